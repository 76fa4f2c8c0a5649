"""Requests in other words: zeroes that are written, FUA as a flush, requests that are split."""

from __future__ import annotations

import pytest

from gateway.nbd.constants import Cmd, CmdFlag, Error
from gateway.nbd.pairing import Terms
from gateway.nbd.plans import MAX_PLANS, READS_UNDER_WAY, WRITES_UNDER_WAY
from gateway.nbd.upgrades import Capabilities
from gateway.nbd.wire import BlockSizes
from tests.nbd.support import (
    ALL_FEATURES,
    DONE,
    MIB,
    Req,
    Tf,
    all_cuts,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    hole_chunk,
    none_chunk,
    read,
    simple,
    write,
)
from tests.nbd.walker import Walker, parse_replies

FEW = Tf.HAS_FLAGS | Tf.SEND_FLUSH | Tf.SEND_TRIM  # no FUA, no WRITE_ZEROES
FUA = CmdFlag.FUA
MAX = 4096  # payload of the upstream


def poor(
    *,
    size: int = MIB,
    below: int = int(FEW),
    structured: bool = False,
    chunks_below: bool = False,
    maximum: int = MAX,
    split: bool = True,
) -> Terms:
    """A client that was told everything, over an upstream that has little."""
    served = Capabilities(below, chunks_below, BlockSizes(1, 512, maximum))
    return Terms(
        "", size, ALL_FEATURES, structured_replies=structured, upstream=served, split=split
    )


def sent(relay: Walker) -> list[tuple[int, int, int, int]]:
    return [(one.kind, one.flags, one.offset, one.length) for one in relay.forwarded]


def answer(relay: Walker, *numbers: int, error: int = 0) -> None:
    relay.replies([simple(number, error) for number in numbers])


def only_reply(relay: Walker) -> tuple[int, int]:
    (seen,) = parse_replies(bytes(relay.client))
    assert seen.final
    return seen.cookie, seen.error


# -- FUA


@pytest.mark.parametrize("kind", [Cmd.WRITE, Cmd.TRIM])
def test_flush_follows_once_the_command_has_succeeded(kind: int) -> None:
    payload = b"data" if kind == Cmd.WRITE else b""
    raw = Req(kind, 8, 4, 7, FUA, payload).pack()
    for pieces in all_cuts(raw):
        relay = Walker(poor()).requests(pieces)
        assert sent(relay) == [(kind, 0, 8, 4)]
        assert relay.forwarded[0].payload == payload
        answer(relay, 1)
        assert sent(relay)[1:] == [(Cmd.FLUSH, 0, 0, 0)]
        assert not relay.client
        assert not relay.machine.idle
        answer(relay, 2)
        assert only_reply(relay) == (7, 0)
        assert relay.machine.idle


def test_no_flush_behind_a_command_that_failed() -> None:
    relay = Walker(poor()).requests([write(0, b"data", 7, FUA)])
    answer(relay, 1, error=Error.EIO)
    assert len(relay.forwarded) == 1
    assert only_reply(relay) == (7, Error.EIO)


def test_error_of_the_flush_is_the_answer() -> None:
    relay = Walker(poor()).requests([write(0, b"data", 7, FUA)])
    answer(relay, 1)
    answer(relay, 2, error=Error.ENOSPC)
    assert only_reply(relay) == (7, Error.ENOSPC)


def test_fua_is_taken_off_what_changes_nothing() -> None:
    relay = Walker(poor()).requests([read(0, 4, 7, FUA)])
    assert sent(relay) == [(Cmd.READ, 0, 0, 4)]


def test_fua_of_the_upstream_itself_goes_with_every_part() -> None:
    relay = Walker(poor(below=int(ALL_FEATURES))).requests([write(0, b"w" * (MAX + 4), 7, FUA)])
    assert sent(relay) == [(Cmd.WRITE, FUA, 0, MAX), (Cmd.WRITE, FUA, MAX, 4)]


# -- zeroes


def test_zeroes_are_written_a_few_at_a_time() -> None:
    count = WRITES_UNDER_WAY + 2
    length = (count - 1) * MAX + 100
    relay = Walker(poor()).requests([Req(Cmd.WRITE_ZEROES, 50, length, 7, CmdFlag.NO_HOLE).pack()])
    assert len(relay.forwarded) == WRITES_UNDER_WAY
    for number in range(1, count + 1):
        assert not relay.client
        answer(relay, number)
    expected = [(Cmd.WRITE, 0, 50 + at * MAX, MAX) for at in range(count - 1)]
    assert sent(relay) == [*expected, (Cmd.WRITE, 0, 50 + (count - 1) * MAX, 100)]
    assert all(one.payload == bytes(one.length) for one in relay.forwarded)
    assert only_reply(relay) == (7, 0)


def test_zeroes_with_fua_are_flushed() -> None:
    relay = Walker(poor()).requests([Req(Cmd.WRITE_ZEROES, 0, 8, 7, FUA).pack()])
    answer(relay, 1)
    assert sent(relay)[1:] == [(Cmd.FLUSH, 0, 0, 0)]


def test_zeroes_with_the_upstreams_own_fua() -> None:
    below = int(FEW | Tf.SEND_FUA)
    relay = Walker(poor(below=below)).requests([Req(Cmd.WRITE_ZEROES, 0, 8, 7, FUA).pack()])
    assert sent(relay) == [(Cmd.WRITE, FUA, 0, 8)]


def test_fast_zero_fails_at_once() -> None:
    flags = CmdFlag.FAST_ZERO
    relay = Walker(poor()).requests([Req(Cmd.WRITE_ZEROES, 0, 8, 7, flags).pack()])
    assert not relay.upstream
    assert only_reply(relay) == (7, Error.ENOTSUP)


def test_first_error_ends_the_zeroing() -> None:
    relay = Walker(poor()).requests([Req(Cmd.WRITE_ZEROES, 0, 100 * MAX, 7, FUA).pack()])
    answer(relay, 2, error=Error.ENOSPC)
    answer(relay, 1, error=Error.EIO)
    answer(relay, 3)
    assert not relay.client
    answer(relay, 4)
    assert only_reply(relay) == (7, Error.ENOSPC)
    assert len(relay.forwarded) == WRITES_UNDER_WAY
    assert relay.machine.idle


def test_follow_ups_that_are_due_are_given_up_when_one_fails() -> None:
    """They could not be sent yet: the upstream is owed a payload."""
    relay = Walker(poor()).requests([Req(Cmd.WRITE_ZEROES, 0, 100 * MAX, 7).pack()])
    raw = write(0, b"12345678", 8)
    relay.requests([raw[:-2]])
    answer(relay, 1, 2)
    assert relay.machine.follow_ups_due
    answer(relay, 3, error=Error.EIO)
    assert not relay.machine.follow_ups_due
    answer(relay, 4)
    assert only_reply(relay) == (7, Error.EIO)
    relay.requests([raw[-2:]])
    assert len(relay.forwarded) == WRITES_UNDER_WAY + 1


def test_zeroes_of_4_gib_are_bounded_batches_out_of_one_buffer() -> None:
    given = poor(size=1 << 33, maximum=32 * MIB)
    relay = Walker(given)
    buffer = bytearray(Req(Cmd.WRITE_ZEROES, 0, (1 << 32) - 512, 7).pack())
    relay.machine.requests(buffer, 0, len(buffer))
    batches = 0
    while relay.machine.follow_ups_due:
        header, *zeroes = relay.machine.take_follow_ups()
        assert len(header) == 28
        assert sum(map(len, zeroes)) == 32 * MIB
        assert len({id(one.obj) for one in zeroes if isinstance(one, memoryview)}) == 1
        batches += 1
    assert batches == WRITES_UNDER_WAY


# -- writes that are split


@pytest.mark.parametrize("structured", [False, True])
def test_write_is_split_around_its_payload(structured: bool) -> None:
    payload = bytes(range(250)) * 40
    raw = write(100, payload, 7)
    for at in [1, 27, 28, 29, 28 + MAX, 29 + MAX, 28 + 2 * MAX, len(raw) - 1]:
        relay = Walker(poor(structured=structured)).requests([raw[:at]])
        for number in range(1, 1 + (at - 28) // MAX):
            answer(relay, number)  # each as soon as it is whole
        done = max(0, (at - 28) // MAX)
        relay.requests([raw[at:]])
        assert sent(relay) == [
            (Cmd.WRITE, 0, 100, MAX),
            (Cmd.WRITE, 0, 100 + MAX, MAX),
            (Cmd.WRITE, 0, 100 + 2 * MAX, len(payload) - 2 * MAX),
        ]
        assert b"".join(one.payload for one in relay.forwarded) == payload
        for number in range(1 + done, 4):
            assert not relay.client
            answer(relay, number)
        assert relay.machine.upstream_fault is None
        assert only_reply(relay) == (7, 0)


def test_rest_of_a_write_that_failed_is_thrown_away() -> None:
    raw = write(0, b"w" * (3 * MAX), 7) + read(0, 4, 8)
    relay = Walker(poor()).requests([raw[: 28 + MAX + 10]])
    answer(relay, 1, error=Error.EIO)
    relay.requests([raw[28 + MAX + 10 : -40]])
    assert not relay.client
    relay.requests([raw[-40:]])
    answer(relay, 2)
    assert sent(relay)[:2] == [(Cmd.WRITE, 0, 0, MAX), (Cmd.WRITE, 0, MAX, MAX)]
    assert only_reply(relay) == (7, Error.EIO)
    assert sent(relay)[2:] == [(Cmd.READ, 0, 0, 4)]


def test_write_without_the_upgrade_is_the_upstreams_own_business() -> None:
    relay = Walker(poor(split=False)).requests([write(0, b"w" * (2 * MAX), 7)])
    assert sent(relay) == [(Cmd.WRITE, 0, 0, 2 * MAX)]


# -- reads that are split


def test_simple_read_is_joined_whatever_the_order() -> None:
    data = bytes(range(256)) * 40
    relay = Walker(poor()).requests([read(0, len(data), 7)])
    assert [one.length for one in relay.forwarded] == [MAX, MAX, len(data) - 2 * MAX]
    for number in (3, 1, 2):
        part = relay.forwarded[number - 1]
        raw = simple(number, 0, data[part.offset :][: part.length])
        relay.replies([raw[:5], raw[5:100], raw[100:]])
    (seen,) = parse_replies(bytes(relay.client), {7: len(data)})
    assert (seen.cookie, seen.error, seen.data) == (7, 0, data)


def test_one_simple_read_is_held_at_a_time() -> None:
    relay = Walker(poor()).requests([read(0, 2 * MAX, 7) + read(MAX, 2 * MAX, 8)])
    assert len(relay.forwarded) == 2
    relay.replies([simple(1, 0, b"a" * MAX), simple(2, Error.EIO)])
    assert parse_replies(bytes(relay.client))[0][:4] == (7, None, True, Error.EIO)
    assert [one.offset for one in relay.forwarded[2:]] == [MAX, 2 * MAX]
    relay.replies([simple(3, 0, b"b" * MAX), simple(4, 0, b"c" * MAX)])
    assert bytes(relay.client[16:]) == simple(8, 0, b"b" * MAX + b"c" * MAX)


def test_chunks_of_the_parts_are_one_reply() -> None:
    below = int(ALL_FEATURES)
    given = poor(below=below, structured=True, chunks_below=True)
    raw = (
        data_chunk(2, MAX, b"b" * MAX, flags=DONE)
        + hole_chunk(1, 100, MAX - 100)
        + data_chunk(1, 0, b"a" * 100)
        + none_chunk(1)
    )
    for pieces in [[raw], *([raw[:at], raw[at:]] for at in range(1, len(raw), 37))]:
        relay = Walker(given).requests([read(0, 2 * MAX, 7)]).replies(pieces)
        assert relay.machine.upstream_fault is None
        disk = bytearray(b"?" * 2 * MAX)
        *content, last = parse_replies(bytes(relay.client))
        assert (last.cookie, last.kind, last.final) == (7, 0, True)
        for seen in content:
            assert not seen.final
            offset = int.from_bytes(seen.data[:8], "big")
            length = int.from_bytes(seen.data[8:], "big") if seen.kind == 2 else 0
            data = bytes(length) if seen.kind == 2 else seen.data[8:]
            disk[offset : offset + len(data)] = data
        assert disk == b"a" * 100 + bytes(MAX - 100) + b"b" * MAX
        assert relay.machine.idle


def test_first_error_chunk_of_the_parts_is_the_last_word() -> None:
    given = poor(below=int(ALL_FEATURES), structured=True, chunks_below=True)
    relay = Walker(given).requests([read(0, 2 * MAX, 7)])
    relay.replies(
        [
            error_offset_chunk(2, Error.EIO, MAX + 5, b"bad sector", flags=0),
            error_chunk(2, Error.ENOMEM, b"and more"),
            error_chunk(1, Error.EPERM, b"later"),
        ]
    )
    (seen,) = parse_replies(bytes(relay.client))
    assert (seen.cookie, seen.final, seen.error) == (7, True, Error.EIO)
    assert seen.data[6:] == b"bad sector" + (MAX + 5).to_bytes(8, "big")


def test_error_behind_data_in_one_part() -> None:
    given = poor(below=int(ALL_FEATURES), structured=True, chunks_below=True)
    relay = Walker(given).requests([read(0, 2 * MAX, 7)])
    relay.replies([error_chunk(1, Error.EIO, flags=0), data_chunk(1, 0, b"a" * MAX, flags=DONE)])
    relay.replies([data_chunk(2, MAX, b"b" * MAX, flags=DONE)])
    *_, last = parse_replies(bytes(relay.client))
    assert (last.final, last.error) == (True, Error.EIO)


def test_unfragmented_read_that_is_split_has_one_chunk() -> None:
    given = poor(below=int(ALL_FEATURES), structured=True, chunks_below=True)
    relay = Walker(given).requests([read(0, 2 * MAX, 7, CmdFlag.DF)])
    assert [one.flags for one in relay.forwarded] == [0, 0]
    relay.replies([hole_chunk(2, MAX, MAX, flags=DONE), data_chunk(1, 0, b"a" * MAX, flags=DONE)])
    assert relay.client == data_chunk(7, 0, b"a" * MAX + bytes(MAX), flags=DONE)


def test_unfragmented_read_over_an_upstream_that_fragments() -> None:
    below = int(ALL_FEATURES & ~Tf.SEND_DF)
    given = poor(below=below, structured=True, chunks_below=True)
    relay = Walker(given).requests([read(0, 100, 7, CmdFlag.DF)])
    relay.replies([hole_chunk(1, 50, 50), data_chunk(1, 0, b"a" * 50, flags=DONE)])
    assert relay.client == data_chunk(7, 0, b"a" * 50 + bytes(50), flags=DONE)


def test_unfragmented_read_has_a_bound() -> None:
    given = poor(size=1 << 40, below=int(ALL_FEATURES), structured=True, chunks_below=True)
    relay = Walker(given).requests([read(0, 1 << 30, 7, CmdFlag.DF)])
    assert not relay.upstream
    assert only_reply(relay) == (7, Error.EOVERFLOW)


def test_simple_upstream_without_the_upgrade_bounds_a_read() -> None:
    given = poor(size=1 << 40, structured=True, split=False)
    relay = Walker(given).requests([read(0, 1 << 30, 7)])
    assert only_reply(relay) == (7, Error.EINVAL)


def test_long_read_has_few_parts_under_way() -> None:
    relay = Walker(poor(structured=True)).requests([read(0, 100 * MAX, 7)])
    assert len(relay.forwarded) == READS_UNDER_WAY
    relay.replies([simple(1, 0, bytes(MAX))])
    assert len(relay.forwarded) == READS_UNDER_WAY + 1


# -- bounds, and ends


def test_request_waits_while_too_many_plans_are_under_way() -> None:
    raw = b"".join(Req(Cmd.TRIM, at, 1, at, FUA).pack() for at in range(MAX_PLANS + 1))
    relay = Walker(poor()).requests([raw])
    assert relay.machine.crowded
    assert relay.machine.full
    assert len(relay.forwarded) == MAX_PLANS
    answer(relay, 1)
    assert relay.machine.crowded
    answer(relay, MAX_PLANS + 1)
    assert not relay.machine.crowded
    assert relay.forwarded[-1].offset == MAX_PLANS


def test_nothing_follows_once_the_upstream_says_it_ends() -> None:
    zeroes = Req(Cmd.WRITE_ZEROES, 0, 100 * MAX, 7).pack()
    raw = zeroes + write(0, b"w", 8, FUA) + read(0, 2 * MAX, 9) + read(0, 2 * MAX, 10)
    relay = Walker(poor()).requests([raw])
    count = len(relay.forwarded)
    relay.replies([simple(one, Error.ESHUTDOWN) for one in (1, 2)])
    assert relay.machine.upstream_ends
    others = [n for n, one in enumerate(relay.forwarded, 1) if n > 2 and one.kind == Cmd.WRITE]
    relay.replies([simple(number) for number in others])
    reads = [n for n, one in enumerate(relay.forwarded, 1) if one.kind == Cmd.READ]
    relay.replies([simple(number, 0, b"a" * MAX) for number in reads])
    assert len(relay.forwarded) == count
    seen = parse_replies(bytes(relay.client), {9: 2 * MAX})
    gone = Error.ESHUTDOWN
    assert sorted((one.cookie, one.error) for one in seen) == [
        (7, gone),
        (8, gone),
        (9, 0),
        (10, gone),
    ]
    assert relay.machine.idle


def test_lost_upstream_answers_every_plan_once() -> None:
    raw = Req(Cmd.WRITE_ZEROES, 0, 100 * MAX, 7).pack() + write(0, b"w", 8, FUA)
    relay = Walker(poor()).requests([raw + read(0, 2 * MAX, 9)])
    relay.replies([simple(6, 0, b"a" * MAX)[:100]])
    assert relay.lose_upstream()
    seen = parse_replies(bytes(relay.client))
    assert sorted((one.cookie, one.error) for one in seen) == [
        (cookie, Error.ESHUTDOWN) for cookie in (7, 8, 9)
    ]
    assert relay.machine.idle
    assert not relay.machine.follow_ups_due


@pytest.mark.parametrize("at", [28, 30, 28 + MAX, 30 + MAX])
@pytest.mark.parametrize("error", [0, Error.EIO])
def test_lost_upstream_in_a_split_write(at: int, error: int) -> None:
    """Its reply comes behind its payload, once; an error that came before is the answer."""
    raw = write(0, b"w" * (3 * MAX), 7)
    relay = Walker(poor()).requests([raw[:at]])
    failed = bool(error) and at >= 28 + MAX
    if failed:
        answer(relay, 1, error=error)
    assert relay.lose_upstream()
    assert not relay.client
    relay.requests([raw[at:]])
    assert only_reply(relay) == (7, Error.EIO if failed else Error.ESHUTDOWN)
    assert relay.machine.idle


def test_lost_upstream_in_the_middle_of_a_part_of_a_read() -> None:
    given = poor(below=int(ALL_FEATURES), structured=True, chunks_below=True)
    relay = Walker(given).requests([read(0, 2 * MAX, 7)])
    relay.replies([data_chunk(1, 0, b"a" * MAX, flags=DONE)[:40]])
    assert relay.lose_upstream()
    data, error = parse_replies(bytes(relay.client))
    assert (len(data.data), data.final) == (8 + MAX, False)
    assert (error.cookie, error.error, error.final) == (7, Error.ESHUTDOWN, True)


def test_part_of_a_plan_is_checked_like_any_reply() -> None:
    given = poor(below=int(ALL_FEATURES), structured=True, chunks_below=True)
    relay = Walker(given).requests([read(0, 2 * MAX, 7)])
    relay.replies([data_chunk(1, MAX, b"b" * MAX, flags=DONE)])  # the other part's
    assert relay.machine.upstream_fault is not None
