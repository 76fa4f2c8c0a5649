"""gateway.relay and gateway.lifeline: the upstream goes, another one comes, the client stays."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway.errors import SessionEnd
from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import InFlightLimits
from gateway.nbd.upgrades import Capabilities
from gateway.nbd.wire import BlockSizes
from tests import reconnect_rig
from tests.reconnect_rig import Lane, Rig
from tests.relay_rig import DISC, FEATURES, MIB, Peer, quietly, reads, same, write
from tests.support.fake_upstream import DONE, data_chunk, pattern, simple
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


async def works(rig: Rig, cookie: int = 900) -> None:
    """A request more goes through, to the newest upstream."""
    (one,) = reads(1, 512, cookie)
    await rig.client.ask(one)
    await rig.upstream.answer(await rig.upstream.request(), structured=rig.structured)
    await rig.client.read_reply(one, structured=rig.structured)


# ---------------------------------------------------------------- a loss in each phase


@pytest.mark.parametrize("structured", [False, True])
async def test_lost_while_idle(lane: Lane, structured: bool) -> None:
    rig = await lane(structured=structured)
    for turn in range(3):
        await works(rig, 900 + turn)
        await is_back(rig)
    await works(rig)
    assert [one for one, _ in rig.dock.said] == [0, 0, 0]
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.DISCONNECTED
    assert await rig.upstream.to_end() == DISC


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, 28, 100, 515, 527])
async def test_lost_within_a_reply(lane: Lane, structured: bool, cut: int) -> None:
    """The client has nothing of it until it is whole."""
    rig = await lane(structured=structured)
    asked = reads(3, 512)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    await rig.upstream.answer(seen[1], structured=structured)
    await rig.client.read_reply(asked[1], structured=structured)
    one = seen[0]
    data = bytes(512)  # other data than the next one has
    whole = (
        data_chunk(one.cookie, 0, data, flags=DONE) if structured else simple(one.cookie, 0, data)
    )
    await rig.upstream.send(whole[:cut])
    await wait_all_tasks_blocked()
    assert rig.client.has_nothing()
    second = await is_back(rig)
    again = [await second.request() for _ in range(2)]
    assert again == [seen[0], seen[2]]
    await second.answer_all(again, structured=structured)
    for request in (asked[0], asked[2]):
        await rig.client.read_reply(request, structured=structured)
    assert rig.dock.said == [(2, False)]


async def test_answers_in_front_of_the_loss_count(lane: Lane) -> None:
    """Closed at once behind them: they are in the socket."""
    rig = await lane()
    asked = [write(512, n, n * 512) for n in range(1, 4)]
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    await rig.upstream.answer_all(seen[:2])
    rig.dies()
    second = rig.comes_back()
    assert await second.request() == seen[2]
    await second.answer(seen[2])
    assert sorted([await rig.client.reply(asked) for _ in asked]) == [(1, 0), (2, 0), (3, 0)]
    assert rig.dock.said == [(1, True)]


@pytest.mark.parametrize("here", [0, 1, 2000, 4095])
async def test_lost_within_a_payload(lane: Lane, here: int) -> None:
    rig = await lane()
    one, (behind,) = write(4096, 5), reads(1, 8)
    raw = one.pack()
    await rig.client.send(raw[: 28 + here])
    assert len(await rig.upstream.take(28 + here)) == 28 + here
    second = await is_back(rig)
    await wait_all_tasks_blocked()
    await rig.client.send(raw[28 + here :] + behind.pack())
    got = await second.request()
    assert same(one, got)
    await second.answer_all([got, await second.request()])
    assert await rig.client.reply([one]) == (5, 0)
    await rig.client.read_reply(behind, structured=False)


async def test_lost_while_the_sender_is_blocked_in_a_payload(
    lane: Lane, nursery: trio.Nursery
) -> None:
    rig = await lane(buffers=4096)
    first, big = reads(1, 8)[0], write(4 * MIB, 5)
    nursery.start_soon(quietly, rig.client.send, first.pack() + big.pack())
    await rig.upstream.take(28 + MIB)
    second = await is_back(rig)
    assert same(await second.request(), first)
    got = await second.request()
    assert same(got, big)
    await second.answer(got)
    assert await rig.client.reply([big]) == (5, 0)


async def test_requests_of_the_outage_wait_and_are_sent_behind(lane: Lane) -> None:
    rig = await lane()
    first, *later = [write(512, n, n * 512) for n in range(1, 6)]
    await rig.client.ask(first)
    await rig.upstream.request()
    rig.dies()
    await wait_all_tasks_blocked()
    await rig.client.ask(*later)
    await wait_all_tasks_blocked()
    second = rig.comes_back()
    for one in (first, *later):
        got = await second.request()
        assert same(one, got)
        await second.answer(got)
        assert await rig.client.reply([one]) == (one.cookie, 0)


async def test_client_that_does_not_read(lane: Lane, nursery: trio.Nursery) -> None:
    """Its replies block the pump that would see the loss; all come, once."""
    rig = await lane(buffers=4096)
    asked = reads(8, 128 << 10)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]

    async def answer_all(peer: Peer, requests: list[Request]) -> None:
        for one in requests:
            await quietly(peer.send, simple(one.cookie, 0, pattern(one.offset, one.length)))

    nursery.start_soon(answer_all, rig.upstream, seen[:5])
    await wait_all_tasks_blocked()
    first = rig.upstream
    second = rig.comes_back()
    await rig.client.reply(asked)
    first.channel.close()

    async def answer() -> None:
        while True:
            one = await second.request()
            await second.send(simple(one.cookie, 0, pattern(one.offset, one.length)))

    nursery.start_soon(answer)
    got = {(await rig.client.reply(asked))[0] for _ in asked[1:]}
    assert len(got) == 7
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("adds", ["zeroes", "fua", "pieces"])
async def test_lost_with_requests_of_our_own_due(lane: Lane, adds: str) -> None:
    sizes = BlockSizes(1, 512, 4096)
    less = {
        "zeroes": TransmissionFlag.SEND_WRITE_ZEROES,
        "fua": TransmissionFlag.SEND_FUA,
        "pieces": TransmissionFlag(0),
    }[adds]
    below = Capabilities(FEATURES & ~less, True, sizes)
    rig = await lane(terms=Terms("", 1 << 40, FEATURES, True, upstream=below, split=True))
    one = {
        "zeroes": Request(Cmd.WRITE_ZEROES, 0, 40960, 5),
        "fua": Request(Cmd.WRITE, 0, 512, 5, flags=1, payload=b"f" * 512),
        "pieces": Request(Cmd.READ, 0, 81920, 5),
    }[adds]
    await rig.client.ask(one)
    seen = [await rig.upstream.request()]
    second = await is_back(rig)
    again = await second.request()
    assert again == seen[0]

    async def answer() -> None:
        request = again
        while True:
            await second.answer(request, structured=True)
            request = await second.request()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        if adds == "pieces":
            await rig.client.read_reply(one, structured=True)
        else:
            assert await rig.client.reply([one]) == (5, 0)
        nursery.cancel_scope.cancel()


async def test_flush_that_waits_behind_a_request_of_our_own(lane: Lane) -> None:
    """It is not walked before it can be sent or kept: else it would be failed, and sent as well."""
    below = Capabilities(
        FEATURES & ~TransmissionFlag.SEND_WRITE_ZEROES, False, BlockSizes(1, 512, 32 * MIB)
    )
    terms = Terms("", 1 << 40, FEATURES, upstream=below)
    rig = await lane(terms=terms, buffers=4096)
    one, zeroes = write(512, 1), Request(Cmd.WRITE_ZEROES, 0, MIB, 5)
    await rig.client.ask(one)
    await rig.upstream.answer(await rig.upstream.request())
    assert await rig.client.reply([one]) == (1, 0)
    await rig.client.ask(zeroes)
    await wait_all_tasks_blocked()  # the upstream does not read
    await rig.client.ask(FLUSH)
    second = await is_back(rig)
    got = await second.request()
    assert (got.cmd, got.payload) == (Cmd.WRITE, bytes(MIB))
    assert await rig.client.reply([FLUSH]) == (77, Err.EIO)
    await second.answer(got)
    assert await rig.client.reply([zeroes]) == (5, 0)
    await works(rig)


async def test_completed_writes_are_lost_and_the_flush_says_so(lane: Lane) -> None:
    rig = await lane()
    one = write(512, 1)
    await rig.client.ask(one)
    await rig.upstream.answer(await rig.upstream.request())
    assert await rig.client.reply([one]) == (1, 0)
    await rig.client.ask(FLUSH)
    assert (await rig.upstream.request()).cmd == Cmd.FLUSH
    await is_back(rig)
    assert await rig.client.reply([FLUSH]) == (77, Err.EIO)
    assert rig.dock.said == [(0, True)]
    await works(rig)


async def test_error_is_owed_to_the_next_flush(lane: Lane) -> None:
    rig = await lane()
    one = write(512, 1)
    await rig.client.ask(one)
    await rig.upstream.answer(await rig.upstream.request())
    assert await rig.client.reply([one]) == (1, 0)
    await is_back(rig)
    await rig.client.ask(FLUSH)
    assert await rig.client.reply([FLUSH]) == (77, Err.EIO)
    await rig.client.ask(FLUSH)
    await rig.upstream.answer(await rig.upstream.request())
    assert await rig.client.reply([FLUSH]) == (77, 0)


# ---------------------------------------------------------------- many losses, byte for byte


async def test_random_writes_and_reads_across_many_losses(lane: Lane) -> None:
    """Every write is where it belongs, and every read finds it."""
    rng = random.Random(5)
    rig = await lane()
    disk = bytearray(rng.randbytes(64 << 10))
    mirror = bytearray(disk)

    async def upstream() -> None:
        while True:
            peer = rig.upstream
            lives = rng.randrange(1, 12)
            for _ in range(lives):
                one = await peer.request()
                if rng.random() < 0.2:
                    break  # it goes without a word, done or not
                if one.cmd == Cmd.WRITE:
                    disk[one.offset : one.offset + one.length] = one.payload
                    await peer.send(simple(one.cookie))
                else:
                    data = bytes(disk[one.offset : one.offset + one.length])
                    await peer.send(simple(one.cookie, 0, data))
            rig.dies()
            rig.comes_back()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upstream)
        for cookie in range(200):
            offset, length = rng.randrange(60 << 10), rng.randrange(1, 4096)
            if rng.random() < 0.5:
                payload = rng.randbytes(length)
                mirror[offset : offset + length] = payload
                await rig.client.ask(Request(Cmd.WRITE, offset, length, cookie, payload=payload))
                assert await rig.client.take(16) == simple(cookie)
            else:
                await rig.client.ask(Request(Cmd.READ, offset, length, cookie))
                data = bytes(mirror[offset : offset + length])
                assert await rig.client.take(16 + length) == simple(cookie, 0, data)
        nursery.cancel_scope.cancel()
    assert disk == mirror
    assert rig.dock.dialled > 10


async def test_memory_of_an_outage_is_bounded(lane: Lane, nursery: trio.Nursery) -> None:
    """What is beyond the bounds stays in the client's socket."""
    rig = await lane(limits=InFlightLimits(requests=8, payload=MIB))
    rig.dies()
    await wait_all_tasks_blocked()
    sent = 0

    async def ask() -> None:
        nonlocal sent
        for n in range(100):
            await quietly(rig.client.send, write(256 << 10, n, n << 18).pack())
            sent += 1

    nursery.start_soon(ask)
    await wait_all_tasks_blocked()
    assert rig.relay._transmission.in_flight == 4
    assert sent < 12
    second = rig.comes_back()
    for n in range(100):
        got = await second.request()
        assert same(got, write(256 << 10, n, n << 18))
        await second.answer(got)
        assert await rig.client.reply([got._replace(cookie=n)]) == (n, 0)
