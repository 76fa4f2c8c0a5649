"""A proxy in front of an NBD server that writes down what the server has acknowledged, and when.

Both directions are read message by message, which needs no state of the handshake: each message
begins with a magic of its own. It can also lie, for the tests of those who look for lies.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from tests.soak.sectors import SECTOR, ZERO, Mark, mark_of
from tests.soak.verdict import Acknowledged
from tests.support.rawclient import (
    CHUNK,
    CHUNK_MAGIC,
    GREETING,
    IHAVEOPT,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    REQUEST,
    SIMPLE,
    SIMPLE_MAGIC,
    Cf,
    Cmd,
    Ct,
)

LIES: Final = (
    "drop a write",  # acknowledged, never passed on
    "misplace a write",  # one sector further on
    "cut a write",  # all but its last sector
    "drop a flush",  # acknowledged, never passed on
    "answer early",  # a write is acknowledged before it is passed on
    "strip FUA",
    "repeat a write",  # an old one again, after others have come
)


@dataclass
class _Request:
    cmd: int
    flags: int
    offset: int
    length: int
    came: int
    mark: Mark | None
    error: int = 0
    told: bool = False  # the lie that it is done


@dataclass
class _Link:
    """One connection through the proxy."""

    number: int
    client: socket.socket
    server: socket.socket
    waiting: dict[int, _Request] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    writing: threading.Lock = field(default_factory=threading.Lock)  # to the client

    def hang_up(self) -> None:
        for sock in (self.client, self.server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _Reader:
    """Whole messages from a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb", 1 << 18)

    def take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def close(self) -> None:
        self._file.close()


class Recorder:
    """Listens on `path`, for the server at `target`. A context manager.

    `lie`: one of LIES, done every `every`th time that it can be.
    """

    def __init__(self, path: Path, target: Path, *, lie: str = "", every: int = 20) -> None:
        assert not lie or lie in LIES
        self.path = path
        self.acknowledged: list[Acknowledged] = []
        self.lies = 0
        self.connects = 0
        self._target = target
        self._lie, self._every, self._chances = lie, every, 0
        self._old: bytes | None = None  # a write that is done again
        self._links: list[_Link] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(128)
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            link.hang_up()
        for thread in self._threads:
            thread.join(10)
        self.path.unlink(missing_ok=True)

    def _start(self, what: Callable[..., None], *args: object) -> None:
        self._threads = [one for one in self._threads if one.is_alive()]
        self._threads.append(threading.Thread(target=what, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._target))
            except OSError:  # the server is not there: nor are we
                client.close()
                server.close()
                continue
            self.connects += 1
            link = _Link(self.connects, client, server)
            self._links = [one for one in self._links if one.client.fileno() >= 0]
            self._links.append(link)
            self._start(self._serve, link)

    def _serve(self, link: _Link) -> None:
        with link.client, link.server:
            back = threading.Thread(target=self._pass, args=(link, self._replies), daemon=True)
            back.start()
            self._pass(link, self._requests)
            back.join()

    def _pass(self, link: _Link, how: Callable[[_Link], None]) -> None:
        try:
            how(link)
        except (OSError, EOFError, ValueError):
            pass
        finally:
            # Whoever goes first takes the other way with him: so does a socket without a proxy.
            link.hang_up()

    # -- from the gateway

    def _requests(self, link: _Link) -> None:
        reader = _Reader(link.client)
        link.server.sendall(reader.take(4))  # client flags
        while True:
            head = reader.take(8)
            if int.from_bytes(head, "big") == IHAVEOPT:
                head += reader.take(OPTION.size - 8)
                (length,) = struct.unpack_from(">I", head, 12)
                link.server.sendall(head + reader.take(length))
                continue
            head += reader.take(REQUEST.size - 8)
            _, flags, cmd, cookie, offset, length = REQUEST.unpack(head)
            payload = reader.take(length) if cmd == Cmd.WRITE else b""
            request = _Request(
                cmd, flags, offset, length, time.monotonic_ns(), _mark(offset, payload)
            )
            with link.lock:
                link.waiting[cookie] = request
            self._pass_on(link, request, cookie, head, payload)

    def _pass_on(
        self, link: _Link, request: _Request, cookie: int, head: bytes, payload: bytes
    ) -> None:
        if self._may_lie(request, payload):
            if self._lie.startswith("drop"):
                with link.lock:
                    del link.waiting[cookie]
                self._answer(link, cookie)
                return
            if self._lie == "answer early":
                request.told = True
                self._answer(link, cookie)
                time.sleep(0.02)  # so that it is early enough to be seen
            elif self._lie == "misplace a write":
                head = head[:16] + struct.pack(">Q", request.offset + SECTOR) + head[24:]
            elif self._lie == "cut a write":
                payload = payload[:-SECTOR]
                head = head[:24] + struct.pack(">I", len(payload))
            elif self._lie == "strip FUA":
                head = head[:4] + struct.pack(">H", request.flags & ~Cf.FUA) + head[6:]
                request.flags &= ~Cf.FUA
            elif self._lie == "repeat a write":
                if self._old is not None:
                    link.server.sendall(self._old)
                again = head[:8] + struct.pack(">Q", (1 << 64) - 1) + head[16:]
                self._old = again + payload
        link.server.sendall(head + payload)

    def _may_lie(self, request: _Request, payload: bytes) -> bool:
        if not self._lie:
            return False
        match self._lie:
            case "drop a flush":
                fits = request.cmd == Cmd.FLUSH
            case "strip FUA":
                fits = bool(request.flags & Cf.FUA)
            case "cut a write" | "repeat a write":
                fits = len(payload) >= 2 * SECTOR
            case _:
                fits = bool(payload)
        self._chances += fits
        if not fits or self._chances % self._every:
            return False
        self.lies += 1
        return True

    def _answer(self, link: _Link, cookie: int) -> None:
        self._send(link, SIMPLE.pack(SIMPLE_MAGIC, 0, cookie))

    # -- from the server

    def _replies(self, link: _Link) -> None:
        reader = _Reader(link.server)
        link.client.sendall(reader.take(GREETING.size))
        while True:
            head = reader.take(8)
            magic = int.from_bytes(head[:4], "big")
            if int.from_bytes(head, "big") == REP_MAGIC:
                head += reader.take(OPTION_REPLY.size - 8)
                (length,) = struct.unpack_from(">I", head, 16)
                link.client.sendall(head + reader.take(length))
            elif magic == SIMPLE_MAGIC:
                head += reader.take(SIMPLE.size - 8)
                _, error, cookie = SIMPLE.unpack(head)
                request = self._settle(link, cookie, error)
                is_read = request is not None and request.cmd == Cmd.READ and not error
                data = reader.take(request.length) if request is not None and is_read else b""
                if request is not None and not request.told:
                    self._send(link, head + data)
            elif magic == CHUNK_MAGIC:
                head += reader.take(CHUNK.size - 8)
                _, flags, kind, cookie, length = CHUNK.unpack(head)
                data = reader.take(length)
                if kind in (Ct.ERROR, Ct.ERROR_OFFSET):
                    with link.lock:
                        link.waiting[cookie].error = int.from_bytes(data[:4], "big")
                if flags & 1:
                    self._settle(link, cookie)
                self._send(link, head + data)
            else:
                raise EOFError

    def _send(self, link: _Link, data: bytes) -> None:
        with link.writing:
            link.client.sendall(data)

    def _settle(self, link: _Link, cookie: int, error: int = 0) -> _Request | None:
        """Write down an answer, before it is passed on. None: to what we have asked ourselves."""
        with link.lock:
            request = link.waiting.pop(cookie, None)
        if request is None:
            return None
        if not (request.error or error) and request.cmd not in (Cmd.READ, Cmd.BLOCK_STATUS):
            self.acknowledged.append(
                Acknowledged(
                    request.cmd,
                    request.offset,
                    request.length,
                    bool(request.flags & Cf.FUA),
                    request.came,
                    time.monotonic_ns(),
                    request.mark,
                    link.number,
                )
            )
        return request


def _mark(offset: int, payload: bytes) -> Mark | None:
    """What the first sector says, if there is one that says anything."""
    if not payload or offset % SECTOR or len(payload) % SECTOR:
        return None
    if not any(payload):
        return ZERO
    mark = mark_of(payload[:SECTOR], offset // SECTOR)
    return None if isinstance(mark, str) else mark
