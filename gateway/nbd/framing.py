"""The headers of the transmission phase: compact, or extended (64-bit lengths).

proto.md, "Request message", "Simple reply message" and "Structured reply chunk message"; for
extended headers its branch extension-ext-header, "Extended reply chunk message". Both kinds have
their magic, flags, type, cookie and offset in the same places.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gateway.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    ReplyFlag,
)
from gateway.nbd.wire import CHUNK, EXTENDED_CHUNK, EXTENDED_REQUEST, REQUEST, U16, U64

FLAGS_AT = 4  # in requests and chunks; a simple reply has its error here
COOKIE_AT = 8
OFFSET_AT = 16  # in requests and extended chunks
LENGTH_AT = 24  # in requests

_DONE = int(ReplyFlag.DONE)


@dataclass(frozen=True, slots=True)
class Framing:
    """One kind of headers."""

    extended: bool
    request: struct.Struct  # magic, flags, type, cookie, offset, length
    request_magic: int
    chunk: struct.Struct  # magic, flags, type, cookie, (extended: offset,) length
    chunk_magic: int

    def pack_request(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        """A request's header."""
        return self.request.pack(self.request_magic, flags, kind, cookie, offset, length)

    def pack_chunk(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        """A chunk's header. `offset` is that of the request, whatever the chunk is about."""
        if self.extended:
            return self.chunk.pack(self.chunk_magic, flags, kind, cookie, offset, length)
        return self.chunk.pack(self.chunk_magic, flags, kind, cookie, length)

    def readdress(self, buffer: bytearray, at: int, flags: int, cookie: int, offset: int) -> None:
        """Make an upstream's chunk header one for the client, whose request has this offset."""
        if flags & ~_DONE or not flags:  # only flags that were negotiated with the client
            U16.pack_into(buffer, at + FLAGS_AT, flags & _DONE)
        U64.pack_into(buffer, at + COOKIE_AT, cookie)
        if self.extended:
            U64.pack_into(buffer, at + OFFSET_AT, offset)

    def disconnect(self) -> bytes:
        """NBD_CMD_DISC: the polite end of the transmission phase. It has no reply."""
        return self.pack_request(0, Cmd.DISC, 0, 0, 0)


COMPACT = Framing(False, REQUEST, REQUEST_MAGIC, CHUNK, STRUCTURED_REPLY_MAGIC)
EXTENDED = Framing(
    True, EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC, EXTENDED_CHUNK, EXTENDED_REPLY_MAGIC
)


def framing(*, extended: bool) -> Framing:
    """What was negotiated."""
    return EXTENDED if extended else COMPACT
