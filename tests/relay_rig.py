"""A relay between a scripted client and a scripted upstream, over real sockets.

`wait_all_tasks_blocked` is the synchronization: the sockets are Unix socket pairs, whose bytes are
there at once, so when all tasks wait, all that can be done has been done.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import relay
from gateway.errors import ChannelClosed, SessionEnd
from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import InFlightLimits, Transmission
from gateway.relay import Relay
from gateway.settings import TLSSettings
from gateway.tls import server_context
from gateway.transport import Channel, look
from gateway.turns import Luck, attention
from tests.support.fake_upstream import (
    DONE,
    data_chunk,
    pattern,
    simple,
)
from tests.support.rawclient import (
    CHUNK,
    CHUNK_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE,
    SIMPLE_MAGIC,
    Cmd,
    Ct,
    Request,
    tls_context,
)

PLENTY = InFlightLimits(requests=1 << 20, payload=1 << 40)
STALL_S = 20.0  # a test that reaches it has found a stall
MIB = 1 << 20
FEATURES = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
)
READ_ONLY = FEATURES | TransmissionFlag.READ_ONLY
DISC = Request(Cmd.DISC, cookie=0).pack()
BOTH_STYLES = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


class Peer:
    """The far end of a channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._inbox = bytearray()

    async def send(self, data: bytes) -> None:
        await self.channel.send_all(data)

    async def take(self, count: int) -> bytes:
        while len(self._inbox) < count:
            data = await self.channel.receive()
            assert data, f"the end, after {len(self._inbox)} of {count} bytes"
            self._inbox += data
        taken = bytes(self._inbox[:count])
        del self._inbox[:count]
        return taken

    def has_nothing(self) -> bool:
        """Whether every byte that came has been taken."""
        view = memoryview(bytearray(1000))
        self._inbox += view[: self.channel.fill(view)]
        return not self._inbox and not self.channel.eof

    async def to_end(self) -> bytes:
        while data := await self.channel.receive():
            self._inbox += data
        return bytes(self._inbox)

    def leave(self) -> None:
        """EOF to the gateway."""
        self.channel.socket.shutdown(socket.SHUT_WR)

    # As an upstream

    async def request(self) -> Request:
        raw = await self.take(REQUEST.size)
        magic, flags, cmd, cookie, offset, length = REQUEST.unpack(raw)
        assert magic == REQUEST_MAGIC
        payload = await self.take(length) if cmd == Cmd.WRITE else b""
        return Request(cmd, offset, length, cookie, flags, payload)

    async def answer(self, request: Request, *, structured: bool = False) -> None:
        data = pattern(request.offset, request.length) if request.cmd == Cmd.READ else b""
        if structured and request.cmd == Cmd.READ:
            await self.send(data_chunk(request.cookie, request.offset, data, flags=DONE))
        else:
            await self.send(simple(request.cookie, 0, data))

    async def answer_all(self, requests: list[Request], *, structured: bool = False) -> None:
        for request in requests:
            await self.answer(request, structured=structured)

    # As a client

    async def ask(self, *requests: Request) -> None:
        await self.send(b"".join(request.pack() for request in requests))

    async def reply(self, requests: list[Request]) -> tuple[int, int]:
        """Cookie and error of the next simple reply; the data of a READ is looked at."""
        magic, error, cookie = SIMPLE.unpack(await self.take(SIMPLE.size))
        assert magic == SIMPLE_MAGIC
        (request,) = (one for one in requests if one.cookie == cookie)
        if request.cmd == Cmd.READ and not error:
            assert await self.take(request.length) == pattern(request.offset, request.length)
        return cookie, error

    async def chunk(self) -> tuple[int, int, int, bytes]:
        """Flags, type, cookie and payload."""
        magic, flags, kind, cookie, length = CHUNK.unpack(await self.take(CHUNK.size))
        assert magic == CHUNK_MAGIC
        return flags, kind, cookie, await self.take(length)

    async def read_reply(self, request: Request, *, structured: bool) -> None:
        """The whole of a reply to a READ that succeeds, in however many chunks."""
        if not structured:
            assert await self.reply([request]) == (request.cookie, 0)
            return
        got, flags = bytearray(), 0
        while not flags & DONE:
            flags, kind, cookie, payload = await self.chunk()
            assert cookie == request.cookie
            if kind == Ct.OFFSET_DATA:
                assert payload[:8] == struct.pack(">Q", request.offset + len(got))
                got += payload[8:]
            else:
                assert kind == Ct.NONE
        assert got == pattern(request.offset, request.length)


class Rig:
    """A relay at work, and both its peers."""

    def __init__(self, client: Channel, upstream: Channel, far: tuple[Channel, Channel]) -> None:
        self.near = client, upstream
        self.client, self.upstream = Peer(far[0]), Peer(far[1])
        self._ended = trio.Event()
        self.end: SessionEnd | None = None
        self.scope = trio.CancelScope()

    async def serve(self, terms: Terms, first: bytes, eager: bool) -> None:
        """As a session does it. `scope` is for those that have to be cut."""
        with self.scope:
            await self._serve(terms, first, eager)

    async def _serve(self, terms: Terms, first: bytes, eager: bool) -> None:
        client, upstream = self.near
        self.relay = Relay(client, upstream, Transmission(terms, limits=PLENTY))
        with contextlib.ExitStack() as stack:
            if eager:
                stack.callback(Eager(self.relay, client, upstream).close)
            try:
                self.end = await self.relay.run(first)
            finally:
                client.shutdown()  # close would be RST where bytes are left: not the point
                try:
                    await self.relay.aclose()
                finally:
                    upstream.shutdown()
                    self._ended.set()

    async def ended(self) -> SessionEnd:
        await self._ended.wait()
        assert self.end is not None
        return self.end

    async def run(self, terms: Terms, first: bytes, *, eager: bool) -> None:
        """Serve, and close everything at the end of the test: the far ends first."""
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(self.serve, terms, first, eager)
                await trio.sleep_forever()
            finally:
                self.client.channel.close()
                self.upstream.channel.close()
                with trio.CancelScope(shield=True):
                    await self._ended.wait()
                for channel in self.near:
                    channel.close()


class Eager:
    """Wakes the request pump for what comes from the upstream, too, and before the other pump.

    That is how a turn meets it: scripted peers are tasks, and do nothing while it looks. To be
    woken in vain is nothing new to a pump: half a TLS record does that.
    """

    def __init__(self, relay: Relay, client: Channel, upstream: Channel) -> None:
        self._relay, self._client, self._upstream = relay, client, upstream
        self._client_readable, self._upstream_readable = client.readable, upstream.readable
        self._second = upstream.socket.dup()  # the reply pump waits for the first
        client.readable = self._either  # type: ignore[method-assign]
        upstream.readable = self._after_the_other  # type: ignore[method-assign]

    def close(self) -> None:
        self._second.close()

    def _takes_replies(self) -> bool:
        relay = self._relay
        free = relay._transmission.mid_reply or relay._replies.free
        return not (relay._replies._unsent or relay._upstream_over) and free

    async def _either(self) -> None:
        if not (self._client._drained and self._takes_replies()):
            await self._client_readable()
            return
        async with trio.open_nursery() as nursery:

            async def also() -> None:
                await trio.lowlevel.wait_readable(self._second)
                nursery.cancel_scope.cancel()

            nursery.start_soon(also)
            await self._client_readable()
            nursery.cancel_scope.cancel()

    async def _after_the_other(self) -> None:
        while True:  # what a turn has taken wakes nobody
            stands_back = self._takes_replies()
            await self._upstream_readable()
            if not stands_back:
                return
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            if any(look(self._upstream, self._upstream, 0.0)):
                return


Lane = Callable[..., Awaitable[Rig]]


@pytest.fixture(params=["two-pumps", "turns"])
async def lane(
    nursery: trio.Nursery,
    pki: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Lane:
    """Sets relays up and starts them. `buffers` is in bytes, `tls` is for the client's side.

    Each of them with two pumps at work, and with every turn taken that can be.
    """
    turns = request.param == "turns"
    monkeypatch.setattr(attention, "undivided", lambda _: turns)
    monkeypatch.setattr(Luck, "worth_it", lambda _: True)
    monkeypatch.setattr(relay, "LOOK_S", 0.0)  # the peers are tasks: nothing comes meanwhile
    monkeypatch.setattr(relay, "TURN_S", STALL_S)  # no turn is cut short

    async def watch() -> None:
        await trio.sleep(STALL_S)
        raise AssertionError("stalled")

    async def lane(
        *,
        structured: bool = False,
        size: int = 1 << 40,
        flags: TransmissionFlag = FEATURES,
        first: bytes = b"",
        buffers: int = 0,
        tls: bool = False,
        terms: Terms | None = None,
    ) -> Rig:
        sockets = (*socket.socketpair(), *socket.socketpair())
        for sock in sockets if buffers else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        client, far_client, upstream, far_upstream = map(Channel, sockets)
        if tls:
            client, far_client = await in_tls(client, far_client, pki)
        rig = Rig(client, upstream, (far_client, far_upstream))
        terms = terms or Terms("", size, flags, structured_replies=structured)
        nursery.start_soon(lambda: rig.run(terms, first, eager=turns))
        await wait_all_tasks_blocked()
        return rig

    if not isinstance(trio.lowlevel.current_clock(), MockClock):
        nursery.start_soon(watch)
    return lane


async def in_tls(near: Channel, far: Channel, pki: Path) -> tuple[Channel, Channel]:
    files = TLSSettings(pki / "server-cert.pem", pki / "server-key.pem", pki / "ca-cert.pem")
    ends: dict[bool, Channel] = {}

    async def start(channel: Channel, context: ssl.SSLContext, *, server_side: bool) -> None:
        ends[server_side] = await channel.start_tls(context, server_side=server_side)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: start(near, server_context(files), server_side=True))
        nursery.start_soon(lambda: start(far, tls_context(pki), server_side=False))
    return ends[True], ends[False]


def reads(count: int, length: int, cookie: int = 1000) -> list[Request]:
    return [Request(Cmd.READ, i * length, length, cookie + i) for i in range(count)]


def write(length: int, cookie: int = 1, offset: int = 0) -> Request:
    payload = random.Random(cookie).randbytes(length)
    return Request(Cmd.WRITE, offset, length, cookie, payload=payload)


def same(request: Request, seen: Request) -> bool:
    """Whether an upstream saw this request; the cookie is the gateway's own."""
    return request._replace(cookie=0) == seen._replace(cookie=0)


def vanish(rig: Rig) -> None:
    """The client's socket is closed: our next write to it fails."""
    rig.client.channel.close()


def die(rig: Rig) -> None:
    """The upstream is gone."""
    rig.upstream.channel.close()


async def quietly(send: Callable[..., Awaitable[None]], data: bytes) -> None:
    """Send what may be cut off at any moment."""
    with contextlib.suppress(trio.ClosedResourceError, ChannelClosed):
        await send(data)
