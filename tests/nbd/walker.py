"""A relay without channels, to drive `Transmission` as a relay has to, and a client's eyes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gateway.nbd.constants import Chunk
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import InFlightLimits, Piece, Transmission
from tests.nbd.support import (
    CHUNK,
    CHUNK_MAGIC,
    DONE,
    SIMPLE,
    SIMPLE_MAGIC,
    Req,
    parse_requests,
)

PLENTY = InFlightLimits(requests=1 << 20, payload=1 << 40)
FRONT = 5  # bytes before, and behind, what a walk is given: it must not touch them


class Walker:
    """Both walks over buffers that are no larger than they must be.

    `upstream` and `client` are what was sent that way. A local reply waits for the end of the
    message that the client is in the middle of.
    """

    def __init__(self, terms: Terms) -> None:
        self.machine = Transmission(terms, limits=PLENTY)
        self.upstream = bytearray()
        self.client = bytearray()
        self._from_client = b""
        self._from_upstream = b""
        self._waiting = b""
        self.follow_ups: list[bytes] = []
        self.largest_request = 32 + 8 + 4 * len(terms.contexts)

    @property
    def forwarded(self) -> list[Req]:
        """The upstream's reading of what it was sent."""
        return parse_requests(bytes(self.upstream))

    def requests(self, pieces: Iterable[bytes]) -> Walker:
        """What the client sends, until the gateway reads no further."""
        for piece in pieces:
            if self.machine.client_done or self.machine.client_fault:
                break
            held = self._from_client + piece
            buffer = bytearray(b"\xa5" * FRONT + held + b"\x5a" * FRONT)
            end = FRONT + len(held)
            at, pieces = self.machine.requests(buffer, FRONT, end)
            assert FRONT <= at <= end
            assert buffer[:FRONT] == b"\xa5" * FRONT
            assert buffer[end:] == b"\x5a" * FRONT
            self.upstream += joined_pieces(buffer, pieces, FRONT, at)
            self._from_client = bytes(buffer[at:end])
            stopped = self.machine.client_done or self.machine.client_fault
            crowded = self.machine.crowded
            assert stopped or crowded or len(self._from_client) < self.largest_request
            self._follow_up()
            self._waiting += self.machine.take_local_replies()
            assert not self.machine.take_local_replies()
            self._speak()
        return self

    def replies(self, pieces: Iterable[bytes]) -> Walker:
        """What the upstream sends, until the gateway reads no further."""
        for piece in pieces:
            if self.machine.upstream_fault:
                break
            held = self._from_upstream + piece
            wanted = self.machine.wanted
            buffer = bytearray(b"\xa5" * FRONT + held + b"\x5a" * FRONT)
            at, end = FRONT, FRONT + len(held)
            stop, pieces = self.machine.replies(buffer, at, end)
            assert at <= stop <= end
            assert not (stop > at and end - at < wanted), "went on with less than it wanted"
            self.client += joined_pieces(buffer, pieces, at, stop)
            at = stop
            self._speak()
            self._follow_up()
            if self.machine.crowded:
                self.requests([b""])
            assert buffer[:FRONT] == b"\xa5" * FRONT
            assert buffer[end:] == b"\x5a" * FRONT
            self._from_upstream = bytes(buffer[at:end])
        return self

    def lose_upstream(self) -> bool:
        """False if the client cannot be told."""
        words = self.machine.lose_upstream()
        if words is None:
            return False
        for one in words:
            self.client += one
        self._speak()
        return True

    def _follow_up(self) -> None:
        """Requests of the gateway's own go out as soon as the upstream is at a boundary."""
        while self.machine.follow_ups_due and not self.machine.mid_request:
            batch = b"".join(self.machine.take_follow_ups())
            self.follow_ups.append(batch)
            self.upstream += batch

    def _speak(self) -> None:
        if not self.machine.mid_reply:
            self.client += self._waiting
            self._waiting = b""


def joined_pieces(buffer: bytearray, pieces: Iterable[Piece], at: int, end: int) -> bytes:
    """What is sent, out of a walk over `buffer[at:end]`."""
    sent = bytearray()
    for piece in pieces:
        if isinstance(piece, tuple):
            start, stop = piece
            assert at <= start < stop <= end, "spans are in order and not empty"
            at = stop
            sent += buffer[start:stop]
        else:
            sent += piece
    return bytes(sent)


class Seen(NamedTuple):
    """One message as a client reads it. `kind` is None for a simple reply."""

    cookie: int
    kind: int | None
    final: bool
    error: int = 0
    data: bytes = b""  # a chunk's payload, or the data of a simple reply


def parse_replies(
    raw: bytes, reads: Mapping[int, int] | None = None, *, cut_off: bool = False
) -> list[Seen]:
    """A stream of whole replies. `reads` has the lengths of the reads, by cookie.

    With `cut_off` the data of the last one may end early.
    """
    found, at = [], 0
    while at < len(raw):
        (magic,) = struct.unpack_from(">I", raw, at)
        if magic == SIMPLE_MAGIC:
            _, error, cookie = SIMPLE.unpack_from(raw, at)
            at += SIMPLE.size
            length = 0 if error else (reads or {}).get(cookie, 0)
            seen = Seen(cookie, None, True, error, raw[at : at + length])
        else:
            assert magic == CHUNK_MAGIC, f"no reply at byte {at}"
            _, flags, kind, cookie, length = CHUNK.unpack_from(raw, at)
            at += CHUNK.size
            data = raw[at : at + length]
            assert not flags & ~DONE
            error = _error_of(data) if kind & 1 << 15 else 0
            seen = Seen(cookie, kind, bool(flags & DONE), error, data)
        assert len(seen.data) == length or cut_off, "cut short"
        at += length
        found.append(seen)
    return found


def _error_of(data: bytes) -> int:
    error, length = struct.unpack_from(">IH", data)
    assert error, "an error chunk without an error"
    assert length <= min(len(data) - 6, 4096)
    return int(error)


def joined(replies: list[Seen]) -> list[Seen]:
    """DONE may come with the last data, or in a message of its own right behind it."""
    found: list[Seen] = []
    for seen in replies:
        last = found[-1] if found else None
        if (
            seen.kind == Chunk.NONE
            and last is not None
            and (last.cookie, last.kind, last.final) == (seen.cookie, Chunk.OFFSET_DATA, False)
        ):
            found[-1] = last._replace(final=True)
        else:
            found.append(seen)
    return found


def verdicts(raw: bytes) -> list[tuple[int, int]]:
    """(cookie, error) of a stream of replies that the gateway itself has made, none with data."""
    found = []
    for seen in parse_replies(raw):
        assert seen.final
        assert seen.kind in (None, Chunk.NONE, Chunk.ERROR)
        if seen.kind == Chunk.ERROR:
            (length,) = struct.unpack_from(">H", seen.data, 4)
            text = seen.data[6:].decode()
            assert length == len(seen.data) - 6
            assert text
            assert text.isprintable()
        found.append((seen.cookie, seen.error))
    return found
