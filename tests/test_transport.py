"""gateway.transport: bytes through plain and TLS channels, and every way in which they end."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import transport
from gateway.errors import ChannelClosed
from gateway.settings import TLSSettings
from gateway.tls import server_context
from gateway.transport import LINGER_S, RECORD, Channel, TLSChannel
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


# ---------------------------------------------------------------- bytes


@PROBE
async def test_both_ways_at_once(connect: Connect, probe: bool) -> None:
    """Byte by byte the same, through buffers far smaller than what is sent."""
    pair = await connect(buffers=4096)
    rng = random.Random(1)
    there, back = rng.randbytes(2 * MIB + 1), rng.randbytes(2 * MIB + 77)
    sizes = [1, 27, 28, 4096, RECORD - 1, RECORD, RECORD + 1, 100_000, 256 << 10]

    async def write(channel: Channel, data: bytes) -> None:
        pieces = itertools.cycle([1, 16, 28, 70_000, RECORD, RECORD + 28, 300_000])
        at = 0
        while at < len(data):
            piece = next(pieces)
            await channel.send_all(memoryview(data)[at : at + piece])
            at += piece

    async def expect(channel: Channel, data: bytes, seed: int) -> None:
        rng = random.Random(seed)
        choose = iter(lambda: rng.choice(sizes), None)
        assert await read(channel, len(data), choose, probe=probe) == data

    with trio.fail_after(6 * STALL_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, pair.near, there)
            nursery.start_soon(write, pair.far, back)
            nursery.start_soon(expect, pair.near, back, 2)
            nursery.start_soon(expect, pair.far, there, 3)
    for channel, sent, got in ((pair.near, there, back), (pair.far, back, there)):
        assert channel.bytes_written == len(sent)
        assert channel.bytes_read == len(got)


@PROBE
@pytest.mark.parametrize("message", [1, 29, RECORD - 1, RECORD, RECORD + 1, 2 * RECORD, 60_000])
async def test_nothing_is_stranded(connect: Connect, message: int, probe: bool) -> None:
    """All has arrived, nothing more comes: what OpenSSL holds has to be given out unasked."""
    pair = await connect()
    data = random.Random(message).randbytes(message)
    for room in (1, 28, 4096, RECORD - 1, RECORD, RECORD + 1, 60_000, 256 << 10):
        if message > 2000 * room:
            continue
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.far.send_all, data)
            with trio.fail_after(STALL_S):
                assert await read(pair.near, message, itertools.repeat(room), probe=probe) == data


@PROBE
async def test_many_small_records(connect: Connect, probe: bool) -> None:
    """All are read, but not in one turn: that would hold up the other clients."""
    pair = await connect()
    data = random.Random(1).randbytes(1000)
    view = memoryview(bytearray(2000))
    got = 0

    async def send() -> None:
        for at in range(len(data)):
            await pair.far.send_all(data[at : at + 1])

    with trio.fail_after(STALL_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            while got < len(data):
                await pair.near.readable()
                filled = pair.near.fill(view[got:], probe=probe)
                assert filled <= 64 or not isinstance(pair.near, TLSChannel)
                got += filled
    assert view[:got] == data


@pytest.mark.parametrize("kind", ["TLS1.3"])
async def test_bytes_that_came_with_the_handshake(
    connect: Connect, ours: ssl.SSLContext, pki: Path
) -> None:
    """The client's last flight and its first data in one segment."""
    pair = await connect(tls=False)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls_context(pki).wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    await pair.far.send_all(outgoing.read())

    async def finish() -> None:
        while True:
            incoming.write(await pair.far.receive())
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
                break
        client.write(b"first")
        client.write(b"second")
        await pair.far.send_all(outgoing.read())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        pair.near = await pair.near.start_tls(ours)
    with trio.fail_after(STALL_S):
        assert await read(pair.near, 11, itertools.repeat(4)) == b"firstsecond"


async def test_readable_waits_for_something(connect: Connect) -> None:
    pair = await connect()
    view = memoryview(bytearray(100))
    pair.near.fill(view)  # under TLS this looks first whether the handshake has left something
    found = []

    async def wait() -> None:
        await pair.near.readable()
        found.append(pair.near.fill(view))

    for size in (1, 100, 7):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert not found
            await pair.far.send_all(bytes(size))
        assert found == [size]
        found.clear()
        pair.near.fill(view)


async def test_fill_does_not_wait(connect: Connect) -> None:
    pair = await connect()
    assert pair.near.fill(memoryview(bytearray(10))) == 0
    assert not pair.near.eof


async def test_receive_takes_no_more_than_its_limit(connect: Connect) -> None:
    pair = await connect()
    await pair.far.send_all(b"abcdef")
    with trio.fail_after(STALL_S):
        assert await pair.near.receive(4) == b"abcd"
        assert await pair.near.receive(4) == b"ef"


@pytest.mark.parametrize("size", [0, 1, 20_000])
async def test_buffers_are_let_go(connect: Connect, size: int) -> None:
    """A bytearray that somebody still looks at cannot be resized."""
    pair = await connect()
    data = bytearray(size)
    with trio.fail_after(STALL_S):
        await pair.near.send_all(data)
    data += b"more"


# ---------------------------------------------------------------- EOF and errors


async def test_orderly_end(connect: Connect) -> None:
    """Seen behind the last byte, and told from a cut."""
    pair = await connect()
    await pair.far.send_all(b"last")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.far.aclose)
        with trio.fail_after(STALL_S):
            assert await read_to_end(pair.near) == b"last"
        assert pair.near.eof
        assert not pair.near.truncated
        pair.near.close()


@PROBE
async def test_end_is_not_missed_behind_data(connect: Connect, probe: bool) -> None:
    """Both have arrived when we look; the end must not wait for more bytes to come."""
    pair = await connect()
    await pair.far.send_all(bytes(100))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.far.aclose)
        await wait_all_tasks_blocked()
        view = memoryview(bytearray(1000))
        with trio.fail_after(STALL_S):
            while not pair.near.eof:
                await pair.near.readable()
                pair.near.fill(view, probe=probe)
        assert pair.near.bytes_read == 100
        pair.near.close()


@ONLY_TLS
async def test_end_without_close_notify_is_a_cut(connect: Connect) -> None:
    pair = await connect()
    await pair.far.send_all(b"last")
    pair.far.close()
    with trio.fail_after(STALL_S):
        assert await read_to_end(pair.near) == b"last"
    assert pair.near.eof
    assert pair.near.truncated


@ONLY_TLS
async def test_end_within_a_record_is_a_cut(connect: Connect) -> None:
    pair = await connect()
    await pair.far.send_all(b"whole")
    socket.socket.sendall(pair.far.socket, b"\x17\x03\x03\x01\x00half a record")
    pair.far.close()
    with trio.fail_after(STALL_S):
        assert await read_to_end(pair.near) == b"whole"
    assert pair.near.truncated


async def test_reset(connect: Connect) -> None:
    """An error, or under TLS, where `ssl` hides ECONNRESET, a cut. Never an orderly end."""
    pair = await connect(tcp=True)
    reset(pair.far)
    with trio.fail_after(STALL_S):
        assert await how_it_ends(pair.near) in ("Connection reset by peer", "cut")
        with pytest.raises(ChannelClosed):
            await pair.near.send_all(bytes(MIB))


async def test_reset_while_sending(connect: Connect) -> None:
    pair = await connect(tcp=True, buffers=4096)
    with trio.fail_after(STALL_S), pytest.RaisesGroup(ChannelClosed):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.near.send_all, bytes(MIB))
            await wait_all_tasks_blocked()
            reset(pair.far)


@ONLY_TLS
@PROBE
async def test_corrupted_record(connect: Connect, probe: bool) -> None:
    """What came before it is good, and comes out."""
    pair = await connect()
    await pair.far.send_all(b"good")
    socket.socket.sendall(pair.far.socket, b"\x17\x03\x03\x00\x20" + bytes(32))
    view = memoryview(bytearray(100))
    with trio.fail_after(STALL_S):
        await pair.near.readable()
        assert pair.near.fill(view, probe=probe) == 4
        assert not pair.near.eof
        # OpenSSL has told the reason already, and forgotten it if there were bytes before it.
        assert await how_it_ends(pair.near) != "orderly"


async def test_close_wakes_who_waits(connect: Connect) -> None:
    pair = await connect(buffers=4096)
    closed = trio.ClosedResourceError
    with pytest.RaisesGroup(closed, closed, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.near.receive)
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as writing:
                writing.start_soon(pair.near.send_all, bytes(MIB))
                await wait_all_tasks_blocked()
                pair.near.close()


async def test_close_is_idempotent(connect: Connect) -> None:
    pair = await connect()
    pair.near.close()
    pair.near.close()
    await pair.near.aclose()
    assert pair.near.socket.fileno() == -1


@pytest.mark.parametrize("kind", ["plain"])
async def test_shutdown_wakes_a_reader_behind_what_has_arrived(connect: Connect) -> None:
    pair = await connect()
    await pair.far.send_all(b"already here")
    pair.near.shutdown()
    pair.near.shutdown()
    with trio.fail_after(STALL_S):
        assert await read_to_end(pair.near) == b"already here"
    with pytest.raises(ChannelClosed, match="Broken pipe"):
        await pair.near.send_all(b"x")
    pair.near.close()
    pair.near.shutdown()


# ---------------------------------------------------------------- the last word


async def test_last_word_arrives_behind_bytes_that_nobody_reads(connect: Connect) -> None:
    """A plain close would make the kernel send RST, and the client would lose the answer."""
    pair = await connect(tcp=True)
    await pair.far.send_all(bytes(20_000))
    await pair.near.send_all(b"last word")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.near.aclose)
        await wait_all_tasks_blocked()
        await pair.far.send_all(bytes(20_000))  # it has not read the end yet
        with trio.fail_after(STALL_S):
            assert await read_to_end(pair.far) == b"last word"
        assert not pair.far.truncated
        pair.far.close()


async def test_close_waits_for_the_peer_but_not_for_long(
    connect: Connect, mock_clock: MockClock
) -> None:
    pair = await connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.near.aclose)
        await wait_all_tasks_blocked()
        mock_clock.jump(LINGER_S * 0.99)
        await wait_all_tasks_blocked()
        assert pair.near.socket.fileno() >= 0
        mock_clock.jump(LINGER_S * 0.02)
    assert pair.near.socket.fileno() == -1


async def test_close_does_not_swallow_without_end(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    """Time stands still here, so only the number of bytes can end it."""
    monkeypatch.setattr(transport, "_LINGER_BYTES", 100_000)
    pair = await connect()

    async def flood() -> None:
        with pytest.raises(ChannelClosed):
            await pair.far.send_all(bytes(64 * MIB))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await pair.near.aclose()


@ONLY_TLS
async def test_cancelled_write_is_never_followed_by_close_notify(connect: Connect) -> None:
    """Else a client would take the half message for all that was to come."""
    pair = await connect(buffers=4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.near.send_all, bytes(MIB))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.near.aclose)
        with trio.fail_after(STALL_S):
            got = await read_to_end(pair.far)
        pair.far.close()
    assert len(got) < MIB
    assert pair.far.truncated


@ONLY_TLS
async def test_whole_write_is_followed_by_close_notify(connect: Connect) -> None:
    pair = await connect(buffers=4096)

    async def say() -> None:
        await pair.near.send_all(bytes(MIB))
        await pair.near.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(say)
        with trio.fail_after(STALL_S):
            assert len(await read_to_end(pair.far)) == MIB
        pair.far.close()
    assert not pair.far.truncated


async def test_cancelled_aclose_closes(connect: Connect) -> None:
    pair = await connect()
    with trio.CancelScope() as scope:
        scope.cancel()
        await pair.near.aclose()
    assert pair.near.socket.fileno() == -1
    with trio.fail_after(STALL_S):
        assert await read_to_end(pair.far) == b""
    assert not pair.far.truncated, "close_notify is out before anything is waited for"


# ---------------------------------------------------------------- the TLS handshake


@pytest.fixture
def nothing_is_left_open() -> Iterator[None]:
    """Warnings are errors: a socket that was dropped and not closed fails the test."""
    yield
    gc.collect()


@ONLY_TLS
@pytest.mark.usefixtures("nothing_is_left_open")
async def test_alert_reaches_a_client_that_is_refused(
    connect: Connect, kind: str, ours: ssl.SSLContext, pki: Path
) -> None:
    """Also when it has sent its first request already: under TLS 1.3 it need not wait for us."""
    pair = await connect(tcp=True, tls=False)
    theirs = tls_context(pki, with_certificate=False, only_1_2=kind == "TLS1.2")
    alert: list[str] = []

    async def client() -> None:
        try:
            pair.far = await pair.far.start_tls(theirs, server_side=False)
            await pair.far.send_all(bytes(20_000))
            await pair.far.receive()
        except ssl.SSLError as error:
            alert.append(error.reason)
        except ChannelClosed as error:
            alert.append(str(error))
        pair.far.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client)
        with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            await pair.near.start_tls(ours)
    assert "ALERT" in alert[0], "reset, and the alert lost"


@pytest.mark.parametrize("kind", ["plain"])
@pytest.mark.usefixtures("nothing_is_left_open")
async def test_cancelled_handshake_closes(connect: Connect, ours: ssl.SSLContext) -> None:
    pair = await connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pair.near.start_tls, ours))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with trio.fail_after(STALL_S):
        assert await pair.far.receive() == b""


@pytest.mark.parametrize("kind", ["plain"])
@pytest.mark.parametrize("said", [b"", b"plaintext"])
@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.usefixtures("nothing_is_left_open")
async def test_peer_is_gone_before_the_handshake(
    connect: Connect, ours: ssl.SSLContext, how: str, said: bytes
) -> None:
    pair = await connect(tcp=True)
    await pair.far.send_all(said)
    if how == "RST":
        reset(pair.far)
    else:
        pair.far.close()
    with trio.fail_after(STALL_S), pytest.raises((ssl.SSLError, ChannelClosed)):
        await pair.near.start_tls(ours)
    pair.near.close()


@pytest.mark.parametrize("kind", ["plain"])
@pytest.mark.usefixtures("nothing_is_left_open")
async def test_peer_leaves_during_the_handshake(connect: Connect, ours: ssl.SSLContext) -> None:
    failed = pytest.RaisesExc((ssl.SSLError, ChannelClosed))
    for how in (Channel.close, reset):
        pair = await connect(tcp=True)
        with trio.fail_after(STALL_S), pytest.RaisesGroup(failed):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(functools.partial(pair.near.start_tls, ours))
                await wait_all_tasks_blocked()
                how(pair.far)
