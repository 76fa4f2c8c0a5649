"""An NBD client made of bytes: it sends what a test says, legal or not, and hides nothing.

The numbers here are the tests' own reading of proto.md; nothing is taken from the gateway. Blocking
sockets with a timeout; TLS runs over memory buffers, so that a test can cut a record in the middle.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import socket
import ssl
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

TIMEOUT_S = 15.0  # longer than any wait of the gateway; a test that reaches it has failed

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
CLISERV = 0x00420281861253
REP_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
MAX_PAYLOAD = 32 << 20

C_FIXED, C_NO_ZEROES = 1, 2  # client flags; the handshake flags have the same two bits
GREETING = struct.Struct(">QQH")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")


class Opt(enum.IntEnum):
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


class Rep(enum.IntEnum):
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


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Tf(enum.IntFlag):
    """Transmission flags."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Cmd(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Cf(enum.IntFlag):
    """Command flags."""

    NONE = 0
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Ct(enum.IntEnum):
    """Chunk types."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class Err(enum.IntEnum):
    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class OptReply(NamedTuple):
    option: int
    type: int
    data: bytes

    @property
    def final(self) -> bool:
        return self.type == Rep.ACK or self.failed

    @property
    def failed(self) -> bool:
        return self.type >= 1 << 31


class Request(NamedTuple):
    cmd: int
    offset: int = 0
    length: int = 0
    cookie: int = 1
    flags: int = 0
    payload: bytes = b""

    def pack(self, magic: int = REQUEST_MAGIC) -> bytes:
        head = (magic, self.flags, self.cmd, self.cookie, self.offset, self.length)
        return REQUEST.pack(*head) + self.payload


class Export(NamedTuple):
    """What a granted INFO or GO said."""

    size: int
    flags: int
    infos: dict[int, bytes]

    @property
    def block_sizes(self) -> tuple[int, int, int] | None:
        raw = self.infos.get(Info.BLOCK_SIZE)
        return None if raw is None else struct.unpack(">III", raw)


class PeerClosedError(Exception):
    """The gateway ended the session while a test still expected bytes."""


def option(opt: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """One option; `length` lies about the size of `data`."""
    return OPTION.pack(IHAVEOPT, opt, len(data) if length is None else length) + data


def info_data(
    name: bytes = b"",
    infos: Sequence[int] = (),
    *,
    name_length: int | None = None,
    count: int | None = None,
) -> bytes:
    """The data of INFO and GO."""
    head = struct.pack(">I", len(name) if name_length is None else name_length) + name
    number = len(infos) if count is None else count
    return head + struct.pack(f">H{len(infos)}H", number, *infos)


def meta_data(
    name: bytes = b"", queries: Sequence[bytes] = (), *, count: int | None = None
) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    head = struct.pack(">I", len(name)) + name
    head += struct.pack(">I", len(queries) if count is None else count)
    return head + b"".join(struct.pack(">I", len(query)) + query for query in queries)


@functools.lru_cache
def tls_context(
    pki: Path, *, with_certificate: bool = True, only_1_2: bool = False
) -> ssl.SSLContext:
    """A client's context; the name in the server's certificate is not looked at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # Set by some builds of Python: a cut would look like close_notify.
    context.options &= ~int(getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0))
    context.load_verify_locations(pki / "ca-cert.pem")
    if with_certificate:
        context.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
    if only_1_2:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def client_hello(context: ssl.SSLContext) -> bytes:
    """The first flight of a TLS client, for tests that send it where it does not belong."""
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def dial(uri: str, source: str | None = None) -> socket.socket:
    """Connect to where the gateway said it listens; from an address of ours, if one is given (all
    of 127.0.0.0/8 are). The caller closes."""
    parts = urlsplit(uri)
    if "unix" in parts.scheme:
        sock = socket.socket(socket.AF_UNIX)
        address: str | tuple[str, int] = parse_qs(parts.query)["socket"][0]
    else:
        host = parts.hostname or "127.0.0.1"
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = (host, parts.port or 10809)
    sock.settimeout(TIMEOUT_S)
    try:
        if source is not None:
            sock.bind((source, 0))
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


class RawClient:
    """One connection. `ended` tells how the gateway closed it, once a read has met the end."""

    def __init__(self, uri: str, source: str | None = None) -> None:
        self.sock = dial(uri, source)
        self.tls: ssl.SSLObject | None = None
        self.structured = False
        self.ended: str | None = None
        self._inbox = bytearray()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with a TCP RST instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # Bytes

    def seal(self, data: bytes) -> bytes:
        """The TLS records that carry `data`, not yet sent."""
        assert self.tls is not None
        self.tls.write(data)
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        self.sock.sendall(self.seal(data) if self.tls else data)

    def try_send(self, data: bytes) -> None:
        """Send to a gateway that has every right to be gone."""
        with contextlib.suppress(ConnectionError):
            self.send(data)

    def recv_some(self) -> bytes:
        """Whatever comes next, b"" at the end; TimeoutError if the gateway keeps still."""
        while self.ended is None:
            try:
                if self.tls is None:
                    data = self.sock.recv(1 << 16)
                    self.ended = None if data else "fin"
                    return data
                if data := self.tls.read(1 << 16):
                    return data
                self.ended = "close_notify"
            except ssl.SSLWantReadError:
                self._feed()
            except ssl.SSLEOFError:
                self.ended = "fin"
            except ssl.SSLError as error:
                cut = error.reason == "UNEXPECTED_EOF_WHILE_READING"  # Python 3.11.2: no own type
                self.ended = "fin" if cut else f"alert: {error.reason}"
            except ConnectionError:
                self.ended = "reset"
        return b""

    def _feed(self) -> None:
        if raw := self.sock.recv(1 << 18):
            self._incoming.write(raw)
        else:
            self._incoming.write_eof()

    def recv_exactly(self, count: int) -> bytes:
        while len(self._inbox) < count:
            data = self.recv_some()
            if not data:
                raise PeerClosedError(f"{self.ended}, {len(self._inbox)} of {count} bytes came")
            self._inbox += data
        taken = bytes(self._inbox[:count])
        del self._inbox[:count]
        return taken

    def recv_to_end(self) -> bytes:
        """All that comes until the gateway closes; the test decides what may have come."""
        while data := self.recv_some():
            self._inbox += data
        rest = bytes(self._inbox)
        self._inbox.clear()
        return rest

    # Handshake

    def greet(self, flags: int = C_FIXED | C_NO_ZEROES) -> int:
        first, second, offered = GREETING.unpack(self.recv_exactly(GREETING.size))
        assert (first, second) == (NBDMAGIC, IHAVEOPT)
        assert offered & C_FIXED, "NBD_FLAG_FIXED_NEWSTYLE must be offered"
        assert not offered & ~(C_FIXED | C_NO_ZEROES), f"unknown handshake flags {offered:#x}"
        self.send(struct.pack(">I", flags))
        return int(offered)

    def reply(self) -> OptReply:
        magic, opt, kind, length = OPTION_REPLY.unpack(self.recv_exactly(OPTION_REPLY.size))
        assert magic == REP_MAGIC, f"reply magic {magic:#x}"
        assert length <= 1 << 16, f"a reply of {length} bytes"
        reply = OptReply(opt, kind, self.recv_exactly(length))
        if reply.failed:
            assert length <= 4096, "error text longer than a string may be"
            assert reply.data.decode().isprintable(), f"not fit for display: {reply.data!r}"
        return reply

    def replies(self, opt: int) -> list[OptReply]:
        """All replies to one option, the final one last."""
        got = [self.reply()]
        while not got[-1].final:
            got.append(self.reply())
        assert {reply.option for reply in got} == {opt}, f"replies to another option: {got}"
        return got

    def ask(self, opt: int, data: bytes = b"") -> list[OptReply]:
        self.send(option(opt, data))
        return self.replies(opt)

    def verdict(self, opt: int, data: bytes = b"") -> int:
        """The type of the final reply."""
        return self.ask(opt, data)[-1].type

    def start_tls(self, context: ssl.SSLContext) -> None:
        """STARTTLS and the TLS handshake."""
        assert self.verdict(Opt.STARTTLS) == Rep.ACK
        self.wrap(context)

    def wrap(self, context: ssl.SSLContext) -> None:
        """The TLS handshake alone. A certificate refused under TLS 1.3 shows at the next read."""
        assert not self._inbox, "plaintext behind the reply to STARTTLS"
        tls = context.wrap_bio(self._incoming, self._outgoing)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._feed()
        self.sock.sendall(self._outgoing.read())
        self.tls = tls

    def ask_structured(self, *, optional: bool = False) -> None:
        """`optional`: an upstream without structured replies; the gateway need not make them."""
        verdict = self.verdict(Opt.STRUCTURED_REPLY)
        assert verdict == Rep.ACK or (optional and verdict == Rep.ERR_UNSUP), f"{verdict:#x}"
        self.structured = verdict == Rep.ACK

    def set_contexts(self, queries: Sequence[bytes], name: bytes = b"") -> dict[int, bytes]:
        *contexts, last = self.ask(Opt.SET_META_CONTEXT, meta_data(name, queries))
        assert last.type == Rep.ACK, last
        return {struct.unpack(">I", got.data[:4])[0]: got.data[4:] for got in contexts}

    def go(self, name: bytes = b"", infos: Iterable[int] = (), *, opt: int = Opt.GO) -> Export:
        """GO (or INFO) that has to be granted."""
        *given, last = self.ask(opt, info_data(name, tuple(infos)))
        assert last.type == Rep.ACK, last
        return parse_export(given)


def parse_export(given: Sequence[OptReply]) -> Export:
    found: dict[int, bytes] = {}
    for reply in given:
        assert reply.type == Rep.INFO, reply
        kind = int.from_bytes(reply.data[:2], "big")
        assert kind not in found, f"NBD_INFO {kind} twice"
        found[kind] = reply.data[2:]
    size, flags = struct.unpack(">QH", found[Info.EXPORT])
    assert flags & Tf.HAS_FLAGS, "NBD_FLAG_HAS_FLAGS must be set"
    return Export(size, flags, found)
