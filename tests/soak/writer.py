"""The client that keeps a book: random writes, flushes and reads in a region of its own.

`python -m tests.soak.writer URI LOG ...` is the same as a process that can be killed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from tests.soak.book import Book, Sent
from tests.soak.line import Line
from tests.soak.sectors import SECTOR, fill, mark_of
from tests.soak.verdict import Finding
from tests.support.rawclient import (
    CHUNK,
    CHUNK_MAGIC,
    SIMPLE,
    SIMPLE_MAGIC,
    Cf,
    Cmd,
    Ct,
    Err,
    PeerClosedError,
    Request,
    Tf,
)

POLL_S: Final = 0.05
ANSWER_S: Final = 60.0  # for any one answer; longer than any outage that a test makes
_LENGTHS: Final = (1, 2, 8, 8, 8, 8, 16, 64, 256, 1024)  # sectors of a request
_MIX: Final = {"write": 55, "fua": 8, "zeroes": 6, "flush": 6, "read": 25}


class WriterFailed(Exception):
    """The session did not do what it must."""


class Writer:
    """One connection to a region of `count` sectors from `first` on. `close` it, or use `with`."""

    def __init__(
        self,
        uri: str,
        book: Book,
        *,
        first: int,
        count: int,
        certificates: Path | None = None,
        export: str = "",
        depth: int = 8,
        seed: int = 0,
        lossy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`lossy`: whether the upstream may have lost by now what was not durable."""
        self.book = book
        self.findings: list[Finding] = []
        self.read_bytes = 0  # that were right
        self.over = False  # something was answered NBD_ESHUTDOWN: all that is left is to leave
        self.depth = depth
        self._random = random.Random(seed)
        self._first, self._count = first, count
        self._lossy = lossy
        self._data: dict[int, bytearray] = {}  # of reads, by number
        self._failed: dict[int, int] = {}  # errors of replies that go on
        self._line = Line(uri)
        self._certificates = certificates
        try:
            structured = self._random.random() < 0.7
            granted = self._line.open(certificates, export.encode(), structured=structured)
        except BaseException:
            self._line.close()
            raise
        self.flags = granted.flags
        assert (first + count) * SECTOR <= granted.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """At once; what is under way is not waited for, and the book stays open."""
        self._line.close()

    def reset(self) -> None:
        """As `close`, with a TCP RST."""
        self._line.reset()

    # -- one at a time

    def submit(self, cmd: int, first: int = 0, count: int = 0, *, fua: bool = False) -> Sent:
        """Queue a request for these sectors. `pump` sends it."""
        request = self.book.sent(cmd, first, count, fua=fua)
        payload = b""
        if cmd == Cmd.WRITE:
            payload = fill(self.book.mark(request), first, count)
        elif cmd == Cmd.READ:
            self._data[request.number] = bytearray(count * SECTOR)
        wire = Request(
            cmd, first * SECTOR, count * SECTOR, request.number, Cf.FUA if fua else Cf.NONE, payload
        )
        self._line.queue(wire.pack())
        return request

    def pump(self, timeout_s: float = POLL_S) -> None:
        """Send and receive what can be. Raises PeerClosedError."""
        inbox = self._line.flow(timeout_s)
        at = 0
        while (size := self._message(inbox, at)) is not None:
            at += size
        del inbox[:at]

    def wait(self, *requests: Sent) -> None:
        """Until these are answered; none: until all are. Raises PeerClosedError, WriterFailed."""
        deadline = time.monotonic() + ANSWER_S
        while any(not one.done for one in requests) if requests else self.book.open:
            if time.monotonic() > deadline:
                waiting = ", ".join(map(str, list(self.book.open.values())[:3]))
                raise WriterFailed(f"no answer within {ANSWER_S:g} s: {waiting}")
            self.pump()

    def ask(self, cmd: int, first: int = 0, count: int = 0, *, fua: bool = False) -> int:
        """One request; its error."""
        request = self.submit(cmd, first, count, fua=fua)
        self.wait(request)
        return request.error

    # -- many

    def run(self, go_on: Callable[[], bool]) -> None:
        """Random requests, `depth` under way, for as long as it says so, or until it is `over`.
        Raises as `wait` does."""
        since, seen = time.monotonic(), -1
        while go_on() and not self.over:
            while len(self.book.open) < self.depth and self._one_more():
                pass
            self.pump()
            answered = len(self.book.requests) - len(self.book.open)
            if answered != seen:
                since, seen = time.monotonic(), answered
            elif time.monotonic() - since > ANSWER_S:
                raise WriterFailed(f"no answer within {ANSWER_S:g} s")

    def leave(self) -> None:
        """Wait for all answers and disconnect in order. Raises as `wait` does."""
        self.wait()
        self._line.queue(Request(Cmd.DISC, cookie=0).pack())
        with contextlib.suppress(PeerClosedError):
            deadline = time.monotonic() + ANSWER_S
            while time.monotonic() < deadline:
                self.pump()
            raise WriterFailed("the gateway does not end a session behind NBD_CMD_DISC")

    def send_half(self) -> None:
        """Begin a write, and send a part of it only. `close` or `reset` follows."""
        self.wait()
        request = self.submit(Cmd.WRITE, self._first, min(64, self._count))
        assert request.count
        del self._line.to_send[len(self._line.to_send) // 2 :]
        while self._line.to_send:
            self.pump()

    def _one_more(self) -> bool:
        source = self._random
        kind = source.choices(list(_MIX), list(_MIX.values()))[0]
        if kind == "flush" and self.flags & Tf.SEND_FLUSH:
            self.submit(Cmd.FLUSH)
            return True
        count = min(source.choice(_LENGTHS), self._count)
        first = self._first + source.randrange(self._count - count + 1)
        for other in self.book.open.values():
            if other.count and first < other.first + other.count and other.first < first + count:
                return False  # the next round
        cmd = Cmd.READ if kind in ("read", "flush") else Cmd.WRITE
        if kind == "zeroes" and self.flags & Tf.SEND_WRITE_ZEROES:
            cmd = Cmd.WRITE_ZEROES
        fua = kind == "fua" and bool(self.flags & Tf.SEND_FUA)
        self.submit(cmd, first, count, fua=fua)
        return True

    # -- replies

    def _message(self, inbox: bytearray, at: int) -> int | None:
        """Take one message. Returns its size, None if it is not all here."""
        if len(inbox) - at < SIMPLE.size:
            return None
        (magic,) = struct.unpack_from(">I", inbox, at)
        if magic == CHUNK_MAGIC:
            return self._chunk(inbox, at)
        if magic != SIMPLE_MAGIC:
            raise WriterFailed(f"a reply with magic {magic:#x}")
        _, error, cookie = SIMPLE.unpack_from(inbox, at)
        request = self._request(cookie)
        length = request.count * SECTOR if request.cmd == Cmd.READ and not error else 0
        begin = at + SIMPLE.size
        if len(inbox) - begin < length:
            return None
        if length:
            self._data[cookie][:] = inbox[begin : begin + length]
        self._answered(request, error)
        return SIMPLE.size + length

    def _chunk(self, inbox: bytearray, at: int) -> int | None:
        if len(inbox) - at < CHUNK.size:
            return None
        _, flags, kind, cookie, length = CHUNK.unpack_from(inbox, at)
        begin = at + CHUNK.size
        if len(inbox) - begin < length:
            return None
        request = self._request(cookie)
        if kind in (Ct.ERROR, Ct.ERROR_OFFSET):
            (self._failed[cookie],) = struct.unpack_from(">I", inbox, begin)
        elif kind == Ct.OFFSET_DATA:
            (offset,) = struct.unpack_from(">Q", inbox, begin)
            self._put(request, offset, bytes(inbox[begin + 8 : begin + length]))
        elif kind == Ct.OFFSET_HOLE:
            offset, count = struct.unpack_from(">QI", inbox, begin)
            self._put(request, offset, bytes(count))
        elif kind != Ct.NONE:
            raise WriterFailed(f"a chunk of type {kind}")
        if flags & 1:
            self._answered(request, self._failed.pop(cookie, 0))
        return CHUNK.size + length

    def _request(self, cookie: int) -> Sent:
        if (request := self.book.open.get(cookie)) is None:
            raise WriterFailed(f"a reply to {cookie}, which nobody has asked")
        return request

    def _put(self, request: Sent, offset: int, data: bytes) -> None:
        at = offset - request.first * SECTOR
        if request.cmd != Cmd.READ or at < 0 or at + len(data) > request.count * SECTOR:
            raise WriterFailed(f"data at {offset} for {request}")
        self._data[request.number][at : at + len(data)] = data

    def _answered(self, request: Sent, error: int) -> None:
        self.book.done(request, error)
        data = self._data.pop(request.number, None)
        if data is not None and not error:
            self._compare(request, data)
        self.over |= error == Err.ESHUTDOWN
        if error not in (0, Err.ESHUTDOWN) and not (request.durably and error == Err.EIO):
            self.findings.append(Finding("refused", str(request)))

    def _compare(self, request: Sent, data: bytearray) -> None:
        lossy = self._lossy()
        view = memoryview(data)
        for index in range(request.count):
            sector = request.first + index
            mark = mark_of(bytes(view[index * SECTOR : (index + 1) * SECTOR]), sector)
            if isinstance(mark, str):
                what = mark
            elif not self.book.may_hold(sector, mark, lossy=lossy):
                what = f"{mark}"
            else:
                continue
            self.findings.append(Finding("read back", f"{request}: sector {sector} holds {what}"))
            return
        self.read_bytes += len(data)


# ---------------------------------------------------------------- a process of its own


def main() -> None:
    parser = argparse.ArgumentParser(description="Write, and keep the book in a file.")
    parser.add_argument("uri")
    parser.add_argument("log", type=Path)
    parser.add_argument("--certificates", type=Path)
    parser.add_argument("--export", default="")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--writer", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    book = Book(args.writer, args.log)
    with Writer(
        args.uri,
        book,
        first=args.first,
        count=args.count,
        certificates=args.certificates,
        export=args.export,
        seed=args.seed,
    ) as writer:
        writer.run(lambda: not writer.findings)
    raise SystemExit("\n".join(map(str, writer.findings)))


if __name__ == "__main__":
    main()
