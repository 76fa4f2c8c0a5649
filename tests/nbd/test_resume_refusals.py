"""gateway.nbd: an upstream that says ESHUTDOWN is left, and what it refused is asked elsewhere."""

from __future__ import annotations

import pytest

from gateway.nbd.constants import Chunk, Cmd, CmdFlag, Error
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import frames
from tests.nbd.masked.frames import Ask, Style
from tests.nbd.masked.setups import Mask
from tests.nbd.resuming import Line, Scene
from tests.nbd.support import (
    DONE,
    all_cuts,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    none_chunk,
    read,
    simple,
    terms,
    write,
)

FUA, DF = int(CmdFlag.FUA), int(CmdFlag.DF)
STYLES = pytest.mark.parametrize("style", Style, ids=[one.value for one in Style])
CHUNKS = pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
KINDS = [Cmd.READ, Cmd.WRITE, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES]
GOING = Error.ESHUTDOWN
TINY = Mask(block_sizes=BlockSizes(1, 512, 512))
S = terms(structured=True)


@STYLES
@pytest.mark.parametrize("kind", KINDS)
def test_refused_is_kept_and_asked_again_at_every_cut(style: Style, kind: Cmd) -> None:
    probe = Scene(style)
    probe.ask(kind, cookie=1)
    for pieces in all_cuts(probe.failure(probe.heard[0], GOING)):
        scene = Scene(style)
        scene.ask(kind, cookie=1)
        (one,) = scene.heard
        assert not scene.machine.upstream_leaves
        scene.says(*pieces)
        assert scene.machine.upstream_leaves
        assert scene.machine.upstream_has_left
        assert not scene.machine.upstream_ends, "the client is not told"
        assert not scene.line.client
        scene.resumes()
        assert not scene.machine.upstream_leaves
        assert scene.heard == [one]
        scene.says(scene.success(one))
        assert scene.errors == {1: 0}


@STYLES
def test_all_other_answers_are_awaited(style: Style) -> None:
    scene = Scene(style)
    for cookie in (1, 2, 3):
        scene.ask(Cmd.READ, 512 * cookie, cookie=cookie)
    first, second, third = scene.heard
    scene.says(scene.failure(second, GOING))
    scene.line.suspends()
    scene.ask(Cmd.READ, 4096, cookie=4)  # not for this one any more
    assert scene.heard == [first, second, third]
    assert not scene.machine.upstream_has_left
    scene.says(scene.success(third))
    assert not scene.machine.upstream_has_left
    scene.says(scene.failure(first, GOING))
    assert scene.machine.upstream_has_left
    scene.resumes()
    assert [one.offset for one in scene.heard] == [512, 1024, 4096]
    assert scene.errors == {3: 0}


@STYLES
def test_payload_that_it_does_not_have_is_not_awaited(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.READ, cookie=1)
    rest = scene.ask(Cmd.WRITE, cookie=2, keep=100)
    scene.says(scene.failure(scene.heard[0], GOING))
    scene.line.suspends()
    assert scene.machine.upstream_has_left
    scene.sends(rest)  # it is whole now, but not with that upstream
    assert scene.machine.upstream_has_left
    scene.resumes()
    assert [one.kind for one in scene.heard] == [Cmd.READ, Cmd.WRITE]
    assert len(scene.heard[1].payload) == 512


@STYLES
def test_refused_again_and_again(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.WRITE, cookie=1, flags=FUA)
    (one,) = scene.heard
    for _ in range(5):
        scene.says(scene.failure(one, GOING)).resumes()
        assert scene.heard == [one]
    assert scene.line.lost == [False] * 5
    scene.says(scene.failure(one, Error.EIO))
    assert scene.errors == {1: Error.EIO}


@STYLES
def test_refused_while_it_is_sent_again(style: Style) -> None:
    """What was sent to that one by then is owed, and nothing else."""
    for parts in range(1, 5):
        scene = Scene(style)
        for cookie in (1, 2, 3):
            scene.ask(Cmd.READ, 512 * cookie, cookie=cookie)
        asked = scene.heard
        scene.line.loses()
        scene.finds()
        scene.line.sends_again(parts)
        sent = scene.heard
        scene.says(scene.failure(sent[0], GOING))
        scene.line.suspends()
        scene.line.sends_again()
        assert scene.heard == sent, "no more for one that refuses"
        for one in sent[1:]:
            assert not scene.machine.upstream_has_left
            scene.says(scene.success(one))
        assert scene.machine.upstream_has_left
        scene.resumes()
        assert scene.heard == [one for one in asked if one not in sent[1:]]


@CHUNKS
@pytest.mark.parametrize("kind", [*KINDS, Cmd.BLOCK_STATUS])
def test_refusal_that_is_not_the_last_chunk(style: Style, kind: Cmd) -> None:
    for behind in ("none", "error", "more"):
        scene = Scene(style)
        scene.ask(kind, cookie=1)
        (one,) = scene.heard
        raw = scene.failure(one, GOING, done=False)
        if behind == "more":
            raw += scene.failure(one, Error.EIO, done=False)
        if behind == "error":
            raw += scene.failure(one, Error.EIO)
        else:
            raw += scene.chunk(one, Chunk.NONE, done=True)
        for pieces in all_cuts(raw):
            scene = Scene(style)
            scene.ask(kind, cookie=1)
            scene.says(*pieces)
            assert not scene.fault
            assert scene.machine.upstream_has_left
            assert scene.resumes().heard == [one]
            assert not scene.line.client


@CHUNKS
def test_refused_in_the_middle_of_its_statuses(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.BLOCK_STATUS, 0, 4096, cookie=1)
    (one,) = scene.heard
    kind = frames.status_kind(style)

    def status(number: int, *, done: bool) -> bytes:
        payload = frames.status_payload(style, number, [(4096, number)])
        return scene.chunk(one, kind, payload, done=done)

    scene.says(status(3, done=False), scene.failure(one, GOING)).resumes()
    assert scene.heard == [one]
    scene.says(status(0, done=False), status(3, done=True))
    assert scene.errors == {1: 0}
    assert scene.told[1].statuses == {3: [(4096, 3)], 0: [(4096, 0)]}


@pytest.mark.parametrize(
    "refusal",
    [
        error_chunk(1, GOING),
        error_offset_chunk(1, GOING, 4),
        error_chunk(1, GOING, flags=0) + none_chunk(1),
        error_chunk(1, Error.EIO, flags=0) + error_chunk(1, GOING),
        error_chunk(1, GOING, kind=(1 << 15) + 77),
    ],
)
def test_content_before_a_refusal_is_void(refusal: bytes) -> None:
    """(proto.md, NBD_CMD_READ) It may be padding, also where it looks like data."""
    line = Line(S).asks(read(0, 8, 5))
    line.says(data_chunk(1, 0, b"pad!"), refusal)
    assert not line.client
    line.resumes()
    assert [(one.offset, one.length) for one in line.forwarded] == [(0, 8)]
    line.says(data_chunk(1, 0, b"01234567", flags=DONE))
    assert line.client == data_chunk(5, 0, b"01234567", flags=DONE)


@STYLES
def test_parts_of_a_plan_are_refused(style: Style) -> None:
    scene = Scene(style, mask=TINY)
    scene.ask(Cmd.WRITE, 0, 1536, cookie=1)
    first, second, third = scene.heard
    scene.says(scene.failure(second, GOING), scene.failure(first, GOING))
    assert not scene.machine.upstream_has_left
    scene.says(scene.failure(third, GOING))
    assert scene.machine.upstream_has_left
    scene.resumes()
    assert scene.heard == [first, second, third]
    for one in scene.heard:
        scene.says(scene.success(one))
    assert scene.errors == {1: 0}


@STYLES
@pytest.mark.parametrize("length", [512, 2048])
def test_zeroes_of_ours_are_refused_and_the_rest_goes_to_the_next(
    style: Style, length: int
) -> None:
    mask = Mask(flags=Mask().flags & ~(1 << 6), block_sizes=BlockSizes(1, 512, 512))
    scene = Scene(style, mask=mask)
    scene.ask(Cmd.WRITE_ZEROES, 0, length, cookie=1)
    for one in scene.heard:
        scene.says(scene.failure(one, GOING))
    scene.resumes()
    done = 0
    while len(scene.heard) > done:
        scene.says(scene.success(scene.heard[done]))
        done += 1
    assert scene.errors == {1: 0}
    assert {one.offset for one in scene.heard} == set(range(0, length, 512))


# ---------------------------------------------------------------- against the protocol


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("first", [simple(1, GOING), error_chunk(1, GOING)])
@pytest.mark.parametrize(
    "second",
    [
        simple(1, GOING),
        simple(1),
        error_chunk(1, GOING),
        error_chunk(1, Error.EIO, flags=0),
        none_chunk(1),
        data_chunk(1, 0, b"abcd", flags=DONE),
        data_chunk(1, 0, b"abcd"),
    ],
)
def test_second_reply_to_what_it_has_refused(kind: str, first: bytes, second: bytes) -> None:
    """Found out at every cut, and nothing of it is told."""
    asked = read(0, 4, 5) if kind == "read" else write(0, b"abcd", 5)
    if kind == "read" and first == simple(1, GOING):
        return  # a fault of its own
    for pieces in all_cuts(first + second):
        line = Line(S).asks(asked).says(*pieces)
        assert line.machine.upstream_fault
        assert not line.client


@CHUNKS
def test_data_behind_a_refusal_is_dropped_until_the_last_chunk(style: Style) -> None:
    probe = Scene(style)
    probe.ask(Cmd.READ, 0, 8, cookie=1)
    (one,) = probe.heard
    raw = probe.failure(one, GOING, done=False) + probe.data(one, b"01234567")
    for pieces in all_cuts(raw):
        scene = Scene(style)
        scene.ask(Cmd.READ, 0, 8, cookie=1)
        scene.says(*pieces)
        assert not scene.fault
        assert not scene.line.client
        assert scene.resumes().heard == [one]


@pytest.mark.parametrize(
    "bad",
    [
        data_chunk(1, 0, bytes(9)),  # more than was asked for
        data_chunk(1, 0, b""),
        data_chunk(1, 4, bytes(8)),
        data_chunk(1, 4, bytes(8), flags=DONE),
        data_chunk(1, 0, bytes(8)) + data_chunk(1, 0, bytes(8)),
        data_chunk(1, 0, bytes(7), flags=DONE),
        data_chunk(1, 0, bytes(7)) + none_chunk(1),
        error_chunk(1, 0),
        none_chunk(1)[:4] + b"\0\0" + none_chunk(1)[6:],
        simple(1, 0, bytes(8)),
        simple(1, Error.EIO),
        error_offset_chunk(1, Error.EIO, 99),
    ],
)
def test_read_that_is_answered_against_the_rules(bad: bytes) -> None:
    for pieces in all_cuts(bad):
        line = Line(S).asks(read(0, 8, 5)).says(*pieces)
        assert line.machine.upstream_fault
        assert not line.client


@pytest.mark.parametrize("length", [9, 1 << 20, 0xFFFFFFFF])
def test_data_is_not_waited_for_if_it_cannot_be_right(length: int) -> None:
    """Its memory is ours."""
    head = data_chunk(1, 0, bytes(8))[:16] + length.to_bytes(4, "big")
    if length == 9:
        head = head[:16] + (8 + 9).to_bytes(4, "big")
    for asked in (read(0, 8, 5), write(0, bytes(8), 5)):
        line = Line(S).asks(asked).says(head + bytes(8))
        assert line.machine.upstream_fault
        assert line.machine.wanted <= 64


def test_extended_read_about_another_offset() -> None:
    scene = Scene(Style.EXTENDED)
    scene.ask(Cmd.READ, 512, 8, cookie=1)
    (one,) = scene.heard
    scene.says(scene.data(Ask(Cmd.READ, 513, 8, 0, b"", one.cookie), bytes(8)))
    assert "another offset" in scene.fault


def test_refusal_of_a_payload_that_is_not_here_is_a_fault() -> None:
    line = Line(S).asks(write(0, b"abcd", 5)[:-1]).says(simple(1, GOING))
    assert line.machine.upstream_fault
