"""A client's eyes: whatever it reads has to be a reply that it has a right to."""

from __future__ import annotations

import struct

from tests.fuzz.model.book import Book
from tests.fuzz.model.entries import Ask
from tests.fuzz.model.frames import (
    BLOCK_STATUS,
    BLOCK_STATUS_EXT,
    CHUNK_MAGICS,
    COMPACT_CHUNK,
    DATA,
    DF,
    DONE,
    ERROR_BIT,
    ERROR_OFFSET,
    EXTENDED_CHUNK,
    HOLE,
    LEGAL_ERRORS,
    MAX_TEXT,
    NONE,
    READ,
    SIMPLE,
    SIMPLE_MAGIC,
    STATUS,
)
from tests.fuzz.source import require

_MOST = 1 << 20  # of a chunk that is not data: none of ours is so long


class Eyes:
    """One client's."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._buffer = bytearray()
        self._layout = EXTENDED_CHUNK if book.extended else COMPACT_CHUNK
        # Data on its way.
        self._ask: Ask | None = None
        self._at = 0
        self._left = 0
        self._last = False
        self.seen: dict[int, Ask] = {}  # answered, by cookie

    @property
    def mid_message(self) -> bool:
        return bool(self._buffer or self._left)

    @property
    def left(self) -> int:
        """Bytes of the message under way that are to come."""
        return self._left

    def see(self, data: bytes | bytearray | memoryview) -> None:
        """Raises Broken."""
        self._buffer += data
        while self._step():
            pass

    def _step(self) -> bool:
        if self._left:
            return self._data()
        if len(self._buffer) < 4:
            return False
        (magic,) = struct.unpack_from(">I", self._buffer)
        if magic == SIMPLE_MAGIC:
            require(not self._book.extended, "a simple reply in spite of extended headers")
            return len(self._buffer) >= SIMPLE.size and self._simple()
        require(
            magic == CHUNK_MAGICS[self._book.extended] and self._book.chunks_above,
            f"no reply: {bytes(self._buffer[:32]).hex()}",
        )
        return len(self._buffer) >= self._layout.size and self._chunk()

    def _find(self, cookie: int) -> Ask:
        ask = self._book.live.get(cookie)
        require(ask, "a reply to nothing, or a second one", cookie, self.seen.get(cookie))
        assert ask is not None
        return ask

    def _close(self, ask: Ask) -> None:
        self._book.close(ask)
        self.seen[ask.cookie] = ask

    def _simple(self) -> bool:
        _, error, cookie = SIMPLE.unpack_from(self._buffer)
        ask = self._find(cookie)
        del self._buffer[: SIMPLE.size]
        if self._book.chunks_above:
            require(ask.kind != READ, "a simple reply to a structured read", ask)
            require(error or ask.kind != STATUS, "a block status without any", ask)
        require(not (ask.told or ask.errors or ask.contexts), "simple behind chunks", ask)
        if error:
            require(error in LEGAL_ERRORS, f"error {error}", ask)
            ask.errors.append(error)
        if ask.kind == READ and not error and ask.length:
            self._begin(ask, ask.offset, ask.length, last=True)
        else:
            self._close(ask)
        return True

    def _chunk(self) -> bool:
        header = self._layout.unpack_from(self._buffer)
        flags, kind, cookie, length = header[1], header[2], header[3], header[-1]
        ask = self._find(cookie)
        require(not flags & ~DONE, f"flags {flags:#x}", ask)
        require(not self._book.extended or header[4] == ask.offset, f"{header[4]}", ask)
        last = bool(flags & DONE)
        if kind == DATA:
            require(8 < length <= 8 + ask.length, f"{length} bytes of data chunk", ask)
            if len(self._buffer) < self._layout.size + 8:
                return False
            (offset,) = struct.unpack_from(">Q", self._buffer, self._layout.size)
            del self._buffer[: self._layout.size + 8]
            self._begin(ask, offset, length - 8, last=last)
            return True
        require(length <= _MOST, f"a chunk of {length} bytes", ask)
        if len(self._buffer) < self._layout.size + length:
            return False
        payload = bytes(self._buffer[self._layout.size : self._layout.size + length])
        del self._buffer[: self._layout.size + length]
        self._small(ask, kind, payload, last)
        if last:
            self._close(ask)
        return True

    def _small(self, ask: Ask, kind: int, payload: bytes, last: bool) -> None:
        status = BLOCK_STATUS_EXT if self._book.extended else BLOCK_STATUS
        if kind == NONE:
            require(last and not payload, "an odd NBD_REPLY_TYPE_NONE", ask)
            require(ask.kind != STATUS or ask.contexts or ask.errors, "no status", ask)
        elif kind == HOLE:
            offset, count = struct.unpack(">QI", payload)
            self._place(ask, offset, count)
            self._book.check_data(ask, offset, count, None)
        elif kind == status:
            (context,) = struct.unpack_from(">I", payload)
            require(context not in ask.contexts, f"context {context} twice", ask)
            ask.contexts.add(context)
            known = any(payload in one.statuses for one in ask.parts)
            require(known, "not the upstream's status", ask)
        else:
            require(kind & ERROR_BIT, f"a chunk of type {kind}", ask)
            self._error(ask, kind, payload)

    def _error(self, ask: Ask, kind: int, payload: bytes) -> None:
        error, size = struct.unpack_from(">IH", payload)
        require(error in LEGAL_ERRORS, f"error {error}", ask)
        require(6 + size <= len(payload) and size <= MAX_TEXT, f"a text of {size} bytes", ask)
        text = payload[6 : 6 + size].decode()
        require(text.isprintable(), f"a text that cannot be shown: {text!r}")
        if kind == ERROR_OFFSET:
            (offset,) = struct.unpack_from(">Q", payload, 6 + size)
            require(ask.offset <= offset < ask.offset + ask.length, f"{offset}", ask)
        ask.errors.append(error)

    def _place(self, ask: Ask, offset: int, count: int) -> None:
        stop = offset + count
        inside = count > 0 and ask.offset <= offset and stop <= ask.offset + ask.length
        require(ask.kind == READ and inside, f"data at {offset}+{count}", ask)
        require(not (ask.flags & DF and ask.told), "two pieces in spite of DF", ask)
        clash = any(a < stop and offset < b for a, b in ask.told)
        require(not clash, f"data at {offset}+{count} twice", ask)
        ask.told.append((offset, stop))

    def _begin(self, ask: Ask, offset: int, count: int, *, last: bool) -> None:
        self._place(ask, offset, count)
        self._ask, self._at, self._left, self._last = ask, offset, count, last

    def _data(self) -> bool:
        ask, part = self._ask, bytes(self._buffer[: self._left])
        assert ask is not None
        if not part:
            return False
        self._book.check_data(ask, self._at, len(part), part)
        del self._buffer[: len(part)]
        self._at += len(part)
        self._left -= len(part)
        if not self._left and self._last:
            self._close(ask)
        return True
