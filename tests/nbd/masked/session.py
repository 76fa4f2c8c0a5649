"""Whole transmission phases: a random client, a masked upstream, and between them a line.

The line is the gateway's machine, driven as a relay has to, or a plain wire to try the tools on.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.nbd.constants import Cmd, Error
from gateway.nbd.transmission import Transmission
from tests.nbd.masked import frames
from tests.nbd.masked.book import Book, Entry
from tests.nbd.masked.eyes import Eyes
from tests.nbd.masked.frames import Ask, Style
from tests.nbd.masked.setups import Setup
from tests.nbd.masked.upstream import NO_FAULTS, Faults, MaskedUpstream, Op
from tests.nbd.walker import joined_pieces

FIRST_COOKIE = 1 << 60  # of the client: far from ours
UNDER_WAY = 16  # parts of one request that the gateway makes of its own accord, at most


def examples(usual: int) -> int:
    """How many examples a test tries; NBD_GATEWAY_EXAMPLES in the environment says otherwise."""
    return int(os.environ.get("NBD_GATEWAY_EXAMPLES", usual))


class Line(Protocol):
    """Between client and upstream. What it returns is for the upstream, or for the client."""

    def from_client(self, piece: bytes) -> bytes: ...
    def from_upstream(self, piece: bytes) -> bytes: ...
    def follow_up(self) -> bytes: ...
    def speak(self) -> bytes: ...

    @property
    def upstream_ends(self) -> bool: ...


class Wire:
    """No gateway at all."""

    upstream_ends = False

    def from_client(self, piece: bytes) -> bytes:
        return piece

    def from_upstream(self, piece: bytes) -> bytes:
        return piece

    def follow_up(self) -> bytes:
        return b""

    speak = follow_up


class Gateway:
    """The machine, and what a relay has to keep for it: unfinished messages and local replies."""

    def __init__(self, setup: Setup) -> None:
        self.machine = Transmission(setup.terms)
        self.may_fail = False  # the client
        self._from_client = b""
        self._from_upstream = b""
        self._local = b""

    def from_client(self, piece: bytes) -> bytes:
        machine = self.machine
        buffer = bytearray(self._from_client + piece)
        stop, pieces = machine.requests(buffer, 0, len(buffer))
        assert self.may_fail or machine.client_fault is None, machine.client_fault.what
        sent = joined_pieces(buffer, pieces, 0, stop)
        self._from_client = bytes(buffer[stop:])
        self._local += machine.take_local_replies()
        return sent

    def from_upstream(self, piece: bytes) -> bytes:
        machine = self.machine
        buffer = bytearray(self._from_upstream + piece)
        stop, pieces = machine.replies(buffer, 0, len(buffer))
        sent = joined_pieces(buffer, pieces, 0, stop)
        self._from_upstream = bytes(buffer[stop:])
        assert machine.upstream_fault is None, machine.upstream_fault.what
        return sent

    def follow_up(self) -> bytes:
        """The next batch, if one may go now."""
        machine = self.machine
        if machine.mid_request or not machine.follow_ups_due:
            return b""
        return b"".join(machine.take_follow_ups())

    def speak(self) -> bytes:
        """Local replies, if they may go now."""
        if self.machine.mid_reply:
            return b""
        said, self._local = self._local, b""
        return said

    @property
    def upstream_ends(self) -> bool:
        return self.machine.upstream_ends


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client behaves, and how the bytes arrive."""

    window: int = 8  # requests that it lets be in flight
    careful: bool = False  # never two in flight that overlap, if one of them writes
    pieces: tuple[int, ...] = (1, 10, 28, 40, 300, 600, 5000)


class Session:
    """`run`, and any event, and then `drain` and `check`."""

    def __init__(
        self,
        setup: Setup,
        asks: list[Ask],
        rng: random.Random,
        *,
        line: Line | None = None,
        manner: Manner = Manner(),
        faults: Faults = NO_FAULTS,
        disk: bytes | None = None,
        upstream: Callable[..., MaskedUpstream] = MaskedUpstream,
    ) -> None:
        self.line = line or Gateway(setup)
        self.rng = rng
        self.setup = setup
        self._manner = manner
        self._extended = setup.above is Style.EXTENDED
        initial = first_disk(setup.mask.size, rng) if disk is None else disk
        self.book = Book(setup, initial)
        self.upstream = upstream(setup, rng, faults, disk=initial, heard=self._heard)
        terms = setup.terms
        self.eyes = Eyes(
            setup.above,
            max_payload=terms.block_sizes.maximum,
            ids=frozenset(one.id for one in terms.contexts),
        )
        self._asks = [one._replace(cookie=FIRST_COOKIE + n) for n, one in enumerate(asks)][::-1]
        self._sending = b""  # the rest of a request that has begun
        self._judge_at = 0  # how much of `_sending` is left when the gateway can judge it
        self._entry: Entry | None = None
        self._on_its_way = b""  # from the upstream
        self.lost = False
        self.cut_short = False  # the client could not be told that the upstream is lost

    # -- events

    def run(self, steps: int) -> None:
        """So many times, some bytes arrive somewhere, or the upstream does something."""
        rng, pieces = self.rng, self._manner.pieces
        for _ in range(steps):
            match rng.randrange(9):
                case 0 | 1:
                    self.send(rng.choice(pieces))
                case 2 | 3:
                    self.return_(rng.choice(pieces))
                case 4 | 5 | 6:
                    self.answer(1)
                case 7:
                    self.upstream.work()
                case 8:
                    self._turn()

    def drain(self) -> None:
        """Everything that can happen happens."""
        while True:
            before = self._state()
            self.send(1 << 20)
            self._turn()
            self.answer(1)
            self.return_(len(self._on_its_way))
            if before == self._state():
                break

    def settle(self) -> None:
        """All that is asked for so far is answered, if the client sends no more."""
        while self.answer(1):
            self.return_(len(self._on_its_way))
            self._turn()

    def _state(self) -> tuple[int, ...]:
        said = sum(len(one.said) for one in self.upstream.ops)
        ended = len(self.book.entries) - len(self.book.unanswered)
        on_its_way = len(self._on_its_way)
        return said, ended, on_its_way, len(self._asks), len(self._sending), len(self.upstream.ops)

    def shutdown(self) -> None:
        """The gateway is told to end."""
        assert isinstance(self.line, Gateway)
        self.line.machine.shutdown()
        self.book.refusing = True

    def lose_upstream(self) -> None:
        """It is gone, whatever it was saying."""
        assert isinstance(self.line, Gateway)
        self.lost = self.book.lost = self.book.refusing = True
        words = self.line.machine.lose_upstream()
        if words is None:
            self.cut_short = True
            return
        for one in words:
            self._to_client(bytes(one))
        assert list(self.line.machine.lose_upstream() or ()) == []

    def check(self) -> None:
        """At the end, when everything has arrived."""
        assert not self.eyes.mid_message
        assert not self.upstream.mid_request or self.lost
        assert not self.book.unanswered, self.book.unanswered
        assert not self._asks
        self.book.check_disk(self.upstream.disk)
        if isinstance(self.line, Gateway):
            machine = self.line.machine
            assert machine.idle
            assert not any((machine.mid_payload, machine.mid_request, machine.mid_reply))
            assert not machine.follow_ups_due
            assert not machine.in_flight

    def check_cut_short(self) -> None:
        """The client could not be told: only the data of a simple reply is a reason."""
        assert self.setup.above is Style.SIMPLE
        assert self.eyes.mid_message

    # -- the client's side

    @property
    def to_send(self) -> int:
        """How many bytes the client has still to send."""
        return len(self._sending) + sum(
            len(one.pack(extended=self._extended)) for one in self._asks
        )

    def send(self, count: int) -> None:
        """So many bytes of the client arrive."""
        piece = b""
        while count > 0 and not self.cut_short and self._next():
            entry, taken = self._entry, self._sending[:count]
            assert entry is not None
            piece += taken
            self._sending = self._sending[len(taken) :]
            count -= len(taken)
            if len(self._sending) <= self._judge_at:
                self.book.judged(entry)
        if not piece:
            return
        sent = self.line.from_client(piece)
        assert not (sent and self.lost), "sent to an upstream that is gone"
        if sent and self.line.upstream_ends:
            assert self.upstream.mid_request, "one more request for an upstream that ends"
        self.upstream.hear(sent)
        if self.rng.random() < 0.8:
            self._turn()

    def _next(self) -> bool:
        """Make sure that there is a request under way, if there may be."""
        if self._sending:
            return True
        if not self._asks:
            return False
        ask, in_flight = self._asks[-1], self.book.unanswered
        if len(in_flight) >= self._manner.window:
            return False
        if self._manner.careful and any(_conflict(ask, one.ask) for one in in_flight):
            return False
        self._asks.pop()
        self._entry = self.book.begin(ask)
        self.eyes.expect(ask)
        self._sending = ask.pack(extended=self._extended)
        self._judge_at = 0 if ask.is_filter else len(ask.payload)
        return True

    def _to_client(self, raw: bytes) -> None:
        for outcome in self.eyes.feed(raw):
            self.book.finished(outcome)

    def end_with(self, raw: bytes) -> None:
        """At the end of its request the client says this, and another one. Neither is passed on."""
        self.send(len(self._sending))
        self._asks.clear()
        behind = Ask(Cmd.FLUSH, cookie=99).pack(extended=self._extended)
        assert not self.line.from_client(raw + behind)

    # -- the upstream's side

    def answer(self, messages: int) -> int:
        """The upstream says so much, if it has something to say. Returns how many bytes of it are
        on their way."""
        while messages and self.upstream.waiting and not self.lost:
            self._on_its_way += self.upstream.speak()
            messages -= 1
        return len(self._on_its_way)

    def return_(self, count: int) -> None:
        """So many bytes of the upstream arrive."""
        piece, self._on_its_way = self._on_its_way[:count], self._on_its_way[count:]
        if not piece or self.lost:
            return
        sent = self.line.from_upstream(piece)
        if self.line.upstream_ends:
            self.book.ending = self.book.refusing = True
        self._to_client(sent)
        if self.rng.random() < 0.8:
            self._turn()

    def _heard(self, op: Op) -> None:
        self.book.heard(op)
        for entry in self.book.unanswered:
            if entry.certain and entry.planned and entry.ask.kind != Cmd.WRITE:
                parts = [one for one in entry.ops if one.answered is None]
                assert len(parts) <= UNDER_WAY, "too many parts under way"

    def _turn(self) -> None:
        """Of a relay's other tasks."""
        while not self.lost and (batch := self.line.follow_up()):
            assert not self.line.upstream_ends, "more requests for an upstream that ends"
            self.upstream.hear(batch)
            assert not self.upstream.mid_request, "follow-ups are whole requests"
            if self.rng.random() < 0.3:
                break
        self._to_client(self.line.speak())


def _conflict(one: Ask, other: Ask) -> bool:
    if frames.WRITES.isdisjoint((one.kind, other.kind)):
        return False
    return one.offset < other.stop and other.offset < one.stop


def first_disk(size: int, rng: random.Random) -> bytes:
    """Data and zeroes in turns, of many lengths, at many places."""
    disk = bytearray()
    while len(disk) < size:
        length = rng.choice([1, 511, 512, 1024, 4096, 4096, 9000])
        disk += bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    return bytes(disk[:size])


ERROR_VALUES = [int(one) for one in Error if one != Error.ESHUTDOWN]
