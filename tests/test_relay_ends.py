"""gateway.relay: every way in which a transmission phase ends, from either side or from inside."""

from __future__ import annotations

import socket
import struct

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.errors import SessionEnd
from gateway.relay import DISC_TIMEOUT_S, FINISH_TIMEOUT_S, LAST_WORD_TIMEOUT_S, LOST_TIMEOUT_S
from tests import relay_rig
from tests.relay_rig import (
    BOTH_STYLES,
    DISC,
    MIB,
    READ_ONLY,
    Lane,
    Rig,
    die,
    quietly,
    reads,
    same,
    vanish,
    write,
)
from tests.support.fake_upstream import DONE, data_chunk, pattern, simple
from tests.support.rawclient import CHUNK, SIMPLE, Cmd, Ct, Err, Request

lane = relay_rig.lane  # the fixture


# ---------------------------------------------------------------- the client ends


@pytest.mark.parametrize("sent", [0, 1, 1000, 4095])
async def test_client_leaves_inside_a_write(lane: Lane, sent: int) -> None:
    """The upstream gets EOF there, and no DISC, which it would take for data."""
    rig = await lane()
    one = write(4096)
    await rig.client.send(one.pack()[: 28 + sent])
    rig.client.leave()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT
    got = await rig.upstream.to_end()
    assert len(got) == 28 + sent
    assert got[28:] == one.payload[:sent]


async def test_client_leaves_inside_a_large_write(lane: Lane, nursery: trio.Nursery) -> None:
    rig = await lane()
    one = write(4 * MIB)

    async def client() -> None:
        await rig.client.send(one.pack()[: 3 * MIB])
        rig.client.leave()

    nursery.start_soon(client)
    got = await rig.upstream.to_end()
    assert got[28:] == one.pack()[28 : 3 * MIB]
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_client_leaves_between_requests(lane: Lane) -> None:
    rig = await lane()
    rig.client.leave()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT
    assert await rig.upstream.to_end() == DISC


async def test_client_leaves_inside_a_header(lane: Lane) -> None:
    """The upstream has seen nothing of it, so it is still between two messages."""
    rig = await lane()
    await rig.client.send(write(512).pack()[:20])
    rig.client.leave()
    assert await rig.ended() == SessionEnd.CLIENT_LEFT
    assert await rig.upstream.to_end() == DISC


async def test_client_that_only_closed_its_side_gets_its_answers(lane: Lane) -> None:
    rig = await lane()
    asked = reads(3, 512)
    await rig.client.ask(*asked)
    rig.client.leave()
    for one in asked:
        seen = await rig.upstream.request()
        assert rig.upstream.has_nothing() or one is not asked[-1]
        await rig.upstream.answer(seen)
        await rig.client.read_reply(one, structured=False)
    assert await rig.client.to_end() == b""
    assert await rig.upstream.to_end() == DISC
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_disc_waits_for_the_answers(lane: Lane) -> None:
    rig = await lane()
    asked = [*reads(2, 512), write(512)]
    await rig.client.ask(*asked)
    await rig.client.send(DISC)
    seen = [await rig.upstream.request() for _ in asked]
    for one in seen:
        await wait_all_tasks_blocked()
        assert rig.upstream.has_nothing()
        await rig.upstream.answer(one)
    for one in asked:
        assert await rig.client.reply(asked) == (one.cookie, 0)
    assert await rig.client.to_end() == b""
    assert await rig.upstream.to_end() == DISC
    assert await rig.ended() == SessionEnd.DISCONNECTED


async def test_slow_client_gets_what_it_asked_for_before_disc(
    lane: Lane, nursery: trio.Nursery
) -> None:
    rig = await lane()
    asked = reads(4, MIB)
    await rig.client.ask(*asked)
    await rig.client.send(DISC)
    seen = [await rig.upstream.request() for _ in asked]
    nursery.start_soon(rig.upstream.answer_all, seen)
    await wait_all_tasks_blocked()
    for one in asked:
        await rig.client.read_reply(one, structured=False)
    assert await rig.client.to_end() == b""
    assert await rig.ended() == SessionEnd.DISCONNECTED


@pytest.mark.parametrize("end", [SessionEnd.DISCONNECTED, SessionEnd.SHUTDOWN])
async def test_last_answer_is_walked_but_not_yet_sent(lane: Lane, end: SessionEnd) -> None:
    """Nothing is in flight any more, and still the client has not got it all."""
    rig = await lane()
    rig.near[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    (one,) = reads(1, 100_000)
    await rig.client.ask(one)
    await rig.upstream.answer(await rig.upstream.request())
    await wait_all_tasks_blocked()
    if end is SessionEnd.DISCONNECTED:
        await rig.client.send(DISC)
    else:
        rig.relay.shutdown()
    await wait_all_tasks_blocked()
    assert rig.end is None
    await rig.client.read_reply(one, structured=False)
    assert await rig.client.to_end() == b""
    assert await rig.ended() == end


async def test_bytes_behind_disc_go_nowhere(lane: Lane) -> None:
    rig = await lane()
    flush = Request(Cmd.FLUSH, cookie=1)
    await rig.client.send(flush.pack() + DISC + flush.pack() + b"garbage")
    seen = await rig.upstream.request()
    await rig.client.ask(flush)
    await wait_all_tasks_blocked()
    await rig.upstream.answer(seen)
    assert await rig.client.reply([flush]) == (1, 0)
    assert await rig.client.to_end() == b""
    assert await rig.upstream.to_end() == DISC
    assert await rig.ended() == SessionEnd.DISCONNECTED


async def test_client_that_breaks_the_protocol(lane: Lane) -> None:
    rig = await lane()
    flush = Request(Cmd.FLUSH, cookie=1)
    await rig.client.send(flush.pack() + Request(Cmd.READ, 0, 512).pack(magic=0x12345678))
    assert (await rig.upstream.request()).cmd == Cmd.FLUSH
    assert await rig.client.to_end() == b""
    assert await rig.upstream.take(28) == DISC
    await rig.upstream.send(simple(1))
    assert await rig.ended() == SessionEnd.CLIENT_BROKE_PROTOCOL
    assert "0x12345678" in rig.relay.detail


async def test_answers_after_disc_are_waited_for_but_not_for_ever(
    lane: Lane, mock_clock: MockClock
) -> None:
    rig = await lane()
    await rig.client.send(Request(Cmd.FLUSH).pack() + DISC)
    await rig.upstream.request()
    await wait_all_tasks_blocked()
    mock_clock.jump(DISC_TIMEOUT_S - 1)
    await wait_all_tasks_blocked()
    assert rig.upstream.has_nothing()
    mock_clock.jump(1.1)
    assert await rig.client.to_end() == b""
    assert await rig.upstream.take(28) == DISC
    await wait_all_tasks_blocked()
    mock_clock.jump(FINISH_TIMEOUT_S)
    assert await rig.ended() == SessionEnd.DISCONNECTED


async def test_session_that_is_cut_while_it_writes_to_the_upstream(lane: Lane) -> None:
    """The upstream gets a part of the write, and no DISC: it would take that for data."""
    rig = await lane()
    rig.near[1].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    one = write(100_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(quietly, rig.client.send, one.pack())
        assert (await rig.upstream.take(28))[:4] == one.pack()[:4]
        await wait_all_tasks_blocked()
        rig.scope.cancel()
        got = await rig.upstream.to_end()
        nursery.cancel_scope.cancel()
    assert len(got) < len(one.payload)
    assert one.payload.startswith(got)


# ---------------------------------------------------------------- a client that is gone


@BOTH_STYLES
async def test_upstream_may_finish_its_answers_to_a_client_that_is_gone(
    lane: Lane, nursery: trio.Nursery, structured: bool
) -> None:
    """Some servers do not survive a connection that is closed under their replies."""
    rig = await lane(structured=structured)
    asked = reads(8, MIB)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    vanish(rig)
    await rig.upstream.answer_all(seen, structured=structured)  # raises if it is cut off
    assert await rig.upstream.to_end() == DISC
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_client_vanishes_inside_a_reply(lane: Lane) -> None:
    rig = await lane()
    asked = reads(2, 4 * MIB)
    await rig.client.ask(*asked)
    first, second = [await rig.upstream.request() for _ in asked]
    message = simple(first.cookie, 0, pattern(first.offset, first.length))
    await rig.upstream.send(message[:100_000])
    await rig.client.take(50_000)
    vanish(rig)
    await rig.upstream.send(message[100_000:])
    await rig.upstream.answer(second)
    assert await rig.upstream.to_end() == DISC
    assert await rig.ended() == SessionEnd.CLIENT_LEFT


async def test_session_that_is_cut_lets_the_upstream_finish_its_answers(
    lane: Lane, mock_clock: MockClock
) -> None:
    """If it does so at once: a second here, and not for ever."""
    rig = await lane()
    asked = reads(2, MIB)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    rig.scope.cancel()
    await wait_all_tasks_blocked()
    await rig.upstream.answer(seen[0])
    await wait_all_tasks_blocked()
    assert rig.near[1].socket.fileno() >= 0
    mock_clock.jump(LAST_WORD_TIMEOUT_S + 0.1)
    assert await rig.upstream.to_end() == DISC


async def test_upstream_that_never_finishes_is_closed(lane: Lane, mock_clock: MockClock) -> None:
    rig = await lane()
    await rig.client.ask(*reads(2, 512))
    await rig.upstream.request()
    await rig.upstream.answer(await rig.upstream.request())
    await rig.client.take(10)
    vanish(rig)
    await wait_all_tasks_blocked()
    mock_clock.jump(DISC_TIMEOUT_S)
    await wait_all_tasks_blocked()
    assert rig.end == SessionEnd.CLIENT_LEFT
    assert rig.near[1].socket.fileno() >= 0
    mock_clock.jump(FINISH_TIMEOUT_S)
    assert await rig.ended() == SessionEnd.CLIENT_LEFT
    assert await rig.upstream.to_end() == DISC


# ---------------------------------------------------------------- shutdown


async def test_shutdown_of_an_idle_session(lane: Lane) -> None:
    rig = await lane()
    rig.relay.shutdown()
    assert await rig.ended() == SessionEnd.SHUTDOWN
    assert await rig.client.to_end() == b""
    assert await rig.upstream.to_end() == DISC


async def test_shutdown_waits_for_what_is_in_flight(lane: Lane) -> None:
    """And refuses what comes meanwhile; the upstream sees nothing of that."""
    rig = await lane()
    asked, late = reads(2, 512), [Request(Cmd.FLUSH, cookie=1), write(512, 2)]
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    rig.relay.shutdown()
    await rig.client.ask(*late)
    for one in late:
        assert await rig.client.reply(late) == (one.cookie, Err.ESHUTDOWN)
    for one in seen:
        await wait_all_tasks_blocked()
        assert rig.end is None
        assert rig.upstream.has_nothing()
        await rig.upstream.answer(one)
    for one in asked:
        assert await rig.client.reply(asked) == (one.cookie, 0)
    assert await rig.client.to_end() == b""
    assert await rig.upstream.to_end() == DISC
    assert await rig.ended() == SessionEnd.SHUTDOWN


async def test_shutdown_inside_a_write(lane: Lane) -> None:
    """Its payload is awaited, passed on and answered."""
    rig = await lane()
    one = write(100_000)
    await rig.client.send(one.pack()[:50_000])
    await wait_all_tasks_blocked()
    rig.relay.shutdown()
    await wait_all_tasks_blocked()
    assert rig.end is None
    await rig.client.send(one.pack()[50_000:])
    seen = await rig.upstream.request()
    assert same(one, seen)
    await rig.upstream.answer(seen)
    assert await rig.client.reply([one]) == (1, 0)
    assert await rig.ended() == SessionEnd.SHUTDOWN
    assert await rig.upstream.to_end() == DISC


async def test_shutdown_inside_a_write_that_is_refused(lane: Lane) -> None:
    rig = await lane(flags=READ_ONLY)
    one = write(100_000)
    await rig.client.send(one.pack()[:50_000])
    await wait_all_tasks_blocked()
    rig.relay.shutdown()
    await rig.client.send(one.pack()[50_000:])
    assert await rig.client.reply([one]) == (1, Err.EPERM)
    assert await rig.ended() == SessionEnd.SHUTDOWN
    assert await rig.upstream.to_end() == DISC


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_slow_client_gets_all_its_answers_after_shutdown(
    lane: Lane, nursery: trio.Nursery, tls: bool
) -> None:
    rig = await lane(tls=tls)
    asked = reads(8, MIB)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    nursery.start_soon(rig.upstream.answer_all, seen)
    await wait_all_tasks_blocked()
    rig.relay.shutdown()
    for one in asked:
        await wait_all_tasks_blocked()
        assert await rig.client.reply(asked) == (one.cookie, 0)
    assert await rig.ended() == SessionEnd.SHUTDOWN
    assert await rig.upstream.to_end() == DISC


async def test_shutdown_gives_local_replies_their_turn(lane: Lane) -> None:
    """Refused requests whose answers wait behind a reply that the client has not read yet."""
    rig = await lane()
    (large,) = reads(1, 4 * MIB)
    await rig.client.ask(large)
    seen = await rig.upstream.request()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.upstream.answer, seen)
        await wait_all_tasks_blocked()
        rig.relay.shutdown()
        flush = Request(Cmd.FLUSH, cookie=1)
        await rig.client.ask(flush)
        await wait_all_tasks_blocked()
        await rig.client.read_reply(large, structured=False)
        assert await rig.client.reply([flush]) == (1, Err.ESHUTDOWN)
    assert await rig.ended() == SessionEnd.SHUTDOWN


# ---------------------------------------------------------------- the upstream ends


async def leaves_in_order(rig: Rig) -> None:
    """What is asked of a lost upstream is refused, until the client disconnects."""
    flush, late = Request(Cmd.FLUSH, cookie=91), write(300_000, 92)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.client.ask, flush, late)
        assert await rig.client.reply([flush]) == (91, Err.ESHUTDOWN)
        assert await rig.client.reply([late]) == (92, Err.ESHUTDOWN)
    await rig.client.send(DISC)
    assert await rig.client.to_end() == b""
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST


async def test_upstream_dies_when_nothing_is_asked_of_it(lane: Lane) -> None:
    rig = await lane()
    die(rig)
    await wait_all_tasks_blocked()
    await leaves_in_order(rig)


async def test_upstream_dies_with_requests_in_flight(lane: Lane) -> None:
    rig = await lane()
    asked = [*reads(2, 512), write(512, 1)]
    await rig.client.ask(*asked)
    for _ in asked:
        await rig.upstream.request()
    die(rig)
    for one in asked:
        assert await rig.client.reply(asked) == (one.cookie, Err.ESHUTDOWN)
    await leaves_in_order(rig)


async def test_upstream_dies_and_leaves_answers_behind(lane: Lane) -> None:
    """They are good answers. It closed without having read all, so the end is a reset."""
    rig = await lane()
    asked = reads(3, 512)
    await rig.client.ask(*asked)
    answers = b""
    for _ in asked[:2]:
        seen = await rig.upstream.request()
        answers += simple(seen.cookie, 0, pattern(seen.offset, seen.length))
    await rig.client.ask(write(512, 1))  # stays unread
    await wait_all_tasks_blocked()
    await rig.upstream.send(answers)
    die(rig)
    assert await rig.client.reply(asked) == (asked[0].cookie, 0)
    assert await rig.client.reply(asked) == (asked[1].cookie, 0)
    assert await rig.client.reply(asked) == (asked[2].cookie, Err.ESHUTDOWN)
    assert await rig.client.reply([write(512, 1)]) == (1, Err.ESHUTDOWN)


async def test_upstream_dies_inside_a_reply_header(lane: Lane) -> None:
    rig = await lane()
    (one,) = reads(1, 512)
    await rig.client.ask(one)
    seen = await rig.upstream.request()
    await rig.upstream.send(simple(seen.cookie)[:9])
    await wait_all_tasks_blocked()
    die(rig)
    assert await rig.client.reply([one]) == (one.cookie, Err.ESHUTDOWN)
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST


@pytest.mark.parametrize("sent", [0, 1, 100_000, 599_999])
async def test_upstream_dies_inside_a_simple_reply(lane: Lane, sent: int) -> None:
    """The promised bytes cannot be taken back: the client is hung up on, without false data."""
    rig = await lane()
    (one,) = reads(1, 600_000)
    await rig.client.ask(one)
    seen = await rig.upstream.request()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.upstream.send, simple(seen.cookie, 0, pattern(0, sent)))
        assert await rig.client.take(SIMPLE.size) == simple(one.cookie)
        assert await rig.client.take(sent) == pattern(0, sent)
    die(rig)
    assert await rig.client.to_end() == b""
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST


@pytest.mark.parametrize("sent", [1, 100_000, 599_999])
async def test_upstream_dies_inside_a_chunk(lane: Lane, nursery: trio.Nursery, sent: int) -> None:
    """The chunk is filled up with zeroes, and then said to have failed."""
    rig = await lane(structured=True)
    (one,) = reads(1, 600_000)
    await rig.client.ask(one)
    seen = await rig.upstream.request()
    message = data_chunk(seen.cookie, 0, pattern(0, 600_000), flags=DONE)

    async def upstream() -> None:
        await rig.upstream.send(message[: CHUNK.size + 8 + sent])
        die(rig)

    nursery.start_soon(upstream)
    flags, kind, cookie, payload = await rig.client.chunk()
    assert (flags, kind, cookie) == (0, Ct.OFFSET_DATA, one.cookie)
    assert payload[8:] == pattern(0, sent) + bytes(600_000 - sent)
    flags, kind, cookie, payload = await rig.client.chunk()
    assert (flags, kind, cookie) == (DONE, Ct.ERROR, one.cookie)
    assert payload[:4] == struct.pack(">I", Err.ESHUTDOWN)
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST


@pytest.mark.parametrize("sent", [0, 1000, 200_000])
async def test_upstream_dies_inside_a_write(lane: Lane, sent: int) -> None:
    """The rest of the payload is taken for payload, and the answer comes behind it."""
    rig = await lane()
    one = write(300_000)
    message = one.pack() + Request(Cmd.FLUSH, cookie=2).pack()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.client.send, message[: 28 + sent])
        await rig.upstream.take(28 + sent)
    die(rig)
    await wait_all_tasks_blocked()
    assert rig.client.has_nothing()
    await rig.client.send(message[28 + sent :])
    assert await rig.client.reply([one]) == (1, Err.ESHUTDOWN)
    assert await rig.client.reply([Request(Cmd.FLUSH, cookie=2)]) == (2, Err.ESHUTDOWN)
    await leaves_in_order(rig)


async def test_upstream_dies_while_it_is_written_to(lane: Lane, nursery: trio.Nursery) -> None:
    rig = await lane()
    one = write(8 * MIB)
    nursery.start_soon(rig.client.ask, one)
    await wait_all_tasks_blocked()
    die(rig)
    assert await rig.client.reply([one]) == (1, Err.ESHUTDOWN)
    await leaves_in_order(rig)


async def test_upstream_breaks_the_protocol(lane: Lane) -> None:
    """What came before the fault is passed on; the rest is as if the upstream had died."""
    rig = await lane()
    asked = reads(2, 512)
    await rig.client.ask(*asked)
    first, _ = [await rig.upstream.request() for _ in asked]
    await rig.upstream.send(simple(first.cookie, 0, pattern(0, 512)) + b"HTTP/1.1 200 OK\r\n")
    assert await rig.client.reply(asked) == (asked[0].cookie, 0)
    assert await rig.client.reply(asked) == (asked[1].cookie, Err.ESHUTDOWN)
    assert await rig.upstream.to_end() == b"", "no DISC: it might take that for anything"
    await leaves_in_order(rig)
    assert "reply magic" in rig.relay.detail


async def test_upstream_that_shuts_down(lane: Lane) -> None:
    """NBD_ESHUTDOWN: we disconnect once all is answered, and tell the client the same."""
    rig = await lane()
    asked = reads(2, 512)
    await rig.client.ask(*asked)
    first, second = [await rig.upstream.request() for _ in asked]
    await rig.upstream.send(simple(first.cookie, Err.ESHUTDOWN))
    assert await rig.client.reply(asked) == (asked[0].cookie, Err.ESHUTDOWN)
    await wait_all_tasks_blocked()
    assert rig.upstream.has_nothing()
    await rig.upstream.answer(second)
    assert await rig.client.reply(asked) == (asked[1].cookie, 0)
    assert await rig.upstream.to_end() == DISC
    await leaves_in_order(rig)


@pytest.mark.parametrize("reading", [True, False])
async def test_client_of_a_lost_upstream_may_not_stay_for_ever(
    lane: Lane, mock_clock: MockClock, reading: bool
) -> None:
    rig = await lane()
    asked = reads(20_000, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.client.ask(*asked))
        for _ in asked:
            await rig.upstream.request()
    die(rig)
    await wait_all_tasks_blocked()
    if reading:
        replies = await rig.client.take(SIMPLE.size * len(asked))
        assert replies == b"".join(simple(one.cookie, Err.ESHUTDOWN) for one in asked)
    mock_clock.jump(LOST_TIMEOUT_S - 1)
    await wait_all_tasks_blocked()
    assert rig.end is None
    mock_clock.jump(1.1)
    assert await rig.ended() == SessionEnd.UPSTREAM_LOST
