"""Fixed structs, and the codecs of options and their replies. All integers are big-endian.

Decoders take the whole data of one message and raise `Malformed` when it is not what the
specification says; who is to blame, and what can still be answered, is for the caller to say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gateway.errors import GatewayError, PeerError, Side
from gateway.nbd.constants import (
    IHAVEOPT,
    MAX_EXPORT_SIZE,
    MAX_MIN_BLOCK,
    MAX_STRING,
    MAX_UNADVERTISED_PAYLOAD,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    Cmd,
    Info,
    Rep,
)

GREETING = struct.Struct(">QQ")  # NBDMAGIC, then the magic of the style
HANDSHAKE_FLAGS = struct.Struct(">H")
CLIENT_FLAGS = struct.Struct(">I")
OLDSTYLE_REST = struct.Struct(">QI124x")  # size, flags, reserved
EXPORT_NAME_ANSWER = struct.Struct(">QH")  # size, transmission flags
OPTION = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
ERROR_CHUNK = struct.Struct(">IH")  # error, message length
HOLE = struct.Struct(">QI")  # offset, hole size
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")


class Malformed(GatewayError):
    """The data of one message is not what the specification says. The framing is still intact."""


class Inbox:
    """Bytes of one direction that no message has claimed yet."""

    def __init__(self, side: Side) -> None:
        self._side: Side = side
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def append(self, data: bytes) -> None:
        self._buffer += data

    def peek(self, count: int) -> bytes:
        """Up to `count` of the first bytes, not consumed."""
        return bytes(self._buffer[:count])

    def take(self, count: int) -> bytes | None:
        """Exactly `count` bytes, or None (and nothing consumed) while there are fewer."""
        if len(self._buffer) < count:
            return None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def skip(self, count: int) -> int:
        """Throw away up to `count` bytes and return how many that were."""
        skipped = min(count, len(self._buffer))
        del self._buffer[:skipped]
        return skipped

    def take_option_header(self) -> OptionHeader | None:
        """The next option's header; its data stays. Raises PeerError when the magic is wrong."""
        if len(self._buffer) < OPTION.size:
            return None
        magic, option, length = OPTION.unpack_from(self._buffer)
        if magic != IHAVEOPT:
            raise PeerError(self._side, f"option magic {magic:#018x}")
        del self._buffer[: OPTION.size]
        return OptionHeader(option, length)

    def take_option_reply(self, *, max_data: int) -> OptionReply | None:
        """The next whole option reply. Raises PeerError on a wrong magic or too much data."""
        if len(self._buffer) < OPTION_REPLY.size:
            return None
        magic, option, kind, length = OPTION_REPLY.unpack_from(self._buffer)
        if magic != OPTION_REPLY_MAGIC:
            raise PeerError(self._side, f"option reply magic {magic:#018x}")
        if length > max_data:
            raise PeerError(self._side, f"option reply of {length} bytes")
        end = OPTION_REPLY.size + length
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[OPTION_REPLY.size : end])
        del self._buffer[:end]
        return OptionReply(option, kind, data)


class OptionHeader(NamedTuple):
    """Client to server, 16 bytes. proto.md, "Newstyle negotiation"."""

    option: int  # plain int: an unknown option is legal and gets a reply
    length: int  # bytes of data that follow; the peer's claim, so cap before buffering


class OptionReply(NamedTuple):
    """Server to client. proto.md, "Fixed newstyle negotiation"."""

    option: int
    kind: int  # NBD_REP_*, plain int: an unknown one is legal
    data: bytes


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """NBD_INFO_BLOCK_SIZE, in bytes. proto.md, "Size constraints"; the defaults are its own."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_UNADVERTISED_PAYLOAD

    def check(self) -> None:
        """Raises Malformed unless the values obey "Size constraints"."""
        if not (_power_of_two(self.minimum) and self.minimum <= MAX_MIN_BLOCK):
            raise Malformed(f"minimum block size {self.minimum}")
        if not _power_of_two(self.preferred) or self.preferred < max(self.minimum, 512):
            raise Malformed(f"preferred block size {self.preferred}")
        if self.maximum < self.preferred:
            raise Malformed(f"maximum payload {self.maximum} below preferred block size")


DEFAULT_BLOCK_SIZES = BlockSizes()


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class MetaContext(NamedTuple):
    """NBD_REP_META_CONTEXT."""

    id: int
    name: str


class ListedExport(NamedTuple):
    """NBD_REP_SERVER."""

    name: str
    description: str


class InfoRequest(NamedTuple):
    """Data of NBD_OPT_INFO and NBD_OPT_GO."""

    name: str
    infos: tuple[int, ...]  # plain ints: unknown information types are legal


class MetaQuery(NamedTuple):
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


# -- encoders


def option(number: int, data: bytes = b"") -> bytes:
    """One option, as a client sends it."""
    return OPTION.pack(IHAVEOPT, number, len(data)) + data


def option_reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """One reply to option `number`, in one piece: some clients do not read twice."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def pack_info_request(name: str, infos: Iterable[int]) -> bytes:
    """Data of NBD_OPT_INFO and NBD_OPT_GO."""
    raw, wanted = name.encode(), tuple(infos)
    return U32.pack(len(raw)) + raw + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def pack_meta_query(name: str, queries: Iterable[str]) -> bytes:
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    raws = [query.encode() for query in queries]
    raw_name = name.encode()
    parts = [U32.pack(len(raw_name)), raw_name, U32.pack(len(raws))]
    for raw in raws:
        parts += [U32.pack(len(raw)), raw]
    return b"".join(parts)


def pack_listed_export(export: ListedExport) -> bytes:
    """Data of NBD_REP_SERVER."""
    name = export.name.encode()
    return U32.pack(len(name)) + name + export.description.encode()


def pack_meta_context(context: MetaContext) -> bytes:
    """Data of NBD_REP_META_CONTEXT."""
    return U32.pack(context.id) + context.name.encode()


def pack_info_export(size: int, flags: int) -> bytes:
    """Data of NBD_REP_INFO, NBD_INFO_EXPORT."""
    return _INFO_EXPORT.pack(Info.EXPORT, size, flags)


def pack_info_block_size(sizes: BlockSizes) -> bytes:
    """Data of NBD_REP_INFO, NBD_INFO_BLOCK_SIZE."""
    return _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, sizes.minimum, sizes.preferred, sizes.maximum)


def pack_info_text(kind: int, text: str) -> bytes:
    """Data of NBD_REP_INFO for NBD_INFO_NAME and NBD_INFO_DESCRIPTION."""
    return U16.pack(kind) + text.encode()


def disconnect_request() -> bytes:
    """NBD_CMD_DISC: the polite end of the transmission phase. It has no reply."""
    return REQUEST.pack(REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0)


# -- decoders


def decode_string(raw: bytes) -> str:
    """A protocol string: UTF-8, no NUL, at most 4096 bytes. Raises Malformed."""
    if len(raw) > MAX_STRING:
        raise Malformed(f"string of {len(raw)} bytes")
    if b"\0" in raw:
        raise Malformed("NUL in a string")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Malformed("a string that is not UTF-8") from None


class _Reader:
    """A cursor over one message's data. Every read raises Malformed beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise Malformed("data shorter than it claims")
        raw = self._data[self._at : self._at + count]
        self._at += count
        return raw

    def u16s(self) -> tuple[int, ...]:
        """As many as the first one says."""
        (count,) = U16.unpack(self.take(U16.size))
        return struct.unpack(f">{count}H", self.take(count * U16.size))

    def u32(self) -> int:
        value: int = U32.unpack(self.take(U32.size))[0]
        return value

    def string(self) -> str:
        return decode_string(self.take(self.u32()))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        if self._at != len(self._data):
            raise Malformed("data longer than it claims")


def unpack_info_request(data: bytes) -> InfoRequest:
    """Data of NBD_OPT_INFO and NBD_OPT_GO: exactly 4+n+2+2k bytes. Raises Malformed."""
    reader = _Reader(data)
    name = reader.string()
    infos = reader.u16s()
    reader.end()
    return InfoRequest(name, infos)


def unpack_meta_query(data: bytes) -> MetaQuery:
    """Data of the two meta context options. Raises Malformed."""
    reader = _Reader(data)
    name = reader.string()
    count = reader.u32()
    if count > len(data) // 4:  # each query is four bytes at least: no loop on a mere claim
        raise Malformed(f"{count} queries in {len(data)} bytes")
    queries = tuple(reader.string() for _ in range(count))
    reader.end()
    return MetaQuery(name, queries)


def unpack_listed_export(data: bytes) -> ListedExport:
    """Data of NBD_REP_SERVER. Raises Malformed."""
    reader = _Reader(data)
    return ListedExport(reader.string(), decode_string(reader.rest()))


def unpack_meta_context(data: bytes) -> MetaContext:
    """Data of NBD_REP_META_CONTEXT. Raises Malformed."""
    reader = _Reader(data)
    return MetaContext(reader.u32(), decode_string(reader.rest()))


def unpack_info_export(data: bytes) -> tuple[int, int]:
    """Size and flags out of NBD_INFO_EXPORT (type included). Raises Malformed."""
    if len(data) != _INFO_EXPORT.size:
        raise Malformed(f"NBD_INFO_EXPORT of {len(data)} bytes")
    _, size, flags = _INFO_EXPORT.unpack(data)
    check_size(size)
    return size, flags


def unpack_info_block_size(data: bytes) -> BlockSizes:
    """NBD_INFO_BLOCK_SIZE (type included). Raises Malformed."""
    if len(data) != _INFO_BLOCK_SIZE.size:
        raise Malformed(f"NBD_INFO_BLOCK_SIZE of {len(data)} bytes")
    sizes = BlockSizes(*_INFO_BLOCK_SIZE.unpack(data)[1:])
    sizes.check()
    return sizes


def check_size(size: int) -> None:
    """Raises Malformed for an export size that no signed 64-bit offset can hold."""
    if size > MAX_EXPORT_SIZE:
        raise Malformed(f"export size {size:#x}")


def rep_name(kind: int) -> str:
    """`NBD_REP_ERR_UNKNOWN` for its number, or the number itself: for logs."""
    try:
        return f"NBD_REP_{Rep(kind).name}"
    except ValueError:
        return f"reply type {kind:#x}"
