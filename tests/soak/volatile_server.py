"""`python -m tests.soak.volatile_server`: an NBD server whose unflushed writes die with it.

What is written lies in its memory until FLUSH or FUA; killed by SIGKILL, it has lost the rest, as a
disk with a cache has when the power goes. Exports are the files of a directory. It can be slow,
answer out of order, die in the middle of anything, and shut down with NBD_ESHUTDOWN (at SIGTERM, or
after so many requests), and even then it does not write what nobody has flushed.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Final, NoReturn

from tests.support.fake_upstream import ALL_FEATURES, DONE, chunk, data_chunk, none_chunk, simple
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
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

CHANGES: Final = frozenset({Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM})
_FEATURES: Final = ALL_FEATURES & ~(Tf.SEND_CACHE | Tf.SEND_FAST_ZERO)


class Disk:
    """A file with a cache in front of it, which all connections share."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.file).st_size
        # A private mapping: what is changed stays in this process.
        self._memory = mmap.mmap(self.file, self.size, flags=mmap.MAP_PRIVATE)
        self._dirty: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        return self._memory[offset : offset + length]

    def change(self, offset: int, data: bytes, *, durably: bool) -> None:
        with self._lock:
            self._memory[offset : offset + len(data)] = data
            self._dirty.append((offset, len(data)))
        if durably:
            os.pwrite(self.file, data, offset)

    def flush(self) -> None:
        with self._lock:
            dirty, self._dirty = self._dirty, []
            for offset, length in dirty:
                os.pwrite(self.file, self._memory[offset : offset + length], offset)


class Server:
    """What the options say, and what has happened so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.leaving = False
        self._disks: dict[str, Disk] = {}
        self._requests = itertools.count(1)
        self._sent = 0
        self._lock = threading.Lock()

    def disk(self, name: str) -> Disk | None:
        with self._lock:
            path = self.options.directory / name
            if not name or "/" in name or name.startswith(".") or not path.is_file():
                return None
            if name not in self._disks:
                self._disks[name] = Disk(path)
            return self._disks[name]

    def count_request(self) -> None:
        number = next(self._requests)
        if number == self.options.die_after_requests:
            _die()
        if self.options.leave_after_requests and number >= self.options.leave_after_requests:
            self.leaving = True

    def send(self, sock: socket.socket, data: bytes) -> None:
        """Raises OSError. May be the last thing that is done here."""
        limit = self.options.die_after_bytes
        with self._lock:
            before, self._sent = self._sent, self._sent + len(data)
        if limit and self._sent >= limit:
            sock.sendall(data[: max(limit - before, 0)])
            _die()
        sock.sendall(data)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Connection:
    """One client. `serve` it in a thread of its own."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._disk: Disk | None = None
        self._structured = False
        self._random = random.Random(server.options.seed)

    def serve(self) -> None:
        try:
            with self._sock:
                self._greet()
                if self._haggle():
                    self._transmit()
        except (OSError, EOFError):
            pass

    def _take(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._sock.recv(min(count - len(parts), 1 << 18))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    # -- the handshake

    def _greet(self) -> None:
        self._sock.sendall(GREETING.pack(NBDMAGIC, IHAVEOPT, C_FIXED | C_NO_ZEROES))
        self._take(4)

    def _haggle(self) -> bool:
        while True:
            _, opt, length = OPTION.unpack(self._take(OPTION.size))
            data = self._take(length)
            if opt in (Opt.INFO, Opt.GO):
                if self._open(opt, data) and opt == Opt.GO:
                    return True
            elif opt == Opt.STRUCTURED_REPLY and not self._server.options.no_structured_replies:
                self._structured = True
                self._reply(opt, Rep.ACK)
            elif opt == Opt.LIST:
                for path in sorted(self._server.options.directory.iterdir()):
                    name = path.name.encode()
                    self._reply(opt, Rep.SERVER, struct.pack(">I", len(name)) + name)
                self._reply(opt, Rep.ACK)
            elif opt == Opt.ABORT:
                self._reply(opt, Rep.ACK)
                return False
            else:
                self._reply(opt, Rep.ERR_UNSUP)

    def _open(self, opt: int, data: bytes) -> bool:
        (length,) = struct.unpack_from(">I", data)
        disk = self._server.disk(data[4 : 4 + length].decode())
        if disk is None:
            self._reply(opt, Rep.ERR_UNKNOWN)
            return False
        flags = _FEATURES if self._structured else _FEATURES & ~Tf.SEND_DF
        if self._server.options.no_fua:
            flags &= ~Tf.SEND_FUA
        self._reply(opt, Rep.INFO, struct.pack(">HQH", Info.EXPORT, disk.size, flags))
        self._reply(opt, Rep.ACK)
        self._disk = disk
        return True

    def _reply(self, opt: int, kind: int, data: bytes = b"") -> None:
        self._sock.sendall(OPTION_REPLY.pack(REP_MAGIC, opt, kind, len(data)) + data)

    # -- transmission

    def _transmit(self) -> None:
        options = self._server.options
        while True:
            batch = [self._request()]
            while batch[-1].cmd != Cmd.DISC and len(batch) < options.window and self._more():
                batch.append(self._request())
            answers = [self._answer(request) for request in batch if request.cmd != Cmd.DISC]
            if options.shuffle:
                self._random.shuffle(answers)
            for answer in answers:
                for part in answer:
                    if options.delay_ms:
                        time.sleep(self._random.random() * options.delay_ms / 1000)
                    self._server.send(self._sock, part)
            if batch[-1].cmd == Cmd.DISC:
                return

    def _more(self) -> bool:
        return bool(select.select([self._sock], [], [], 0)[0])

    def _request(self) -> Request:
        head = self._take(REQUEST.size)
        magic, flags, cmd, cookie, offset, length = REQUEST.unpack(head)
        if magic != REQUEST_MAGIC:
            raise EOFError
        payload = self._take(length) if cmd == Cmd.WRITE else b""
        return Request(cmd, offset, length, cookie, flags, payload)

    def _answer(self, request: Request) -> list[bytes]:
        """What is to be sent, in parts between which it may die."""
        server, disk = self._server, self._disk
        assert disk is not None
        server.count_request()
        cookie, fua = request.cookie, bool(request.flags & Cf.FUA)
        if server.leaving:
            return [self._done(cookie, Err.ESHUTDOWN, read=request.cmd == Cmd.READ)]
        if request.offset + request.length > disk.size:
            return [self._done(cookie, Err.EINVAL, read=request.cmd == Cmd.READ)]
        if request.cmd == Cmd.READ:
            return self._read(disk, request)
        if request.cmd in CHANGES:
            disk.change(request.offset, request.payload or bytes(request.length), durably=fua)
        elif request.cmd == Cmd.FLUSH:
            disk.flush()
        else:
            return [self._done(cookie, Err.EINVAL)]
        return [self._done(cookie)]

    def _read(self, disk: Disk, request: Request) -> list[bytes]:
        data = disk.read(request.offset, request.length)
        if not self._structured:
            head = simple(request.cookie)
            half = len(data) // 2
            return [head + data[:half], data[half:]]
        parts = []
        step = max(512, -(-len(data) // 3) // 512 * 512)
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            parts.append(data_chunk(request.cookie, request.offset + at, piece))
        return [*parts, none_chunk(request.cookie)]

    def _done(self, cookie: int, error: int = 0, *, read: bool = False) -> bytes:
        if read and self._structured:
            return chunk(cookie, Ct.ERROR, struct.pack(">IH", error, 0), flags=DONE)
        return simple(cookie, error)


# ---------------------------------------------------------------- the command


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An NBD server with a volatile cache.")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--pidfile", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before each reply, at most")
    parser.add_argument("--window", type=int, default=32, help="requests that are read at a time")
    parser.add_argument("--shuffle", action="store_true", help="answer them out of order")
    parser.add_argument("--die-after-requests", type=int, default=0)
    parser.add_argument("--die-after-bytes", type=int, default=0, help="of replies")
    parser.add_argument("--leave-after-requests", type=int, default=0, help="by NBD_ESHUTDOWN")
    parser.add_argument("--no-fua", action="store_true")
    parser.add_argument("--no-structured-replies", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = _options()
    server = Server(options)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(options.socket))
    listener.listen(128)
    options.pidfile.write_text(f"{os.getpid()}\n")
    threads: list[threading.Thread] = []

    def leave(*_: object) -> None:
        server.leaving = True

    signal.signal(signal.SIGTERM, leave)
    listener.settimeout(0.05)
    while not server.leaving:
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            continue
        sock.setblocking(True)
        threads = [one for one in threads if one.is_alive()]
        threads.append(threading.Thread(target=Connection(server, sock).serve, daemon=True))
        threads[-1].start()
    listener.close()
    options.socket.unlink(missing_ok=True)
    for thread in threads:  # its clients have to leave: it only refuses
        thread.join(10)


if __name__ == "__main__":
    main()
