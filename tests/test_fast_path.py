"""With no upgrade in play, the payload of a request is neither copied nor allocated.

Counted, not timed: what is allocated at any one time while requests go through is a few small
objects, however long their payload, and nothing of it is left behind them. The same counters are
tried on a machine that copies what it passes on, and have to notice.
"""

from __future__ import annotations

import gc
import struct
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
import trio

from gateway.buffers import BUFFER_SIZE
from gateway.nbd.constants import Cmd, CmdFlag, TransmissionFlag
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import Piece, Transmission
from gateway.transport import RECORD, Channel
from tests import relay_rig
from tests.nbd.masked import frames
from tests.nbd.masked.frames import Ask, Style
from tests.relay_rig import FEATURES, Lane

lane = relay_rig.lane  # the fixture

KIB, MIB = 1 << 10, 1 << 20
SMALL = 4 * KIB  # what one request in flight may take
KEPT = 8 * KIB  # caches and the like, however many requests there were
# The relay may put the end of a reply and what comes behind it together, up to two TLS records. The
# rest is for its tasks, and for those at both far ends.
JOINED = 2 * RECORD + 16 * KIB
REQUESTS = 40  # for each figure
LENGTHS = [4 * KIB, 100 * KIB, 3 * MIB]
PAYLOAD = memoryview(b"\xa5payload" * (BUFFER_SIZE // 8))


class Figures(NamedTuple):
    """`peak` and `kept` in bytes, `blocks` in objects that are left."""

    peak: int
    kept: int
    blocks: int

    def lean(self, limit: int) -> bool:
        return self.peak <= limit and self.kept <= KEPT and self.blocks <= 100


class Counter:
    """Use as a context, after a first request has warmed everything up."""

    def __enter__(self) -> Counter:
        gc.collect()
        gc.disable()
        self._blocks = sys.getallocatedblocks()
        tracemalloc.start()
        self.figures = Figures(0, 0, 0)
        return self

    def __exit__(self, *exc: object) -> None:
        _, peak = tracemalloc.get_traced_memory()
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        blocks = sys.getallocatedblocks() - self._blocks
        gc.enable()
        self.figures = Figures(peak, kept, blocks)


class Copying(Transmission):
    """Passes on copies."""

    def requests(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        stop, pieces = super().requests(buffer, at, end)
        return stop, [_copy(buffer, one) for one in pieces]

    def replies(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        stop, pieces = super().replies(buffer, at, end)
        return stop, [_copy(buffer, one) for one in pieces]


class Hoarding(Transmission):
    """Keeps a little of each request."""

    def __init__(self, terms: Terms, **how: Any) -> None:
        super().__init__(terms, **how)
        self.hoard: list[bytes] = []

    def requests(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        stop, pieces = super().requests(buffer, at, end)
        self.hoard.append(bytes(buffer[at : at + KIB]))
        return stop, pieces


def _copy(buffer: bytearray, piece: Piece) -> Piece:
    return bytes(buffer[piece[0] : piece[1]]) if isinstance(piece, tuple) else piece


def _terms(style: Style) -> Terms:
    return Terms(
        "",
        1 << 40,
        FEATURES | TransmissionFlag.SEND_DF if style is not Style.SIMPLE else FEATURES,
        structured_replies=style is Style.STRUCTURED,
        extended_headers=style is Style.EXTENDED,
    )


def _ask(style: Style, kind: int, length: int, cookie: int = 7) -> bytes:
    """A request's header."""
    extended = style is Style.EXTENDED
    flags = CmdFlag.PAYLOAD_LEN if extended and kind == Cmd.WRITE else 0
    return Ask(kind, 0, length, int(flags), cookie=cookie).pack(extended=extended)


def _reply(style: Style, kind: int, length: int, cookie: int) -> bytes:
    """What stands before the data of a READ, or the whole reply to another command."""
    ask = Ask(kind, 0, length, cookie=cookie)
    if style is Style.SIMPLE or (style is Style.STRUCTURED and kind != Cmd.READ):
        return frames.simple(cookie)
    if kind != Cmd.READ:
        return frames.chunk(style, ask, 0, done=True)
    head = frames.chunk(style, ask, 1, bytes(8), done=True)
    count = struct.pack(">Q" if style is Style.EXTENDED else ">I", 8 + length)
    return head[: -8 - len(count)] + count + bytes(8)


# A test that takes every turn needs tasks of its own to be woken for it, which are counted too.
TWO_PUMPS = pytest.mark.parametrize("lane", ["two-pumps"], indirect=True)
STYLES = pytest.mark.parametrize("style", Style)
KINDS = pytest.mark.parametrize("kind", [Cmd.READ, Cmd.WRITE], ids=["read", "write"])


# ---------------------------------------------------------------- the machine


class Bench:
    """One machine, and one buffer, as a pump has it."""

    def __init__(self, make: Callable[[Terms], Transmission], style: Style) -> None:
        self.machine = make(_terms(style))
        self.style = style
        self.buffer = bytearray(BUFFER_SIZE)
        self.cookie = 0  # of the upstream's next request

    def request(self, kind: int, length: int) -> None:
        """One request, and its answer."""
        header = _ask(self.style, kind, length)
        self._pass(self.machine.requests, header, length if kind == Cmd.WRITE else 0)
        self.cookie += 1
        header = _reply(self.style, kind, length, self.cookie)
        self._pass(self.machine.replies, header, length if kind == Cmd.READ else 0)
        assert self.machine.idle
        assert self.machine.upstream_fault is self.machine.client_fault is None

    def _pass(
        self, walk: Callable[[bytearray, int, int], tuple[int, list[Piece]]], head: bytes, more: int
    ) -> None:
        """`head`, and so much payload behind it, buffer by buffer."""
        passed, left = 0, len(head) + more
        with memoryview(self.buffer) as view:
            start = len(head)
            view[:start] = head
            while left:
                end = min(left, len(view))
                view[start:end] = PAYLOAD[start:end]
                stop, pieces = walk(self.buffer, 0, end)
                assert stop == end
                for piece in pieces:
                    passed += piece[1] - piece[0] if isinstance(piece, tuple) else len(piece)
                left, start = left - end, 0
        assert passed >= len(head) + more

    def figures(self, kind: int, length: int) -> Figures:
        self.request(kind, length)
        with Counter() as counter:
            for _ in range(REQUESTS):
                self.request(kind, length)
        return counter.figures


@STYLES
@KINDS
def test_machine_passes_payload_on_in_place(style: Style, kind: int) -> None:
    found = [Bench(Transmission, style).figures(kind, length) for length in LENGTHS]
    assert all(one.lean(SMALL) for one in found), found
    peaks = [one.peak for one in found]
    assert max(peaks) - min(peaks) <= KIB, "it does not depend on how long the payload is"


@STYLES
@KINDS
def test_machine_names_nothing_but_spans_of_the_buffer(style: Style, kind: int) -> None:
    """But for the end of a reply in chunks, when its data is longer than the buffer."""
    made: list[bytes] = []

    class Seen(Transmission):
        def requests(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
            stop, pieces = super().requests(buffer, at, end)
            made.extend(one for one in pieces if not isinstance(one, tuple))
            return stop, pieces

        def replies(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
            stop, pieces = super().replies(buffer, at, end)
            made.extend(one for one in pieces if not isinstance(one, tuple))
            return stop, pieces

    for length in LENGTHS:
        bench = Bench(Seen, style)
        for _ in range(3):
            bench.request(kind, length)
        ends = kind == Cmd.READ and style is not Style.SIMPLE and length > BUFFER_SIZE
        assert len(made) == 3 * ends
        assert all(len(one) <= 32 for one in made)
        made.clear()


@STYLES
@KINDS
@pytest.mark.parametrize("make", [Copying, Hoarding])
def test_counter_notices_a_machine_that_does_not(
    style: Style, kind: int, make: type[Transmission]
) -> None:
    assert not Bench(make, style).figures(kind, LENGTHS[-1]).lean(JOINED)


# ---------------------------------------------------------------- the relay


class Far:
    """The far end of a channel. Allocates nothing by the byte itself."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._scratch = memoryview(bytearray(BUFFER_SIZE))

    async def send(self, head: bytes, more: int) -> None:
        await self._channel.send_all(head)
        while more:
            count = min(more, len(PAYLOAD))
            await self._channel.send_all(PAYLOAD[:count])
            more -= count

    async def take(self, count: int) -> memoryview:
        """So many bytes; what is returned is of use if they fit into the scratch."""
        left = count
        while left:
            start = count - left if count <= len(self._scratch) else 0
            room = self._scratch[start : start + min(left, len(self._scratch))]
            left -= self._channel.fill(room, probe=False)
            if left:
                await self._channel.readable()
        return self._scratch[:count]


class Pair:
    """Client and upstream of one relay."""

    def __init__(self, rig: relay_rig.Rig, style: Style) -> None:
        self.client, self.upstream = Far(rig.client.channel), Far(rig.upstream.channel)
        self.style = style

    async def request(self, kind: int, length: int) -> None:
        """One request, and its answer. Both ends are at work at the same time."""
        style = self.style
        header = _ask(style, kind, length)
        with_request = length if kind == Cmd.WRITE else 0
        with_reply = length if kind == Cmd.READ else 0

        async def client() -> None:
            await self.client.send(header, with_request)

        async def upstream() -> None:
            (cookie,) = struct.unpack_from(">Q", await self.upstream.take(len(header)), 8)
            await self.upstream.take(with_request)
            await self.upstream.send(_reply(style, kind, length, cookie), with_reply)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            nursery.start_soon(upstream)
            head = await self.client.take(len(_reply(style, kind, length, 0)))
            done = style is Style.SIMPLE or kind != Cmd.READ or head[5] & frames.DONE
            await self.client.take(with_reply)
            if not done:  # that is said apart, behind data that had not come yet
                await self.client.take(32 if style is Style.EXTENDED else 20)

    async def figures(self, kind: int, length: int) -> Figures:
        for _ in range(3):
            await self.request(kind, length)
        with Counter() as counter:
            for _ in range(REQUESTS // 4):
                await self.request(kind, length)
        return counter.figures


@pytest.fixture
async def pair(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Awaitable[tuple[Pair, relay_rig.Rig]]]:
    async def pair(
        style: Style, *, tls: bool = False, make: type[Transmission] = Transmission
    ) -> tuple[Pair, relay_rig.Rig]:
        monkeypatch.setattr(relay_rig, "Transmission", make)
        rig = await lane(terms=_terms(style), tls=tls)
        return Pair(rig, style), rig

    return pair


@TWO_PUMPS
@STYLES
@KINDS
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_relay_allocates_no_payload(
    pair: Callable[..., Awaitable[tuple[Pair, relay_rig.Rig]]], style: Style, kind: int, tls: bool
) -> None:
    ends, _ = await pair(style, tls=tls)
    found = [await ends.figures(kind, length) for length in LENGTHS]
    assert all(one.lean(JOINED) for one in found), found


@TWO_PUMPS
@STYLES
@KINDS
@pytest.mark.parametrize("make", [Copying, Hoarding])
async def test_counter_notices_a_relay_that_does(
    pair: Callable[..., Awaitable[tuple[Pair, relay_rig.Rig]]],
    style: Style,
    kind: int,
    make: type[Transmission],
) -> None:
    ends, _ = await pair(style, make=make)
    assert not (await ends.figures(kind, LENGTHS[-1])).lean(JOINED)


class Sends:
    """What a channel is given to send: how many bytes of it are not in a borrowed buffer?"""

    def __init__(self, channel: Channel) -> None:
        self.in_place = self.elsewhere = 0
        self._send_now = channel.send_now  # which `send_all` calls
        channel.send_now = self._counted  # type: ignore[method-assign]

    def _counted(self, data: bytes | bytearray | memoryview) -> int:
        sent = self._send_now(data)
        whole = data.obj if isinstance(data, memoryview) else data
        if isinstance(whole, bytearray) and len(whole) == BUFFER_SIZE:
            self.in_place += sent
        else:
            self.elsewhere += sent
        return sent


@TWO_PUMPS
@STYLES
@KINDS
@pytest.mark.parametrize("make", [Transmission, Copying])
async def test_what_is_sent_is_what_was_received(
    pair: Callable[..., Awaitable[tuple[Pair, relay_rig.Rig]]],
    style: Style,
    kind: int,
    make: type[Transmission],
) -> None:
    """The same bytes of memory: in a borrowed buffer, but for the end of a reply in chunks."""
    ends, rig = await pair(style, make=make)
    sends = Sends(rig.near[0] if kind == Cmd.READ else rig.near[1])
    length = LENGTHS[-1]
    for _ in range(5):
        await ends.request(kind, length)
    assert sends.in_place + sends.elsewhere >= 5 * length
    if make is Transmission:
        assert sends.elsewhere <= 5 * (2 * RECORD + 32)
    else:
        assert sends.in_place == 0
