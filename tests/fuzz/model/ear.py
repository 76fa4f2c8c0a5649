"""Readers of requests: what the client sends, and what goes upstream."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable

from tests.fuzz.model.book import Book
from tests.fuzz.model.entries import Ask, Sent
from tests.fuzz.model.frames import (
    COMPACT_REQUEST,
    DISC,
    EXTENDED_REQUEST,
    MAX_PAYLOAD,
    PAYLOAD_LEN,
    REQUEST_MAGICS,
    STATUS,
    STATUS_PAYLOAD,
    WRITE,
)
from tests.fuzz.source import require


class Mind:
    """The client's stream. What goes in as it comes to mind comes out fit to be sent: whole
    headers, and a cookie that was used before is another one, or nobody could say whose reply is
    whose."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._layout = EXTENDED_REQUEST if book.extended else COMPACT_REQUEST
        self._head = bytearray()
        self._next_cookie = 1 << 48
        self._used: set[int] = set()
        self._payload_left = 0
        self._at = 0  # how much has come out
        self._asks: deque[Ask] = deque()  # not consumed by the gateway yet
        self._last: Ask | None = None
        self.broken_at: int | None = None  # where the gateway has to find fault
        self.done_at: int | None = None  # where NBD_CMD_DISC begins

    def say(self, data: bytes) -> bytes:
        out = bytearray()
        at = 0
        while at < len(data):
            if self.over:
                out += data[at:]
                break
            if self._payload_left:
                part = data[at : at + self._payload_left]
                assert self._last is not None
                self._last.payload += part
                self._payload_left -= len(part)
                if not self._payload_left:
                    self._end_payload(self._last)
            else:
                part = data[at : at + self._layout.size - len(self._head)]
                self._head += part
                if len(self._head) < self._layout.size:
                    break
                at += len(part)
                out += self._header(self._at + len(out))
                continue
            at += len(part)
            out += part
        self._at += len(out)
        return bytes(out)

    def last(self) -> bytes:
        """Half a header, if there is one."""
        out, self._head = bytes(self._head), bytearray()
        return out

    @property
    def over(self) -> bool:
        return self.broken_at is not None or self.done_at is not None

    @property
    def mid_payload(self) -> int:
        """How many bytes of payload are to come."""
        return self._payload_left

    def _header(self, begin: int) -> bytes:
        raw, self._head = bytes(self._head), bytearray()
        magic, flags, kind, cookie, offset, length = self._layout.unpack(raw)
        if magic != REQUEST_MAGICS[self._book.extended]:
            self.broken_at = begin
            return raw
        if kind == DISC:
            self.done_at = begin
            return raw
        if cookie in self._used:
            cookie = self._next_cookie = self._next_cookie + 1
            raw = raw[:8] + struct.pack(">Q", cookie) + raw[16:]
        self._used.add(cookie)
        if kind == WRITE and self._book.extended:
            flags |= PAYLOAD_LEN  # QEMU 10 forgets it
        payload = length if kind == WRITE or (self._book.extended and flags & PAYLOAD_LEN) else 0
        if payload > max(self._book.terms.block_sizes.maximum, MAX_PAYLOAD):
            self.broken_at = begin
            return raw
        ask = Ask(cookie, kind, flags, offset, length, begin + len(raw), payload)
        self._asks.append(ask)
        self._last, self._payload_left = ask, payload
        if not payload:
            self._end_payload(ask)
        return raw

    def _end_payload(self, ask: Ask) -> None:
        """What a payload of a block status means: a length, and meta contexts."""
        filters = self._book.flags & STATUS_PAYLOAD and self._book.extended
        if ask.kind != STATUS or not ask.flags & PAYLOAD_LEN or not filters:
            return
        count, odd = divmod(len(ask.payload) - 8, 4)
        ask.bad_filter = bool(odd) or not 1 <= count <= len(self._book.ids)
        if ask.bad_filter:
            return
        (ask.length,) = struct.unpack_from(">Q", ask.payload)
        ids = struct.unpack_from(f">{count}I", ask.payload, 8)
        ask.ids = frozenset(ids)
        ask.bad_filter = len(ask.ids) != count or not ask.ids <= self._book.ids

    def consumed(self, at: int) -> None:
        """The gateway is done with the stream up to there."""
        while self._asks and self._asks[0].header_end <= at:
            self._book.take(self._asks.popleft())


class Ear:
    """All that is to be sent upstream has to be whole requests, in order, and allowed; or, with
    `repeats`, one upstream of several, which is sent nothing but that, and not what is answered."""

    def __init__(self, book: Book, *, repeats: bool = False) -> None:
        self._book = book
        self._repeats = repeats
        self._layout = EXTENDED_REQUEST if book.extended else COMPACT_REQUEST
        self._buffer = bytearray()
        self.current: Sent | None = None  # whose payload is on its way
        self._left = 0  # of it
        self.seen: set[int] = set()  # cookies
        self.over = False  # DISC was the last

    def hear(self, pieces: Iterable[bytes | bytearray | memoryview], *, own: bool = False) -> None:
        """`own`: requests of the gateway's own, and zeroes."""
        for piece in pieces:
            at = 0
            while at < len(piece):
                if self.current is not None:
                    at += self._payload(self.current, piece[at : at + self._left])
                    continue
                need = self._need() - len(self._buffer)
                self._buffer += piece[at : at + need]
                at += need
                if len(self._buffer) == self._need():
                    self._message(own)

    def check_whole(self) -> None:
        require(not self._buffer, "half a header for the upstream")

    def _need(self) -> int:
        """How long the message is, as far as it has to be whole to be understood."""
        size = self._layout.size
        if len(self._buffer) >= size:
            _, flags, kind, _, _, length = self._layout.unpack_from(self._buffer)
            if kind == STATUS and flags & PAYLOAD_LEN and self._book.extended:
                require(length <= 8 + 4 * len(self._book.ids), "a filter of too many contexts")
                return int(size + length)
        return size

    def _message(self, own: bool) -> None:
        raw, self._buffer = bytes(self._buffer), bytearray()
        magic, flags, kind, cookie, offset, length = self._layout.unpack_from(raw)
        require(magic == REQUEST_MAGICS[self._book.extended], f"no request: {raw.hex()}")
        require(not self.over, "something behind NBD_CMD_DISC")
        require(cookie not in self.seen, f"cookie {cookie} twice")
        self.seen.add(cookie)
        if kind == DISC:
            require(raw[4:] == self._layout.pack(magic, 0, DISC, 0, 0, 0)[4:], "DISC of something")
            self.over = True
            return
        ids = None
        if len(raw) > self._layout.size:
            (length,) = struct.unpack_from(">Q", raw, self._layout.size)
            count = (len(raw) - self._layout.size - 8) // 4
            ids = frozenset(struct.unpack_from(f">{count}I", raw, self._layout.size + 8))
        sent = Sent(cookie, kind, flags, offset, length, self._book.tick(), ids)
        if self._repeats:
            sent = self._again(sent)
        else:
            self._book.sent[cookie] = sent
            self._book.check_request(sent)
            if own:
                self._book.link_follow_up(sent)
            else:
                ask = self._book.link(sent)
                sent.ask = ask if kind == WRITE else None
        if kind == WRITE:
            self.current, self._left = sent, length
            sent.payload_left = length

    def _again(self, sent: Sent) -> Sent:
        known = self._book.sent.get(sent.cookie)
        require(known, "sent what was never recorded", sent)
        assert known is not None
        require(not known.answered, "asked again what was answered", known)
        before = (known.kind, known.flags, known.offset, known.length, known.ids)
        now = (sent.kind, sent.flags, sent.offset, sent.length, sent.ids)
        require(before == now, "asked again for something else", known, sent)
        return known

    def _payload(self, sent: Sent, data: bytes | bytearray | memoryview) -> int:
        done = sent.length - self._left
        if sent.ask is None:
            expected = bytes(len(data))
        else:
            done += sent.offset - sent.ask.offset
            expected = bytes(sent.ask.payload[done : done + len(data)])
        require(data == expected, "another payload than the client's", sent)
        self._left -= len(data)
        sent.payload_left = self._left
        if not self._left:
            self.current = None
        return len(data)
