"""An nbdkit that writes down what really reaches it, and one gateway for many servers in turn."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from tests.peers.bench import Bench, Front
from tests.support.gateway import Gateway
from tests.support.peers import Nbdkit, Server

_LINE = re.compile(r" connection=(\d+) (\.\.\.)?([A-Z]\w+) id=(\d+)(.*)")
_CLOSED = re.compile(r"\[(\d+)\] .*closed: .*?(\d+) bytes in, (\d+) out")


@contextlib.contextmanager
def staged(pki: Path, directories: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench for all tests of a module."""
    with contextlib.ExitStack() as stack:
        yield Bench(directories.mktemp("bench"), pki, stack)


class Place:
    """A path that a gateway dials: whatever server stands there at the time."""

    def __init__(self, bench: Bench) -> None:
        self.socket = bench.directory() / "upstream.sock"

    def put(self, server: Server | None) -> None:
        self.socket.unlink(missing_ok=True)
        if server is not None:
            self.socket.symlink_to(server.socket)


class Swap:
    """One gateway for many upstreams: each takes the place of the one before."""

    def __init__(self, bench: Bench, *args: str | Path) -> None:
        self.place = Place(bench)
        self._front = bench.gateway(cast(Server, self.place), *args)

    def front(self, server: Server) -> Front:
        self.place.put(server)
        return Front(self._front.gateway, server, self._front.pki)


class Request(NamedTuple):
    """As it arrived."""

    command: str
    offset: int = 0
    count: int = 0
    fua: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.count


class Event(NamedTuple):
    """A request that begins or ends; `failed` is for its end."""

    connection: int
    number: int
    begins: bool
    request: Request
    failed: bool = False


class Watched:
    """nbdkit with these arguments and its log filter in front of all other filters."""

    def __init__(self, bench: Bench, *args: str | Path) -> None:
        self.bench = bench
        self.path = bench.directory() / "nbdkit.log"
        self.server: Nbdkit = bench.nbdkit("--filter=log", *args, f"logfile={self.path}")

    def gateway(self, *args: str | Path) -> Front:
        return self.bench.gateway(self.server, *args)

    def forget(self) -> None:
        """Of the requests until now."""
        self.path.write_text("")

    def events(self) -> list[Event]:
        """All that has happened, in order."""
        events: list[Event] = []
        begun: dict[tuple[int, int], Request] = {}
        for connection, ends, command, number, rest in _LINE.findall(self.path.read_text()):
            words = dict(word.split("=", 1) for word in rest.split() if "=" in word)
            key = int(connection), int(number)
            if not ends:
                offset, count = (int(words.get(name, "0"), 16) for name in ("offset", "count"))
                begun[key] = Request(command, offset, count, words.get("fua") == "1")
            failed = bool(ends) and words["return"] != "0"
            events.append(Event(*key, not ends, begun[key], failed))
        return events

    def requests(self, *commands: str) -> list[Request]:
        """In the order in which they came; all, or those of some commands."""
        found = [event.request for event in self.events() if event.begins]
        return [one for one in found if not commands or one.command in commands]


def covers(requests: list[Request], offset: int, length: int) -> bool:
    """Whether these are exactly the bytes of a range, each once."""
    at = offset
    for one in sorted(requests, key=lambda one: one.offset):
        if one.offset != at:
            return False
        at = one.end
    return at == offset + length


def traffic(gateway: Gateway, number: int) -> tuple[int, int]:
    """Bytes that a session received from its client and sent to it, once it has ended."""
    match = gateway.wait_log(rf"\[{number}\] .*closed: .*")
    closed = _CLOSED.search(match.group())
    assert closed is not None, match.group()
    return int(closed[2]), int(closed[3])


def peak_memory(gateway: Gateway) -> int:
    """The most memory that the process ever had, in bytes."""
    status = Path(f"/proc/{gateway.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
