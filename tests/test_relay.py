"""gateway.relay: what passes through the two pumps, in what order, and with what buffers."""

from __future__ import annotations

import random
import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway import buffers as pool
from gateway.buffers import BUFFER_SIZE
from gateway.errors import SessionEnd
from tests import relay_rig
from tests.relay_rig import (
    BOTH_STYLES,
    DISC,
    MIB,
    READ_ONLY,
    Lane,
    die,
    quietly,
    reads,
    same,
    vanish,
    write,
)
from tests.support.fake_upstream import DONE, data_chunk, none_chunk, pattern, simple
from tests.support.rawclient import SIMPLE, Cmd, Ct, Err, Request

lane = relay_rig.lane  # the fixture

# What may be on its way in one direction: two kernel buffers, one of ours, and their overhead.
ON_THE_WAY = 2 * MIB


# ---------------------------------------------------------------- requests and replies


@BOTH_STYLES
async def test_pipelined_and_answered_out_of_order(
    lane: Lane, nursery: trio.Nursery, structured: bool
) -> None:
    rig = await lane(structured=structured)
    asked = reads(200, 3000)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    assert all(map(same, asked, seen))
    assert len({one.cookie for one in seen}) == len(seen)
    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    shuffled = [seen[i] for i in order]
    nursery.start_soon(lambda: rig.upstream.answer_all(shuffled, structured=structured))
    for i in order:
        await rig.client.read_reply(asked[i], structured=structured)
    await rig.client.send(DISC)
    assert await rig.ended() == SessionEnd.DISCONNECTED
    assert await rig.upstream.to_end() == DISC


async def test_one_cookie_for_all_requests(lane: Lane) -> None:
    """A sloppy client; the upstream must not be confused by it."""
    rig = await lane()
    flushes = [Request(Cmd.FLUSH, cookie=7) for _ in range(3)]
    await rig.client.ask(*flushes)
    seen = [await rig.upstream.request() for _ in flushes]
    assert len({one.cookie for one in seen}) == 3
    for one in reversed(seen):
        await rig.upstream.answer(one)
        assert await rig.client.reply(flushes[:1]) == (7, 0)


@pytest.mark.parametrize("length", [1, 4096, BUFFER_SIZE - 28, BUFFER_SIZE, 3 * MIB])
async def test_write_comes_whole(lane: Lane, nursery: trio.Nursery, length: int) -> None:
    rig = await lane()
    asked = [write(length, cookie) for cookie in (1, 2, 3)]
    nursery.start_soon(rig.client.ask, *asked)
    for one in asked:
        seen = await rig.upstream.request()
        assert same(one, seen)
        await rig.upstream.answer(seen)
        assert await rig.client.reply(asked) == (one.cookie, 0)


async def test_header_and_payload_that_come_apart_leave_together(lane: Lane) -> None:
    """Also when the payload takes its time, the header does not wait for it for ever."""
    rig = await lane()
    one = write(1000)
    await rig.client.send(one.pack()[:28])
    assert len(await rig.upstream.take(28)) == 28
    await rig.client.send(one.payload)
    assert await rig.upstream.take(1000) == one.payload


@BOTH_STYLES
async def test_one_byte_at_a_time(lane: Lane, structured: bool) -> None:
    """Every cut of every message, both ways."""
    rig = await lane(structured=structured, flags=READ_ONLY)
    asked = [Request(Cmd.READ, 8, 33, 5), Request(Cmd.FLUSH, cookie=6)]
    refused = write(30, 7)
    for byte in b"".join(one.pack() for one in (asked[0], refused, asked[1])):
        await rig.client.send(bytes([byte]))
        await wait_all_tasks_blocked()
    first, second = [await rig.upstream.request() for _ in asked]
    if structured:
        flags, kind, cookie, _ = await rig.client.chunk()
        assert (flags, kind, cookie) == (DONE, Ct.ERROR, 7)
        data = pattern(8, 33)
        answer = data_chunk(first.cookie, 8, data[:20]) + data_chunk(first.cookie, 28, data[20:])
        answer += none_chunk(first.cookie)
    else:
        assert await rig.client.reply([refused]) == (7, Err.EPERM)
        answer = simple(first.cookie, 0, pattern(8, 33))
    for byte in answer + simple(second.cookie):
        await rig.upstream.send(bytes([byte]))
        await wait_all_tasks_blocked()
    await rig.client.read_reply(asked[0], structured=structured)
    assert await rig.client.reply(asked) == (6, 0)


async def test_requests_that_came_with_the_last_option(lane: Lane) -> None:
    """One whole, and one that is cut in its header."""
    asked = reads(2, 512)
    stream = b"".join(one.pack() for one in asked)
    rig = await lane(first=stream[:40])
    assert same(asked[0], await rig.upstream.request())
    assert rig.upstream.has_nothing()
    await rig.client.send(stream[40:])
    assert same(asked[1], await rig.upstream.request())


@BOTH_STYLES
async def test_local_reply_waits_for_the_message_that_is_under_way(
    lane: Lane, nursery: trio.Nursery, structured: bool
) -> None:
    rig = await lane(structured=structured, flags=READ_ONLY)
    large, later = reads(2, 2 * MIB)
    await rig.client.ask(large)
    seen = await rig.upstream.request()
    data = pattern(large.offset, large.length)
    if structured:
        message = data_chunk(seen.cookie, large.offset, data, flags=DONE)
    else:
        message = simple(seen.cookie, 0, data)
    await rig.upstream.send(message[:100_000])
    await wait_all_tasks_blocked()
    # A write is refused here; that the READ behind it comes up proves that it was walked.
    await rig.client.ask(write(512, 77), later)
    assert same(later, await rig.upstream.request())
    await wait_all_tasks_blocked()
    nursery.start_soon(rig.upstream.send, message[100_000:])
    await rig.client.read_reply(large, structured=structured)
    if structured:
        assert (await rig.client.chunk())[:3] == (DONE, Ct.ERROR, 77)
    else:
        assert await rig.client.reply([write(512, 77)]) == (77, Err.EPERM)


async def test_local_replies_between_chunks_of_another_reply(lane: Lane) -> None:
    """Between two chunks a client may be told something else, and need not wait."""
    rig = await lane(structured=True, flags=READ_ONLY)
    (large,) = reads(1, 1000)
    await rig.client.ask(large)
    seen = await rig.upstream.request()
    await rig.upstream.send(data_chunk(seen.cookie, 0, pattern(0, 600)))
    assert (await rig.client.chunk())[1] == Ct.OFFSET_DATA
    await rig.client.ask(write(512, 77))
    assert (await rig.client.chunk())[:3] == (DONE, Ct.ERROR, 77)
    await rig.upstream.send(data_chunk(seen.cookie, 600, pattern(600, 400), flags=DONE))
    assert (await rig.client.chunk())[:3] == (DONE, Ct.OFFSET_DATA, large.cookie)


# ---------------------------------------------------------------- back-pressure


async def test_client_that_does_not_read(lane: Lane, nursery: trio.Nursery) -> None:
    """Holds its own replies up, and not its requests; memory stays bounded."""
    rig = await lane()
    asked = reads(32, MIB)
    await rig.client.ask(*asked)
    seen = [await rig.upstream.request() for _ in asked]
    nursery.start_soon(rig.upstream.answer_all, seen)
    await wait_all_tasks_blocked()
    assert rig.upstream.channel.bytes_written <= ON_THE_WAY
    await rig.client.ask(Request(Cmd.FLUSH, cookie=1))
    flush = await rig.upstream.request()
    assert flush.cmd == Cmd.FLUSH
    for one in asked:
        await rig.client.read_reply(one, structured=False)
    await rig.upstream.answer(flush)
    assert await rig.client.reply([Request(Cmd.FLUSH, cookie=1)]) == (1, 0)


async def test_upstream_that_does_not_read(lane: Lane, nursery: trio.Nursery) -> None:
    """Holds the client's requests up, and not the replies."""
    rig = await lane()
    (read,) = reads(1, 512)
    await rig.client.ask(read)
    seen = await rig.upstream.request()
    writes = [write(MIB, cookie) for cookie in range(1, 17)]
    nursery.start_soon(rig.client.ask, *writes)
    await wait_all_tasks_blocked()
    before = rig.near[0].bytes_read
    assert before <= ON_THE_WAY
    await rig.upstream.answer(seen)
    await rig.client.read_reply(read, structured=False)
    await wait_all_tasks_blocked()
    assert rig.near[0].bytes_read == before, "nothing was read that could not be passed on"
    for one in writes:
        assert same(one, await rig.upstream.request())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_large_reads_and_writes_cross(lane: Lane, nursery: trio.Nursery, tls: bool) -> None:
    """Through tiny buffers, with an upstream that does one thing after the other."""
    rig = await lane(buffers=4096, tls=tls)
    asked = []
    for i in range(6):
        asked += [write(300_000, 2 * i), Request(Cmd.READ, i, 300_001, 2 * i + 1)]

    async def upstream() -> None:
        for one in asked:
            seen = await rig.upstream.request()
            assert same(one, seen)
            await rig.upstream.answer(seen)

    nursery.start_soon(rig.client.ask, *asked)
    nursery.start_soon(upstream)
    for one in asked:
        assert await rig.client.reply([one]) == (one.cookie, 0)


async def test_client_that_asks_more_than_it_reads(lane: Lane, nursery: trio.Nursery) -> None:
    """Requests that are answered here: they wait in its socket, not in our memory."""
    rig = await lane(flags=READ_ONLY)
    flood = Request(Cmd.TRIM, 0, 512, 1).pack() * 200_000
    nursery.start_soon(rig.client.send, flood)
    await wait_all_tasks_blocked()
    assert rig.near[0].bytes_read <= ON_THE_WAY
    replies = await rig.client.take(SIMPLE.size * 200_000)
    assert replies == simple(1, Err.EPERM) * 200_000


# ---------------------------------------------------------------- buffers


class Buffers:
    """Counts the buffers that are borrowed and not given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out: dict[int, bytearray] = {}
        self.made = 0
        borrow, give_back = pool._borrow, pool._give_back

        def counted(size: int) -> bytearray:
            buffer = borrow(size)
            assert id(buffer) not in self.out, "lent twice"
            self.out[id(buffer)] = buffer
            return buffer

        def counted_back(buffer: bytearray) -> None:
            del self.out[id(buffer)]
            give_back(buffer)

        monkeypatch.setattr(pool, "_borrow", counted)
        monkeypatch.setattr(pool, "_give_back", counted_back)


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    return Buffers(monkeypatch)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_idle_session_holds_no_buffer(lane: Lane, buffers: Buffers, tls: bool) -> None:
    rig = await lane(tls=tls)
    assert not buffers.out
    for one in (*reads(2, 100_000), write(100_000)):
        await rig.client.ask(one)
        seen = await rig.upstream.request()
        await wait_all_tasks_blocked()
        assert not buffers.out, "while the upstream is at work"
        await rig.upstream.answer(seen)
        await rig.client.reply([one])
        await wait_all_tasks_blocked()
        assert not buffers.out
    for part in (write(512).pack()[:27], write(512).pack()[27:100]):
        await rig.client.send(part)
        await wait_all_tasks_blocked()
        assert not buffers.out, "a few bytes, or a payload that is still to come"


async def test_half_a_record_holds_no_buffer(lane: Lane, buffers: Buffers) -> None:
    """TLS wakes us, and has nothing for us yet: a client can stay so as long as it likes."""
    rig = await lane(tls=True)
    socket.socket.send(rig.client.channel.socket, b"\x17\x03\x03\x40\x00" + bytes(100))
    await wait_all_tasks_blocked()
    assert not buffers.out


@BOTH_STYLES
@pytest.mark.parametrize("first_to_go", ["client", "upstream"])
async def test_all_buffers_come_back(
    lane: Lane, nursery: trio.Nursery, buffers: Buffers, structured: bool, first_to_go: str
) -> None:
    """From many sessions that end in the middle of everything. The pool has a bound as well."""
    rigs = [await lane(structured=structured, buffers=4096) for _ in range(pool._KEPT_BUFFERS)]
    for rig in rigs:
        asked = reads(2, MIB)
        await rig.client.ask(*asked)
        first, _ = [await rig.upstream.request() for _ in asked]
        message = data_chunk(first.cookie, 0, pattern(0, MIB))
        if not structured:
            message = simple(first.cookie, 0, pattern(0, MIB))
        nursery.start_soon(quietly, rig.client.send, write(MIB).pack())
        nursery.start_soon(quietly, rig.upstream.send, message)
    await wait_all_tasks_blocked()
    assert len(buffers.out) == 2 * len(rigs), "both directions are held up"
    for rig in rigs:
        for leave in (vanish, die) if first_to_go == "client" else (die, vanish):
            leave(rig)
            await wait_all_tasks_blocked()
        await rig.ended()
    assert not buffers.out
    assert len(pool._free_buffers) <= pool._KEPT_BUFFERS
    assert all(len(one) == BUFFER_SIZE for one in pool._free_buffers)
