"""Messages as proto.md draws them, packed and parsed without the gateway's own codecs.

Codes such as (H3) in the tests' docstrings are the names of the project's protocol rules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gateway.nbd.constants import Chunk, Cmd, Opt, Rep, TransmissionFlag
from gateway.nbd.negotiation import Effect, Send
from gateway.nbd.pairing import Terms

IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
START_OF_REPLY = struct.pack(">Q", REPLY_MAGIC)

MIB = 1 << 20
DONE = 1  # the one structured reply flag

Tf = TransmissionFlag
ALL_FEATURES = (
    Tf.HAS_FLAGS
    | Tf.SEND_FLUSH
    | Tf.SEND_FUA
    | Tf.SEND_TRIM
    | Tf.SEND_WRITE_ZEROES
    | Tf.SEND_DF
    | Tf.SEND_CACHE
    | Tf.SEND_FAST_ZERO
)


def all_cuts(data: bytes) -> Iterator[list[bytes]]:
    """`data` in one piece, in every two pieces, and byte by byte."""
    yield [data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    yield [data[at : at + 1] for at in range(len(data))]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """`data` cut at these places, wherever they fall. No piece is empty."""
    stops = sorted({place % len(data) for place in places} - {0}) if data else []
    return [data[a:b] for a, b in zip([0, *stops], [*stops, len(data)], strict=True) if a < b]


# -- haggling, client to server


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """One option; `length` lies about the size of `data`."""
    return OPTION.pack(IHAVEOPT, number, len(data) if length is None else length) + data


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    """A string behind its 32-bit length, which `length` may lie about."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw) if length is None else length) + raw


def info_data(name: str | bytes = "", infos: Sequence[int] = ()) -> bytes:
    """The data of NBD_OPT_INFO and NBD_OPT_GO."""
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(name: str | bytes = "", queries: Sequence[str | bytes] = ()) -> bytes:
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    head = string(name) + struct.pack(">I", len(queries))
    return head + b"".join(string(query) for query in queries)


# -- haggling, server to client


class Reply(NamedTuple):
    """One option reply. The text of an error reply is ours to choose: here it is left out."""

    option: int
    kind: int
    data: bytes = b""

    def pack(self) -> bytes:
        head = OPTION_REPLY.pack(REPLY_MAGIC, self.option, self.kind, len(self.data))
        return head + self.data


def option_reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return Reply(number, kind, data).pack()


def info_export(size: int, flags: int = int(Tf.HAS_FLAGS)) -> bytes:
    return struct.pack(">HQH", 0, size, flags)


def info_text(kind: int, text: str) -> bytes:
    return struct.pack(">H", kind) + text.encode()


def info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">HIII", 3, minimum, preferred, maximum)


def listed(name: str | bytes, description: str = "") -> bytes:
    """The data of NBD_REP_SERVER."""
    return string(name) + description.encode()


def context(number: int, name: str) -> bytes:
    """The data of NBD_REP_META_CONTEXT."""
    return struct.pack(">I", number) + name.encode()


def said(effects: Iterable[Effect]) -> list[object]:
    """Effects with every option reply read; each has to be one whole `Send` (H14).

    Error texts are checked (fit for display, no longer than a string may be) and left out.
    """
    return [
        one_reply(one.data) if isinstance(one, Send) and one.data[:8] == START_OF_REPLY else one
        for one in effects
    ]


def one_reply(raw: bytes) -> Reply:
    magic, number, kind, length = OPTION_REPLY.unpack_from(raw)
    data = raw[OPTION_REPLY.size :]
    assert magic == REPLY_MAGIC
    assert len(data) == length, "not one reply in one write"
    if kind & 1 << 31:
        assert length <= 4096
        assert data.decode().isprintable()
        data = b""
    return Reply(number, kind, data)


def text_of(effect: Effect) -> str:
    """The text of an error reply."""
    assert isinstance(effect, Send)
    assert one_reply(effect.data).kind & 1 << 31
    return effect.data[OPTION_REPLY.size :].decode()


def acked(number: int) -> Reply:
    return Reply(number, Rep.ACK)


# -- transmission


def terms(
    size: int = MIB, flags: int = ALL_FEATURES, *, structured: bool = False, **more: object
) -> Terms:
    return Terms("", size, TransmissionFlag(flags), structured, **more)  # type: ignore[arg-type]


class Req(NamedTuple):
    """One request, `payload` included."""

    kind: int
    offset: int = 0
    length: int = 0
    cookie: int = 1
    flags: int = 0
    payload: bytes = b""

    def pack(self) -> bytes:
        head = (REQUEST_MAGIC, self.flags, self.kind, self.cookie, self.offset, self.length)
        return REQUEST.pack(*head) + self.payload


WITH_LENGTH = [one for one in Cmd if one not in (Cmd.DISC, Cmd.FLUSH, Cmd.RESIZE)]
WRITES = (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)  # all that a read-only export refuses


def request(kind: int, offset: int = 0, length: int = 512, flags: int = 0, cookie: int = 9) -> Req:
    """A request with what its kind has to have: a payload, or no length."""
    payload = b"w" * length if kind == Cmd.WRITE else b""
    return Req(kind, offset, 0 if kind == Cmd.FLUSH else length, cookie, flags, payload)


def read(offset: int, length: int, cookie: int = 1, flags: int = 0) -> bytes:
    return Req(Cmd.READ, offset, length, cookie, flags).pack()


def write(offset: int, payload: bytes, cookie: int = 1, flags: int = 0) -> bytes:
    return Req(Cmd.WRITE, offset, len(payload), cookie, flags, payload).pack()


def parse_requests(raw: bytes) -> list[Req]:
    """A stream of whole requests, as an upstream reads it."""
    found, at = [], 0
    while at < len(raw):
        magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(raw, at)
        assert magic == REQUEST_MAGIC, f"no request at byte {at}"
        at += REQUEST.size
        payload = b""
        if kind == Cmd.WRITE:
            payload = raw[at : at + length]
            assert len(payload) == length, "a write without its payload"
            at += length
        found.append(Req(kind, offset, length, cookie, flags, payload))
    return found


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return SIMPLE.pack(SIMPLE_MAGIC, error, cookie) + data


def chunk(cookie: int, kind: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    return CHUNK.pack(CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload


def data_chunk(cookie: int, offset: int, data: bytes, *, flags: int = 0) -> bytes:
    return chunk(cookie, Chunk.OFFSET_DATA, struct.pack(">Q", offset) + data, flags=flags)


def hole_chunk(cookie: int, offset: int, length: int, *, flags: int = 0) -> bytes:
    return chunk(cookie, Chunk.OFFSET_HOLE, struct.pack(">QI", offset, length), flags=flags)


def none_chunk(cookie: int) -> bytes:
    return chunk(cookie, Chunk.NONE, flags=DONE)


def error_chunk(
    cookie: int, error: int, text: bytes = b"", *, kind: int = Chunk.ERROR, flags: int = DONE
) -> bytes:
    return chunk(cookie, kind, struct.pack(">IH", error, len(text)) + text, flags=flags)


def error_offset_chunk(
    cookie: int, error: int, offset: int, text: bytes = b"", *, flags: int = DONE
) -> bytes:
    payload = struct.pack(">IH", error, len(text)) + text + struct.pack(">Q", offset)
    return chunk(cookie, Chunk.ERROR_OFFSET, payload, flags=flags)


def status_chunk(
    cookie: int, number: int, extents: Sequence[tuple[int, int]], *, flags: int = 0
) -> bytes:
    payload = struct.pack(">I", number) + b"".join(struct.pack(">II", *one) for one in extents)
    return chunk(cookie, Chunk.BLOCK_STATUS, payload, flags=flags)


OPTIONS_WITHOUT_DATA = (Opt.LIST, Opt.STARTTLS, Opt.STRUCTURED_REPLY)
