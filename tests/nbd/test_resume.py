"""gateway.nbd: the upstream is lost, another one is there, and the client notices nothing."""

from __future__ import annotations

from itertools import combinations

import pytest

from gateway.nbd.constants import Chunk, Cmd, CmdFlag, Error
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import frames
from tests.nbd.masked.frames import WRITES, Ask, Style
from tests.nbd.masked.setups import Mask
from tests.nbd.resuming import Line, Scene
from tests.nbd.support import all_cuts, read, simple, terms, write

FUA, DF, REQ_ONE = int(CmdFlag.FUA), int(CmdFlag.DF), int(CmdFlag.REQ_ONE)
STYLES = pytest.mark.parametrize("style", Style, ids=[one.value for one in Style])
CHUNKS = pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
ALL = (Cmd.READ, Cmd.WRITE, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES)


def some_in_flight(style: Style) -> Scene:
    scene = Scene(style)
    for number, kind in enumerate(ALL):
        scene.ask(kind, 512 * number, cookie=10 + number)
    if style is not Style.SIMPLE:
        scene.ask(Cmd.BLOCK_STATUS, 0, 4096, cookie=16)
    return scene


def answer_all(scene: Scene) -> None:
    for one in scene.heard:
        if one.kind == Cmd.BLOCK_STATUS:
            scene.says(*statuses(scene, one))
        else:
            scene.says(scene.success(one))


def statuses(
    scene: Scene, one: Ask, ids: tuple[int, ...] = (3, 0), *, done: bool = True
) -> list[bytes]:
    style = scene.setup.below
    kind = frames.status_kind(style)
    return [
        scene.chunk(
            one,
            kind,
            frames.status_payload(style, number, [(one.length, number)]),
            done=done and number == ids[-1],
        )
        for number in ids
    ]


# ---------------------------------------------------------------- sent again


@STYLES
def test_all_that_is_not_answered_is_sent_again_in_order_to_the_byte(style: Style) -> None:
    scene = some_in_flight(style)
    sent = bytes(scene.line.upstream)
    scene.resumes()
    assert scene.line.upstream == sent
    answer_all(scene)
    assert set(scene.errors.values()) == {0}
    assert len(scene.told) == len(ALL) + (style is not Style.SIMPLE)
    assert scene.machine.idle
    assert scene.resumes().heard == []


@STYLES
def test_what_was_answered_is_not_sent_again(style: Style) -> None:
    for first, second in combinations(range(len(ALL)), 2):
        scene = some_in_flight(style)
        heard = scene.heard
        scene.says(scene.success(heard[first]), scene.success(heard[second]))
        lost = any(ALL[one] in WRITES for one in (first, second))  # then the flush has failed
        scene.resumes()
        assert scene.line.lost == [lost]
        left = [one for at, one in enumerate(heard) if at not in (first, second)]
        assert scene.heard == [one for one in left if not (lost and one.kind == Cmd.FLUSH)]


@STYLES
def test_requests_of_the_outage_wait_and_come_behind(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.WRITE, cookie=1)
    scene.line.loses()
    rest = scene.ask(Cmd.WRITE, 512, cookie=2, keep=300)
    assert len(scene.heard) == 1
    scene.sends(rest[:100])
    scene.finds()
    scene.line.sends_again(1)
    scene.sends(rest[100:])
    scene.ask(Cmd.READ, cookie=3)
    scene.line.sends_again()
    assert [one.kind for one in scene.heard] == [Cmd.WRITE, Cmd.WRITE, Cmd.READ]
    assert [len(one.payload) for one in scene.heard] == [512, 512, 0]
    answer_all(scene)
    assert scene.errors == {1: 0, 2: 0, 3: 0}


@STYLES
def test_half_a_payload_is_sent_again_and_the_rest_goes_on(style: Style) -> None:
    whole = Scene(style)
    whole.ask(Cmd.WRITE, cookie=9)
    for keep in (1, 100, 511, 512):
        scene = Scene(style)
        rest = scene.ask(Cmd.WRITE, cookie=9, keep=keep)
        scene.resumes()
        assert scene.machine.mid_request
        assert scene.heard == []
        scene.sends(rest)
        assert scene.line.upstream == whole.line.upstream
        scene.says(scene.success(scene.heard[0]))
        assert scene.errors == {9: 0}


def test_cookies_are_those_of_before_and_used_once() -> None:
    line = Line(terms()).asks(read(0, 1, 70), read(1, 1, 70)).resumes()
    line.asks(read(2, 1, 70))
    assert [one.cookie for one in line.forwarded] == [1, 2, 3]
    assert line.resumes().asks(read(3, 1, 70)).forwarded[-1].cookie == 4


@STYLES
def test_reply_to_nothing_is_still_a_fault(style: Style) -> None:
    """An upstream that goes on where the last one was."""
    scene = Scene(style)
    scene.ask(Cmd.CACHE, cookie=1)
    (one,) = scene.heard
    scene.says(scene.success(one)).resumes().says(scene.success(one))
    assert "nobody sent" in scene.fault


def test_half_a_reply_is_forgotten() -> None:
    for style in Style:
        scene = Scene(style)
        scene.ask(Cmd.READ, cookie=1)
        (one,) = scene.heard
        reply = scene.success(one, fill=1)
        for at in range(len(reply)):
            scene.says(reply[:at])
            assert not scene.told, "only what is whole is passed on"
            scene.resumes()
            assert scene.heard == [one]
            assert scene.machine.wanted == 0
        scene.says(scene.success(one, fill=2))
        assert scene.told[1].data == b"\2" * 512


# ---------------------------------------------------------------- replies in parts


@CHUNKS
def test_read_in_chunks_is_told_when_it_is_whole(style: Style) -> None:
    """Data of an upstream that is lost may be padding: none of it is told."""
    scene = Scene(style)
    scene.ask(Cmd.READ, 1024, 1024, cookie=1)
    (one,) = scene.heard
    scene.says(scene.data(one, b"a" * 512, 1024, done=False))
    assert not scene.line.client
    scene.resumes()
    assert scene.heard == [one]
    scene.says(scene.data(one, b"c" * 512, 1536, done=False))
    scene.says(scene.data(one, b"b" * 512, 1024, done=True))
    assert scene.told[1].data == b"b" * 512 + b"c" * 512


@CHUNKS
@pytest.mark.parametrize("last", ["data", "hole", "none"])
def test_read_in_chunks_and_holes_at_every_cut(style: Style, last: str) -> None:
    def replies(scene: Scene, one: Ask) -> bytes:
        hole = scene.chunk(one, Chunk.OFFSET_HOLE, frames.hole_payload(0, 600), done=last == "hole")
        data = scene.data(one, b"d" * 424, 600, done=last == "data")
        chunks = [data, hole] if last == "hole" else [hole, data]
        if last == "none":
            chunks.append(scene.chunk(one, Chunk.NONE, done=True))
        return b"".join(chunks)

    probe = Scene(style)
    probe.ask(Cmd.READ, 0, 1024, cookie=1)
    for at in range(len(replies(probe, probe.heard[0]))):
        scene = Scene(style)
        scene.ask(Cmd.READ, 0, 1024, cookie=1)
        (one,) = scene.heard
        raw = replies(scene, one)
        scene.says(raw[:at]).resumes()
        assert not scene.told
        assert scene.heard == [one]
        scene.says(raw[:at], raw[at:])
        assert scene.told[1].data == bytes(600) + b"d" * 424


@CHUNKS
def test_hole_is_zeroes_whatever_the_last_one_said_of_it(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.READ, 0, 1024, cookie=1)
    (one,) = scene.heard
    scene.says(scene.data(one, b"old!" * 128, 0, done=False)).resumes()
    scene.says(scene.data(one, b"new!" * 128, 512, done=False))
    hole = frames.hole_payload(0, 512)
    scene.says(scene.chunk(one, Chunk.OFFSET_HOLE, hole, done=True))
    assert scene.told[1].data == bytes(512) + b"new!" * 128


@CHUNKS
def test_read_with_df_stays_one_piece(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.READ, 0, 1024, cookie=1, flags=DF)
    (one,) = scene.heard
    scene.says(scene.data(one, b"x" * 1024, done=False)).resumes()
    assert scene.heard == [one]
    assert one.flags == DF
    scene.says(scene.failure(one, Error.ESHUTDOWN)).resumes()
    assert scene.heard == [one]
    scene.says(scene.data(one, b"y" * 1000 + bytes(24), done=False))
    scene.says(scene.chunk(one, Chunk.NONE, done=True))
    assert scene.told[1].data == b"y" * 1000 + bytes(24)
    assert scene.told[1].covered == [(0, 1024)]


@CHUNKS
def test_told_chunks_are_no_longer_than_what_the_client_was_told(style: Style) -> None:
    """proto.md: no variable part "larger than any advertised maximum payload size"."""
    scene = Scene(style, mask=Mask(block_sizes=BlockSizes(1, 512, 600)))
    scene.ask(Cmd.READ, 0, 1500, cookie=1)
    while not scene.told:
        one = scene.heard[len(scene.told)]
        for ask in scene.heard:
            half = ask.length // 2
            scene.says(scene.data(ask, b"a" * half, ask.offset, done=False))
            scene.says(scene.data(ask, b"b" * (ask.length - half), ask.offset + half))
    assert one
    assert scene.told[1].data is not None  # `Eyes` has looked at the lengths


@CHUNKS
def test_read_that_fails_behind_data_is_an_error_and_nothing_else(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.READ, 0, 1024, cookie=1)
    (one,) = scene.heard
    scene.says(scene.data(one, b"a" * 512, done=False))
    scene.says(scene.failure(one, Error.EIO, done=False))
    scene.says(scene.failure(one, Error.ENOMEM, done=False))
    assert not scene.line.client
    scene.says(scene.chunk(one, Chunk.NONE, done=True))
    assert scene.errors == {1: Error.EIO}
    assert scene.told[1].data is None


@CHUNKS
@pytest.mark.parametrize("first", [(3,), (0,), (3, 0)])
def test_block_status_that_was_told_is_not_told_again(style: Style, first: tuple[int, ...]) -> None:
    for order in ((3, 0), (0, 3)):
        for ends_with_none in (False, True):
            scene = Scene(style)
            scene.ask(Cmd.BLOCK_STATUS, 0, 4096, cookie=1)
            (one,) = scene.heard
            scene.says(*statuses(scene, one, first, done=False))
            scene.resumes()
            assert scene.heard == [one]
            scene.says(*statuses(scene, one, order, done=not ends_with_none))
            if ends_with_none:
                assert not scene.told
                scene.says(scene.chunk(one, Chunk.NONE, done=True))
            assert scene.errors == {1: 0}
            assert scene.told[1].statuses == {3: [(4096, 3)], 0: [(4096, 0)]}
            assert scene.machine.idle


@CHUNKS
def test_block_status_across_three_upstreams(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.BLOCK_STATUS, 0, 4096, cookie=1)
    (one,) = scene.heard
    scene.says(*statuses(scene, one, (3,), done=False)).resumes()
    scene.says(*statuses(scene, one, (3,), done=False)).resumes().resumes()
    scene.says(*statuses(scene, one, (3, 0), done=False)).resumes()
    scene.says(*statuses(scene, one, (0, 3)))
    assert scene.errors == {1: 0}
    assert scene.told[1].chunks == 3


@CHUNKS
def test_block_status_that_fails_in_the_end(style: Style) -> None:
    scene = Scene(style)
    scene.ask(Cmd.BLOCK_STATUS, 0, 4096, cookie=1)
    (one,) = scene.heard
    scene.says(*statuses(scene, one, (3,), done=False)).resumes()
    scene.says(*statuses(scene, one, (3,), done=False))
    scene.says(scene.failure(one, Error.EIO))
    assert scene.errors == {1: Error.EIO}


@CHUNKS
@pytest.mark.parametrize("kind", [Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.FLUSH, Cmd.BLOCK_STATUS])
def test_reply_with_an_error_in_it_is_ended(style: Style, kind: Cmd) -> None:
    """The client knows; to do it once more would be no help."""
    scene = Scene(style)
    scene.ask(kind, 0, 512, cookie=1)
    (one,) = scene.heard
    scene.says(scene.failure(one, Error.ENOSPC, done=False))
    assert not scene.told
    scene.resumes()
    assert scene.heard == []
    assert scene.errors == {1: Error.ENOSPC}
    assert scene.machine.idle


# ---------------------------------------------------------------- again and again


@STYLES
def test_lost_while_it_is_sent_again_at_every_part(style: Style) -> None:
    whole = some_in_flight(style)
    sent = bytes(whole.line.upstream)
    for parts in range(10):
        scene = some_in_flight(style)
        scene.line.loses()
        scene.finds()
        scene.line.sends_again(parts)
        assert sent.startswith(bytes(scene.line.upstream))
        scene.line.loses()
        scene.ask(Cmd.READ, 8192, cookie=99)
        scene.finds()
        scene.line.sends_again()
        assert bytes(scene.line.upstream).startswith(sent)
        answer_all(scene)
        assert set(scene.errors.values()) == {0}
        assert scene.machine.idle


def test_lost_ten_times_without_a_word() -> None:
    line = Line(terms()).asks(write(0, b"abcd", 1))
    sent = bytes(line.upstream)
    for _ in range(10):
        assert line.resumes().upstream == sent
    assert line.says(simple(1)).client == simple(1)
    assert line.lost == [False] * 10


@pytest.mark.parametrize("half", [0, 2])
def test_nobody_comes_back(half: int) -> None:
    """As without the flag: ESHUTDOWN to all in flight, and to what comes."""
    line = Line(terms()).asks(read(0, 4, 1), write(0, b"abcd", 2)[: 32 - half]).loses()
    line.asks(read(4, 4, 3)) if not half else None
    line.says(simple(1, Error.ESHUTDOWN))
    words = line.machine.lose_upstream()
    assert words is not None
    told = b"".join(map(bytes, words))
    later = [] if half else [simple(3, Error.ESHUTDOWN)]
    behind = [] if half else [simple(2, Error.ESHUTDOWN)]
    assert told == b"".join([simple(1, Error.ESHUTDOWN), *behind, *later])
    assert line.machine._journal is not None
    assert not line.machine._journal._entries, "payload that nobody will want"
    line.asks(b"cd" if half else b"", read(0, 1, 9))
    last = [simple(2, Error.ESHUTDOWN)] if half else []
    assert line.client == b"".join([*last, simple(9, Error.ESHUTDOWN)])


def test_early_answer_to_what_has_not_been_sent_again() -> None:
    """A liar. The stream to it stays whole."""
    line = Line(terms()).asks(write(0, b"abcd", 1), read(0, 4, 2)).loses().finds()
    line.sends_again(1)
    line.says(simple(1), simple(2, 0, b"1234"))
    line.sends_again()
    assert line.forwarded == [line.forwarded[0]]
    assert line.client == simple(1) + simple(2, 0, b"1234")


@STYLES
def test_all_cuts_of_the_replies_across_a_loss(style: Style) -> None:
    probe = Scene(style)
    probe.ask(Cmd.READ, 0, 24, cookie=1)
    probe.ask(Cmd.CACHE, 0, 24, cookie=2)
    raw = b"".join(probe.success(one) for one in probe.heard)
    for pieces in all_cuts(raw):
        scene = Scene(style)
        scene.ask(Cmd.READ, 0, 24, cookie=1)
        scene.ask(Cmd.CACHE, 0, 24, cookie=2)
        heard = scene.heard
        scene.says(pieces[0]).resumes()
        left = [one for one, cookie in zip(heard, (1, 2), strict=True) if cookie not in scene.told]
        assert scene.heard == left
        scene.says(*(scene.success(one) for one in left))
        assert scene.errors == {1: 0, 2: 0}
