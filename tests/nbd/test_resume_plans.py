"""gateway.nbd: the upstream is lost while requests are done in other words, or in parts."""

from __future__ import annotations

import pytest

from gateway.nbd.constants import Chunk, Cmd, CmdFlag, Error
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import frames
from tests.nbd.masked.frames import Style
from tests.nbd.masked.setups import Mask
from tests.nbd.resuming import Scene

FUA, DF, REQ_ONE = int(CmdFlag.FUA), int(CmdFlag.DF), int(CmdFlag.REQ_ONE)
STYLES = pytest.mark.parametrize("style", Style, ids=[one.value for one in Style])
CHUNKS = pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
SMALL = BlockSizes(1, 512, 512)


# ---------------------------------------------------------------- with plans

NO_FUA = Mask(flags=Mask().flags & ~(1 << 3))
TINY = Mask(block_sizes=SMALL)


@STYLES
def test_parts_of_a_read_are_asked_for_again_one_by_one(style: Style) -> None:
    scene = Scene(style, mask=TINY)
    scene.ask(Cmd.READ, 0, 1536, cookie=1)
    parts = scene.heard
    assert [one.offset for one in parts] == [0, 512, 1024]
    scene.says(scene.success(parts[1], fill=2)).resumes()
    assert scene.heard == [parts[0], parts[2]]
    scene.says(scene.success(parts[2], fill=3), scene.success(parts[0], fill=1))
    assert scene.told[1].data == b"\1" * 512 + b"\2" * 512 + b"\3" * 512


@CHUNKS
def test_unfragmented_read_of_parts(style: Style) -> None:
    """Held here: what the last upstream said of a part does not shine through a hole."""
    scene = Scene(style, mask=TINY)
    scene.ask(Cmd.READ, 0, 1024, cookie=1, flags=DF)
    first, second = scene.heard
    scene.says(scene.data(first, b"pad!" * 128, done=False))
    scene.says(scene.failure(first, Error.ESHUTDOWN)).says(scene.success(second, fill=9))
    scene.resumes()
    assert scene.heard == [first]
    hole = frames.hole_payload(0, 512)
    scene.says(scene.chunk(first, Chunk.OFFSET_HOLE, hole, done=True))
    assert scene.told[1].data == bytes(512) + b"\x09" * 512


@CHUNKS
def test_part_that_failed_and_was_not_ended(style: Style) -> None:
    scene = Scene(style, mask=TINY)
    scene.ask(Cmd.WRITE, 0, 1024, cookie=1)
    first, second = scene.heard
    scene.says(scene.failure(first, Error.ENOSPC, done=False)).resumes()
    assert [one.cookie for one in scene.heard] in ([second.cookie], [])
    for one in scene.heard:
        scene.says(scene.success(one))
    assert scene.errors[1] in (Error.ENOSPC, Error.EIO)


@STYLES
@pytest.mark.parametrize("kind", [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES])
def test_loss_between_a_write_and_the_flush_that_stands_for_its_fua(
    style: Style, kind: Cmd
) -> None:
    """(X10) The data is gone, and a flush of the next upstream would not bring it back."""
    scene = Scene(style, mask=NO_FUA)
    scene.ask(kind, cookie=1, flags=FUA)
    (change,) = scene.heard
    scene.says(scene.success(change))
    assert scene.heard[-1].kind == Cmd.FLUSH
    scene.resumes()
    assert scene.line.lost == [True]
    assert scene.heard == []
    assert scene.errors == {1: Error.EIO}


@STYLES
def test_write_with_its_fua_still_to_do_is_done_again_in_full(style: Style) -> None:
    scene = Scene(style, mask=NO_FUA)
    scene.ask(Cmd.WRITE, cookie=1, flags=FUA)
    (one,) = scene.heard
    scene.resumes()
    assert scene.heard == [one]
    scene.says(scene.success(one))
    assert scene.heard[-1].kind == Cmd.FLUSH
    scene.says(scene.success(scene.heard[-1]))
    assert scene.errors == {1: 0}


@STYLES
@pytest.mark.parametrize("kind", [Cmd.WRITE, Cmd.WRITE_ZEROES])
def test_parts_that_the_lost_one_had_answered_are_not_taken_for_done(
    style: Style, kind: Cmd
) -> None:
    """A flush in flight takes the error; the write that ends behind it must not be a lie."""
    flags = Mask().flags & ~(1 << 6) if kind == Cmd.WRITE_ZEROES else Mask().flags
    scene = Scene(style, mask=Mask(flags=flags, block_sizes=SMALL))
    scene.ask(Cmd.FLUSH, cookie=1)
    scene.ask(kind, 0, 1024, cookie=2)
    scene.says(scene.success(scene.heard[1]))
    scene.resumes()
    assert scene.errors[1] == Error.EIO
    done: set[int] = set()
    while scene.machine.in_flight:
        (one, *_) = [one for one in scene.heard if one.cookie not in done]
        done.add(one.cookie)
        scene.says(scene.success(one))
    again = {one.offset for one in scene.heard if one.kind == Cmd.WRITE}
    assert scene.errors[2] == Error.EIO or again == {0, 512}


@STYLES
def test_fua_of_the_upstreams_own_in_parts(style: Style) -> None:
    """Each of them is durable when it is answered: nothing is lost."""
    scene = Scene(style, mask=TINY)
    scene.ask(Cmd.WRITE, 0, 1024, cookie=1, flags=FUA)
    first, second = scene.heard
    scene.says(scene.success(first)).resumes()
    assert scene.line.lost == [False]
    assert scene.heard == [second]
    scene.says(scene.success(second))
    assert scene.errors == {1: 0}
