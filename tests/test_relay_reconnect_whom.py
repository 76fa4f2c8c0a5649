"""gateway.lifeline: when an upstream may be replaced by another one, and when it must not be."""

from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway.errors import SessionEnd
from tests import reconnect_rig
from tests.reconnect_rig import Lane, Rig
from tests.relay_rig import DISC, MIB, Peer, quietly, reads, same, write
from tests.support.fake_upstream import pattern, simple
from tests.support.rawclient import Cmd, Err, Request

lane = reconnect_rig.lane  # the fixture
FLUSH = Request(Cmd.FLUSH, cookie=77)


async def is_back(rig: Rig) -> Peer:
    """The upstream is lost, and another one is there."""
    rig.dies()
    await wait_all_tasks_blocked()
    assert rig.dock.dialled == len(rig.upstreams)
    peer = rig.comes_back()
    await wait_all_tasks_blocked()
    return peer


# ---------------------------------------------------------------- lost while sending again


async def resending(lane: Lane, nursery: trio.Nursery) -> tuple[Rig, list[Request]]:
    """Lost with one write in flight; two more came in the outage. The newest upstream has been sent
    the first two, and part of the third, which is large."""
    rig = await lane(buffers=4096)
    asked = [write(4, 1), write(4, 2, 8), write(MIB, 3, 16)]
    await rig.client.ask(asked[0])
    await rig.upstream.request()
    rig.dies()
    await wait_all_tasks_blocked()
    nursery.start_soon(quietly, rig.client.send, asked[1].pack() + asked[2].pack())
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    await wait_all_tasks_blocked()
    for one in asked[:2]:
        assert same(await second.request(), one)
    return rig, asked


async def test_lost_once_more_while_sending_again(lane: Lane, nursery: trio.Nursery) -> None:
    rig, asked = await resending(lane, nursery)
    third = await is_back(rig)
    asked.append(write(4, 4))
    await rig.client.ask(asked[-1])  # not into the payload that is being sent again
    await wait_all_tasks_blocked()
    for one in asked:
        got = await third.request()
        assert same(got, one)
        await third.answer(got)
        assert await rig.client.reply([one]) == (one.cookie, 0)
    assert rig.dock.progress == [False, False]


async def test_half_closed_while_sending_again_is_not_replaced(
    lane: Lane, nursery: trio.Nursery
) -> None:
    """It has the second write, and may do it yet."""
    rig, asked = await resending(lane, nursery)
    rig.upstream.leave()
    told = [await rig.client.reply(asked) for _ in asked[:2]]
    assert told == [(1, Err.ESHUTDOWN), (2, Err.ESHUTDOWN)]
    assert rig.dock.dialled == 1


async def test_refused_while_sending_again_what_it_has_is_awaited(
    lane: Lane, nursery: trio.Nursery
) -> None:
    rig, asked = await resending(lane, nursery)
    second = rig.upstream
    cookies = [2, 3]  # ours, of the first two
    await second.send(simple(cookies[0] - 1, Err.ESHUTDOWN))
    await wait_all_tasks_blocked()
    assert rig.dock.dialled == 1, "it owes the second"
    await second.send(simple(cookies[0]))
    assert await rig.client.reply(asked) == (2, 0)
    nursery.start_soon(quietly, lambda _: second.to_end(), b"")
    while rig.dock.dialled < 2:
        await wait_all_tasks_blocked()
    third = rig.comes_back()
    for one in (asked[0], asked[2]):
        got = await third.request()
        assert same(got, one)
        await third.answer(got)
        assert await rig.client.reply([one]) == (one.cookie, 0)


# ---------------------------------------------------------------- whom it may not be replaced


async def test_half_closed_is_not_replaced(lane: Lane) -> None:
    """What it has been sent may be done at any time."""
    rig = await lane()
    one = write(512, 1)
    await rig.client.ask(one)
    await rig.upstream.request()
    rig.upstream.leave()
    assert await rig.client.reply([one]) == (1, Err.ESHUTDOWN)
    assert rig.dock.dialled == 0
    await rig.client.ask(write(512, 2))
    assert await rig.client.reply([write(512, 2)]) == (2, Err.ESHUTDOWN)
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST


async def test_half_closed_at_first_is_replaced(lane: Lane) -> None:
    """SHUT_WR, and a while later the close."""
    rig = await lane()
    one = write(512, 1)
    await rig.client.ask(one)
    await rig.upstream.request()
    rig.upstream.leave()
    await wait_all_tasks_blocked()
    assert rig.dock.dialled == 0
    rig.dies()
    while not rig.dock.dialled:  # noqa: ASYNC110
        await trio.sleep(0.01)
    second = rig.comes_back()
    assert same(await second.request(), one)


async def test_takes_nothing_more_but_is_there(lane: Lane) -> None:
    """SHUT_RD: our next write to it fails."""
    rig = await lane()
    rig.upstream.channel.socket.shutdown(socket.SHUT_RD)
    one = write(512, 1)
    await rig.client.ask(one)
    assert await rig.client.reply([one]) == (1, Err.ESHUTDOWN)
    assert rig.dock.dialled == 0


async def test_stalled_upstream_is_not_replaced(lane: Lane, nursery: trio.Nursery) -> None:
    rig = await lane(buffers=4096, stall_s=0.05)
    first, big = reads(1, 8)[0], write(MIB, 5)
    nursery.start_soon(quietly, rig.client.send, first.pack() + big.pack())
    told = [await rig.client.reply([first, big]) for _ in range(2)]
    assert told == [(first.cookie, Err.ESHUTDOWN), (5, Err.ESHUTDOWN)]
    assert rig.dock.dialled == 0


async def test_replacement_that_stalls_is_not_replaced(lane: Lane, nursery: trio.Nursery) -> None:
    rig = await lane(buffers=4096, stall_s=0.3)
    big = write(MIB, 5)
    nursery.start_soon(quietly, rig.client.send, big.pack())
    await rig.upstream.take(40_000)
    await is_back(rig)
    assert await rig.client.reply([big]) == (5, Err.ESHUTDOWN)
    assert rig.dock.dialled == 1


async def test_stalled_client(lane: Lane, nursery: trio.Nursery) -> None:
    """It takes nothing of a reply: it is a client that has left."""
    rig = await lane(buffers=4096, stall_s=0.05)
    (one,) = reads(1, MIB)
    await rig.client.ask(one)
    got = await rig.upstream.request()
    nursery.start_soon(quietly, rig.upstream.send, simple(got.cookie, 0, pattern(0, MIB)))
    assert await rig.ended() == SessionEnd.CLIENT_LEFT
    assert rig.relay.detail == "it took no bytes for 0.05 s"


async def test_fault_of_the_upstream_is_no_reason_to_replace_it(lane: Lane) -> None:
    rig = await lane()
    one = write(512, 1)
    await rig.client.ask(one)
    await rig.upstream.request()
    await rig.upstream.send(b"garbage and more of it")
    assert await rig.client.reply([one]) == (1, Err.ESHUTDOWN)
    assert rig.dock.dialled == 0
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST
    assert rig.relay.detail.startswith("reply magic")


@pytest.mark.parametrize("half", [False, True])
async def test_never_back(lane: Lane, half: bool) -> None:
    rig = await lane()
    asked = [reads(1, 8)[0], write(512, 5)]
    raw = b"".join(one.pack() for one in asked)
    await rig.client.send(raw[: len(raw) - 100 * half])
    await rig.upstream.request()
    rig.dies()
    await wait_all_tasks_blocked()
    assert rig.client.has_nothing()
    rig.is_over()
    assert await rig.client.reply(asked) == (1000, Err.ESHUTDOWN)
    await rig.client.send(raw[len(raw) - 100 * half :])
    assert await rig.client.reply(asked) == (5, Err.ESHUTDOWN)
    rig.client.leave()
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST


# ---------------------------------------------------------------- one that says ESHUTDOWN


@pytest.mark.parametrize("answered", [0, 1, 3])
async def test_refuses_and_is_left_politely(lane: Lane, answered: int) -> None:
    """So many others are answered behind the refusal, and then comes DISC."""
    rig = await lane()
    asked = [write(8, n, 8 * n) for n in range(1, 5)]
    await rig.client.ask(*asked)
    first = rig.upstream
    seen = [await first.request() for _ in asked]
    await first.send(simple(seen[0].cookie, Err.ESHUTDOWN))
    await wait_all_tasks_blocked()
    assert rig.dock.dialled == 0
    await rig.client.ask(write(8, 9, 80))  # is not for this one
    for one in seen[1 : 1 + answered]:
        await first.answer(one)
        await rig.client.reply(asked)
    for one in seen[1 + answered :]:
        await first.send(simple(one.cookie, Err.ESHUTDOWN))
    assert await first.to_end() == DISC
    second = rig.comes_back()
    again = [await second.request() for _ in range(5 - answered)]
    assert again[:-1] == [seen[0], *seen[1 + answered :]]
    assert same(again[-1], write(8, 9, 80))


async def test_refuses_and_closes(lane: Lane) -> None:
    rig = await lane()
    asked = reads(2, 8)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    await rig.upstream.send(simple(seen[1].cookie, Err.ESHUTDOWN))
    second = await is_back(rig)
    assert [await second.request() for _ in asked] == seen


async def test_refusal_while_a_payload_is_half_sent(lane: Lane, nursery: trio.Nursery) -> None:
    """Nobody would look again: it waits for the rest, and we for it."""
    rig = await lane(buffers=4096)
    (one,), big = reads(1, 8), write(MIB, 1)
    await rig.client.ask(one)
    first = rig.upstream
    seen = await first.request()
    rest = trio.Event()

    async def send() -> None:
        await rig.client.send(big.pack()[: MIB // 2])
        await rest.wait()
        await rig.client.send(big.pack()[MIB // 2 :])

    nursery.start_soon(send)
    await wait_all_tasks_blocked()
    await first.send(simple(seen.cookie, Err.ESHUTDOWN))
    await wait_all_tasks_blocked()
    nursery.start_soon(quietly, lambda _: first.to_end(), b"")
    second = rig.comes_back()
    assert await second.request() == seen
    rest.set()
    assert same(await second.request(), big)


async def test_refusal_while_sending_again_stops_in_a_payload(
    lane: Lane, nursery: trio.Nursery
) -> None:
    rig = await lane(buffers=4096)
    (one,), big = reads(1, 8), write(4 * MIB, 1)
    await rig.client.ask(one)
    seen = await rig.upstream.request()
    rig.dies()
    nursery.start_soon(quietly, rig.client.send, big.pack())
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    assert await second.request() == seen
    await wait_all_tasks_blocked()
    await second.send(simple(seen.cookie, Err.ESHUTDOWN))
    await wait_all_tasks_blocked()
    nursery.start_soon(quietly, lambda _: second.to_end(), b"")
    third = rig.comes_back()
    await wait_all_tasks_blocked()
    behind = write(8, 9)
    await rig.client.ask(behind)  # not into the payload that is being sent again
    await wait_all_tasks_blocked()
    assert await third.request() == seen
    assert same(await third.request(), big)
    assert same(await third.request(), behind)
