"""gateway.transport: every way in which a channel ends, and handshakes that fail."""

from __future__ import annotations

import functools
import gc
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import transport
from gateway.errors import ChannelClosed
from gateway.transport import LINGER_S, Channel
from tests import transport_rig
from tests.support.rawclient import tls_context
from tests.transport_rig import (
    MIB,
    ONLY_TLS,
    PROBE,
    STALL_S,
    Connect,
    how_it_ends,
    read_to_end,
    reset,
)

ours, kind, connect = transport_rig.ours, transport_rig.kind, transport_rig.connect  # the fixtures


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
    view = memoryview(bytearray(MIB))
    while pair.far.fill(view):  # there is room for more now
        pass
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.near.aclose)
        with trio.fail_after(STALL_S):
            await read_to_end(pair.far)
        pair.far.close()
    assert pair.far.bytes_read < MIB
    assert pair.far.truncated


@ONLY_TLS
async def test_unclean_end_has_no_close_notify(connect: Connect) -> None:
    """All that was said has arrived, but it was not all that was to be said."""
    pair = await connect()
    await pair.near.send_all(b"half")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pair.near.aclose, clean=False))
        with trio.fail_after(STALL_S):
            assert await read_to_end(pair.far) == b"half"
        pair.far.close()
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
            for _ in range(3):
                await pair.far.send_all(bytes(20_000))
                await wait_all_tasks_blocked()
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
