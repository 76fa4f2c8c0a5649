"""What an upstream may say to one request, from honest to nearly honest."""

from __future__ import annotations

import struct

from tests.fuzz.model.book import Book
from tests.fuzz.model.entries import Sent
from tests.fuzz.model.frames import (
    BLOCK_STATUS,
    BLOCK_STATUS_EXT,
    DATA,
    DONE,
    ERROR,
    ERROR_OFFSET,
    HOLE,
    NONE,
    READ,
    SIMPLE,
    SIMPLE_MAGIC,
    STATUS,
    chunk,
)

MOST = 1 << 18  # bytes of data that are made up for one answer
_ERRORS = (5, 22, 28, 108, 30, 122, 0, 1, 12, 75, 95, 27, 0xFFFFFFFF, 99)
_TEXTS = (b"", b"no luck", b"\x1b[2J", b"\xff\xfe", "nöt".encode(), b"x" * 300)
_PATTERN = bytes(at * 7 % 251 for at in range(251 * 8))


def data_of(offset: int, count: int, salt: int = 0) -> bytes:
    """Bytes that tell their place; some places are all zeroes."""
    if (offset >> 12) % 3 == 2:
        return bytes(count)
    begin = (offset + salt) % 251
    return (_PATTERN * (count // len(_PATTERN) + 2))[begin : begin + count]


class Words:
    """Answers in the style of one upstream."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def honest(self, sent: Sent) -> bytes:
        """The whole answer, from whatever state it is in."""
        if sent.refused:
            return self._chunk(sent, NONE, b"", DONE)
        if sent.kind == READ and not sent.errors:
            return self._rest_of_read(sent)
        if sent.kind == STATUS and not sent.errors:
            return self._statuses(sent)
        if sent.chunks or self._book.extended:
            return self._chunk(sent, NONE, b"", DONE)
        return SIMPLE.pack(SIMPLE_MAGIC, 0, sent.cookie)

    def _rest_of_read(self, sent: Sent) -> bytes:
        if not self._book.chunks_below:
            if sent.length > MOST:
                return self.error(sent, 0, 0)
            head = SIMPLE.pack(SIMPLE_MAGIC, 0, sent.cookie)
            return head + data_of(sent.offset, sent.length)
        if sent.segments:
            return self._gaps(sent)
        if sent.length > MOST:
            if sent.length >> 32:
                return self.error(sent, 0, 0)
            return self._chunk(sent, HOLE, struct.pack(">QI", sent.offset, sent.length), DONE)
        return self.data(sent, sent.offset, sent.length, DONE)

    def _gaps(self, sent: Sent) -> bytes:
        said, at = b"", sent.offset
        spans = sorted((a, a + (o if isinstance(o, int) else len(o))) for a, o in sent.segments)
        for start, stop in (*spans, (sent.offset + sent.length, 0)):
            if start > at:
                said += self._chunk(sent, HOLE, struct.pack(">QI", at, start - at), 0)
            at = max(at, stop)
        return said + self._chunk(sent, NONE, b"", DONE)

    def _statuses(self, sent: Sent) -> bytes:
        asked = self._book.ids if sent.ids is None else sent.ids
        left = sorted(asked - sent.contexts)
        said = b"".join(self.status(sent, one, 1, 0) for one in left)
        return said + self._chunk(sent, NONE, b"", DONE)

    def status(self, sent: Sent, context: int, extents: int, flags: int) -> bytes:
        each = max(min(sent.length // max(extents, 1), 0xFFFFFFFF), 1)
        if self._book.extended:
            body = struct.pack(">II", context, extents) + struct.pack(">QQ", each, 3) * extents
            return self._chunk(sent, BLOCK_STATUS_EXT, body, flags)
        body = struct.pack(">I", context) + struct.pack(">II", each, 3) * extents
        return self._chunk(sent, BLOCK_STATUS, body, flags)

    def data(self, sent: Sent, offset: int, count: int, flags: int, salt: int = 0) -> bytes:
        body = struct.pack(">Q", offset & (1 << 64) - 1) + data_of(offset, min(count, MOST), salt)
        return self._chunk(sent, DATA, body, flags)

    def error(self, sent: Sent, which: int, text: int, *, flags: int = DONE) -> bytes:
        error = _ERRORS[which % len(_ERRORS)]
        if not (self._book.chunks_below and (sent.kind in (READ, STATUS) or text & 64)):
            if not self._book.extended:
                return SIMPLE.pack(SIMPLE_MAGIC, error, sent.cookie)
        words = _TEXTS[text % len(_TEXTS)]
        body = struct.pack(">IH", error, len(words)) + words
        if text & 128:
            return self._chunk(sent, ERROR_OFFSET, body + struct.pack(">Q", sent.offset), flags)
        return self._chunk(sent, ERROR, body, flags)

    def odd(self, sent: Sent, how: int, what: int) -> bytes:
        """Not the whole answer, or not the right one."""
        half = max(sent.length // 2, 1)
        match how % 16:
            case 0:
                return self.data(sent, sent.offset, half, 0, what)
            case 1:
                return self.data(sent, sent.offset + half, sent.length - half, 0, what)
            case 2:
                return self.data(sent, sent.offset, sent.length, 0, what)
            case 3:
                return self.data(sent, sent.offset, sent.length, DONE | what)
            case 4:
                span = struct.pack(">QI", sent.offset, min(half, 0xFFFFFFFF))
                return self._chunk(sent, HOLE, span, what & DONE)
            case 5:
                return self._chunk(sent, NONE, b"", DONE)
            case 6:
                return self.error(sent, what, what, flags=0)
            case 7:
                return self.error(sent, what, what >> 2)
            case 8:
                return self.status(sent, what, what >> 4, what & DONE)
            case 9:
                return SIMPLE.pack(SIMPLE_MAGIC, what, sent.cookie)
            case 10:
                return self.data(sent, sent.offset, sent.length + what, DONE)
            case 11:
                return self.data(sent, sent.offset - what, sent.length, DONE)
            case 12:
                return self._chunk(sent, DATA, struct.pack(">Q", sent.offset), DONE, what * 257)
            case 13:
                return self._chunk(sent, what, bytes(what >> 3), DONE)
            case 14:
                return self.data(sent, sent.offset, half, DONE)
            case _:
                ids = sorted(self._book.ids) or [0]
                return self.status(sent, ids[what % len(ids)], 1 + (what >> 4), what >> 3 & DONE)

    def _chunk(self, sent: Sent, kind: int, body: bytes, flags: int, claim: int = 0) -> bytes:
        return chunk(self._book.extended, flags, kind, sent.cookie, sent.offset, body, claim)
