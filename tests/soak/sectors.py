"""What is written: each sector of 512 bytes says where it belongs, and which request wrote it.

So a disk tells by itself what became of each request, and nothing that was never sent can pass for
data: a checksum stands at the end of each sector.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

SECTOR: Final = 512
_MAGIC: Final = b"nbdsoak1"
_HEAD: Final = struct.Struct(">8sQQQII")
_SUM: Final = struct.Struct(">I")
_FILL: Final = SECTOR - _HEAD.size - _SUM.size
_NOTHING: Final = bytes(SECTOR)


class Mark(NamedTuple):
    """Who wrote a sector: a writer, and the number of its request. Numbers begin at 1."""

    writer: int
    number: int


ZERO: Final = Mark(0, 0)
"""Of a sector of zeroes, whoever made it so."""


class Stamp(NamedTuple):
    """What a sector says of itself."""

    sector: int  # where it belongs
    mark: Mark
    count: int  # sectors of the request
    index: int  # of this one in it


def fill(mark: Mark, first: int, count: int) -> bytes:
    """The payload of a request for `count` sectors from `first` on."""
    filler = struct.pack(">Q", (mark.number * 0x9E3779B97F4A7C15 + mark.writer) % (1 << 64))
    body = (filler * (_FILL // 8 + 1))[:_FILL]
    parts = []
    for index in range(count):
        head = _HEAD.pack(_MAGIC, first + index, mark.writer, mark.number, count, index) + body
        parts += [head, _SUM.pack(zlib.crc32(head))]
    return b"".join(parts)


def stamp_of(sector: bytes | memoryview) -> Stamp | None:
    """None: these are not 512 bytes that `fill` has made."""
    (checksum,) = _SUM.unpack_from(sector, SECTOR - _SUM.size)
    if zlib.crc32(sector[: SECTOR - _SUM.size]) != checksum:
        return None
    magic, place, writer, number, count, index = _HEAD.unpack_from(sector)
    if magic != _MAGIC:
        return None
    return Stamp(place, Mark(writer, number), count, index)


def mark_of(sector: bytes | memoryview, place: int) -> Mark | str:
    """Who wrote this sector, or what is wrong with finding it in this place."""
    if sector == _NOTHING:
        return ZERO
    stamp = stamp_of(sector)
    if stamp is None:
        return "no content that was ever sent: torn, or foreign"
    if stamp.sector != place:
        return f"content of sector {stamp.sector}, of request {stamp.mark.number}"
    return stamp.mark
