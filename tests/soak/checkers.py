"""Writers with a book, in a soak: they work, end in some way, and the disk is compared."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.book import Book
from tests.soak.recorder import Recorder
from tests.soak.sectors import SECTOR
from tests.soak.upstreams import Lease, Upstream
from tests.soak.verdict import Finding, examine, made_up, told
from tests.soak.writer import Writer
from tests.support.gateway import ROOT, environment
from tests.support.rawclient import PeerClosedError

ENDS = ("leave", "leave", "leave", "close", "reset", "half")
_REGION = 8192  # sectors of a lease that are used


@dataclass
class Scene:
    """What checkers share: the server, and who is there to be told that it dies."""

    upstream: Upstream
    recorder: Recorder | None
    guard: threading.Lock = field(default_factory=threading.Lock)  # held while the server is away
    books: set[Book] = field(default_factory=set)
    doubtful: bool = False  # the server has died by itself: nobody knows when
    checked: int = 0  # acknowledged writes that were looked for
    told: int = 0  # losses that clients were told of

    def dying(self) -> None:
        for book in list(self.books):
            book.dying()

    def dead(self) -> None:
        for book in list(self.books):
            book.dead()

    def verdict(self, book: Book, lease: Lease, *, live: bool = True) -> list[Finding]:
        """All rules. `live`: the book was kept by this process, and knows of losses."""
        first, count = lease.first, min(lease.count, _REGION)
        with self.guard:
            lossy = self.upstream.lossy and (bool(book.losses) or self.doubtful or not live)
            disk = self.upstream.read(lease, 0, count)
            findings, _ = examine(book, disk, first, lossy=lossy)
        if live and not self.doubtful:
            findings += told(book, fua_flushes="poor" in self.upstream.name)
        if self.recorder is not None:
            findings += made_up(book, list(self.recorder.acknowledged))
        writes = [one for one in book.requests.values() if one.count and one.ok]
        self.checked += sum(one.durable or not lossy for one in writes)
        self.told += sum(bool(one.durably and one.error) for one in book.requests.values())
        return findings


@dataclass(eq=False)
class Checker:
    """One connection. `run` it in a thread; `stop` makes it end in its own way."""

    scene: Scene
    uri: str
    certificates: Path
    lease: Lease
    number: int
    random: random.Random
    seconds: float
    verified: int = 0
    ended: str = ""  # why, if the other side has ended it
    connected: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)

    def __str__(self) -> str:
        name = self.certificates.name.removeprefix("client-")
        where = self.lease.export or f"sector {self.lease.first}"
        return f"checker {self.number} ({name}) on {where} at {self.uri}"

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> list[Finding]:
        """What is wrong. Raises WriterFailed; AssertionError or OSError: it cannot connect."""
        book = Book(self.number)
        self.scene.books.add(book)
        try:
            return self._work(book)
        finally:
            self.scene.books.discard(book)

    def _work(self, book: Book) -> list[Finding]:
        scene = self.scene
        writer = Writer(
            self.uri,
            book,
            first=self.lease.first,
            count=min(self.lease.count, _REGION),
            certificates=self.certificates,
            export=self.lease.export,
            depth=self.random.choice((1, 4, 16, 48)),
            seed=self.number,
            lossy=lambda: scene.upstream.lossy and (scene.doubtful or bool(book.losses)),
        )
        self.connected = True
        until = time.monotonic() + self.seconds
        with writer:
            try:
                writer.run(lambda: time.monotonic() < until and not self._stop.is_set())
                self._end(writer)
            except PeerClosedError as closed:
                self.ended = str(closed)
        if writer.over:
            self.ended = "NBD_ESHUTDOWN"
        self.verified += writer.read_bytes + sum(
            one.count * SECTOR for one in book.requests.values() if one.ok
        )
        return writer.findings + scene.verdict(book, self.lease)

    def _end(self, writer: Writer) -> None:
        how = "leave" if writer.over else self.random.choice(ENDS)
        if how == "leave":
            writer.leave()
        elif how == "reset":
            writer.reset()
        elif how == "half":
            writer.send_half()
            writer.reset()


def killed_process(
    scene: Scene, uri: str, certificates: Path, lease: Lease, number: int, seconds: float, log: Path
) -> tuple[list[Finding], int]:
    """A writer that is a process of its own, killed; also the bytes that it wrote. Its book knows
    of no losses: only for servers that keep what they acknowledge."""
    command = [sys.executable, "-m", "tests.soak.writer", uri, str(log)]
    command += ["--certificates", str(certificates), "--export", lease.export]
    command += ["--first", str(lease.first), "--count", str(min(lease.count, _REGION))]
    command += ["--writer", str(number), "--seed", str(number)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        said = b""
    if b"read back" in said or b"refused" in said:
        return [Finding("read back", said.decode().strip())], 0
    if not log.exists():
        return [], 0
    book = Book.load(log)
    written = sum(one.count * SECTOR for one in book.requests.values() if one.ok)
    return scene.verdict(book, lease, live=False), written
