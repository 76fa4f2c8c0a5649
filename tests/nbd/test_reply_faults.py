"""An upstream that breaks the protocol: found out at every cut, and nothing bad passed on (U5)."""

from __future__ import annotations

import struct

import pytest

from gateway.nbd.constants import MAX_EXTENTS, Chunk, Cmd, CmdFlag, Error
from gateway.nbd.replies import MAX_ERROR_DATA
from tests.nbd.answers import DATA, FLUSH, OURS, READ, SIMPLE, STATUS, STRUCTURED, asked, fault
from tests.nbd.support import (
    CHUNK,
    CHUNK_MAGIC,
    DONE,
    Req,
    all_cuts,
    chunk,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    hole_chunk,
    none_chunk,
    read,
    simple,
    status_chunk,
    terms,
    write,
)
from tests.nbd.walker import Walker

OTHER = 2  # a cookie that nobody has sent
REQ_ONE = STATUS._replace(flags=CmdFlag.REQ_ONE)


def header(kind: int, length: int, flags: int = DONE) -> bytes:
    """A chunk's header alone."""
    return CHUNK.pack(CHUNK_MAGIC, flags, kind, OURS, length)


# -- magic, cookie, style


@pytest.mark.parametrize("given", [SIMPLE, STRUCTURED])
@pytest.mark.parametrize("magic", [0, 0x96744668, 0x6E8A278C, 0x25609513])
def test_wrong_magic(magic: int, given: object) -> None:
    raw = struct.pack(">I", magic) + simple(OURS)[4:]
    assert "magic" in fault(FLUSH, raw, given)  # type: ignore[arg-type]


def test_structured_reply_that_was_not_negotiated() -> None:
    assert "magic 0x668e33ef" in fault(READ, data_chunk(OURS, 1000, DATA, flags=DONE), SIMPLE)


@pytest.mark.parametrize("cookie", [0, OTHER, 2**64 - 1])
def test_unknown_cookie(cookie: int) -> None:
    assert "cookie" in fault(FLUSH, simple(cookie), SIMPLE)
    assert "cookie" in fault(FLUSH, none_chunk(cookie))
    assert "cookie" in fault(READ, data_chunk(cookie, 1000, DATA, flags=DONE))


def test_second_reply_to_one_request() -> None:
    assert "cookie" in fault(FLUSH, simple(OURS), SIMPLE, good=simple(OURS))
    assert "cookie" in fault(FLUSH, none_chunk(OURS), good=none_chunk(OURS))
    whole = data_chunk(OURS, 1000, DATA, flags=DONE)
    assert "cookie" in fault(READ, none_chunk(OURS), good=whole)


@pytest.mark.parametrize("error", [0, Error.EIO])
def test_simple_reply_to_a_read_once_structured_replies_are_on(error: int) -> None:
    """(X6): not even with an error."""
    assert "simple reply" in fault(READ, simple(OURS, error))


def test_simple_success_to_a_block_status() -> None:
    assert "simple reply" in fault(STATUS, simple(OURS))


def test_simple_reply_behind_chunks_of_the_same_request() -> None:
    good = error_chunk(OURS, Error.EIO, flags=0)
    assert "has chunks" in fault(FLUSH, simple(OURS), good=good)


@pytest.mark.parametrize("given", [SIMPLE, STRUCTURED])
def test_reply_to_a_write_before_its_payload_is_through(given: object) -> None:
    raw = write(0, b"abcd", 9)
    for at in range(28, len(raw)):
        for reply in (simple(1), simple(1, Error.EIO)):
            for pieces in all_cuts(reply):
                relay = Walker(given).requests([raw[:at]])  # type: ignore[arg-type]
                relay.replies(pieces)
                assert relay.machine.upstream_fault
                assert not relay.client
                relay.requests([raw[at:]])
                assert relay.forwarded[0].payload == b"abcd"


# -- lengths


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        (Chunk.NONE, [1, 8, 2**32 - 1]),
        (Chunk.OFFSET_HOLE, [0, 8, 11, 13, 2**32 - 1]),
        (Chunk.BLOCK_STATUS, [0, 4, 8, 11, 13, 16, 4 + 8 * (MAX_EXTENTS + 1), 2**32 - 4]),
        (Chunk.ERROR, [0, 5, MAX_ERROR_DATA + 1, 2**32 - 1]),
        (Chunk.ERROR_OFFSET, [0, 6, 13, MAX_ERROR_DATA + 1, 2**32 - 1]),
        ((1 << 15) + 77, [0, 5, MAX_ERROR_DATA + 1, 2**32 - 1]),
    ],
)
def test_chunk_of_a_length_that_cannot_be_is_a_fault_on_its_header(
    kind: int, lengths: list[int]
) -> None:
    for one in (READ, STATUS):
        for length in lengths:
            assert f"with {length} bytes" in fault(one, header(kind, length))


@pytest.mark.parametrize("length", range(9))
def test_data_chunk_without_a_byte_of_data(length: int) -> None:
    """ "length MUST be at least 9": such a chunk is not worth waiting for either."""
    fault(READ, header(Chunk.OFFSET_DATA, length) + struct.pack(">Q", 1000)[:length])


@pytest.mark.parametrize("kind", [3, 4, Chunk.BLOCK_STATUS_EXT, 0x7FFF])
def test_unknown_chunk_that_is_no_error(kind: int) -> None:
    assert "unknown chunk type" in fault(READ, chunk(OURS, kind, bytes(12), flags=DONE))


# -- content of a read (X7)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(999, 1), (999, 8), (1000, 9), (1008, 1), (1007, 2), (0, 8), (2**64 - 1, 1), (1000, 2**31)],
)
@pytest.mark.parametrize("flags", [0, DONE])
def test_content_out_of_bounds(offset: int, length: int, flags: int) -> None:
    data = header(Chunk.OFFSET_DATA, 8 + length, flags) + struct.pack(">Q", offset)
    assert "outside" in fault(READ, data)
    assert "outside" in fault(READ, hole_chunk(OURS, offset, length, flags=flags))


def test_hole_of_no_bytes() -> None:
    assert "outside" in fault(READ, hole_chunk(OURS, 1000, 0))


FIRST = data_chunk(OURS, 1002, b"23")


@pytest.mark.parametrize(
    ("offset", "length"), [(1002, 2), (1002, 1), (1003, 1), (1003, 5), (1001, 2), (1000, 8)]
)
def test_content_that_overlaps(offset: int, length: int) -> None:
    for raw in (data_chunk(OURS, offset, b"x" * length), hole_chunk(OURS, offset, length)):
        assert "second time" in fault(READ, raw, good=FIRST)


def test_content_that_overlaps_one_of_many() -> None:
    good = b"".join(data_chunk(OURS, 1000 + at, b"x") for at in (6, 0, 3, 4))
    for offset, length in [(0, 1), (2, 2), (1, 3), (4, 1), (5, 2), (6, 1), (4, 2)]:
        raw = hole_chunk(OURS, 1000 + offset, length)
        assert "second time" in fault(READ, raw, good=good)


@pytest.mark.parametrize(
    "good",
    [
        b"",
        data_chunk(OURS, 1000, b"0123456"),
        hole_chunk(OURS, 1001, 7),
        data_chunk(OURS, 1000, b"012") + data_chunk(OURS, 1004, b"4567"),
    ],
)
def test_success_without_full_coverage(good: bytes) -> None:
    assert "bytes for a read of 8" in fault(READ, none_chunk(OURS), good=good)


def test_last_content_chunk_without_full_coverage() -> None:
    good = data_chunk(OURS, 1000, b"012")
    assert "7 bytes" in fault(READ, hole_chunk(OURS, 1004, 4, flags=DONE), good=good)
    data = data_chunk(OURS, 1004, b"4567", flags=DONE)
    assert "7 bytes" in fault(READ, data, good=good)


def test_content_in_too_many_pieces_that_do_not_touch() -> None:
    """Memory: each such piece has to be remembered."""
    relay = Walker(terms(structured=True)).requests([read(0, 1 << 20, 5)])
    pieces = [hole_chunk(1, offset, 1) for offset in range(0, 1 << 17, 2)]
    relay.replies([b"".join(pieces[:4096])])
    assert relay.machine.upstream_fault is None
    relay.replies([b"".join(pieces[4096:])])
    assert relay.machine.upstream_fault
    assert len(relay.client) <= 2 * 4096 * len(pieces[0])


def test_none_that_is_not_the_last() -> None:
    assert "not the last" in fault(READ, header(Chunk.NONE, 0, flags=0))


@pytest.mark.parametrize("one", [FLUSH, STATUS, Req(Cmd.CACHE, 1000, 8)])
def test_content_for_what_is_no_read(one: Req) -> None:
    assert "not a read" in fault(one, data_chunk(OURS, 1000, DATA, flags=DONE))
    assert "not a read" in fault(one, hole_chunk(OURS, 1000, 8, flags=DONE))


# -- block status (X8)


@pytest.mark.parametrize("one", [FLUSH, READ])
def test_block_status_that_nobody_asked_for(one: Req) -> None:
    assert "nobody asked" in fault(one, status_chunk(OURS, 7, [(8, 0)]))


@pytest.mark.parametrize("number", [0, 8, 2**32 - 1])
def test_context_that_was_not_negotiated(number: int) -> None:
    assert f"id {number}" in fault(STATUS, status_chunk(OURS, number, [(512, 0)]))


def test_context_for_the_second_time() -> None:
    good = status_chunk(OURS, 7, [(512, 0)])
    assert "id 7" in fault(STATUS, good, good=good)


@pytest.mark.parametrize("extents", [[(0, 0)], [(1, 0), (0, 1)], [(0, 1), (512, 0)]])
def test_extent_of_no_bytes(extents: list[tuple[int, int]]) -> None:
    assert "no bytes" in fault(STATUS, status_chunk(OURS, 7, extents))


@pytest.mark.parametrize("count", [8191, 8192, 8193, 16385])
def test_extents_of_a_long_row(count: int) -> None:
    """Wherever in it the wrong one is."""
    long, row = STATUS._replace(length=count), [(1, 0)] * count

    def what(one: Req, extents: list[tuple[int, int]]) -> str:
        machine = asked(one).replies([status_chunk(OURS, 7, extents)]).machine
        return machine.upstream_fault.what if machine.upstream_fault else "fine"

    assert what(long, row) == "fine"
    for at in {0, min(8191, count - 1), min(8192, count - 1), count - 1}:
        assert "no bytes" in what(long, [*row[:at], (0, 0), *row[at + 1 :]])
    assert "before the last" in what(long, [*row, (1, 0)])
    assert "one extent" in what(long._replace(flags=REQ_ONE.flags), row)


@pytest.mark.parametrize("extents", [[(512, 0), (512, 1)], [(4097, 0)], [(2**32 - 1, 0)]])
def test_more_than_the_one_extent_asked_for(extents: list[tuple[int, int]]) -> None:
    assert "one extent" in fault(REQ_ONE, status_chunk(OURS, 7, extents))


@pytest.mark.parametrize(
    "extents", [[(4096, 0), (1, 0)], [(4000, 0), (96, 1), (512, 0)], [(2**32 - 1, 0), (1, 0)]]
)
def test_extents_beyond_the_request_before_the_last(extents: list[tuple[int, int]]) -> None:
    assert "before the last" in fault(STATUS, status_chunk(OURS, 7, extents))


@pytest.mark.parametrize("good", [b"", status_chunk(OURS, 9, [(512, 0)])])
def test_success_without_every_context(good: bytes) -> None:
    assert "without all" in fault(STATUS, none_chunk(OURS), good=good)


def test_last_context_without_the_other() -> None:
    assert "without all" in fault(STATUS, status_chunk(OURS, 9, [(512, 0)], flags=DONE))


# -- errors


@pytest.mark.parametrize("kind", [Chunk.ERROR, Chunk.ERROR_OFFSET, (1 << 15) + 77])
def test_error_chunk_without_an_error(kind: int) -> None:
    payload = struct.pack(">IHQ", 0, 0, 1000)
    assert "without an error" in fault(READ, chunk(OURS, kind, payload, flags=DONE))


@pytest.mark.parametrize(
    ("kind", "text_length", "length"),
    [
        (Chunk.ERROR, 1, 6),
        (Chunk.ERROR, 3, 8),
        (Chunk.ERROR, 2**16 - 1, 8),
        (Chunk.ERROR_OFFSET, 1, 14),
        (Chunk.ERROR_OFFSET, 2**16 - 1, 30),
        ((1 << 15) + 77, 5, 10),
    ],
)
def test_error_text_longer_than_its_chunk(kind: int, text_length: int, length: int) -> None:
    """(P "unless it detects that message length is too large")."""
    payload = struct.pack(">IH", Error.EIO, text_length) + bytes(length - 6)
    assert "error text" in fault(READ, chunk(OURS, kind, payload, flags=DONE))


def test_error_text_longer_than_a_string_may_be() -> None:
    raw = error_chunk(OURS, Error.EIO, b"x" * 4097)
    relay = asked(READ).replies([raw])
    assert relay.machine.upstream_fault
    assert not relay.client


@pytest.mark.parametrize("offset", [0, 999, 1008, 2**64 - 1])
def test_error_at_an_offset_outside_the_request(offset: int) -> None:
    assert "outside" in fault(READ, error_offset_chunk(OURS, Error.EIO, offset))


def test_error_at_an_offset_of_a_flush() -> None:
    assert "outside" in fault(FLUSH, error_offset_chunk(OURS, Error.EIO, 0))


# -- what came before


def test_good_replies_in_front_of_a_bad_one_are_delivered() -> None:
    requests = [read(0, 4, 100 + number) for number in range(1, 4)]
    good = simple(2, 0, b"good") + simple(1, Error.EIO)
    for pieces in all_cuts(good + simple(2, 0, b"bad!") + simple(3, 0, b"late")):
        relay = Walker(terms()).requests(requests).replies(pieces)
        assert relay.machine.upstream_fault
        assert relay.client == simple(102, 0, b"good") + simple(101, Error.EIO)
        assert relay.machine.in_flight == 1
