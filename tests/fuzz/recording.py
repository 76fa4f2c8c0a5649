"""A proxy on Unix sockets that writes down what passes; and the messages in what it has heard."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_CHUNK = 1 << 16


@dataclass
class Record:
    """One connection: both streams, and after how much of the one how much of the other came."""

    client: bytearray = field(default_factory=bytearray)
    server: bytearray = field(default_factory=bytearray)
    heard: list[tuple[bool, int]] = field(default_factory=list)  # from the client, bytes
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, data: bytes, *, from_client: bool) -> None:
        with self.lock:
            (self.client if from_client else self.server).extend(data)
            self.heard.append((from_client, len(data)))


class Proxy:
    """Listens on `path`, and passes on to `upstream`. A context manager."""

    def __init__(self, path: Path, upstream: Path) -> None:
        self.records: list[Record] = []
        self._upstream = upstream
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._threads:
            one.join(10)

    def _start(self, work, *args) -> None:  # type: ignore[no-untyped-def]
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._upstream))
                record = Record()
                self.records.append(record)
                self._start(self._pass, client, server, record, True)
                self._start(self._pass, server, client, record, False)

    def _pass(
        self, source: socket.socket, sink: socket.socket, record: Record, from_client: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                record.add(data, from_client=from_client)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@dataclass(frozen=True, slots=True)
class Option:
    """One option, and all replies to it."""

    number: int
    data: bytes
    replies: bytes

    def infos(self) -> Iterator[bytes]:
        """The payloads of NBD_REP_INFO among them."""
        at = 0
        while at + 20 <= len(self.replies):
            _, _, kind, length = struct.unpack_from(">QIII", self.replies, at)
            if kind == 3:
                yield self.replies[at + 20 : at + 20 + length]
            at += 20 + length

    @property
    def granted(self) -> bool:
        """Whether the last reply is an ACK."""
        return struct.pack(">III", self.number, 1, 0) in self.replies[-12:]


@dataclass(frozen=True, slots=True)
class Haggled:
    """A whole handshake: what it was made of, and where the transmission phase begins."""

    greeting: bytes
    flags: bytes  # of the client; empty for oldstyle
    options: tuple[Option, ...]
    client_at: int
    server_at: int
    export: tuple[int, int] | None  # size and flags; None: there is no transmission phase

    def agreed(self, number: int) -> bool:
        return any(one.number == number and one.granted for one in self.options)


def haggled(record: Record) -> Haggled | None:
    """None if not even the greeting was whole."""
    client, server = bytes(record.client), bytes(record.server)
    if server[8:16] == bytes.fromhex("0000420281861253") and len(server) >= 152:
        size, flags = struct.unpack_from(">QI", server, 16)
        return Haggled(server[:152], b"", (), 0, 152, (size, flags & 0xFFFF))
    if len(server) < 18 or len(client) < 4:
        return None
    options, mine, theirs = [], 4, 18
    export = None
    while mine + 16 <= len(client):
        _, number, length = struct.unpack_from(">QII", client, mine)
        data = client[mine + 16 : mine + 16 + length]
        mine += 16 + length
        end = theirs
        if number == 1:
            zeroes = 0 if client[3] & 2 and server[17] & 2 else 124
            size, flags = struct.unpack_from(">QH", server, theirs)
            end, export = theirs + 10 + zeroes, (size, flags)
        else:
            kind = 0
            while end + 20 <= len(server) and kind != 1 and not kind >> 31:
                _, _, kind, size = struct.unpack_from(">QIII", server, end)
                end += 20 + size
        option = Option(number, data, server[theirs:end])
        options.append(option)
        theirs = end
        if number == 7 and option.granted:
            (info,) = (one for one in option.infos() if one[:2] == b"\0\0")
            export = struct.unpack(">QH", info[2:])
        if export is not None:
            break
    return Haggled(server[:18], client[:4], tuple(options), mine, theirs, export)


@dataclass(frozen=True, slots=True)
class Message:
    """A request, a reply or a chunk; what is behind the header may be long."""

    from_client: bool
    header: bytes
    body: bytes


def messages(record: Record, start: Haggled, *, extended: bool) -> list[Message]:
    """The transmission phase, in the order in which it was heard."""
    asks: dict[int, tuple[int, int]] = {}
    client = list(_requests(bytes(record.client[start.client_at :]), asks, extended))
    server = list(_replies(bytes(record.server[start.server_at :]), asks, extended))
    ends = {True: start.client_at, False: start.server_at}
    have = {True: 0, False: 0}
    queues = {True: client, False: server}
    found: list[Message] = []
    for from_client, count in record.heard:
        have[from_client] += count
        queue = queues[from_client]
        while queue and ends[from_client] + _size(queue[0]) <= have[from_client]:
            ends[from_client] += _size(queue[0])
            found.append(queue.pop(0))
    return found


def _size(one: Message) -> int:
    return len(one.header) + len(one.body)


def _requests(raw: bytes, asks: dict[int, tuple[int, int]], extended: bool) -> Iterator[Message]:
    layout = struct.Struct(">IHHQQQ" if extended else ">IHHQQI")
    at = 0
    while at + layout.size <= len(raw):
        _, flags, kind, cookie, _, length = layout.unpack_from(raw, at)
        asks[cookie] = (kind, length)
        size = length if kind == 1 or (extended and flags & 32) else 0
        begin = at + layout.size
        yield Message(True, raw[at:begin], raw[begin : begin + size])
        at = begin + size


def _replies(raw: bytes, asks: dict[int, tuple[int, int]], extended: bool) -> Iterator[Message]:
    layout = struct.Struct(">IHHQQQ" if extended else ">IHHQI")
    at = 0
    while at + 16 <= len(raw):
        magic, error, cookie = struct.unpack_from(">IIQ", raw, at)
        if magic == 0x67446698:
            kind, size = asks[cookie]
            size, header = (size if kind == 0 and not error else 0), 16
        else:
            header = layout.size
            size = layout.unpack_from(raw, at)[-1]
        yield Message(False, raw[at : at + header], raw[at + header : at + header + size])
        at += header + size
