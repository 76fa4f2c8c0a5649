"""An upstream with simple replies only, and a client that has negotiated structured ones."""

from __future__ import annotations

import pytest

from gateway.nbd.constants import Chunk, Cmd, CmdFlag, Error
from gateway.nbd.pairing import Terms
from gateway.nbd.sparse import BLOCK, Run, runs, whole_blocks
from gateway.nbd.upgrades import Capabilities
from tests.nbd.support import (
    ALL_FEATURES,
    DONE,
    MIB,
    Req,
    Tf,
    all_cuts,
    data_chunk,
    hole_chunk,
    none_chunk,
    read,
    simple,
)
from tests.nbd.walker import Seen, Walker, parse_replies

BELOW = int(ALL_FEATURES & ~Tf.SEND_DF)
CONVERTED = Terms("", MIB, ALL_FEATURES, True, upstream=Capabilities(BELOW), split=True)


def converted(data: bytes, offset: int = 0, *, flags: int = 0, cuts: int = 0) -> list[Seen]:
    """What the client sees of a read."""
    raw = simple(1, 0, data)
    pieces = [raw[at : at + cuts] for at in range(0, len(raw), cuts)] if cuts else [raw]
    relay = Walker(CONVERTED).requests([read(offset, len(data), 7, flags)])
    assert relay.forwarded[0].flags == 0
    relay.replies(pieces)
    assert relay.machine.upstream_fault is None
    assert relay.machine.idle
    return parse_replies(bytes(relay.client))


def content(seen: list[Seen], offset: int, length: int) -> bytes:
    """The data in these chunks, which must cover all of it, once."""
    found: dict[int, bytes] = {}
    for one in seen:
        at = int.from_bytes(one.data[:8], "big")
        if one.kind == Chunk.OFFSET_HOLE:
            found[at] = bytes(int.from_bytes(one.data[8:], "big"))
        elif one.kind == Chunk.OFFSET_DATA:
            found[at] = one.data[8:]
    joined = b""
    for at in sorted(found):
        assert at == offset + len(joined)
        joined += found[at]
    assert len(joined) == length
    assert [one.final for one in seen] == [False] * (len(seen) - 1) + [True]
    return joined


def test_data_is_one_chunk() -> None:
    assert converted(b"x" * 100, 50) == [
        Seen(7, Chunk.OFFSET_DATA, True, 0, (50).to_bytes(8, "big") + b"x" * 100)
    ]


def test_zeroes_are_a_hole() -> None:
    raw = simple(1, 0, bytes(8 * BLOCK))
    relay = Walker(CONVERTED).requests([read(0, 8 * BLOCK, 7)]).replies([raw])
    assert relay.client == hole_chunk(7, 0, 8 * BLOCK, flags=DONE)


@pytest.mark.parametrize("cuts", [0, 1000, 4096, 5000, 70])
@pytest.mark.parametrize("offset", [0, 100, BLOCK, 3 * BLOCK + 1])
def test_runs_of_zeroes_are_holes_wherever_it_is_cut(offset: int, cuts: int) -> None:
    data = b"a" * 5000 + bytes(3 * BLOCK) + b"b" * 300 + bytes(2 * BLOCK) + b"c"
    seen = converted(data, offset, cuts=cuts)
    assert content(seen, offset, len(data)) == data
    holes = [one for one in seen if one.kind == Chunk.OFFSET_HOLE]
    assert holes
    for one in holes:
        start = int.from_bytes(one.data[:8], "big")
        assert start % BLOCK == 0


def test_every_cut_of_a_small_read() -> None:
    for pieces in all_cuts(simple(1, 0, b"01234567")):
        relay = Walker(CONVERTED).requests([read(1000, 8, 7)]).replies(pieces)
        assert relay.client == data_chunk(7, 1000, b"01234567", flags=DONE)


def test_short_zeroes_are_data() -> None:
    (seen,) = converted(bytes(100))
    assert seen.kind == Chunk.OFFSET_DATA


@pytest.mark.parametrize("cuts", [0, 1000])
def test_unfragmented_read_has_one_content_chunk(cuts: int) -> None:
    data = b"a" * BLOCK + bytes(BLOCK)
    seen = converted(data, flags=CmdFlag.DF, cuts=cuts)
    assert content(seen, 0, len(data)) == data
    assert [one.kind for one in seen if one.kind != Chunk.NONE] == [Chunk.OFFSET_DATA]


def test_unfragmented_zeroes_are_one_hole() -> None:
    (seen,) = converted(bytes(2 * BLOCK), flags=CmdFlag.DF)
    assert seen.kind == Chunk.OFFSET_HOLE


@pytest.mark.parametrize("error", [*Error, 77])
@pytest.mark.parametrize("kind", [Cmd.READ, Cmd.WRITE, Cmd.FLUSH])
def test_errors_get_words(kind: int, error: int) -> None:
    one = Req(kind, 0, 0 if kind == Cmd.FLUSH else 4, 7, 0, b"data" if kind == Cmd.WRITE else b"")
    relay = Walker(CONVERTED).requests([one.pack()]).replies([simple(1, error)])
    (seen,) = parse_replies(bytes(relay.client))
    assert (seen.cookie, seen.kind, seen.final) == (7, Chunk.ERROR, True)
    assert seen.error == (error if error != 77 else Error.EINVAL)
    assert seen.data[6:].decode().isprintable()
    assert len(seen.data) > 10


def test_success_without_data_stays_as_it_is() -> None:
    relay = Walker(CONVERTED).requests([Req(Cmd.FLUSH, cookie=7).pack()]).replies([simple(1)])
    assert relay.client == simple(7)


def test_chunks_of_such_an_upstream_are_a_fault() -> None:
    relay = Walker(CONVERTED).requests([read(0, 4, 7)]).replies([none_chunk(1)])
    assert relay.machine.upstream_fault is not None


@pytest.mark.parametrize("flags", [0, CmdFlag.DF])
def test_upstream_lost_in_the_data(flags: int) -> None:
    """Whole blocks are out; nothing is promised that cannot be kept."""
    data = b"a" * BLOCK + bytes(BLOCK) + b"b" * BLOCK
    relay = Walker(CONVERTED).requests([read(0, len(data), 7, flags)])
    relay.replies([simple(1, 0, data)[: 16 + 2 * BLOCK + 100]])
    assert relay.machine.mid_reply == bool(flags)
    assert not relay.machine.idle
    assert relay.lose_upstream()
    *_, last = parse_replies(bytes(relay.client))
    assert (last.cookie, last.kind, last.error) == (7, Chunk.ERROR, Error.ESHUTDOWN)
    assert relay.machine.idle


def test_no_meta_contexts_without_chunks() -> None:
    relay = Walker(CONVERTED).requests([Req(Cmd.BLOCK_STATUS, 0, 4, 7).pack()])
    assert parse_replies(bytes(relay.client))[0].error == Error.EINVAL


# -- runs of zeroes


def test_whole_blocks() -> None:
    assert whole_blocks(0, BLOCK - 1) == 0
    assert whole_blocks(0, BLOCK) == BLOCK
    assert whole_blocks(1, BLOCK) == BLOCK - 1
    assert whole_blocks(100, 3 * BLOCK) == 3 * BLOCK - 100


def test_runs_are_found_in_place() -> None:
    buffer = bytearray(b"?" * 10 + b"x" * 10 + bytes(BLOCK) + bytes(600) + b"?")
    assert runs(buffer, 10, 20 + BLOCK + 600, BLOCK - 10) == [
        Run(10, 20, False),
        Run(20, 620 + BLOCK, True),
    ]
    assert runs(buffer, 10, 10, 0) == []
    assert runs(bytearray(BLOCK + 5), 0, BLOCK + 5, 0) == [Run(0, BLOCK + 5, True)]
    assert runs(bytearray(BLOCK) + b"x", 0, BLOCK + 1, 0) == [
        Run(0, BLOCK, True),
        Run(BLOCK, BLOCK + 1, False),
    ]
