"""gateway.relay: how a session ends whose upstream is away, or is being sent things again."""

from __future__ import annotations

import socket
import struct

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway import relay
from gateway.errors import SessionEnd
from gateway.nbd.transmission import InFlightLimits
from tests import reconnect_rig
from tests.reconnect_rig import Lane, Rig
from tests.relay_rig import DISC, MIB, quietly, reads, same, write
from tests.support.fake_upstream import simple
from tests.support.rawclient import Cmd, Err, Request

lane = reconnect_rig.lane  # the fixture


async def away(lane: Lane, *asked: Request, **how: object) -> Rig:
    """These requests are in flight, and the upstream is gone."""
    rig = await lane(**how)
    await rig.client.ask(*asked)
    for _ in asked:
        await rig.upstream.request()
    rig.dies()
    await wait_all_tasks_blocked()
    assert rig.dock.dialled == 1
    return rig


# ---------------------------------------------------------------- the client goes meanwhile


async def test_client_leaves_with_nothing_in_flight(lane: Lane) -> None:
    rig = await away(lane)
    rig.client.leave()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_client_says_goodbye_with_nothing_in_flight(lane: Lane) -> None:
    rig = await away(lane)
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.DISCONNECTED


@pytest.mark.parametrize("goodbye", [True, False])
async def test_what_is_in_flight_is_done_for_a_client_that_has_gone(
    lane: Lane, goodbye: bool
) -> None:
    one = write(512, 5)
    rig = await away(lane, one)
    if goodbye:
        await rig.client.send(DISC)
    else:
        rig.client.leave()
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    got = await second.request()
    assert same(got, one)
    await second.answer(got)
    assert await rig.client.reply([one]) == (5, 0)
    assert await rig.ended() in (SessionEnd.DISCONNECTED, SessionEnd.CLIENT_LEFT)
    assert await second.to_end() == DISC


async def test_client_leaves_within_a_payload(lane: Lane) -> None:
    rig = await away(lane)
    await rig.client.send(write(512, 5).pack()[:100])
    await wait_all_tasks_blocked()
    rig.client.leave()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_client_leaves_within_a_payload_that_was_sent_again(lane: Lane) -> None:
    """No DISC: it would be taken for data."""
    rig = await away(lane)
    raw = write(512, 5).pack()
    await rig.client.send(raw[:100])
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    assert (await second.take(100))[28:] == raw[28:100]
    rig.client.leave()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT
    assert await second.to_end() == b""


async def test_client_is_reset(lane: Lane) -> None:
    rig = await away(lane, write(512, 5))
    await rig.client.ask(reads(1, 8)[0])
    rig.client.channel.close()
    await wait_all_tasks_blocked()
    rig.is_over()
    assert await rig.ended() in (SessionEnd.CLIENT_LEFT, SessionEnd.UPSTREAM_LOST)


async def test_nobody_is_waited_for_longer_than_the_goodbye(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is gone, the upstream stays away: an end all the same."""
    monkeypatch.setattr(relay, "DISC_TIMEOUT_S", 0.05)
    rig = await away(lane, write(512, 5))
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.DISCONNECTED


async def test_client_breaks_the_protocol(lane: Lane) -> None:
    rig = await away(lane, write(512, 5))
    await rig.client.send(bytes(28))
    assert await rig.ended() == SessionEnd.CLIENT_BROKE_PROTOCOL


async def test_refused_by_the_next_upstream_behind_a_goodbye(lane: Lane) -> None:
    """None is there that would do it: the client is not told that it was done."""
    rig = await away(lane, write(512, 5))
    await rig.client.send(DISC)
    await wait_all_tasks_blocked()
    rig.is_over()
    assert await rig.client.reply([write(512, 5)]) == (5, Err.ESHUTDOWN)
    assert await rig.ended() in (SessionEnd.UPSTREAM_LOST, SessionEnd.DISCONNECTED)


# ---------------------------------------------------------------- we go meanwhile


async def test_shutdown_with_nothing_in_flight(lane: Lane) -> None:
    rig = await away(lane)
    rig.relay.shutdown()
    assert await rig.ended() == SessionEnd.SHUTDOWN


async def test_shutdown_waits_for_the_upstream_and_refuses_what_is_new(lane: Lane) -> None:
    one = write(512, 5)
    rig = await away(lane, one)
    rig.relay.shutdown()
    await rig.client.ask(write(512, 6))
    assert await rig.client.reply([write(512, 6)]) == (6, Err.ESHUTDOWN)
    second = rig.comes_back()
    got = await second.request()
    assert same(got, one)
    await second.answer(got)
    assert await rig.client.reply([one]) == (5, 0)
    assert await rig.ended() == SessionEnd.SHUTDOWN
    assert await second.to_end() == DISC


async def test_shutdown_and_the_upstream_never_comes_back(lane: Lane) -> None:
    one = write(512, 5)
    rig = await away(lane, one)
    rig.relay.shutdown()
    rig.is_over()
    assert await rig.client.reply([one]) == (5, Err.ESHUTDOWN)
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST


async def test_shutdown_with_only_lost_flushes_in_flight(lane: Lane) -> None:
    """These fail at once when the next upstream is there, and that is the end."""
    rig = await lane()
    one, flush = write(512, 5), Request(Cmd.FLUSH, cookie=6)
    await rig.client.ask(one)
    await rig.upstream.answer(await rig.upstream.request())
    assert await rig.client.reply([one]) == (5, 0)
    await rig.client.ask(flush)
    await rig.upstream.request()
    rig.dies()
    await wait_all_tasks_blocked()
    rig.relay.shutdown()
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    assert await rig.client.reply([flush]) == (6, Err.EIO)
    assert await rig.ended() == SessionEnd.SHUTDOWN
    assert await second.to_end() in (DISC, b"")


async def test_shutdown_while_sending_again(lane: Lane, nursery: trio.Nursery) -> None:
    rig = await lane(buffers=4096)
    big = write(MIB, 5)
    nursery.start_soon(quietly, rig.client.send, big.pack())
    await rig.upstream.take(100_000)
    rig.dies()
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    await wait_all_tasks_blocked()
    rig.relay.shutdown()
    got = await second.request()
    assert same(got, big)
    await second.answer(got)
    assert await rig.client.reply([big]) == (5, 0)
    assert await rig.ended() == SessionEnd.SHUTDOWN
    assert await second.to_end() == DISC


async def test_cut_in_the_outage(lane: Lane, nursery: trio.Nursery) -> None:
    rig = await away(lane, write(512, 5), buffers=4096)
    nursery.start_soon(quietly, rig.client.send, write(MIB, 6).pack())
    await wait_all_tasks_blocked()
    rig.scope.cancel()
    with trio.fail_after(5):
        while rig.relay.upstream.socket.fileno() >= 0:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_cut_while_sending_again(
    lane: Lane, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream is in the middle of a payload: it gets no DISC, which it would take for data."""
    monkeypatch.setattr(relay, "FINISH_TIMEOUT_S", 0.1)
    rig = await lane(buffers=4096)
    nursery.start_soon(quietly, rig.client.send, write(MIB, 5).pack())
    await rig.upstream.take(100_000)
    rig.dies()
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    await wait_all_tasks_blocked()
    rig.scope.cancel()
    got = await second.to_end()
    assert write(MIB, 5).pack()[28:].startswith(got[28:])


async def test_cut_while_looking_whether_it_is_closed(lane: Lane) -> None:
    rig = await lane()
    await rig.client.ask(write(512, 5))
    await rig.upstream.request()
    rig.upstream.leave()
    await wait_all_tasks_blocked()
    rig.scope.cancel()
    assert await rig.upstream.to_end() in (b"", DISC)
    assert rig.dock.dialled == 0


# ---------------------------------------------------------------- timeouts


async def test_client_goes_with_its_window_full(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing more of it is read then, and the upstream answers nothing: it is noticed."""
    monkeypatch.setattr(relay, "DISC_TIMEOUT_S", 0.1)
    monkeypatch.setattr(relay, "FINISH_TIMEOUT_S", 0.1)
    rig = await lane(limits=InFlightLimits(3, MIB))
    await rig.client.ask(*(write(8, n) for n in range(9)))
    await wait_all_tasks_blocked()
    rig.client.channel.close()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_idle_client_of_an_upstream_that_is_away(lane: Lane) -> None:
    rig = await away(lane, idle_s=0.1)
    assert await rig.ended() == SessionEnd.IDLE


async def test_idle_behind_a_return(lane: Lane) -> None:
    rig = await lane(idle_s=0.3)
    rig.dies()
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    assert await rig.ended() == SessionEnd.IDLE
    assert await second.to_end() == DISC


async def test_not_idle_with_a_request_in_flight(lane: Lane) -> None:
    """However long that takes, and in an outage too."""
    (one,) = reads(1, 8)
    rig = await away(lane, one, idle_s=0.05)
    await trio.sleep(0.3)
    assert rig.end is None
    second = rig.comes_back()
    await second.answer(await second.request())
    await rig.client.read_reply(one, structured=False)
    assert await rig.ended() == SessionEnd.IDLE


@pytest.mark.parametrize("sent", [28, 100, 200_000])
async def test_not_idle_in_the_middle_of_a_write(lane: Lane, sent: int) -> None:
    rig = await lane(idle_s=0.05)
    one = write(300_000)
    await rig.client.send(one.pack()[:sent])
    await trio.sleep(0.3)
    assert rig.end is None
    await rig.client.send(one.pack()[sent:])
    await rig.upstream.answer(await rig.upstream.request())
    assert await rig.client.reply([one]) == (one.cookie, 0)
    assert await rig.ended() == SessionEnd.IDLE


async def test_idle_is_for_a_client_that_asks_for_nothing(lane: Lane) -> None:
    rig = await lane(idle_s=0.4)
    for cookie in range(6):
        (one,) = reads(1, 8, cookie)
        await trio.sleep(0.1)
        await rig.client.ask(one)
        await rig.upstream.answer(await rig.upstream.request())
        await rig.client.read_reply(one, structured=False)
    assert rig.end is None
    assert await rig.ended() == SessionEnd.IDLE
    assert await rig.upstream.to_end() == DISC


async def test_client_that_does_not_read_is_not_idle(lane: Lane, nursery: trio.Nursery) -> None:
    """Its reply is not out of our hands; for that there is the stall timeout."""
    rig = await lane(buffers=4096, idle_s=0.05)
    (one,) = reads(1, MIB)
    await rig.client.ask(one)
    got = await rig.upstream.request()
    nursery.start_soon(quietly, rig.upstream.send, simple(got.cookie, 0, bytes(MIB)))
    await trio.sleep(0.3)
    assert rig.end is None
    assert (await rig.client.take(16 + MIB))[16:] == bytes(MIB)
    assert await rig.ended() == SessionEnd.IDLE


async def test_client_resets_in_the_outage_over_tcp(lane: Lane) -> None:
    """RST behind bytes of ours that it has not read."""
    rig = await away(lane, write(512, 5))
    rig.client.channel.socket.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    rig.client.channel.close()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT
    assert rig.dock.dialled == 1  # and nobody came: nothing is sent again for who is gone
