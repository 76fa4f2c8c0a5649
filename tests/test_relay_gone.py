"""gateway.relay: a client that is gone for sure has nothing to wait for; one that may read, has."""

from __future__ import annotations

import contextlib
import socket
import ssl

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.errors import SessionEnd
from gateway.nbd.transmission import InFlightLimits
from gateway.relay import DISC_TIMEOUT_S, FINISH_TIMEOUT_S, GONE_S
from gateway.transport import STUCK_S, Channel, TLSChannel
from tests import relay_rig
from tests.relay_rig import DISC, MIB, Lane, Rig, quietly, reads, vanish, write
from tests.support.rawclient import Cmd, Request

lane = relay_rig.lane  # the fixture
FLUSH = Request(Cmd.FLUSH, cookie=1)


async def finish(rig: Rig, clock: MockClock) -> None:
    """The client is found to be gone now, though the upstream owes an answer still."""
    await wait_all_tasks_blocked()
    assert rig.end == SessionEnd.CLIENT_LEFT
    clock.jump(FINISH_TIMEOUT_S)
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


@pytest.mark.parametrize("half", [False, True], ids=["closed", "one_way"])
async def test_tls_that_is_cut(lane: Lane, mock_clock: MockClock, half: bool) -> None:
    """A client that is killed: the kernel ends TCP for it, and nobody ends TLS."""
    rig = await lane(tls=True)
    await rig.client.ask(FLUSH)
    await rig.upstream.request()
    rig.client.leave() if half else vanish(rig)
    await finish(rig, mock_clock)
    assert await rig.upstream.to_end() == DISC


async def test_what_was_passed_on_before_may_be_done(lane: Lane) -> None:
    """The upstream has all of a write, and the time to answer it."""
    rig = await lane(tls=True)
    one = write(300_000)
    await rig.client.ask(one)
    rig.client.leave()
    seen = await rig.upstream.request()
    assert seen.payload == one.payload
    assert await rig.upstream.take(28) == DISC
    await rig.upstream.answer(seen)  # raises if it is cut off
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_tls_that_is_ended_one_way_in_order(lane: Lane) -> None:
    """close_notify says that no more is sent, and not that no more is read. RFC 8446, 6.1."""
    rig = await lane(tls=True)
    (one,) = reads(1, 512)
    await rig.client.ask(one)
    seen = await rig.upstream.request()
    assert isinstance(rig.client.channel, TLSChannel)
    with contextlib.suppress(ssl.SSLError, OSError):
        rig.client.channel.tls.unwrap()
    await wait_all_tasks_blocked()
    assert rig.end is None
    await rig.upstream.answer(seen)
    await rig.client.read_reply(one, structured=False)
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_without_tls(lane: Lane, mock_clock: MockClock) -> None:
    """A Unix socket tells a close from an end of what is sent."""
    rig = await lane()
    await rig.client.ask(FLUSH)
    await rig.upstream.request()
    rig.client.leave()
    await wait_all_tasks_blocked()
    mock_clock.jump(3 * GONE_S)
    await wait_all_tasks_blocked()
    assert rig.end is None
    vanish(rig)
    mock_clock.jump(GONE_S)
    await finish(rig, mock_clock)


async def test_behind_a_goodbye_all_is_waited_for(lane: Lane, mock_clock: MockClock) -> None:
    """ "The server MUST handle all outstanding requests": proto.md, NBD_CMD_DISC."""
    rig = await lane()
    await rig.client.send(FLUSH.pack() + DISC)
    await rig.upstream.request()
    vanish(rig)
    await wait_all_tasks_blocked()
    mock_clock.jump(DISC_TIMEOUT_S - 1)
    await wait_all_tasks_blocked()
    assert rig.end is None
    mock_clock.jump(1.1)
    await wait_all_tasks_blocked()
    assert rig.end == SessionEnd.DISCONNECTED
    mock_clock.jump(FINISH_TIMEOUT_S)
    await rig.ended()


async def test_with_its_window_full(
    lane: Lane, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads it then."""
    monkeypatch.setattr(relay_rig, "PLENTY", InFlightLimits(3, MIB))
    rig = await lane()
    await rig.client.ask(*(write(8, n) for n in range(9)))
    await wait_all_tasks_blocked()
    vanish(rig)
    mock_clock.jump(GONE_S)
    await finish(rig, mock_clock)


async def test_in_front_of_an_upstream_that_takes_nothing(
    lane: Lane, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Nobody reads it then either. The upstream has half a write, and gets no DISC behind that."""
    rig = await lane(buffers=4096)
    one = write(MIB)
    nursery.start_soon(quietly, rig.client.send, one.pack())
    await wait_all_tasks_blocked()
    mock_clock.jump(3 * STUCK_S)
    await wait_all_tasks_blocked()
    assert rig.end is None
    vanish(rig)
    mock_clock.jump(STUCK_S)
    await finish(rig, mock_clock)
    got = await rig.upstream.to_end()
    assert len(got) < MIB
    assert one.payload.startswith(got[28:])


def test_a_reset_is_seen_by_who_does_not_read() -> None:
    """Over TCP too, behind bytes that nobody has read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
        near = Channel(sock)
        far.sendall(b"request")
        assert not near.gone
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        assert near.gone
        sock.close()
