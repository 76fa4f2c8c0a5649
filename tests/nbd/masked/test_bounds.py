"""What large and many requests cost: batches, parts under way, and bytes of memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gateway.nbd.constants import Chunk, Cmd, Error
from gateway.nbd.transmission import Transmission
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import frames
from tests.nbd.masked.frames import DF, FUA, PAYLOAD_LEN, Ask, Style
from tests.nbd.masked.session import UNDER_WAY
from tests.nbd.masked.setups import EVERYTHING, Mask, Setup, Tf

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HUGE = 1 << 40
SMALL = 128 * KIB  # what no number of bytes of payload may add up to
LIMIT = 32 * MIB


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """So many bytes are allocated at any one time, and none are kept."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= count, f"{peak} bytes"


def test_at_most_can_fail() -> None:
    with pytest.raises(AssertionError, match="bytes"), at_most(SMALL):
        bytearray(SMALL + 1)


class Machine:
    """A session with an export of 1 TiB. Follow-ups are read, and not kept."""

    def __init__(
        self, *, missing: int = 0, maximum: int = LIMIT, style: Style, best: Style | None = None
    ) -> None:
        sizes = BlockSizes(1, 4 * KIB, maximum)
        mask = Mask(HUGE, EVERYTHING & ~missing, best or style, sizes)
        self.setup = Setup(mask, style)
        self.machine = Transmission(self.setup.terms)
        self.asked: deque[Ask] = deque()  # of the upstream, not answered
        self.buffer = bytearray(256 * KIB)

    def ask(self, *asks: Ask) -> int:
        """Returns how many bytes of it the machine is done with."""
        raw = b"".join(one.pack(extended=self.setup.above is Style.EXTENDED) for one in asks)
        buffer = bytearray(raw)
        stop, pieces = self.machine.requests(buffer, 0, len(buffer))
        assert not pieces
        return stop

    def follow_up(self) -> int:
        """Take one batch, if there is one. Returns how many bytes there are in it."""
        size = payload_left = 0
        extended = self.setup.below is Style.EXTENDED
        for piece in self.machine.take_follow_ups():
            size += len(piece)
            if payload_left or not len(piece):
                payload_left -= len(piece)
                assert payload_left >= 0
                continue
            ask, _ = frames.take_ask(bytes(piece), extended=extended) or _header(piece)
            self.asked.append(ask)
            payload_left = ask.length if ask.kind == Cmd.WRITE else 0
        assert not payload_left
        assert len(self.asked) == self.machine.in_flight
        return size

    def answer(self, error: int = 0) -> list[bytes]:
        """To the oldest, without data. Returns what the client gets."""
        ask = self.asked.popleft()
        if self.setup.below is Style.EXTENDED:
            kind = Chunk.ERROR if error else Chunk.NONE
            payload = frames.error_payload(error) if error else b""
            return self.feed(frames.chunk(Style.EXTENDED, ask, kind, payload, done=True))
        return self.feed(frames.simple(ask.cookie, error))

    def feed(self, raw: bytes) -> list[bytes]:
        self.buffer[: len(raw)] = raw
        stop, pieces = self.machine.replies(self.buffer, 0, len(raw))
        assert stop == len(raw)
        assert self.machine.upstream_fault is None
        return [bytes(self.buffer[p[0] : p[1]]) if isinstance(p, tuple) else p for p in pieces]


def _header(piece: bytes | memoryview) -> tuple[Ask, int]:
    """Of a request whose payload is in the next pieces."""
    layout = frames.EXTENDED_REQUEST if len(piece) == 32 else frames.COMPACT_REQUEST
    _, flags, kind, cookie, offset, length = layout.unpack(piece)
    return Ask(kind, offset, length, flags, b"", cookie), len(piece)


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize("maximum", [4 * MIB, LIMIT, LIMIT + 512, 0xFFFFFFFF])
@pytest.mark.parametrize(
    ("style", "length"),
    [(Style.SIMPLE, 4 * GIB - 4 * KIB), (Style.EXTENDED, 8 * GIB + 512)],
    ids=["compact", "extended"],
)
def test_zeroing_many_gib(style: Style, length: int, maximum: int, flags: int) -> None:
    """A batch has at most 32 MiB, and only a few writes are under way."""
    session = Machine(missing=Tf.SEND_WRITE_ZEROES | Tf.SEND_FUA, maximum=maximum, style=style)
    said: list[bytes] = []
    at = 4096
    with at_most(SMALL):
        session.ask(Ask(Cmd.WRITE_ZEROES, at, length, flags, cookie=7))
        while session.machine.follow_ups_due or session.asked:
            assert not said, "answered too early"
            before = len(session.asked)
            while session.machine.follow_ups_due:
                assert session.follow_up() <= min(maximum, LIMIT) + 32
            for one in list(session.asked)[before:]:
                assert one.offset == (at if one.kind == Cmd.WRITE else 0)
                at += one.length
            assert len(session.asked) <= UNDER_WAY
            said += session.answer()
    assert at == 4096 + length
    (reply,) = said
    assert struct.unpack_from(">Q", reply, 8) == (7,)
    assert session.machine.idle


def test_zeroing_ends_with_the_first_error() -> None:
    session = Machine(missing=Tf.SEND_WRITE_ZEROES, style=Style.SIMPLE)
    session.ask(Ask(Cmd.WRITE_ZEROES, 0, 4 * GIB - 4096, cookie=7))
    while session.machine.follow_ups_due:
        session.follow_up()
    parts = len(session.asked)
    assert session.answer(Error.EIO) == []
    assert not session.machine.follow_ups_due
    said = [one for _ in range(parts - 1) for one in session.answer(Error.ENOSPC)]
    assert said == [frames.simple(7, Error.EIO)]


@pytest.mark.parametrize("best", [Style.SIMPLE, Style.STRUCTURED])
def test_long_read_in_chunks_is_passed_on_as_it_comes(best: Style) -> None:
    """64 MiB, in parts of 1 MiB: memory does not grow with either."""
    session = Machine(maximum=MIB, style=Style.STRUCTURED, best=best)
    data = b"data" * (64 * KIB)
    passed = 0
    with at_most(len(data) * 2 + SMALL):  # `feed` and the pieces that this test looks at
        session.ask(Ask(Cmd.READ, 0, 64 * MIB, cookie=7))
        while session.machine.follow_ups_due or session.asked:
            while session.machine.follow_ups_due:
                session.follow_up()
            assert len(session.asked) <= UNDER_WAY
            ask = session.asked.popleft()
            if best is Style.SIMPLE:
                head = frames.simple(ask.cookie)
            else:
                payload = frames.data_payload(ask.offset, b"")
                head = struct.pack(">IHHQI", 0x668E33EF, 1, 1, ask.cookie, 8 + ask.length) + payload
            session.feed(head)
            for _ in range(ask.length // (len(data) // 2)):
                passed += sum(map(len, session.feed(data[: len(data) // 2])))
    assert passed >= 64 * MIB
    assert session.machine.idle


def test_one_read_is_held_at_a_time() -> None:
    """For simple replies, which cannot be in parts: what waits for its turn holds nothing."""
    length, data = 4 * MIB, b"data" * (16 * KIB)
    session = Machine(maximum=len(data), style=Style.SIMPLE)
    said: list[int] = []
    with at_most(length + 4 * SMALL):
        for cookie in range(4):
            session.ask(Ask(Cmd.READ, cookie * length, length, cookie=cookie))
        while session.machine.follow_ups_due or session.asked:
            while session.machine.follow_ups_due:
                session.follow_up()
            assert len(session.asked) <= UNDER_WAY
            pieces = session.feed(frames.simple(session.asked.popleft().cookie, 0, data))
            if pieces:
                header, held = pieces
                assert len(held) == length
                assert held.count(data) == length // len(data)
                said.append(struct.unpack_from(">Q", header, 8)[0])
                del held
            del pieces
    assert said == [0, 1, 2, 3]


@pytest.mark.parametrize("maximum", [LIMIT, 0xFFFFFFFF])
def test_no_read_is_held_that_is_longer_than_32_mib(maximum: int) -> None:
    session = Machine(missing=Tf.SEND_DF, maximum=maximum, style=Style.STRUCTURED)
    with at_most(SMALL):
        session.ask(Ask(Cmd.READ, 0, 2 * GIB, DF, cookie=7))
        reply = session.machine.take_local_replies()
    assert struct.unpack_from(">I", reply, 20) == (Error.EOVERFLOW,)
    assert not session.machine.follow_ups_due


@pytest.mark.parametrize("extended", [False, True])
def test_split_write_is_spans_of_the_buffer(extended: bool) -> None:
    """32 MiB through a buffer of 256 KiB, in parts of 64 KiB."""
    style = Style.EXTENDED if extended else Style.SIMPLE
    session = Machine(maximum=64 * KIB, style=style)
    flags = PAYLOAD_LEN if extended else 0
    header = Ask(Cmd.WRITE, 0, LIMIT, flags, cookie=7).pack(extended=extended)
    machine, buffer = session.machine, session.buffer
    passed = made = 0
    with at_most(SMALL):
        buffer[: len(header)] = header
        left, start, said = len(header) + LIMIT, 0, b""
        while left:
            end = min(len(buffer), left)
            stop, pieces = machine.requests(buffer, start, end)
            assert stop == end
            for piece in pieces:
                if isinstance(piece, tuple):
                    passed += piece[1] - piece[0]
                else:
                    made += 1
                    session.asked.append(_header(piece)[0])
            left -= end
            whole = len(session.asked) - machine.mid_request
            for _ in range(whole):
                said += b"".join(session.answer())
    assert passed == LIMIT
    assert made == LIMIT // (64 * KIB)
    assert not session.asked
    assert said
    assert machine.idle


@pytest.mark.parametrize("kind", [Cmd.WRITE_ZEROES, Cmd.READ])
def test_many_large_requests_wait_for_their_turn(kind: int) -> None:
    """Each costs its client 28 bytes: so only some are taken on, and the rest stays unread."""
    count = 400
    session = Machine(missing=Tf.SEND_WRITE_ZEROES, maximum=MIB, style=Style.SIMPLE)
    asks = [Ask(kind, 0, 2 * MIB, cookie=cookie) for cookie in range(count)]
    buffer = bytearray(b"".join(one.pack(extended=False) for one in asks))
    machine, said = session.machine, bytearray()
    data = bytes(MIB) if kind == Cmd.READ else b""
    session.buffer = bytearray(MIB + 100)
    answered = at = 0
    with at_most(8 * MIB):
        while answered < count:
            at, pieces = machine.requests(buffer, at, len(buffer))
            assert not pieces
            assert machine.crowded is (at < len(buffer))
            while machine.follow_ups_due:
                session.follow_up()
            assert len(session.asked) <= 64 * UNDER_WAY
            for _ in range(len(session.asked)):
                message = frames.simple(session.asked.popleft().cookie, 0, data)
                for piece in session.feed(message):
                    if len(piece) == 16:
                        said += piece
                        answered += 1
    assert sorted(struct.unpack(f">{4 * count}I", said)[3::4]) == list(range(count))
    assert machine.idle
    assert not machine.crowded
