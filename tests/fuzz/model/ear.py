"""Readers of requests: the client's stream as the gateway takes it, and what goes upstream."""

from __future__ import annotations

import struct
from collections import deque

from tests.fuzz.model.book import Ask, Book, Sent
from tests.fuzz.model.frames import (
    COMPACT_REQUEST,
    DISC,
    EXTENDED_REQUEST,
    MAX_PAYLOAD,
    PAYLOAD_LEN,
    READ,
    REQUEST_MAGICS,
    STATUS,
    STATUS_PAYLOAD,
    WRITE,
)
from tests.fuzz.source import require


class Mind:
    """The client's stream. Bytes go in as they are made up, and come out fit to be sent: a cookie
    that is in use is made another one, or nobody could say which reply is whose."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._layout = EXTENDED_REQUEST if book.extended else COMPACT_REQUEST
        self._magic = REQUEST_MAGICS[book.extended]
        self._head = bytearray()
        self._cookies = 1 << 48
        self._asks: deque[Ask] = deque()  # whose payload is not through, and the last of them
        self._payload_left = 0
        self._at = 0  # of the stream
        self._made: deque[Ask] = deque()  # not consumed yet
        self._used: set[int] = set()
        self.broken = False  # the gateway has to hang up, once it has come here
        self.done_at: int | None = None  # where NBD_CMD_DISC begins
        self._consumed = 0

    def say(self, data: bytes) -> bytes:
        """What the client sends, given what it would like to send."""
        out = bytearray()
        at = 0
        while at < len(data):
            if self.broken or self.done_at is not None:
                out += data[at:]
                break
            if self._payload_left:
                part = data[at : at + self._payload_left]
                self._made[-1].payload += part
                self._payload_left -= len(part)
                self._end_payload()
                out += part
                at += len(part)
                continue
            need = self._layout.size - len(self._head)
            self._head += data[at : at + need]
            at += need
            if len(self._head) == self._layout.size:
                out += self._header()
        self._at += len(out)
        return bytes(out)

    def last(self) -> bytes:
        """What is left: half a header."""
        out, self._head = bytes(self._head), bytearray()
        self._at += len(out)
        return out

    @property
    def mid_payload(self) -> int:
        """How many bytes of payload are to come."""
        return self._payload_left

    def _header(self) -> bytes:
        magic, flags, kind, cookie, offset, length = self._layout.unpack(self._head)
        raw, self._head = bytes(self._head), bytearray()
        begin = self._at_of(raw)
        if magic != self._magic:
            self.broken = True
            return raw
        if kind == DISC:
            self.done_at = begin
            return raw
        if cookie in self._used:
            self._cookies += 1
            cookie = self._cookies
            raw = raw[:8] + struct.pack(">Q", cookie) + raw[16:]
        self._used.add(cookie)
        payload = kind == WRITE or (self._book.extended and flags & PAYLOAD_LEN)
        if payload and self._book.extended and kind == WRITE:
            flags |= PAYLOAD_LEN
        if payload and length > max(self._book.terms.block_sizes.maximum, MAX_PAYLOAD):
            self.broken = True
            return raw
        end = begin + len(raw)
        ask = Ask(cookie, kind, flags, offset, length, end, end + (length if payload else 0))
        self._made.append(ask)
        self._payload_left = length if payload else 0
        self._end_payload()
        return raw

    def _at_of(self, raw: bytes) -> int:
        # `_at` is behind what `say` has given out; headers are counted as they become whole.
        return self._at + self._pending - len(raw) if False else self._begin(raw)

    def _begin(self, raw: bytes) -> int:
        raise NotImplementedError
