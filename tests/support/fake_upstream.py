"""A plain NBD server on a Unix socket that obeys, or breaks, the specification as a test tells it.

One thread a connection. A `Script` says what happens on a connection: the base class speaks
oldstyle, newstyle and fixed newstyle correctly, and a test overrides the phase that is to go wrong.
A `Link` is one connection: it keeps every byte that came, every option and request in them, and how
it ended.
"""

from __future__ import annotations

import array
import contextlib
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    CHUNK,
    CHUNK_MAGIC,
    CLISERV,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE,
    SIMPLE_MAGIC,
    TIMEOUT_S,
    Cf,
    Cmd,
    Ct,
    Err,
    Info,
    Opt,
    Rep,
    Request,
    Tf,
)

MIB = 1 << 20
DONE = 1  # the one structured reply flag
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


def pattern(offset: int, length: int) -> bytes:
    """What the fake disk holds: each aligned 8 bytes are their own number, so nothing repeats."""
    first, last = offset // 8, -(-(offset + length) // 8)
    words = array.array("Q", range(first, last))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()[offset - first * 8 :][:length]


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return SIMPLE.pack(SIMPLE_MAGIC, error, cookie) + data


def chunk(cookie: int, kind: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    return CHUNK.pack(CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload


def data_chunk(cookie: int, offset: int, data: bytes, *, flags: int = 0) -> bytes:
    return chunk(cookie, Ct.OFFSET_DATA, struct.pack(">Q", offset) + data, flags=flags)


def hole_chunk(cookie: int, offset: int, length: int, *, flags: int = 0) -> bytes:
    return chunk(cookie, Ct.OFFSET_HOLE, struct.pack(">QI", offset, length), flags=flags)


def error_chunk(cookie: int, error: int, text: bytes = b"", *, flags: int = DONE) -> bytes:
    return chunk(cookie, Ct.ERROR, struct.pack(">IH", error, len(text)) + text, flags=flags)


def none_chunk(cookie: int) -> bytes:
    return chunk(cookie, Ct.NONE, flags=DONE)


def status_chunk(
    cookie: int, context: int, extents: Sequence[tuple[int, int]], *, flags: int = 0
) -> bytes:
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(cookie, Ct.BLOCK_STATUS, body, flags=flags)


class LinkEndedError(Exception):
    """The connection is over, whoever ended it."""


class Link:
    """One connection as the fake saw it.

    `end` is None while it lives; then "disc" (NBD_CMD_DISC), "abort" (NBD_OPT_ABORT), "eof" (closed
    between two messages), "cut" (closed inside one), "reset", or "script" (the fake hung up).
    """

    def __init__(self, number: int, sock: socket.socket, cut_after: int | None) -> None:
        self.number = number
        self.received = bytearray()
        self.sent = 0
        self.client_flags: int | None = None
        self.options: list[tuple[int, bytes]] = []
        self.requests: list[Request] = []
        self.structured = False
        self.contexts: dict[int, bytes] = {}
        self.export: bytes | None = None
        self.end: str | None = None
        self._sock = sock
        self._cut_after = cut_after

    def send(self, data: bytes) -> None:
        """Send, or hang up in the middle if the script's `cut_after` falls into these bytes."""
        if self._cut_after is not None and self.sent + len(data) >= self._cut_after:
            data = data[: self._cut_after - self.sent]
            self._send(data)
            raise LinkEndedError
        self._send(data)

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except ConnectionError:
            self.end = self.end or "reset"
            raise LinkEndedError from None
        self.sent += len(data)

    def take(self, count: int, *, inside: bool = True) -> bytes:
        """Exactly `count` bytes; `inside` says that a message has begun, so an EOF is a cut."""
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._sock.recv(min(count - len(parts), 1 << 18))
            except ConnectionError:
                self.end = self.end or "reset"
                raise LinkEndedError from None
            if not part:
                self.end = self.end or ("cut" if inside or parts else "eof")
                raise LinkEndedError
            parts += part
            self.received += part
        return bytes(parts)

    def take_to_end(self) -> bytes:
        """Everything until the gateway hangs up."""
        before = len(self.received)
        with contextlib.suppress(LinkEndedError):
            while True:
                self.take(1, inside=False)
        return bytes(self.received[before:])

    def take_option(self) -> tuple[int, bytes]:
        magic, opt, length = OPTION.unpack(self.take(OPTION.size, inside=False))
        assert magic == IHAVEOPT, f"option magic {magic:#x}"
        data = self.take(length)
        self.options.append((opt, data))
        return opt, data

    def take_header(self) -> Request:
        """A request without its payload."""
        magic, flags, cmd, cookie, offset, length = REQUEST.unpack(
            self.take(REQUEST.size, inside=False)
        )
        assert magic == REQUEST_MAGIC, f"request magic {magic:#x}: bytes of something else?"
        return Request(cmd, offset, length, cookie, flags)

    def take_request(self) -> Request:
        request = self.take_header()
        if request.cmd == Cmd.WRITE:
            request = request._replace(payload=self.take(request.length))
        self.requests.append(request)
        return request

    def idle(self) -> bool:
        """Nothing has come that was not read yet."""
        return not select.select([self._sock], [], [], 0)[0]

    def hang_up(self) -> None:
        """Close, seen by the script's thread as the end. Safe from any thread, and twice."""
        self.end = self.end or "script"
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        self.end = self.end or "script"
        self._sock.close()


class Script:
    """What the fake does on a connection. One instance may serve many: state lives in the link."""

    style: str = "fixed"  # or "newstyle", "oldstyle"
    size: int = MIB
    flags: int = ALL_FEATURES
    block_sizes: tuple[int, int, int] | None = None
    structured: bool = True
    contexts: tuple[bytes, ...] = (b"base:allocation", b"qemu:dirty-bitmap:b0")
    names: tuple[bytes, ...] | None = (b"",)  # None: any name is an export
    cut_after: int | None = None  # hang up after so many bytes

    def __init__(self, **changes: object) -> None:
        for name, value in changes.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def serve(self, link: Link) -> None:
        if self.style == "oldstyle":
            link.send(struct.pack(">QQQI124x", NBDMAGIC, CLISERV, self.size, self.flags))
            self.transmit(link)
            return
        self.greet(link)
        if self.haggle(link):
            self.transmit(link)

    def greet(self, link: Link) -> None:
        offered = C_FIXED | C_NO_ZEROES if self.style == "fixed" else 0
        link.send(GREETING.pack(NBDMAGIC, IHAVEOPT, offered))
        (link.client_flags,) = struct.unpack(">I", link.take(4))
        assert link.client_flags | offered == offered, f"client flags {link.client_flags:#x}"

    def haggle(self, link: Link) -> bool:
        """True when transmission begins, False when the gateway said ABORT."""
        while True:
            opt, data = link.take_option()
            if opt == Opt.EXPORT_NAME:
                self.export_name(link, data)
                return True
            assert self.style == "fixed", f"option {opt} towards a server without options"
            if opt == Opt.ABORT:
                self.reply(link, opt, Rep.ACK)
                link.end = "abort"
                return False
            if self.option(link, opt, data):
                return True

    def reply(self, link: Link, opt: int, kind: int, data: bytes = b"") -> None:
        link.send(OPTION_REPLY.pack(REP_MAGIC, opt, kind, len(data)) + data)

    def export_name(self, link: Link, name: bytes) -> None:
        if self.names is not None and name not in self.names:
            raise LinkEndedError
        link.export = name
        zeroes = not (link.client_flags or 0) & C_NO_ZEROES
        link.send(struct.pack(">QH", self.size, self.flags & 0xFFFF) + bytes(124 * zeroes))

    def option(self, link: Link, opt: int, data: bytes) -> bool:
        """Answer one option; True when it was a GO that succeeded."""
        if opt in (Opt.INFO, Opt.GO):
            return self.info(link, opt, data) and opt == Opt.GO
        if opt == Opt.STRUCTURED_REPLY and self.structured:
            link.structured = True
            self.reply(link, opt, Rep.ACK)
        elif opt in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT) and self.structured:
            self.meta(link, opt, data)
        elif opt == Opt.LIST:
            for name in self.names or ():
                self.reply(link, opt, Rep.SERVER, struct.pack(">I", len(name)) + name)
            self.reply(link, opt, Rep.ACK)
        else:
            self.reply(link, opt, Rep.ERR_UNSUP)
        return False

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        (length,) = struct.unpack_from(">I", data)
        name = data[4 : 4 + length]
        if self.names is not None and name not in self.names:
            self.reply(link, opt, Rep.ERR_UNKNOWN)
            return False
        if opt == Opt.GO:
            link.export = name
        for body in self.infos(link):
            self.reply(link, opt, Rep.INFO, body)
        self.reply(link, opt, Rep.ACK)
        return True

    def infos(self, link: Link) -> list[bytes]:
        flags = self.flags if link.structured else self.flags & ~Tf.SEND_DF
        bodies = [struct.pack(">HQH", Info.EXPORT, self.size & (1 << 64) - 1, flags)]
        if self.block_sizes is not None:
            bodies.append(struct.pack(">HIII", Info.BLOCK_SIZE, *self.block_sizes))
        return bodies

    def meta(self, link: Link, opt: int, data: bytes) -> None:
        (length,) = struct.unpack_from(">I", data)
        at = 4 + length
        (count,) = struct.unpack_from(">I", data, at)
        at += 4
        queries = []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", data, at)
            queries.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        assert at == len(data), "bytes behind the last query"
        wanted = [name for name in self.contexts if name in queries]
        if opt == Opt.LIST_META_CONTEXT:
            wanted = [name for name in self.contexts if not queries or name in queries]
        else:
            link.contexts = {0x1001 + 2 * i: name for i, name in enumerate(wanted)}
        for i, name in enumerate(wanted):
            ident = 0x1001 + 2 * i if opt == Opt.SET_META_CONTEXT else 0
            self.reply(link, opt, Rep.META_CONTEXT, struct.pack(">I", ident) + name)
        self.reply(link, opt, Rep.ACK)

    def transmit(self, link: Link) -> None:
        while True:
            request = link.take_request()
            if request.cmd == Cmd.DISC:
                link.end = "disc"
                return
            self.requested(link, request)

    def requested(self, link: Link, request: Request) -> None:
        """Answer one request; the checks are those that the gateway was bound to make before."""
        data_cmd = request.cmd not in (Cmd.DISC, Cmd.FLUSH)
        assert not data_cmd or request.length > 0, f"empty request forwarded: {request}"
        assert request.offset + request.length <= self.size, f"beyond the end: {request}"
        if self.block_sizes is not None:
            minimum, _, maximum = self.block_sizes
            assert not (request.offset | request.length) % minimum, f"unaligned: {request}"
            sized = request.cmd == Cmd.WRITE or (request.cmd == Cmd.READ and not link.structured)
            assert not sized or request.length <= maximum, f"beyond the maximum: {request}"
        if request.cmd == Cmd.READ:
            self.read(link, request)
        elif request.cmd == Cmd.BLOCK_STATUS:
            self.block_status(link, request)
        else:
            self.done(link, request)

    def read(self, link: Link, request: Request) -> None:
        data = pattern(request.offset, request.length)
        if link.structured:
            link.send(data_chunk(request.cookie, request.offset, data, flags=DONE))
        else:
            link.send(simple(request.cookie, 0, data))

    def block_status(self, link: Link, request: Request) -> None:
        assert link.contexts, "BLOCK_STATUS without contexts"
        for ident in link.contexts:
            half = request.length // 2
            extents = [(half, 0), (request.length - half, 3)]
            if half == 0 or request.flags & Cf.REQ_ONE:
                extents = [(request.length, 0)]
            link.send(status_chunk(request.cookie, ident, extents))
        link.send(none_chunk(request.cookie))

    def done(self, link: Link, request: Request, error: int = Err.OK) -> None:
        """The answer to a request that carries nothing back."""
        link.send(simple(request.cookie, error))


class FakeUpstream:
    """Listens on `path`. `script` serves each connection, after those that `queue` is for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.script = Script()
        self.queue: list[Script] = []
        self.links: list[Link] = []
        self.errors: list[BaseException] = []  # a script's assertion failed, or it crashed
        self.connects = 0
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(256)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(2 * TIMEOUT_S)
            script = self.queue.pop(0) if self.queue else self.script
            link = Link(self.connects, sock, script.cut_after)
            self.links.append(link)
            self.connects += 1
            thread = threading.Thread(target=self._serve, args=(script, link), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, script: Script, link: Link) -> None:
        try:
            with contextlib.suppress(LinkEndedError):
                script.serve(link)
        except BaseException as error:  # whatever it is, the test that caused it must fail
            if link.end != "script":
                self.errors.append(error)
        finally:
            link.finish()

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: waited {TIMEOUT_S:g} s in vain"
            assert not self.errors, self.errors
            time.sleep(0.005)

    def wait_link(self, index: int = -1) -> Link:
        """A connection of this test, once it is there."""
        self.wait(lambda: len(self.links) > max(index, 0), "no connection to the upstream")
        return self.links[index]

    def wait_end(self, index: int = -1) -> Link:
        """The same, once it has ended."""
        link = self.wait_link(index)
        self.wait(lambda: link.end is not None, "the upstream connection stays open")
        return link

    def reset(self) -> None:
        """Hang up on everybody and begin anew with a correct script."""
        for link in self.links:
            link.hang_up()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        self.links, self._threads, self.errors, self.queue = [], [], [], []
        self.connects = 0
        self.script = Script()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
        self.path.unlink(missing_ok=True)
