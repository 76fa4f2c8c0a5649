"""A strict client's eyes: the stream of replies taken apart, with every rule of framing checked."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from gateway.nbd.constants import Chunk, Cmd, Error
from tests.nbd.masked import frames
from tests.nbd.masked.frames import DF, DONE, REQ_ONE, Ask, Style

_ERROR_BIT = 1 << 15


@dataclass
class Outcome:
    """The whole reply to one request."""

    ask: Ask
    error: int = 0  # the first
    text: str = ""  # with it
    data: bytearray | None = None  # of a READ, where `covered` says
    covered: list[tuple[int, int]] = field(default_factory=list)  # start and stop in the export
    holes: list[tuple[int, int]] = field(default_factory=list)  # those of it that were not sent
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: int = 0


class Eyes:
    """Tell it with `expect` what is asked, and feed it what comes.

    `max_payload` is what the client was told; `ids` are the meta contexts that it selected.
    """

    def __init__(self, style: Style, *, max_payload: int, ids: frozenset[int]) -> None:
        self.outstanding: dict[int, Outcome] = {}
        self._style = style
        self._max_payload = max_payload
        self._ids = ids
        self._inbox = bytearray()

    def expect(self, ask: Ask) -> None:
        assert ask.cookie not in self.outstanding
        self.outstanding[ask.cookie] = Outcome(ask)

    @property
    def mid_message(self) -> bool:
        return bool(self._inbox)

    def feed(self, raw: bytes | bytearray) -> list[Outcome]:
        """What has come. Returns the replies that are whole by now."""
        self._inbox += raw
        whole: list[Outcome] = []
        while (taken := self._message()) is not None:
            size, outcome = taken
            del self._inbox[:size]
            if outcome is not None:
                del self.outstanding[outcome.ask.cookie]
                whole.append(outcome)
        return whole

    def _message(self) -> tuple[int, Outcome | None] | None:
        raw = self._inbox
        if len(raw) < 4:
            return None
        (magic,) = struct.unpack_from(">I", raw)
        if magic == frames.SIMPLE_MAGIC:
            return self._simple()
        layout = frames.CHUNK
        if self._style is Style.EXTENDED:
            layout = frames.EXTENDED_CHUNK
            assert magic == frames.EXTENDED_CHUNK_MAGIC, f"reply magic {magic:#x}"
        else:
            assert magic == frames.CHUNK_MAGIC, f"reply magic {magic:#x}"
            assert self._style is Style.STRUCTURED, "a chunk that was not negotiated"
        if len(raw) < layout.size:
            return None
        header = layout.unpack_from(raw)
        flags, kind, cookie, length = header[1], header[2], header[3], header[-1]
        outcome = self._outcome(cookie)
        assert not flags & ~DONE, "reply flags that were not negotiated"
        assert length <= self._max_payload + 8 or outcome.ask.kind != Cmd.READ
        if self._style is Style.EXTENDED:
            assert header[4] == outcome.ask.offset, "not the offset of the request"
        stop = layout.size + length
        if len(raw) < stop:
            return None
        done = bool(flags & DONE)
        self._chunk(outcome, kind, bytes(raw[layout.size : stop]), done=done)
        return stop, outcome if done else None

    def _outcome(self, cookie: int) -> Outcome:
        assert cookie in self.outstanding, f"a reply to nothing: cookie {cookie:#x}"
        return self.outstanding[cookie]

    def _simple(self) -> tuple[int, Outcome] | None:
        assert self._style is not Style.EXTENDED, "a simple reply with extended headers"
        raw = self._inbox
        if len(raw) < frames.SIMPLE.size:
            return None
        _, error, cookie = frames.SIMPLE.unpack_from(raw)
        outcome = self._outcome(cookie)
        kind = outcome.ask.kind
        assert not outcome.chunks, "a simple reply behind chunks"
        if self._style is Style.STRUCTURED:
            assert kind != Cmd.READ, "a simple reply to a read"
            assert kind != Cmd.BLOCK_STATUS or error
        _check_error(error, optional=True)
        stop = frames.SIMPLE.size
        if kind == Cmd.READ and not error:
            stop += outcome.ask.length
            if len(raw) < stop:
                return None
            outcome.data = bytearray(raw[frames.SIMPLE.size : stop])
            outcome.covered = [(outcome.ask.offset, outcome.ask.stop)]
        outcome.error = error
        return stop, outcome

    def _chunk(self, outcome: Outcome, kind: int, payload: bytes, *, done: bool) -> None:
        outcome.chunks += 1
        ask = outcome.ask
        if kind == Chunk.NONE:
            assert not payload
            assert done, "NBD_REPLY_TYPE_NONE that is not the last chunk"
        elif kind in (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE):
            self._content(outcome, kind, payload)
        elif kind == frames.status_kind(self._style):
            self._status(outcome, payload)
        else:
            assert kind & _ERROR_BIT, f"chunk of type {kind:#x}"
            self._error(outcome, kind, payload)
        if done and not outcome.error:
            if ask.kind == Cmd.READ:
                covered = sum(stop - start for start, stop in outcome.covered)
                assert covered == ask.length, f"{covered} bytes for a read of {ask.length}"
            if ask.kind == Cmd.BLOCK_STATUS:
                ids = set(ask.ids) if ask.is_filter else self._ids
                assert set(outcome.statuses) == ids, "one chunk for each meta context"

    def _content(self, outcome: Outcome, kind: int, payload: bytes) -> None:
        ask = outcome.ask
        assert ask.kind == Cmd.READ
        assert outcome.error != Error.EOVERFLOW, "content with NBD_EOVERFLOW"
        if kind == Chunk.OFFSET_DATA:
            assert len(payload) >= 9
            start, data = struct.unpack_from(">Q", payload)[0], payload[8:]
        else:
            start, count = struct.unpack(">QI", payload)
            assert count
            data = bytes(count)
            outcome.holes.append((start, start + count))
        stop = start + len(data)
        assert ask.offset <= start < stop <= ask.stop, "content outside of the request"
        assert all(stop <= one or other <= start for one, other in outcome.covered), "overlap"
        assert not (ask.flags & DF and outcome.covered), "two content chunks in spite of DF"
        outcome.covered.append((start, stop))
        if outcome.data is None:
            outcome.data = bytearray(ask.length)
        outcome.data[start - ask.offset : stop - ask.offset] = data

    def _status(self, outcome: Outcome, payload: bytes) -> None:
        ask = outcome.ask
        assert ask.kind == Cmd.BLOCK_STATUS
        head, each, words = (8, 16, "Q") if self._style is Style.EXTENDED else (4, 8, "I")
        count, odd = divmod(len(payload) - head, each)
        assert count >= 1
        assert not odd
        (number,) = struct.unpack_from(">I", payload)
        assert number in (ask.ids if ask.is_filter else self._ids)
        assert number not in outcome.statuses
        if head == 8:
            assert struct.unpack_from(">I", payload, 4) == (count,)
        flat = struct.unpack_from(f">{2 * count}{words}", payload, head)
        extents = list(zip(flat[::2], flat[1::2], strict=True))
        lengths = [length for length, _ in extents]
        assert all(lengths)
        assert sum(lengths[:-1]) < ask.effect
        if ask.flags & REQ_ONE:
            assert count == 1
            assert lengths[0] <= ask.effect
        outcome.statuses[number] = extents

    def _error(self, outcome: Outcome, kind: int, payload: bytes) -> None:
        ask = outcome.ask
        error, length = struct.unpack_from(">IH", payload)
        _check_error(error, optional=False)
        text = payload[6 : 6 + length].decode()
        assert len(payload) >= 6 + length
        assert not text or text.isprintable()
        if kind == Chunk.ERROR:
            assert len(payload) == 6 + length
        elif kind == Chunk.ERROR_OFFSET:
            (offset,) = struct.unpack(">Q", payload[6 + length :])
            assert ask.kind != Cmd.FLUSH
            assert ask.offset <= offset < ask.stop
        assert not (error == Error.EOVERFLOW and ask.flags & DF and outcome.covered)
        if not outcome.error:
            outcome.error, outcome.text = error, text


def _check_error(error: int, *, optional: bool) -> None:
    assert error in frames.LEGAL_ERRORS or (optional and not error), f"error {error}"
