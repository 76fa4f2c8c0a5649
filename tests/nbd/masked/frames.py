"""Messages of the transmission phase in all three kinds of headers, by the tests' own reading.

proto.md, "Request message" to "Structured reply types"; for extended headers its branch
extension-ext-header. Nothing is taken from the gateway but the names of numbers.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from gateway.nbd.constants import Chunk, Cmd, CmdFlag, Error

COMPACT_REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
COMPACT_MAGIC, EXTENDED_MAGIC = 0x25609513, 0x21E41C71
SIMPLE_MAGIC, CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC = 0x67446698, 0x668E33EF, 0x6E8A278C

DONE = 1
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (int(one) for one in CmdFlag)
WRITES = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
LEGAL_ERRORS = frozenset(Error)


class Style(enum.Enum):
    """How a server answers: what was negotiated."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class Ask(NamedTuple):
    """One request. `length` is what the header says: of the payload, if there is one."""

    kind: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: bytes = b""
    cookie: int = 0

    @property
    def is_filter(self) -> bool:
        """A block status with a payload: effect length and meta context ids."""
        return self.kind == Cmd.BLOCK_STATUS and bool(self.flags & PAYLOAD_LEN)

    @property
    def effect(self) -> int:
        """How many bytes of the export it is about."""
        if self.is_filter and len(self.payload) >= 8:
            return int.from_bytes(self.payload[:8], "big")
        return self.length

    @property
    def stop(self) -> int:
        return self.offset + self.effect

    @property
    def ids(self) -> list[int]:
        """The meta context ids of a filter."""
        count = max(0, len(self.payload) - 8) // 4
        return list(struct.unpack_from(f">{count}I", self.payload, 8)) if count else []

    def pack(self, *, extended: bool) -> bytes:
        layout = EXTENDED_REQUEST if extended else COMPACT_REQUEST
        magic = EXTENDED_MAGIC if extended else COMPACT_MAGIC
        fields = (magic, self.flags, self.kind, self.cookie, self.offset, self.length)
        return layout.pack(*fields) + self.payload


def header_size(*, extended: bool) -> int:
    return EXTENDED_REQUEST.size if extended else COMPACT_REQUEST.size


def take_ask(raw: bytes | bytearray, *, extended: bool) -> tuple[Ask, int] | None:
    """The first request in `raw`, and how long it is; None while it is not whole."""
    layout = EXTENDED_REQUEST if extended else COMPACT_REQUEST
    if len(raw) < layout.size:
        return None
    magic, flags, kind, cookie, offset, length = layout.unpack_from(raw)
    assert magic == (EXTENDED_MAGIC if extended else COMPACT_MAGIC), f"request magic {magic:#x}"
    has_payload = flags & PAYLOAD_LEN if extended else kind == Cmd.WRITE
    stop = layout.size + (length if has_payload else 0)
    if len(raw) < stop:
        return None
    payload = bytes(raw[layout.size : stop])
    return Ask(kind, offset, length, flags, payload, cookie), stop


# -- replies


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return SIMPLE.pack(SIMPLE_MAGIC, error, cookie) + data


def chunk(style: Style, ask: Ask, kind: int, payload: bytes = b"", *, done: bool) -> bytes:
    """One chunk of the answer to `ask`."""
    if style is Style.EXTENDED:
        fields = (EXTENDED_CHUNK_MAGIC, DONE * done, kind, ask.cookie, ask.offset, len(payload))
        return EXTENDED_CHUNK.pack(*fields) + payload
    return CHUNK.pack(CHUNK_MAGIC, DONE * done, kind, ask.cookie, len(payload)) + payload


def data_payload(offset: int, data: bytes | bytearray) -> bytes:
    return struct.pack(">Q", offset) + data


def hole_payload(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


def error_payload(error: int, text: bytes = b"", offset: int | None = None) -> bytes:
    """Of NBD_REPLY_TYPE_ERROR, or with an offset of NBD_REPLY_TYPE_ERROR_OFFSET."""
    tail = b"" if offset is None else struct.pack(">Q", offset)
    return struct.pack(">IH", error, len(text)) + text + tail


def status_payload(style: Style, number: int, extents: Sequence[tuple[int, int]]) -> bytes:
    if style is Style.EXTENDED:
        head = struct.pack(">II", number, len(extents))
        return head + b"".join(struct.pack(">QQ", *one) for one in extents)
    return struct.pack(">I", number) + b"".join(struct.pack(">II", *one) for one in extents)


def status_kind(style: Style) -> Chunk:
    return Chunk.BLOCK_STATUS_EXT if style is Style.EXTENDED else Chunk.BLOCK_STATUS
