"""The log of one connection's requests: what was sent, what was acknowledged, in which order.

In memory, and with a path on disk too, each line written before the next thing happens: whoever is
killed leaves a log that is complete. What it says about durability is what a client may conclude,
and no more: proto.md, "Flag: NBD_CMD_FLUSH" and "NBD_CMD_FLAG_FUA".
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.soak.sectors import ZERO, Mark
from tests.support.rawclient import Cmd, Err

CHANGES = frozenset({Cmd.WRITE, Cmd.WRITE_ZEROES})


@dataclass(slots=True, eq=False)
class Sent:
    """One request. Sectors, not bytes; `at` and `done` count events of its book, 0: not yet."""

    number: int
    cmd: int
    first: int
    count: int
    fua: bool
    at: int
    ns: int  # of the monotonic clock, which all processes share
    done: int = 0
    done_ns: int = 0
    error: int = 0
    durable: bool = False  # an acknowledgement has promised that it outlives its server

    @property
    def ok(self) -> bool:
        return bool(self.done) and not self.error

    @property
    def durably(self) -> bool:
        """It asks for durability: a FLUSH, or FUA."""
        return self.fua or self.cmd == Cmd.FLUSH

    def __str__(self) -> str:
        words = f"{Cmd(self.cmd).name}{' FUA' if self.fua else ''} {self.number}"
        if self.count:
            words += f" (sectors {self.first} to {self.first + self.count - 1})"
        if not self.done:
            return f"{words}, not answered"
        return f"{words}, answered {Err(self.error).name}"


@dataclass(frozen=True, slots=True)
class Loss:
    """The upstream was killed between two events."""

    before: int
    after: int


class Book:
    """One connection's. Requests that are under way at a time never overlap."""

    def __init__(self, writer: int, path: Path | None = None) -> None:
        self.writer = writer
        self.requests: dict[int, Sent] = {}
        self.by_sector: dict[int, list[Sent]] = {}  # those that change it, in order
        self.base: dict[int, Mark] = {}  # what was there before; else zeroes
        self.losses: list[Loss] = []
        self.open: dict[int, Sent] = {}  # not answered
        self._lock = threading.Lock()  # whoever kills is not who writes
        self._events = 0
        self._uncovered: list[Sent] = []  # acknowledged, and no flush has come behind it
        self._dying = 0  # the event before the upstream was killed, while it is not known dead
        self._file = -1
        if path is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o644)
            self._note(f"W {writer}")

    def start_from(self, base: Mapping[int, Mark]) -> Self:
        """What earlier writers have left on the disk."""
        for sector, mark in base.items():
            self._note(f"B {sector} {mark.writer} {mark.number}")
        self.base.update(base)
        return self

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # -- what happens

    def sent(self, cmd: int, first: int = 0, count: int = 0, *, fua: bool = False) -> Sent:
        """To be called before the first byte of it is sent."""
        number = len(self.requests) + 1
        with self._lock:
            return self._sent(number, cmd, first, count, fua, time.monotonic_ns())

    def done(self, request: Sent, error: int) -> None:
        """The answer is here."""
        ns = time.monotonic_ns()
        with self._lock:
            self._done(request, error, ns)

    def dying(self) -> None:
        """To be called before the upstream is killed, and `dead` once it is gone."""
        with self._lock:
            self._dying = self._events
            self._note("K")

    def dead(self) -> None:
        with self._lock:
            self._events += 1  # what is sent from now on is sent to the next one
            self.losses.append(Loss(self._dying, self._events))
            self._note("L")

    def _sent(self, number: int, cmd: int, first: int, count: int, fua: bool, ns: int) -> Sent:
        self._events += 1
        request = Sent(number, cmd, first, count, fua, self._events, ns)
        if cmd in CHANGES:
            for other in self.open.values():
                apart = first >= other.first + other.count or other.first >= first + count
                assert apart or not other.count, f"{request} while {other}"
            for sector in range(first, first + count):
                self.by_sector.setdefault(sector, []).append(request)
        self.requests[number] = self.open[number] = request
        self._note(f"S {number} {int(cmd)} {first} {count} {int(fua)} {ns}")
        return request

    def _done(self, request: Sent, error: int, ns: int) -> None:
        self._events += 1
        request.done, request.error, request.done_ns = self._events, error, ns
        del self.open[request.number]
        if request.durably and error:
            self._uncovered.clear()  # told: what was acknowledged so far may be gone
        elif request.cmd == Cmd.FLUSH:
            for one in self._uncovered:
                one.durable = one.done < request.at
            self._uncovered = [one for one in self._uncovered if not one.durable]
        elif request.cmd in CHANGES and not error:
            request.durable = request.fua
            if not request.fua:
                self._uncovered.append(request)
        self._note(f"D {request.number} {error} {ns}")

    def _note(self, line: str) -> None:
        if self._file >= 0:
            os.write(self._file, f"{line}\n".encode())

    # -- what follows from it

    @property
    def uncovered(self) -> list[Sent]:
        """Acknowledged, and not promised to outlive the upstream."""
        return list(self._uncovered)

    def versions(self, sector: int) -> Iterator[Sent]:
        """The requests that changed this sector, the latest first."""
        return reversed(self.by_sector.get(sector, []))

    def may_hold(self, sector: int, mark: Mark, *, lossy: bool) -> bool:
        """Whether a disk may hold this. `lossy`: it may have lost what was not durable."""
        for request in self.versions(sector):
            if self.mark(request) == mark:
                return True
            if request.durable if lossy else request.ok:
                return False
        return self.base.get(sector, ZERO) == mark

    def mark(self, request: Sent) -> Mark:
        """What is to be found where it has written."""
        return ZERO if request.cmd == Cmd.WRITE_ZEROES else Mark(self.writer, request.number)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The log of somebody who was killed: a last line that is not whole is none."""
        lines = path.read_text().split("\n")[:-1]
        book = cls(int(lines[0].split()[1]))
        for line in lines[1:]:
            kind, *texts = line.split()
            values = [int(text) for text in texts]
            if kind == "B":
                book.base[values[0]] = Mark(values[1], values[2])
            elif kind == "S":
                number, cmd, first, count, fua, ns = values
                book._sent(number, cmd, first, count, bool(fua), ns)
            elif kind == "D":
                book._done(book.requests[values[0]], values[1], values[2])
            elif kind == "K":
                book.dying()
            else:
                assert kind == "L", line
                book.dead()
        return book
