"""Headers of 32 bytes and lengths of 64 bits. proto.md, branch extension-ext-header."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from gateway.nbd.constants import Chunk, Cmd, CmdFlag, Error
from gateway.nbd.pairing import Terms
from gateway.nbd.upgrades import Capabilities
from gateway.nbd.wire import BlockSizes, MetaContext
from tests.nbd.support import ALL_FEATURES, DONE, MIB, Tf, all_cuts
from tests.nbd.walker import Walker

REQUEST, REPLY = struct.Struct(">IHHQQQ"), struct.Struct(">IHHQQQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x21E41C71, 0x6E8A278C
LEN = int(CmdFlag.PAYLOAD_LEN)
SIZE = 1 << 40
CONTEXTS = (MetaContext(3, "base:allocation"), MetaContext(4, "qemu:dirty-bitmap:b"))
GIVEN = Terms(
    "",
    SIZE,
    ALL_FEATURES | Tf.BLOCK_STATUS_PAYLOAD,
    extended_headers=True,
    contexts=CONTEXTS,
    split=True,
)


def ask(
    kind: int,
    offset: int = 0,
    length: int = 0,
    cookie: int = 7,
    flags: int = 0,
    payload: bytes = b"",
) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, length) + payload


def chunk(cookie: int, offset: int, kind: int, payload: bytes = b"", *, flags: int = DONE) -> bytes:
    return REPLY.pack(REPLY_MAGIC, flags, kind, cookie, offset, len(payload)) + payload


def data(cookie: int, offset: int, at: int, raw: bytes, *, flags: int = DONE) -> bytes:
    return chunk(cookie, offset, Chunk.OFFSET_DATA, struct.pack(">Q", at) + raw, flags=flags)


def status(context: int, *extents: tuple[int, int], count: int | None = None) -> bytes:
    head = struct.pack(">II", context, len(extents) if count is None else count)
    return head + b"".join(struct.pack(">QQ", *one) for one in extents)


def errors(raw: bytes) -> list[tuple[int, int, int]]:
    """Cookie, offset and error of whole replies without data."""
    found, at = [], 0
    while at < len(raw):
        magic, flags, kind, cookie, offset, length = REPLY.unpack_from(raw, at)
        assert (magic, flags) == (REPLY_MAGIC, DONE)
        at += REPLY.size
        number = 0
        if kind == Chunk.ERROR:
            number, text = struct.unpack_from(">IH", raw, at)
            assert text == length - 6
        else:
            assert (kind, length) == (Chunk.NONE, 0)
        found.append((cookie, offset, number))
        at += length
    return found


def through(raw: bytes, given: Terms = GIVEN) -> bytes:
    """What the upstream gets, at every cut."""
    seen = set()
    for pieces in all_cuts(raw):
        relay = Walker(given).requests(pieces)
        assert relay.machine.client_fault is None
        assert not relay.client
        seen.add(bytes(relay.upstream))
    (only,) = seen
    return only


def refused(raw: bytes, given: Terms = GIVEN) -> int:
    """The error, at every cut; the request behind it is in step."""
    seen = set()
    for pieces in all_cuts(raw + ask(Cmd.FLUSH, cookie=9)):
        relay = Walker(given).requests(pieces)
        assert relay.machine.client_fault is None
        assert relay.upstream == ask(Cmd.FLUSH, cookie=1)
        seen |= set(errors(bytes(relay.client)))
    ((_, _, number),) = seen
    return number


# -- requests


@pytest.mark.parametrize(
    ("kind", "length", "flags"),
    [
        (Cmd.READ, 4096, 0),
        (Cmd.READ, 4096, CmdFlag.DF),
        (Cmd.TRIM, 1 << 39, CmdFlag.FUA),
        (Cmd.CACHE, 5 << 32, 0),
        (Cmd.WRITE_ZEROES, 8 << 30, CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO),
        (Cmd.BLOCK_STATUS, SIZE, CmdFlag.REQ_ONE),
        (Cmd.FLUSH, 0, 0),
    ],
)
def test_requests_of_any_length_pass(kind: int, length: int, flags: int) -> None:
    assert through(ask(kind, 0, length, 7, flags)) == ask(kind, 0, length, 1, flags)


def test_write_passes_with_its_payload() -> None:
    raw = ask(Cmd.WRITE, SIZE - 4, 4, 7, LEN | CmdFlag.FUA, b"data")
    assert through(raw) == ask(Cmd.WRITE, SIZE - 4, 4, 1, LEN | CmdFlag.FUA, b"data")


def test_fua_is_taken_off_what_changes_nothing() -> None:
    assert through(ask(Cmd.READ, 0, 4, 7, CmdFlag.FUA)) == ask(Cmd.READ, 0, 4, 1)


@pytest.mark.parametrize("flags", [0, CmdFlag.FUA])
def test_write_without_payload_flag_has_its_payload_all_the_same(flags: int) -> None:
    """QEMU 10 does not set it. What the upstream gets is as it should be."""
    smuggled = ask(Cmd.TRIM, 0, 1 << 30)
    raw = ask(Cmd.WRITE, 0, len(smuggled), 7, flags, smuggled)
    assert through(raw) == ask(Cmd.WRITE, 0, len(smuggled), 1, flags | LEN, smuggled)
    assert refused(ask(Cmd.WRITE, SIZE, 4, 7, 0, b"data")) == Error.ENOSPC


@pytest.mark.parametrize("kind", [Cmd.READ, Cmd.TRIM, Cmd.FLUSH, Cmd.WRITE_ZEROES, Cmd.CACHE, 77])
def test_payload_of_other_commands_is_consumed(kind: int) -> None:
    """ "in all other cases, a server SHOULD gracefully consume length bytes of payload"."""
    assert refused(ask(kind, 0, 4, 7, LEN, b"data")) == Error.EINVAL


def test_payload_of_nothing_is_a_request_of_no_bytes() -> None:
    assert refused(ask(Cmd.WRITE, 0, 0, 7, LEN)) == 0


@pytest.mark.parametrize("kind", [Cmd.WRITE, Cmd.READ, Cmd.BLOCK_STATUS])
@pytest.mark.parametrize("length", [(32 << 20) + 1, (1 << 64) - 1])
def test_payload_beyond_all_bounds_is_an_attack(kind: int, length: int) -> None:
    relay = Walker(GIVEN).requests([ask(kind, 0, length, 7, LEN)])
    assert relay.machine.client_fault is not None


@pytest.mark.parametrize("length", [(1 << 64) - 1, SIZE + 1])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Cmd.READ, Error.EINVAL), (Cmd.TRIM, Error.EINVAL), (Cmd.WRITE_ZEROES, Error.ENOSPC)],
)
def test_lengths_do_not_wrap(kind: int, length: int, expected: int) -> None:
    assert refused(ask(kind, 512, length)) == expected
    assert refused(ask(kind, (1 << 64) - 1, length)) == expected


def test_compact_magic_is_a_fault() -> None:
    relay = Walker(GIVEN).requests([struct.pack(">IHHQQQ", 0x25609513, 0, 0, 7, 0, 4)])
    assert relay.machine.client_fault is not None


def test_disconnect_is_extended_too() -> None:
    relay = Walker(GIVEN).requests([ask(Cmd.DISC, cookie=0)])
    assert relay.machine.client_done
    assert relay.machine.disconnect_request() == ask(Cmd.DISC, cookie=0)


# -- block status with a filter


def wanted(length: int, ids: Sequence[int], *, offset: int = 512, flags: int = 0) -> bytes:
    payload = struct.pack(f">Q{len(ids)}I", length, *ids)
    return ask(Cmd.BLOCK_STATUS, offset, len(payload), 7, LEN | flags, payload)


def test_filter_passes() -> None:
    raw = wanted(SIZE - 512, [4], flags=CmdFlag.REQ_ONE)
    assert through(raw) == raw.replace(struct.pack(">Q", 7), struct.pack(">Q", 1), 1)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(wanted(4096, [5]), id="unknown id"),
        pytest.param(wanted(4096, [3, 3]), id="one id twice"),
        pytest.param(wanted(4096, []), id="no id"),
        pytest.param(wanted(4096, [3, 4, 5]), id="more than there are"),
        pytest.param(wanted(0, [3]), id="no length"),
        pytest.param(wanted(SIZE, [3]), id="beyond the end"),
        pytest.param(ask(Cmd.BLOCK_STATUS, 0, 7, 7, LEN, bytes(7)), id="too short"),
        pytest.param(ask(Cmd.BLOCK_STATUS, 0, 13, 7, LEN, bytes(13)), id="odd"),
    ],
)
def test_bad_filter_is_consumed_and_refused(raw: bytes) -> None:
    assert refused(raw) == Error.EINVAL


def test_filter_that_was_not_offered_is_consumed_and_refused() -> None:
    given = Terms("", SIZE, ALL_FEATURES, extended_headers=True, contexts=CONTEXTS)
    assert refused(wanted(4096, [3]), given) == Error.EINVAL


def test_only_the_contexts_asked_for_are_due() -> None:
    relay = Walker(GIVEN).requests([wanted(4096, [4])])
    raw = chunk(1, 512, Chunk.BLOCK_STATUS_EXT, status(4, (1 << 33, 1 << 40)))
    relay.replies([raw])
    assert relay.client == raw.replace(struct.pack(">Q", 1), struct.pack(">Q", 7), 1)
    assert relay.machine.idle


# -- replies


def replied(request: bytes, *replies: bytes) -> Walker:
    return Walker(GIVEN).requests([request]).replies(replies)


READ = ask(Cmd.READ, 1000, 8)


@pytest.mark.parametrize("request_", [ask(Cmd.FLUSH), ask(Cmd.TRIM, 512, 1 << 39)])
def test_success_is_a_chunk(request_: bytes) -> None:
    offset = REQUEST.unpack(request_)[4]
    for pieces in all_cuts(chunk(1, offset, Chunk.NONE)):
        relay = replied(request_, *pieces)
        assert relay.client == chunk(7, offset, Chunk.NONE)
        assert relay.machine.idle


def test_read_at_every_cut() -> None:
    for pieces in all_cuts(data(1, 1000, 1000, b"01234567")):
        relay = replied(READ, *pieces)
        if len(pieces) == 1:
            assert relay.client == data(7, 1000, 1000, b"01234567")
        assert relay.client[40:48] == b"01234567"
        assert relay.client[32:40] == (1000).to_bytes(8, "big")
        assert relay.machine.idle


def test_chunks_echo_the_offset_of_the_request() -> None:
    hole = struct.pack(">QI", 1000, 4)
    relay = replied(
        READ,
        chunk(1, 1000, Chunk.OFFSET_HOLE, hole, flags=0),
        data(1, 1000, 1004, b"4567"),
    )
    assert relay.machine.upstream_fault is None
    assert relay.client == (
        chunk(7, 1000, Chunk.OFFSET_HOLE, hole, flags=0) + data(7, 1000, 1004, b"4567")
    )


def test_error_chunk_passes() -> None:
    payload = struct.pack(">IH", Error.EIO, 3) + b"bad"
    relay = replied(READ, chunk(1, 1000, Chunk.ERROR, payload))
    assert relay.client == chunk(7, 1000, Chunk.ERROR, payload)


def test_status_of_all_contexts_passes() -> None:
    request = ask(Cmd.BLOCK_STATUS, 0, SIZE)
    one = status(3, (1 << 35, 3), (SIZE, 0xFFFFFFFF))
    two = status(4, (1 << 35, (1 << 64) - 1))
    raw = chunk(1, 0, Chunk.BLOCK_STATUS_EXT, one, flags=0) + chunk(
        1, 0, Chunk.BLOCK_STATUS_EXT, two
    )
    for pieces in all_cuts(raw):
        relay = replied(request, *pieces)
        assert relay.machine.upstream_fault is None
        assert relay.client == raw.replace(struct.pack(">HQ", 6, 1), struct.pack(">HQ", 6, 7))
        assert relay.machine.idle


STATUS = ask(Cmd.BLOCK_STATUS, 0, 4096)


@pytest.mark.parametrize(
    ("request_", "raw"),
    [
        pytest.param(READ, struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(24), id="simple"),
        pytest.param(
            READ, struct.pack(">IHHQI", 0x668E33EF, 1, 0, 1, 0) + bytes(12), id="compact chunk"
        ),
        pytest.param(READ, data(1, 1001, 1000, b"01234567"), id="another offset"),
        pytest.param(READ, data(2, 1000, 1000, b"01234567"), id="another cookie"),
        pytest.param(READ, chunk(1, 1000, Chunk.NONE), id="no data"),
        pytest.param(READ, chunk(1, 1000, Chunk.NONE, b"x"), id="data in none"),
        pytest.param(READ, data(1, 1000, 1000, b"012345678"), id="too much data"),
        pytest.param(
            STATUS,
            chunk(1, 0, Chunk.BLOCK_STATUS, struct.pack(">III", 3, 4096, 0)),
            id="compact status",
        ),
        pytest.param(
            STATUS,
            chunk(1, 0, Chunk.BLOCK_STATUS_EXT, status(3, (4096, 0), count=2)),
            id="wrong count",
        ),
        pytest.param(
            STATUS,
            chunk(1, 0, Chunk.BLOCK_STATUS_EXT, status(3, (4096, 1 << 32)), flags=0),
            id="more than 32 bits in base:",
        ),
        pytest.param(
            STATUS, chunk(1, 0, Chunk.BLOCK_STATUS_EXT, status(3, (4096, 0))), id="one context"
        ),
        pytest.param(
            STATUS, chunk(1, 0, Chunk.BLOCK_STATUS_EXT, status(3)), id="without an extent"
        ),
        pytest.param(
            STATUS,
            REPLY.pack(REPLY_MAGIC, 0, Chunk.BLOCK_STATUS_EXT, 1, 0, (1 << 64) - 8),
            id="absurd length",
        ),
    ],
)
def test_faults_of_the_upstream(request_: bytes, raw: bytes) -> None:
    for pieces in [[raw], [raw[:20], raw[20:]]]:
        relay = replied(request_, *pieces)
        assert relay.machine.upstream_fault is not None
        assert not relay.client
        assert relay.lose_upstream()
        offset = REQUEST.unpack(request_)[4]
        assert errors(bytes(relay.client)) == [(7, offset, Error.ESHUTDOWN)]


# -- with upgrades


def test_split_read_answers_for_the_whole() -> None:
    served = Capabilities(int(ALL_FEATURES), block_sizes=BlockSizes(1, 512, 4096))
    given = Terms("", SIZE, ALL_FEATURES, extended_headers=True, upstream=served, split=True)
    relay = Walker(given).requests([ask(Cmd.READ, 512, 8192)])
    assert relay.upstream == ask(Cmd.READ, 512, 4096, 1) + ask(Cmd.READ, 4608, 4096, 2)
    relay.replies([data(2, 4608, 4608, b"b" * 4096), data(1, 512, 512, b"a" * 4096)])
    assert relay.client == (
        data(7, 512, 4608, b"b" * 4096, flags=0)
        + data(7, 512, 512, b"a" * 4096, flags=0)
        + chunk(7, 512, Chunk.NONE)
    )


def test_zeroes_of_8_gib_for_an_upstream_without() -> None:
    below = ALL_FEATURES & ~(Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO | Tf.SEND_FUA)
    served = Capabilities(int(below), block_sizes=BlockSizes(1, 512, 1 << 20))
    given = Terms("", SIZE, ALL_FEATURES, extended_headers=True, upstream=served, split=True)
    relay = Walker(given)
    relay.requests([ask(Cmd.WRITE_ZEROES, 0, 3 * MIB, 7, CmdFlag.FUA)])
    zeroes = [ask(Cmd.WRITE, n * MIB, MIB, n + 1, LEN, bytes(MIB)) for n in range(3)]
    assert relay.upstream == b"".join(zeroes)
    relay.replies([chunk(n + 1, n * MIB, Chunk.NONE) for n in range(3)])
    assert relay.upstream[-32:] == ask(Cmd.FLUSH, 0, 0, 4)
    relay.replies([chunk(4, 0, Chunk.NONE)])
    assert relay.client == chunk(7, 0, Chunk.NONE)
