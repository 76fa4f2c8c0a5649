"""Upstream to client: which replies pass, and what is found wrong with all others."""

from __future__ import annotations

import errno
import struct

import pytest

from gateway.nbd.constants import MAX_EXTENTS, Cmd, CmdFlag, Error
from gateway.nbd.pairing import Terms
from gateway.nbd.replies import MAX_ERROR_DATA, legal_error
from gateway.nbd.transmission import Transmission
from gateway.nbd.wire import MetaContext
from tests.nbd.answers import (
    DATA,
    FLUSH,
    OURS,
    READ,
    SIMPLE,
    STATUS,
    STRUCTURED,
    THEIRS,
    asked,
    fault,
    passes,
    seen_by_client,
    swap_cookie,
)
from tests.nbd.support import (
    CHUNK,
    DONE,
    MIB,
    Req,
    all_cuts,
    chunk,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    hole_chunk,
    none_chunk,
    simple,
    status_chunk,
    terms,
)
from tests.nbd.walker import Walker, parse_replies

OTHERS = [Req(Cmd.TRIM, 1000, 8), Req(Cmd.CACHE, 1000, 8), Req(Cmd.WRITE, 1000, 4, 0, 0, b"data")]


# -- simple replies


@pytest.mark.parametrize("given", [SIMPLE, STRUCTURED])
@pytest.mark.parametrize("error", [0, *Error])
@pytest.mark.parametrize("one", [FLUSH, *OTHERS])
def test_simple_reply_passes_to_all_but_reads(one: Req, error: int, given: Terms) -> None:
    passes(one, simple(OURS, error), given)


@pytest.mark.parametrize("error", [*Error])
def test_simple_error_to_a_read_has_no_payload(error: int) -> None:
    passes(READ, simple(OURS, error), SIMPLE)


def test_simple_read_passes_with_its_payload() -> None:
    passes(READ, simple(OURS, 0, DATA), SIMPLE)


def test_simple_error_to_a_block_status_passes() -> None:
    """It has no payload, so it need not be structured."""
    passes(STATUS, simple(OURS, Error.EINVAL))


def test_replies_out_of_order_find_their_requests() -> None:
    """(X11)."""
    sent = [Req(Cmd.READ, 0, n, 100 + n).pack() for n in range(1, 5)]
    order = [3, 1, 4, 2]
    raw = b"".join(simple(n, 0, bytes([n]) * n) for n in order)
    for pieces in all_cuts(raw):
        relay = Walker(SIMPLE).requests(sent).replies(pieces)
        assert relay.client == b"".join(simple(100 + n, 0, bytes([n]) * n) for n in order)
        assert relay.machine.idle


def test_large_payload_is_passed_by_count() -> None:
    relay = Walker(terms(64 * MIB)).requests([Req(Cmd.READ, 0, 32 * MIB, 9).pack()])
    relay.replies([simple(1)])
    for _ in range(32):
        assert relay.machine.mid_reply
        assert not relay.machine.idle
        relay.replies([bytes(MIB)])
        assert relay._from_upstream == b""
    assert relay.machine.idle
    assert len(relay.client) == 16 + 32 * MIB


# -- structured replies


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(data_chunk(OURS, 1000, DATA, flags=DONE), id="all at once"),
        pytest.param(data_chunk(OURS, 1000, DATA) + none_chunk(OURS), id="all, then none"),
        pytest.param(hole_chunk(OURS, 1000, 8, flags=DONE), id="a hole"),
        pytest.param(
            data_chunk(OURS, 1000, b"012") + data_chunk(OURS, 1003, b"34567", flags=DONE),
            id="in order",
        ),
        pytest.param(
            data_chunk(OURS, 1006, b"67")
            + hole_chunk(OURS, 1002, 4)
            + data_chunk(OURS, 1000, b"01", flags=DONE),
            id="backwards",
        ),
        pytest.param(
            hole_chunk(OURS, 1001, 1)
            + data_chunk(OURS, 1003, b"3")
            + hole_chunk(OURS, 1004, 4)
            + data_chunk(OURS, 1002, b"2")
            + data_chunk(OURS, 1000, b"0")
            + none_chunk(OURS),
            id="mixed",
        ),
        pytest.param(error_chunk(OURS, Error.EIO, b"sorry"), id="an error"),
        pytest.param(error_chunk(OURS, Error.EIO, flags=0) + none_chunk(OURS), id="error, none"),
        pytest.param(
            data_chunk(OURS, 1000, b"01")
            + error_offset_chunk(OURS, Error.EIO, 1001, b"bad sector", flags=0)
            + error_offset_chunk(OURS, Error.EIO, 1007)
            ,
            id="data and errors at offsets",
        ),
        pytest.param(
            error_chunk(OURS, Error.EIO, flags=0) + data_chunk(OURS, 1004, b"4", flags=DONE),
            id="data after an error",
        ),
        pytest.param(error_chunk(OURS, Error.EIO, kind=(1 << 15) + 77), id="unknown error type"),
    ],
)  # fmt: skip
def test_structured_read_passes(raw: bytes) -> None:
    """(X7): any split and order, full coverage or an error."""
    passes(READ, raw)


@pytest.mark.parametrize("one", [FLUSH, *OTHERS])
def test_structured_reply_without_data_passes(one: Req) -> None:
    passes(one, none_chunk(OURS))
    passes(one, error_chunk(OURS, Error.ENOSPC, b"full"))
    if one is not FLUSH:
        passes(one, error_offset_chunk(OURS, Error.EIO, 1003))


@pytest.mark.parametrize(
    "raw",
    [
        data_chunk(OURS, 1000, DATA, flags=DONE),
        hole_chunk(OURS, 1000, 8) + none_chunk(OURS),
        data_chunk(OURS, 1000, b"0123") + error_offset_chunk(OURS, Error.EIO, 1004),
        error_chunk(OURS, Error.EOVERFLOW),
    ],
)
def test_unfragmented_read_has_one_content_chunk(raw: bytes) -> None:
    """(X7)."""
    passes(READ._replace(flags=CmdFlag.DF), raw)


@pytest.mark.parametrize("second", [data_chunk(OURS, 1004, b"4567"), hole_chunk(OURS, 1004, 4)])
def test_second_content_chunk_of_an_unfragmented_read_is_a_fault(second: bytes) -> None:
    """(X7)."""
    first = data_chunk(OURS, 1000, b"0123")
    assert "DF" in fault(READ._replace(flags=CmdFlag.DF), second, good=first)


def test_block_status_passes_with_one_chunk_for_each_context_in_any_order() -> None:
    """(X8): the last extent may go beyond what was asked."""
    passes(
        STATUS,
        status_chunk(OURS, 9, [(512, 0), (2**32 - 1, 3)])
        + status_chunk(OURS, 7, [(4096, 1)], flags=DONE),
    )
    passes(
        STATUS._replace(flags=CmdFlag.REQ_ONE),
        status_chunk(OURS, 7, [(4096, 0)]) + status_chunk(OURS, 9, [(1, 0)]) + none_chunk(OURS),
    )


def test_block_status_may_fail_halfway() -> None:
    passes(STATUS, status_chunk(OURS, 9, [(512, 0)]) + error_chunk(OURS, Error.EIO))
    passes(STATUS, error_offset_chunk(OURS, Error.EIO, 4095))


def test_largest_block_status_there_is_passes_whole() -> None:
    given = terms(structured=True, contexts=(MetaContext(7, "base:allocation"),))
    raw = status_chunk(OURS, 7, [(1, 0)] * MAX_EXTENTS, flags=DONE)
    relay = asked(STATUS._replace(length=MAX_EXTENTS), given).replies([raw[:100]])
    assert relay.machine.wanted == len(raw)
    assert not relay.client
    assert not relay.machine.mid_reply
    relay.replies([raw[100:]])
    assert relay.client == swap_cookie(raw[:20]) + raw[20:]
    assert relay.machine.wanted == 0


def test_chunks_of_several_replies_may_be_interleaved() -> None:
    requests = [Req(Cmd.READ, 0, 4, 100).pack(), Req(Cmd.READ, 2, 4, 200).pack()]
    raw = [
        data_chunk(1, 2, b"23"),
        data_chunk(2, 2, b"23"),
        hole_chunk(2, 4, 2, flags=DONE),
        hole_chunk(1, 0, 2, flags=DONE),
    ]
    for pieces in all_cuts(b"".join(raw)):
        relay = Walker(STRUCTURED).requests(requests).replies(pieces)
        assert relay.client == (
            data_chunk(100, 2, b"23")
            + data_chunk(200, 2, b"23")
            + hole_chunk(200, 4, 2, flags=DONE)
            + hole_chunk(100, 0, 2, flags=DONE)
        )
        assert relay.machine.idle


def test_flags_that_were_not_negotiated_are_taken_off_a_chunk() -> None:
    """ "The server MUST NOT set any other flags" """
    for raw, clean in [
        (none_chunk(OURS), none_chunk(THEIRS)),
        (data_chunk(OURS, 1000, DATA, flags=DONE), data_chunk(THEIRS, 1000, DATA, flags=DONE)),
        (hole_chunk(OURS, 1000, 8), hole_chunk(THEIRS, 1000, 8)),
    ]:
        magic, flags, *rest = CHUNK.unpack_from(raw)
        dirty = CHUNK.pack(magic, flags | 0xFFFE, *rest) + raw[CHUNK.size :]
        one = FLUSH if raw == none_chunk(OURS) else READ
        for pieces in all_cuts(dirty):
            assert seen_by_client(asked(one).replies(pieces).client) == seen_by_client(clean)


def test_last_data_that_is_not_there_in_full_is_not_yet_the_last() -> None:
    """(X7) "MUST NOT do so for a content chunk if it would still be possible to detect an error":
    the upstream may still fail, so DONE follows in a message of its own.
    """
    raw = data_chunk(OURS, 1000, DATA, flags=DONE)
    for at in range(28, len(raw)):
        relay = asked(READ).replies([raw[:at]])
        assert relay.client == data_chunk(THEIRS, 1000, DATA)[:at]
        assert not relay.machine.idle
        relay.replies([raw[at:]])
        assert relay.client == data_chunk(THEIRS, 1000, DATA) + none_chunk(THEIRS)
        assert relay.machine.idle


def test_one_read_after_the_other_comes_in_pieces() -> None:
    relay = Walker(STRUCTURED)
    for number in range(1, 4):
        relay.requests([Req(Cmd.READ, 0, 4, 100 + number).pack()])
        raw = data_chunk(number, 0, b"abcd", flags=DONE)
        relay.replies([raw[:-1], raw[-1:]])
        assert relay.machine.idle
    assert [one.cookie for one in parse_replies(bytes(relay.client)) if one.final] == [
        101,
        102,
        103,
    ]


def test_last_data_of_several_chunks_is_not_the_last_either_until_it_is_there() -> None:
    first, last = data_chunk(OURS, 1004, b"4567"), data_chunk(OURS, 1000, b"0123", flags=DONE)
    relay = asked(READ).replies([first + last[:-1]])
    assert not relay.machine.idle
    relay.replies([last[-1:] + none_chunk(OURS)])
    assert [one.final for one in parse_replies(bytes(relay.client))] == [False, False, True]
    assert relay.machine.upstream_fault, "the second DONE is a reply that nobody waits for"


def test_last_chunk_goes_between_data_that_was_cut_and_what_comes_behind() -> None:
    machine = Transmission(STRUCTURED)
    buffer = bytearray(Req(Cmd.READ, 0, 4, 8).pack() + Req(Cmd.FLUSH, cookie=9).pack())
    machine.requests(buffer, 0, len(buffer))
    buffer = bytearray(data_chunk(1, 0, b"abcd", flags=DONE) + simple(2))
    assert machine.replies(buffer, 0, 30) == (30, [(0, 30)])
    assert machine.replies(buffer, 30, 48) == (48, [(30, 32), none_chunk(8), (32, 48)])
    assert buffer[32:] == simple(9)


def test_read_in_many_pieces_from_its_end_to_its_start() -> None:
    """(X7): "MAY send the content chunks in any order"."""
    relay = Walker(STRUCTURED).requests([Req(Cmd.READ, 0, 5000, 9).pack()])
    raw = b"".join(hole_chunk(1, offset, 1) for offset in reversed(range(5000)))
    relay.replies([raw, none_chunk(1)])
    assert relay.machine.upstream_fault is None
    assert relay.machine.idle


# -- errors (E1)


@pytest.mark.parametrize("error", [0, *Error])
def test_legal_errors_stay_what_they_are(error: int) -> None:
    if error:
        assert legal_error(error) == error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errno.EROFS, Error.EPERM),
        (errno.EDQUOT, Error.ENOSPC),
        (errno.EFBIG, Error.ENOSPC),
        (errno.ENOENT, Error.EINVAL),
        (errno.EACCES, Error.EINVAL),
        (0x7FFFFFFF, Error.EINVAL),
        (0xFFFFFFFF, Error.EINVAL),
    ],
)
def test_other_errors_are_told_as_legal_ones(error: int, told: int) -> None:
    """(E1): in every kind of reply that has an error in it."""
    assert legal_error(error) == told
    for given, one, raw, clean in [
        (SIMPLE, READ, simple(OURS, error), simple(THEIRS, told)),
        (STRUCTURED, FLUSH, simple(OURS, error), simple(THEIRS, told)),
        (STRUCTURED, READ, error_chunk(OURS, error, b"why"), error_chunk(THEIRS, told, b"why")),
        (
            STRUCTURED,
            READ,
            error_offset_chunk(OURS, error, 1000, b"why"),
            error_offset_chunk(THEIRS, told, 1000, b"why"),
        ),
        (
            STRUCTURED,
            READ,
            error_chunk(OURS, error, kind=0xFFFF),
            error_chunk(THEIRS, told, kind=0xFFFF),
        ),
    ]:
        for pieces in all_cuts(raw):
            assert asked(one, given).replies(pieces).client == clean


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"disk on fire", b"disk on fire"),
        ("Gerät weg \N{SNOWMAN}".encode(), "Gerät weg \N{SNOWMAN}".encode()),
        (b"\x1b[31mred\n", b"?[31mred?"),
        (b"a\0b", b"a?b"),
        (b"\x1f ~\x7f", b"? ~?"),
        (b"Ger\xe4t", b"Ger?t"),
        (b"\xc3\xa4\x07", b"???"),
    ],
)
def test_error_text_is_fit_for_display(text: bytes, shown: bytes) -> None:
    """(H13): of the same length, so that nothing moves."""
    for offset in (None, 1003):
        raw, clean = (
            error_chunk(cookie, Error.EIO, one)
            if offset is None
            else error_offset_chunk(cookie, Error.EIO, offset, one)
            for cookie, one in ((OURS, text), (THEIRS, shown))
        )
        for pieces in all_cuts(raw):
            relay = asked(READ).replies(pieces)
            assert relay.client == clean
            assert relay.machine.idle


@pytest.mark.parametrize("length", [0, 4096])
def test_error_text_of_legal_length_passes(length: int) -> None:
    raw = error_chunk(OURS, Error.EIO, b"x" * length)
    relay = asked(READ).replies([raw[:50], raw[50:]])
    assert relay.client == swap_cookie(raw[:20]) + raw[20:]
    assert MAX_ERROR_DATA >= 6 + 4096 + 8


# -- memory


def test_replies_that_are_whole_leave_nothing_behind() -> None:
    relay = Walker(STRUCTURED)
    for number in range(1, 50):
        relay.requests([Req(Cmd.READ, 0, 2, number).pack()])
        relay.replies([hole_chunk(number, 0, 1) + hole_chunk(number, 1, 1, flags=DONE)])
    machine: Transmission = relay.machine
    assert machine.idle
    assert machine.in_flight == 0
    assert not machine._from_upstream._chunked


def test_unknown_error_chunk_with_fields_of_its_own_passes() -> None:
    payload = struct.pack(">IH", Error.EIO, 2) + b"no" + bytes(40)
    passes(READ, chunk(OURS, (1 << 15) + 3, payload, flags=DONE))
    longest = payload.ljust(MAX_ERROR_DATA, b"\0")
    assert asked(READ).replies([chunk(OURS, 0xFFFF, longest, flags=DONE)]).machine.idle
