"""Two ends of one connection, plain or inside TLS."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from gateway.errors import ChannelClosed
from gateway.settings import TLSSettings
from gateway.tls import server_context
from gateway.transport import Channel, TLSChannel
from tests.support.rawclient import tls_context

STALL_S = 10.0  # a test that reaches it has found a stall
MIB = 1 << 20
KINDS = ("plain", "TLS1.2", "TLS1.3")
ONLY_TLS = pytest.mark.parametrize("kind", KINDS[1:])
PROBE = pytest.mark.parametrize("probe", [True, False], ids=["probe", "no probe"])


@pytest.fixture(scope="module")
def ours(pki: Path) -> ssl.SSLContext:
    files = TLSSettings(pki / "server-cert.pem", pki / "server-key.pem", pki / "ca-cert.pem")
    return server_context(files)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Tests that are for one kind only override this with a parameter of their own."""
    return str(request.param)


@dataclass
class Pair:
    """Two ends of one connection. `near` is the gateway's, and the server of TLS."""

    near: Channel
    far: Channel

    async def start_tls(self, ours: ssl.SSLContext, theirs: ssl.SSLContext) -> None:
        async def near() -> None:
            self.near = await self.near.start_tls(ours)

        async def far() -> None:
            self.far = await self.far.start_tls(theirs, server_side=False)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(near)
            nursery.start_soon(far)


Connect = Callable[..., Awaitable[Pair]]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    return near, far


@pytest.fixture
async def connect(kind: str, ours: ssl.SSLContext, pki: Path) -> AsyncIterator[Connect]:
    """Makes pairs. `tcp` is for what Unix sockets do not have: RST. `buffers` is in bytes."""
    pairs = []

    async def connect(*, tcp: bool = False, buffers: int = 0, tls: bool = True) -> Pair:
        sockets = tcp_pair() if tcp else socket.socketpair()
        for sock in sockets if buffers else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        near, far = sockets
        pairs.append(pair := Pair(Channel(near), Channel(far)))
        if kind != "plain" and tls:
            await pair.start_tls(ours, tls_context(pki, only_1_2=kind == "TLS1.2"))
            assert isinstance(pair.near, TLSChannel)
            assert pair.near.tls.version() == kind.replace("TLS", "TLSv")
        return pair

    yield connect
    for pair in pairs:
        pair.near.close()
        pair.far.close()


def reset(channel: Channel) -> None:
    """Close with RST."""
    channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    channel.close()


async def read(channel: Channel, count: int, sizes: Iterator[int], *, probe: bool = True) -> bytes:
    """Exactly `count` bytes, by `fill`, into views of these sizes."""
    got = bytearray()
    while len(got) < count:
        await channel.readable()
        view = memoryview(bytearray(next(sizes)))
        filled = channel.fill(view, probe=probe)
        assert not view[filled:].tobytes().strip(b"\0"), "written behind what was filled"
        got += view[:filled]
        assert not channel.eof
    return bytes(got)


async def read_to_end(channel: Channel) -> bytes:
    got = bytearray()
    while data := await channel.receive():
        got += data
    return bytes(got)


async def how_it_ends(channel: Channel) -> str:
    """ "orderly", "cut", or the error in words. No byte comes before it."""
    try:
        assert await read_to_end(channel) == b""
    except ChannelClosed as closed:
        return str(closed)
    return "cut" if channel.truncated else "orderly"
