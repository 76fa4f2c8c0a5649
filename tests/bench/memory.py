"""`python -m tests.bench.memory [CLIENTS]`: what clients can make the gateway hold, of each kind.

One gateway a kind, with so many clients (40 if it is not said; idle ones and handshakes a multiple
of that) at the same time, each as greedy as it can be and none reading its answers. The figures
beside README's formula, which has to be an upper bound. `tests/test_memory_bound.py` looks.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import select
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gateway import certs
from tests.support.fake_upstream import DONE, MIB, FakeUpstream, Link, Script, none_chunk, simple
from tests.support.fake_upstream import status_chunk as status
from tests.support.gateway import ROOT, Gateway
from tests.support.rawclient import (
    Cmd,
    Opt,
    RawClient,
    Request,
    client_hello,
    option,
    tls_context,
)

CLIENTS = 40
HANDSHAKES, IDLE = 5, 2.5  # times as many
SIZE = 1 << 30
QUIET_S = 0.5  # nobody can send any more, for so long: the gateway holds what it can
LONGEST_S = 60.0
SOCKET_BUFFER = 64 << 10  # of clients, so that they keep little of it themselves
CONTEXT = b"base:allocation"


class Formula(NamedTuple):
    """README's, in MiB. `program` is for one process."""

    program: float
    handshake: float
    client: float
    kept: float  # buffers for the next, a worker
    counts: float


def formula() -> Formula:
    """As README has it."""
    text = (ROOT / "README.md").read_text().partition("**Memory of the whole process**")[2]
    block = text.split("```")[1]
    found = re.fullmatch(
        r"\s*workers \+ 1 \(1 alone\) +x +([\d.]+) MiB .*\n"
        r"\+ handshakes +x +([\d.]+) MiB .*\n"
        r"\+ max-connections +x \(([\d.]+) MiB \+ joined \+ status \+ journal\) .*\n"
        r"\+ 16 +x +([\d.]+) MiB  a worker .*\n"
        r"\+ ([\d.]+) MiB .*\n",
        block,
    )
    assert found, f"README's formula is not what this knows:\n{block}"
    program, handshake, client, one, counts = map(float, found.groups())
    return Formula(program, handshake, client, 16 * one, counts)


# ---------------------------------------------------------------- servers behind


class Waiting(Script):
    """Until a test is over."""

    size = SIZE
    over = threading.Event()


class Deaf(Waiting):
    """Takes nothing in transmission."""

    def transmit(self, link: Link) -> None:
        self.over.wait(LONGEST_S)


class Mute(Waiting):
    """Takes all, and answers nothing."""

    def requested(self, link: Link, request: Request) -> None:
        link.requests.clear()


class Zeroes(Waiting):
    """Answers in order, and so takes no more when nobody takes the answers."""

    def read(self, link: Link, request: Request) -> None:
        link.requests.clear()
        if link.structured:
            head = struct.pack(
                ">IHHQIQ", 0x668E33EF, DONE, 1, request.cookie, request.length + 8, request.offset
            )
            link.send(head + bytes(request.length))
        else:
            link.send(simple(request.cookie, 0, bytes(request.length)))


class Talkative(Waiting):
    """A million extents in one message, the most that is passed on."""

    def block_status(self, link: Link, request: Request) -> None:
        (context,) = link.contexts
        extents = list(itertools.islice(itertools.cycle([(512, 0), (512, 3)]), 1 << 20))
        link.send(status(request.cookie, context, extents))
        link.send(none_chunk(request.cookie))


# ---------------------------------------------------------------- clients in front


def half_hello(client: RawClient, pki: Path) -> None:
    client.greet()
    client.ask(Opt.STARTTLS)
    client.send(client_hello(tls_context(pki))[:-1])


def half_option(client: RawClient, pki: Path) -> None:
    client.greet()
    client.start_tls(tls_context(pki))
    client.send(option(Opt.LIST_META_CONTEXT, bytes((64 << 10) - 1))[:-1])


def opened(client: RawClient, pki: Path) -> None:
    client.greet()
    client.start_tls(tls_context(pki))
    client.go()


def opened_structured(client: RawClient, pki: Path) -> None:
    client.greet()
    client.start_tls(tls_context(pki))
    client.ask_structured()
    client.set_contexts([CONTEXT])
    client.go()


def nothing() -> Iterator[bytes]:
    return iter(())


def reads() -> Iterator[bytes]:
    for cookie in itertools.count():
        yield Request(Cmd.READ, 0, 64 << 10, cookie).pack()


def writes() -> Iterator[bytes]:
    part = bytes(16 << 10)
    for cookie in itertools.count():
        yield Request(Cmd.WRITE, 0, 2 * MIB, cookie).pack()
        yield from itertools.repeat(part, 2 * MIB // len(part))


def reads_and_writes() -> Iterator[bytes]:
    """A row of answers that nobody takes, and behind it data that nobody takes."""
    for cookie in range(1000):
        yield Request(Cmd.READ, 0, 24 << 10, cookie).pack()
    yield from writes()


def flushes() -> Iterator[bytes]:
    for cookie in itertools.count():
        yield Request(Cmd.FLUSH, 0, 0, cookie).pack()


def nonsense() -> Iterator[bytes]:
    """Refused by the gateway itself, in words."""
    for cookie in itertools.count():
        yield Request(99, 0, 512, cookie).pack()


def statuses() -> Iterator[bytes]:
    for cookie in itertools.count():
        yield Request(Cmd.BLOCK_STATUS, 0, SIZE, cookie).pack()


class Kind(NamedTuple):
    name: str
    enter: Callable[[RawClient, Path], None]
    flood: Callable[[], Iterator[bytes]] = nothing
    script: Callable[[], Script] = Waiting
    times: float = 1
    more_mib: float = 0.0  # that README allows such a client beside
    handshake: bool = False


KINDS = (
    Kind("handshake: half a ClientHello", half_hello, times=HANDSHAKES, handshake=True),
    Kind("handshake: half an option of 64 KiB", half_option, times=HANDSHAKES, handshake=True),
    Kind("idle", opened, times=IDLE),
    Kind("reads, nobody takes the answers", opened, reads, Zeroes),
    Kind("the same in chunks", opened_structured, reads, Zeroes),
    Kind("the same, made into chunks here", opened_structured, reads,
         lambda: Zeroes(structured=False, contexts=())),
    Kind("writes, the server takes nothing", opened, writes, Deaf),
    Kind("reads and writes, nobody takes anything", opened_structured, reads_and_writes, Zeroes),
    Kind("1024 requests, no answer", opened, flushes, Mute),
    Kind("refused requests, nobody takes the answers", opened_structured, nonsense),
    Kind("block status of a million extents", opened_structured, statuses, Talkative, more_mib=8.0),
)  # fmt: skip


# ---------------------------------------------------------------- the measurement


class Figures(NamedTuple):
    """In MiB, of the gateway: alone, after its first client; then with so many of them."""

    clients: int
    alone: float
    resident: float
    peak: float
    proportional: float
    allowed: float

    @property
    def each_kib(self) -> float:
        return (self.peak - self.alone) / self.clients * 1024


class Flood:
    """What a client has to say, as far as the gateway takes it. Never waits."""

    def __init__(self, client: RawClient, words: Iterable[bytes]) -> None:
        self._client, self._words = client, iter(words)
        self._left = b""

    def go_on(self) -> bool:
        """Whether anything was taken."""
        taken = False
        with contextlib.suppress(BlockingIOError):
            while True:
                if not self._left:
                    said = bytearray()
                    while len(said) < SOCKET_BUFFER and (word := next(self._words, b"")):
                        said += word
                    if not said:
                        break
                    self._left = self._client.seal(bytes(said))
                self._left = self._left[self._client.sock.send(self._left) :]
                taken = True
        return taken


def measure(kind: Kind, count: int, pki: Path, folder: Path, *, rounds: int = 1) -> Figures:
    """So many clients of this kind, in front of a gateway of their own; or several rounds of them,
    one after the other: of that the last."""
    sizes, most = formula(), count + 1
    options = ["--tls-dir", str(pki), "--listen", "127.0.0.1:0", "--log-level", "warning"]
    options += ["--max-connections", str(most), "--handshake-timeout", "600"]
    for limit in ("handshake-rate=0", "clients-per-identity=0", f"handshakes={most}"):
        options += ["--limit", limit]
    Waiting.over.clear()
    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(FakeUpstream(folder / "up"))
        stack.callback(Waiting.over.set)
        gateway = stack.enter_context(Gateway(*options, "--socket", fake.path))
        with RawClient(gateway.uri) as first:
            opened(first, pki)
            first.send(Request(Cmd.DISC).pack())
            first.recv_to_end()
        alone = memory(gateway.pid)["VmRSS"]
        for _ in range(rounds):
            fake.script = kind.script()
            seen = hold(gateway, kind, count, pki)
            fake.reset()
            Waiting.over.clear()
    each = sizes.handshake if kind.handshake else sizes.client + kind.more_mib
    allowed = sizes.program + sizes.kept + sizes.counts + count * each
    return Figures(count, alone, seen["VmRSS"], seen["VmHWM"], seen["Pss"], allowed)


def hold(gateway: Gateway, kind: Kind, count: int, pki: Path) -> dict[str, float]:
    """The memory while they are there. They are gone in the end."""
    clients = []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(RawClient(gateway.uri))
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                client.sock.setsockopt(socket.SOL_SOCKET, buffer, SOCKET_BUFFER)
            kind.enter(client, pki)
            client.sock.setblocking(False)
            clients.append(client)
        send_all_there_is([Flood(client, kind.flood()) for client in clients], clients)
        seen = memory(gateway.pid)
        for client in clients:
            client.reset()
        Waiting.over.set()
    return seen


def send_all_there_is(floods: list[Flood], clients: list[RawClient]) -> None:
    """Until the gateway takes nothing more of anybody."""
    end = time.monotonic() + LONGEST_S / 2
    quiet_from = time.monotonic()
    while time.monotonic() - quiet_from < QUIET_S:
        assert time.monotonic() < end, "there is no end of what the gateway takes"
        if any([flood.go_on() for flood in floods]):
            quiet_from = time.monotonic()
        select.select([], [], [], 0.01)
    assert not any(client.sock.fileno() < 0 for client in clients)


def memory(pid: int) -> dict[str, float]:
    """MiB of it."""
    text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.findall(r"^(VmRSS|VmHWM|Pss):\s+(\d+) kB", text, re.M)
    return {name: int(kib) / 1024 for name, kib in found}


def main() -> None:
    try:
        (clients,) = [int(text) for text in sys.argv[1:]] or [CLIENTS]
    except ValueError:
        sys.exit(__doc__)
    print("| clients | each is | RSS | peak | Pss | a client, of the peak | by README at most |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            certs.init(here / "tls")
            got = measure(kind, round(clients * kind.times), here / "tls", here)
        print(
            f"| {got.clients} | {kind.name} | {got.resident:.0f} MiB | {got.peak:.0f} MiB "
            f"| {got.proportional:.0f} MiB | {got.each_kib:.0f} KiB | {got.allowed:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
