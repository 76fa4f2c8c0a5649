"""The numbers and headers of the transmission phase, as proto.md has them."""

from __future__ import annotations

import struct

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
(
    HAS_FLAGS,
    READ_ONLY,
    SEND_FLUSH,
    SEND_FUA,
    ROTATIONAL,
    SEND_TRIM,
    SEND_ZEROES,
    SEND_DF,
    MULTI_CONN,
    SEND_RESIZE,
    SEND_CACHE,
    SEND_FAST_ZERO,
    STATUS_PAYLOAD,
) = (1 << bit for bit in range(13))

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
LEGAL_ERRORS = frozenset({1, 5, 12, 22, 28, 75, 95, 108})
TRANSLATED = {30: EPERM, 122: ENOSPC, 27: ENOSPC}  # EROFS, EDQUOT, EFBIG

MAX_PAYLOAD = 1 << 25  # of a peer that advertises nothing
MAX_TEXT = 4096
MAX_EXTENTS = 1 << 20

NONE, DATA, HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET, ERROR_BIT = 0x8001, 0x8002, 0x8000
DONE = 1

COMPACT_REQUEST, EXTENDED_REQUEST = struct.Struct(">IHHQQI"), struct.Struct(">IHHQQQ")
COMPACT_CHUNK, EXTENDED_CHUNK = struct.Struct(">IHHQI"), struct.Struct(">IHHQQQ")
SIMPLE = struct.Struct(">IIQ")
REQUEST_MAGICS = (0x25609513, 0x21E41C71)  # compact, extended
CHUNK_MAGICS = (0x668E33EF, 0x6E8A278C)
SIMPLE_MAGIC = 0x67446698


def legal(error: int) -> int:
    """What a client may be told for an upstream's error."""
    return error if error in LEGAL_ERRORS else TRANSLATED.get(error, EINVAL)


def request(extended: bool, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
    layout = EXTENDED_REQUEST if extended else COMPACT_REQUEST
    length &= (1 << 64) - 1 if extended else (1 << 32) - 1
    return layout.pack(REQUEST_MAGICS[extended], flags, kind, cookie, offset, length)


def chunk(
    extended: bool, flags: int, kind: int, cookie: int, offset: int, payload: bytes, claim: int = 0
) -> bytes:
    """One chunk. `claim`: how many more bytes it announces than there are in `payload`."""
    length = len(payload) + claim
    if extended:
        head = EXTENDED_CHUNK.pack(CHUNK_MAGICS[1], flags, kind, cookie, offset, length)
    else:
        head = COMPACT_CHUNK.pack(CHUNK_MAGICS[0], flags, kind, cookie, length)
    return head + payload
