"""gateway.nbd: completed writes are lost with an upstream, and no flush calls them safe (X10).

proto.md, "Ordering of messages and writes": a flush covers "all write commands ... that have been
completed". A server that starts anew knows nothing of those before.
"""

from __future__ import annotations

import pytest

from gateway.nbd.constants import Cmd, CmdFlag, Error
from tests.nbd.masked.frames import Ask, Style
from tests.nbd.masked.setups import Mask
from tests.nbd.resuming import Scene

FUA = int(CmdFlag.FUA)
STYLES = pytest.mark.parametrize("style", Style, ids=[one.value for one in Style])
CHUNKS = pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
CHANGES = [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES]
READ_ONLY_KINDS = [Cmd.READ, Cmd.CACHE]
EIO = Error.EIO
NO_FUA = Mask(flags=Mask().flags & ~(1 << 3))


def written(style: Style, kind: Cmd = Cmd.WRITE, *, flags: int = 0, **more: object) -> Scene:
    """One change is completed."""
    scene = Scene(style, **more)  # type: ignore[arg-type]
    scene.ask(kind, cookie=1, flags=flags)
    for _ in range(2):  # with the flush, if FUA is made of one
        if 1 not in scene.told:
            scene.says(scene.success(scene.heard[-1]))
    assert scene.errors == {1: 0}
    return scene


def asks_and_gets(scene: Scene, kind: Cmd, cookie: int, flags: int = 0) -> int:
    """One more request, answered in full if it gets to the upstream. The error that it gets."""
    before = len(scene.heard)
    scene.ask(kind, 4096, cookie=cookie, flags=flags)
    while len(scene.heard) > before:
        scene.says(scene.success(scene.heard[before]))
        before += 1
    return scene.errors[cookie]


# ---------------------------------------------------------------- the next one fails, once


@STYLES
@pytest.mark.parametrize("kind", CHANGES)
def test_next_flush_fails_and_the_one_after_that_does_not(style: Style, kind: Cmd) -> None:
    scene = written(style, kind).resumes()
    assert scene.line.lost == [True]
    assert asks_and_gets(scene, Cmd.FLUSH, 2) == EIO
    assert scene.heard == []
    assert asks_and_gets(scene, Cmd.FLUSH, 3) == 0
    assert asks_and_gets(scene.resumes(), Cmd.FLUSH, 4) == 0


@STYLES
@pytest.mark.parametrize("mask", [Mask(), NO_FUA], ids=["theirs", "ours"])
@pytest.mark.parametrize("kind", CHANGES)
def test_next_request_with_fua_fails_in_its_place(style: Style, mask: Mask, kind: Cmd) -> None:
    """Its payload goes nowhere, and what is behind it is found."""
    scene = written(style, mask=mask).resumes()
    assert asks_and_gets(scene, kind, 2, FUA) == EIO
    assert scene.heard == []
    assert asks_and_gets(scene, kind, 3, FUA) == 0
    assert asks_and_gets(scene, Cmd.FLUSH, 4) == 0


@STYLES
def test_what_asks_for_no_durability_does_not_take_the_error(style: Style) -> None:
    scene = written(style).resumes()
    for cookie, kind in enumerate([*CHANGES, *READ_ONLY_KINDS], 10):
        assert asks_and_gets(scene, kind, cookie) == 0
    for cookie, kind in enumerate(READ_ONLY_KINDS, 20):  # FUA means nothing there
        assert asks_and_gets(scene, kind, cookie, FUA) == 0
    scene.ask(Cmd.WRITE, 0, 0, cookie=30, flags=FUA)  # of no bytes: nothing to be made durable
    scene.ask(Cmd.WRITE, 1 << 40, 512, cookie=31, flags=FUA)
    assert scene.errors[30] == 0
    assert scene.errors[31] == Error.ENOSPC
    assert asks_and_gets(scene, Cmd.FLUSH, 40) == EIO


@STYLES
def test_error_is_owed_across_another_loss_and_only_once(style: Style) -> None:
    scene = written(style).resumes().resumes().resumes()
    assert scene.line.lost == [True, False, False]
    assert asks_and_gets(scene, Cmd.FLUSH, 2) == EIO
    assert asks_and_gets(scene, Cmd.FLUSH, 3) == 0


@STYLES
def test_writes_are_no_slower_behind_it(style: Style) -> None:
    scene = written(style)
    usual = scene.machine._rules.checked_flags
    scene.resumes()
    assert scene.machine._rules.checked_flags != usual
    assert asks_and_gets(scene, Cmd.FLUSH, 2) == EIO
    assert scene.machine._rules.checked_flags == usual


@STYLES
def test_lost_twice_is_told_twice(style: Style) -> None:
    scene = written(style).resumes()
    assert asks_and_gets(scene, Cmd.FLUSH, 2) == EIO
    assert asks_and_gets(scene, Cmd.WRITE, 3) == 0
    scene.resumes()
    assert asks_and_gets(scene, Cmd.FLUSH, 4) == EIO
    assert asks_and_gets(scene, Cmd.FLUSH, 5) == 0


# ---------------------------------------------------------------- those in flight fail


@STYLES
def test_all_flushes_in_flight_fail_and_nothing_is_owed(style: Style) -> None:
    scene = written(style)
    scene.ask(Cmd.FLUSH, cookie=2)
    scene.ask(Cmd.READ, cookie=3)
    scene.ask(Cmd.WRITE, 512, cookie=4, flags=FUA)
    scene.ask(Cmd.FLUSH, cookie=5)
    scene.ask(Cmd.WRITE, 1024, cookie=6)
    scene.resumes()
    assert scene.errors == {1: 0, 2: EIO, 4: EIO, 5: EIO}
    assert [one.kind for one in scene.heard] == [Cmd.READ, Cmd.WRITE]
    for one in scene.heard:
        scene.says(scene.success(one))
    assert asks_and_gets(scene, Cmd.FLUSH, 7) == 0


@STYLES
def test_flush_that_came_in_the_outage_fails(style: Style) -> None:
    scene = written(style)
    scene.line.loses()
    scene.ask(Cmd.FLUSH, cookie=2)
    scene.finds()
    assert scene.errors == {1: 0, 2: EIO}
    scene.line.sends_again()
    assert scene.heard == []


@STYLES
def test_fua_write_half_here_answers_for_itself_and_the_next_is_told(style: Style) -> None:
    scene = written(style)
    rest = scene.ask(Cmd.WRITE, 512, cookie=2, flags=FUA, keep=100)
    scene.resumes()
    scene.sends(rest)
    (one,) = scene.heard
    scene.says(scene.success(one))
    assert scene.errors[2] == 0
    assert asks_and_gets(scene, Cmd.FLUSH, 3) == EIO
    assert asks_and_gets(scene, Cmd.FLUSH, 4) == 0


@STYLES
def test_flush_of_a_plan_in_flight_fails_it(style: Style) -> None:
    """The WRITE was done, the FLUSH that stands for its FUA is under way."""
    scene = Scene(style, mask=NO_FUA)
    scene.ask(Cmd.WRITE, cookie=1, flags=FUA)
    scene.says(scene.success(scene.heard[0]))
    assert scene.heard[-1].kind == Cmd.FLUSH
    scene.resumes()
    assert scene.errors == {1: EIO}
    assert scene.heard == []
    assert scene.machine.idle
    assert asks_and_gets(scene, Cmd.FLUSH, 2) == 0


# ---------------------------------------------------------------- what was safe


@STYLES
@pytest.mark.parametrize("kind", CHANGES)
def test_flushed_before_the_loss(style: Style, kind: Cmd) -> None:
    scene = written(style, kind)
    assert asks_and_gets(scene, Cmd.FLUSH, 2) == 0
    scene.resumes()
    assert scene.line.lost == [False]
    assert asks_and_gets(scene, Cmd.FLUSH, 3) == 0


@STYLES
@pytest.mark.parametrize("mask", [Mask(), NO_FUA], ids=["theirs", "ours"])
@pytest.mark.parametrize("kind", CHANGES)
def test_written_with_fua(style: Style, mask: Mask, kind: Cmd) -> None:
    scene = written(style, kind, flags=FUA, mask=mask).resumes()
    assert scene.line.lost == [False]
    assert asks_and_gets(scene, Cmd.FLUSH, 3) == 0


@STYLES
def test_not_answered_is_done_again_and_not_lost(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.WRITE, cookie=1)
    scene.ask(Cmd.FLUSH, cookie=2)
    scene.resumes()
    assert scene.line.lost == [False]
    for one in scene.heard:
        scene.says(scene.success(one))
    assert scene.errors == {1: 0, 2: 0}


@STYLES
def test_nothing_was_ever_written(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.READ, cookie=1)
    scene.says(scene.success(scene.heard[0])).resumes()
    assert scene.line.lost == [False]


# ---------------------------------------------------------------- what was not


@STYLES
def test_flush_that_was_sent_before_the_answer_covers_nothing(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.WRITE, cookie=1)
    scene.ask(Cmd.FLUSH, cookie=2)
    for one in scene.heard:
        scene.says(scene.success(one))
    assert scene.resumes().line.lost == [True]


@STYLES
def test_flush_that_failed_covers_nothing(style: Style) -> None:
    scene = written(style)
    scene.ask(Cmd.FLUSH, cookie=2)
    scene.says(scene.failure(scene.heard[-1], Error.ENOSPC)).resumes()
    assert scene.line.lost == [True]
    assert asks_and_gets(scene, Cmd.FLUSH, 3) == EIO


@CHUNKS
@pytest.mark.parametrize("ended", [False, True])
def test_flush_that_fails_in_two_chunks_covers_nothing(style: Style, ended: bool) -> None:
    scene = written(style)
    scene.ask(Cmd.FLUSH, cookie=2)
    flush = scene.heard[-1]
    scene.says(scene.failure(flush, Error.EIO, done=False))
    scene.ask(Cmd.CACHE, cookie=3)
    scene.says(scene.success(scene.heard[-1]))
    if ended:
        scene.says(scene.chunk(flush, 0, done=True))
    scene.resumes()
    assert scene.errors[2] == EIO
    assert scene.line.lost == [True]
    assert asks_and_gets(scene, Cmd.FLUSH, 4) == EIO


@STYLES
def test_failed_write_may_be_there_in_part(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.WRITE, cookie=1)
    scene.says(scene.failure(scene.heard[0], Error.EIO)).resumes()
    assert scene.line.lost == [True]


def test_whoever_was_not_told_of_flush_or_fua_gets_no_error_either() -> None:
    mask = Mask(flags=1)  # HAS_FLAGS
    scene = written(Style.SIMPLE, mask=mask).resumes()
    assert scene.line.lost == [True]
    assert asks_and_gets(scene, Cmd.WRITE, 2) == 0
    scene.ask(Cmd.FLUSH, cookie=3)
    assert scene.errors[3] in (Error.EINVAL, EIO)


@STYLES
@pytest.mark.parametrize("cut", [0, 1, 511])
def test_only_the_first_of_those_that_come_together_fails(style: Style, cut: int) -> None:
    """A FLUSH and a WRITE with FUA in one piece: the second is forwarded, with its payload."""
    scene = written(style).resumes()
    raws = []
    for cookie, kind in ((2, Cmd.FLUSH), (3, Cmd.WRITE)):
        keep = len(
            Ask(kind, 0, 0 if kind == Cmd.FLUSH else 512, 0, bytes(512), cookie).pack(
                extended=style is Style.EXTENDED
            )
        )
        if kind == Cmd.FLUSH:
            keep -= 512
        raws.append(scene.ask(kind, cookie=cookie, flags=FUA * (kind == Cmd.WRITE), keep=keep))
    raw = b"".join(raws)
    scene.sends(raw[: len(raw) - cut])
    scene.sends(raw[len(raw) - cut :])
    assert scene.errors == {1: 0, 2: EIO}
    (write,) = scene.heard
    assert (write.kind, len(write.payload)) == (Cmd.WRITE, 512)
    assert write.payload == raw[-512:]
    scene.says(scene.success(write))
    assert scene.errors[3] == 0


@STYLES
def test_behind_the_one_that_fails_in_the_same_bytes(style: Style) -> None:
    scene = written(style).resumes()
    raw = b"".join(
        scene.ask(Cmd.WRITE, 512 * n, cookie=10 + n, flags=FUA, keep=1 << 20) for n in range(3)
    )
    assert not scene.heard
    scene.sends(raw[:-5])
    assert scene.errors == {1: 0, 10: EIO}
    assert scene.machine.mid_request
    scene.sends(raw[-5:])
    assert [one.offset for one in scene.heard] == [512, 1024]
    assert [len(one.payload) for one in scene.heard] == [512, 512]
    for one in scene.heard:
        scene.says(scene.success(one))
    assert scene.errors == {1: 0, 10: EIO, 11: 0, 12: 0}
