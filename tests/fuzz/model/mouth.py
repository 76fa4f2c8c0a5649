"""A reader of what an upstream says, as strict as a client has a right to be."""

from __future__ import annotations

import struct

from tests.fuzz.model.book import Book
from tests.fuzz.model.entries import Sent
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
    ESHUTDOWN,
    EXTENDED_CHUNK,
    HOLE,
    MAX_EXTENTS,
    MAX_TEXT,
    NONE,
    READ,
    REQ_ONE,
    SIMPLE,
    SIMPLE_MAGIC,
    STATUS,
    legal,
)

# Room in an error chunk for the fields of types that nobody knows yet. The project's own bound.
_MORE_FIELDS = 64


class Wrong(Exception):
    """The upstream has broken the protocol."""


class Mouth:
    """One upstream's. Writes down in each `Sent` what was said to it."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._buffer = bytearray()
        self._layout = EXTENDED_CHUNK if book.extended else COMPACT_CHUNK
        # Data on its way: of which request, what is left of it, and whether it is the last.
        self._sent: Sent | None = None
        self._left = 0
        self._last = False
        self.broken = ""  # why the gateway has to hang up

    @property
    def mid_message(self) -> bool:
        return bool(self._buffer or self._left)

    def say(self, data: bytes) -> None:
        """Read as far as it is understood, or until it is `broken`."""
        self._buffer += data
        try:
            while not self.broken and self._step():
                pass
        except Wrong as wrong:
            self.broken = str(wrong)

    def _step(self) -> bool:
        if self._left:
            return self._data()
        smallest = self._layout.size if self._book.extended else SIMPLE.size
        if len(self._buffer) < smallest:
            return False
        (magic,) = struct.unpack_from(">I", self._buffer)
        if magic == SIMPLE_MAGIC and not self._book.extended:
            return self._simple()
        if magic == CHUNK_MAGICS[self._book.extended] and self._book.chunks_below:
            return len(self._buffer) >= self._layout.size and self._chunk()
        raise Wrong("magic")

    def _find(self, cookie: int) -> Sent:
        sent = self._book.sent.get(cookie)
        if sent is None or sent.forgotten:
            raise Wrong("a reply to nothing")
        if sent.answered:
            raise Wrong("a second reply")
        if sent.payload_left:
            raise Wrong("a reply before the payload")
        return sent

    def _end(self, sent: Sent) -> None:
        if not sent.errors and not sent.refused:
            told = sum(one if isinstance(one, int) else len(one) for _, one in sent.segments)
            if sent.kind == READ and told != sent.length:
                raise Wrong("less than was asked for")
            asked = self._book.ids if sent.ids is None else sent.ids
            if sent.kind == STATUS and sent.contexts != asked:
                raise Wrong("not all contexts")
        sent.answered = self._book.tick()

    # -- simple replies

    def _simple(self) -> bool:
        _, error, cookie = SIMPLE.unpack_from(self._buffer)
        sent = self._find(cookie)
        below = self._book.chunks_below
        if below and (sent.kind == READ or (sent.kind == STATUS and not error)):
            raise Wrong("no chunk")
        if sent.chunks:
            raise Wrong("simple behind chunks")
        del self._buffer[: SIMPLE.size]
        if error:
            self._failed(sent, error)
        if sent.kind == READ and not error:
            self._begin(sent, sent.offset, sent.length, last=True)
        else:
            self._end(sent)
        return True

    def _failed(self, sent: Sent, error: int) -> None:
        error = legal(error)
        if error == ESHUTDOWN and self._book.resumable:
            sent.refused = True
            return
        if error == ESHUTDOWN:
            self._book.refusing = True
        sent.errors.append(error)
        sent.all_errors.add(error)

    # -- chunks

    def _chunk(self) -> bool:
        header = self._layout.unpack_from(self._buffer)
        flags, kind, cookie, length = header[1], header[2], header[3], header[-1]
        sent = self._find(cookie)
        if self._book.extended and header[4] != sent.offset:
            raise Wrong("about another offset")
        last = bool(flags & DONE)
        if kind == DATA:
            return self._data_chunk(sent, length, last)
        self._check_length(kind, length)
        if len(self._buffer) < self._layout.size + length:
            return False
        payload = bytes(self._buffer[self._layout.size : self._layout.size + length])
        del self._buffer[: self._layout.size + length]
        sent.chunks += 1
        if not sent.refused:
            self._small(sent, kind, payload, last)
        if last:
            self._end(sent)
        return True

    def _check_length(self, kind: int, length: int) -> None:
        status = BLOCK_STATUS_EXT if self._book.extended else BLOCK_STATUS
        head, each = (8, 16) if self._book.extended else (4, 8)
        if kind == NONE:
            fits = not length
        elif kind == HOLE:
            fits = length == 12
        elif kind == status:
            extents, odd = divmod(length - head, each)
            fits = not odd and 1 <= extents <= MAX_EXTENTS
        elif kind & ERROR_BIT:
            least = 14 if kind == ERROR_OFFSET else 6
            fits = least <= length <= 6 + MAX_TEXT + _MORE_FIELDS
        else:
            raise Wrong("an unknown chunk")
        if not fits:
            raise Wrong("a chunk of the wrong length")

    def _data_chunk(self, sent: Sent, length: int, last: bool) -> bool:
        if length <= 8:
            raise Wrong("no data in a data chunk")
        if sent.kind != READ and (self._book.resumable or len(self._buffer) >= 8):
            raise Wrong("data of what is no read")
        if self._book.resumable and length > 8 + sent.length:
            raise Wrong("too much data")
        if len(self._buffer) < self._layout.size + 8:
            return False
        (offset,) = struct.unpack_from(">Q", self._buffer, self._layout.size)
        del self._buffer[: self._layout.size + 8]
        sent.chunks += 1
        if sent.refused:
            self._sent, self._left, self._last = sent, length - 8, last
            return True
        self._check_place(sent, offset, length - 8)
        self._begin(sent, offset, length - 8, last=last)
        return True

    def _check_place(self, sent: Sent, offset: int, count: int) -> None:
        end = sent.offset + sent.length
        if sent.kind != READ or count < 1 or offset < sent.offset or offset + count > end:
            raise Wrong("outside the read")
        if sent.segments and sent.flags & DF:
            raise Wrong("two pieces of what may not be in pieces")
        for begin, told in sent.segments:
            size = told if isinstance(told, int) else len(told)
            if begin < offset + count and offset < begin + size:
                raise Wrong("told twice")

    def _begin(self, sent: Sent, offset: int, count: int, *, last: bool) -> None:
        if not sent.refused:
            sent.segments.append((offset, bytearray()))
            if last and not sent.errors:
                told = sum(o if isinstance(o, int) else len(o) for _, o in sent.segments)
                if told + count != sent.length:
                    raise Wrong("less than was asked for")
        self._sent, self._left, self._last = sent, count, last

    def _data(self) -> bool:
        sent, part = self._sent, self._buffer[: self._left]
        assert sent is not None
        if not part:
            return False
        if not sent.refused:
            data = sent.segments[-1][1]
            assert isinstance(data, bytearray)
            data += part
        self._left -= len(part)
        del self._buffer[: len(part)]
        if not self._left and self._last:
            self._end(sent)
        return True

    def _small(self, sent: Sent, kind: int, payload: bytes, last: bool) -> None:
        if kind == NONE:
            if not last:
                raise Wrong("nothing, and more to come")
        elif kind == HOLE:
            offset, count = struct.unpack(">QI", payload)
            self._check_place(sent, offset, count)
            sent.segments.append((offset, count))
        elif kind & ERROR_BIT:
            self._error(sent, kind, payload)
        else:
            self._status(sent, payload)

    def _error(self, sent: Sent, kind: int, payload: bytes) -> None:
        error, size = struct.unpack_from(">IH", payload)
        fields = 8 if kind == ERROR_OFFSET else 0
        if self._book.resumable and legal(error) == ESHUTDOWN:
            self._failed(sent, error)  # the client will not see it, so nobody looks at the rest
            return
        if not error or size > min(len(payload) - 6 - fields, MAX_TEXT):
            raise Wrong("no error, or too long a text")
        if fields:
            (offset,) = struct.unpack_from(">Q", payload, 6 + size)
            if not sent.offset <= offset < sent.offset + sent.length:
                raise Wrong("an error somewhere else")
        self._failed(sent, error)

    def _status(self, sent: Sent, payload: bytes) -> None:
        extended = self._book.extended
        (context,) = struct.unpack_from(">I", payload)
        asked = self._book.ids if sent.ids is None else sent.ids
        if sent.kind != STATUS or context not in asked or context in sent.contexts:
            raise Wrong("a context that is not due")
        head, each = (8, 16) if extended else (4, 8)
        count = (len(payload) - head) // each
        if extended and struct.unpack_from(">I", payload, 4)[0] != count:
            raise Wrong("not so many extents")
        words = struct.unpack_from(f">{2 * count}{'Q' if extended else 'I'}", payload, head)
        lengths = words[::2]
        base = {o.id for o in self._book.terms.contexts if o.name.startswith("base:")}
        if context in base and max(words[1::2]) >> 32:
            raise Wrong("more than 32 bits")
        if 0 in lengths or sum(lengths[:-1]) >= sent.length:
            raise Wrong("extents that are none")
        if sent.flags & REQ_ONE and (count > 1 or lengths[0] > sent.length):
            raise Wrong("more than one extent")
        sent.contexts.add(context)
        sent.statuses.add(payload)
