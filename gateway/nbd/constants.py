"""Every number of the specification, in its order (proto.md, "Values" and the magic numbers)."""

from __future__ import annotations

import enum

NBD_MAGIC = 0x4E42444D41474943  # "NBDMAGIC", also known as INIT_PASSWD
CLISERV_MAGIC = 0x00420281861253  # oldstyle
IHAVEOPT = 0x49484156454F5054  # newstyle greeting, and the start of every option
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

MAX_STRING = 4096  # "MUST be no longer than 4096 bytes"
MAX_UNADVERTISED_PAYLOAD = 1 << 25  # 32 MiB: up to here a payload SHOULD NOT be taken for an attack
UNLIMITED_PAYLOAD = 0xFFFFFFFF  # "maximum payload size" of a server without a limit
MAX_EXTENTS = 1 << 20  # extents in one NBD_REPLY_TYPE_BLOCK_STATUS
MAX_EXPORT_SIZE = (1 << 63) - 1  # larger sizes are negative offsets on every peer
MAX_MIN_BLOCK = 1 << 16
EXPORT_NAME_ZEROES = bytes(124)  # behind the answer to NBD_OPT_EXPORT_NAME, and in oldstyle


class HandshakeFlag(enum.IntFlag):
    """proto.md, "Handshake flags": server to client, 16 bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(enum.IntFlag):
    """proto.md, "Client flags": client to server, 32 bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(enum.IntFlag):
    """proto.md, "Transmission flags": 16 bits."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Opt(enum.IntEnum):
    """proto.md, "Option types"."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(enum.IntEnum):
    """proto.md, "Option reply types"."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


REP_ERROR_BIT = 1 << 31


class Info(enum.IntEnum):
    """proto.md, NBD_REP_INFO: information types."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class CmdFlag(enum.IntFlag):
    """proto.md, "Command flags": 16 bits."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(enum.IntFlag):
    """proto.md, "Structured reply flags": 16 bits."""

    DONE = 1 << 0


class Chunk(enum.IntEnum):
    """proto.md, "Structured reply types"."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_ERROR_BIT = 1 << 15


class Cmd(enum.IntEnum):
    """proto.md, "Request types"."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class Error(enum.IntEnum):
    """proto.md, "Error values": all that may stand in the error field of a reply."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108
