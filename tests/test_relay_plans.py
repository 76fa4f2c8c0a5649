"""Requests of the gateway's own, and those that have to wait for them."""

from __future__ import annotations

import pytest
import trio

from gateway.errors import SessionEnd
from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Terms
from gateway.nbd.plans import MAX_PLANS
from gateway.nbd.upgrades import Capabilities
from gateway.nbd.wire import BlockSizes
from gateway.relay import FINISH_TIMEOUT_S
from tests.relay_rig import DISC, FEATURES, MIB, Lane, lane, write
from tests.support.rawclient import Cf, Cmd, Request

__all__ = ["lane"]

POOR = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH


def poor(maximum: int = 32 * MIB) -> Terms:
    served = Capabilities(int(POOR), block_sizes=BlockSizes(1, 4096, maximum))
    return Terms("", 1 << 40, FEATURES, upstream=served, split=True)


@pytest.mark.parametrize("more", [1, 2, 3, MAX_PLANS + 1])
async def test_requests_that_had_to_wait_are_answered(lane: Lane, more: int) -> None:
    """Also when nothing else comes from the client, and their headers are few bytes."""
    rig = await lane(terms=poor())
    asked = [Request(Cmd.WRITE_ZEROES, n, 512, 1000 + n) for n in range(MAX_PLANS + more)]
    await rig.client.ask(*asked)
    answered = []
    for _ in asked:
        request = await rig.upstream.request()
        assert (request.cmd, request.payload) == (Cmd.WRITE, bytes(512))
        await rig.upstream.answer(request)
        answered.append(await rig.client.reply(asked))
    assert answered == [(one.cookie, 0) for one in asked]


async def test_flush_goes_out_while_the_client_is_silent(lane: Lane) -> None:
    rig = await lane(terms=poor())
    asked = Request(Cmd.WRITE, 0, 4, 7, Cf.FUA, b"data")
    await rig.client.ask(asked)
    request = await rig.upstream.request()
    assert (request.cmd, request.flags, request.payload) == (Cmd.WRITE, 0, b"data")
    assert rig.client.has_nothing()
    await rig.upstream.answer(request)
    flush = await rig.upstream.request()
    assert flush.cmd == Cmd.FLUSH
    assert rig.client.has_nothing()
    await rig.upstream.answer(flush)
    assert await rig.client.reply([asked]) == (7, 0)


async def test_follow_up_waits_for_the_end_of_a_payload(lane: Lane) -> None:
    first, second = Request(Cmd.TRIM, 0, 4, 7, Cf.FUA), write(MIB, 8)
    rig = await lane(
        terms=Terms(
            "",
            1 << 40,
            FEATURES,
            upstream=Capabilities(int(POOR | TransmissionFlag.SEND_TRIM)),
            split=True,
        )
    )
    raw = first.pack() + second.pack()
    await rig.client.send(raw[:1000])
    request = await rig.upstream.request()
    await rig.upstream.answer(request)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.client.send, raw[1000:])
        large = await rig.upstream.request()
    assert large.payload == second.payload
    flush = await rig.upstream.request()
    assert flush.cmd == Cmd.FLUSH
    await rig.upstream.answer_all([flush, large])
    assert {await rig.client.reply([first, second]) for _ in range(2)} == {(7, 0), (8, 0)}


async def test_disc_waits_for_plans(lane: Lane) -> None:
    rig = await lane(terms=poor(4096))
    asked = Request(Cmd.WRITE_ZEROES, 0, 20 * 4096, 7)
    await rig.client.send(asked.pack() + DISC)
    for _ in range(20):
        await rig.upstream.answer(await rig.upstream.request())
    assert await rig.client.reply([asked]) == (7, 0)
    assert await rig.ended() is SessionEnd.DISCONNECTED
    assert (await rig.upstream.take(28))[6:8] == b"\0\2"


async def test_split_write_with_both_directions_full(lane: Lane) -> None:
    """Small socket buffers; the upstream answers nothing until it has all."""
    rig = await lane(terms=poor(65536), buffers=4096)
    asked = write(4 * MIB, 7)
    got = bytearray(4 * MIB)

    async def serve() -> None:
        requests = []
        for _ in range(64):
            request = await rig.upstream.request()
            got[request.offset : request.offset + request.length] = request.payload
            requests.append(request)
        await rig.upstream.answer_all(requests)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        nursery.start_soon(rig.client.ask, asked)
        assert await rig.client.reply([asked]) == (7, 0)
    assert got == asked.payload


async def test_client_gone_between_two_parts_ends_at_once(
    lane: Lane, autojump_clock: trio.testing.MockClock
) -> None:
    rig = await lane(terms=poor(4096))
    await rig.client.send(write(3 * 4096, 7).pack()[: 28 + 4096])
    await rig.upstream.request()
    rig.client.leave()
    begun = trio.current_time()
    assert await rig.ended() is SessionEnd.CLIENT_LEFT
    assert trio.current_time() - begun <= FINISH_TIMEOUT_S  # for what the upstream still owes
