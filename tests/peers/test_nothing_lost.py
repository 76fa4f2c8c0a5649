"""Whoever is killed, nothing that was acknowledged is lost: the disk is compared with the log.

Clients write blocks that say who wrote them, and log what they were told. What may be missing on
the disk then depends on who was killed: nothing but what was under way if it was a client or the
gateway; with the server, what nobody had flushed, if the client is told so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.book import Book
from tests.soak.disks import VolatileServer, image, in_file, wait_idle
from tests.soak.load import Load
from tests.soak.recorder import Recorder
from tests.soak.sectors import Mark
from tests.soak.verdict import Finding, examine, made_up, told
from tests.soak.writer import Writer
from tests.support.gateway import ROOT, Gateway
from tests.support.peers import Nbdkit, QemuNbd, Server, wait_until
from tests.support.rawclient import Cmd, Err, PeerClosedError
from tests.workers_rig import Crew

SECTORS = 4096  # of a writer's region
WRITERS = 3


class Proof:
    """A server with one image, a gateway, writers with a region each; and what they leave there."""

    def __init__(self, root: Path, pki: Path, stack: contextlib.ExitStack) -> None:
        self.root, self.pki = root, pki
        self.stack = stack
        (root / "disks").mkdir()
        self.image = image(root / "disks" / "d0", WRITERS * SECTORS)
        self.recorder: Recorder | None = None
        self.lossy = False
        self.dies_by_itself = False
        self.fua_flushes = False
        self.writers = 0
        self._found: dict[int, dict[int, Mark]] = {}  # by region

    def nbdkit(self) -> None:
        """A server that has written what it acknowledges, as far as its own death goes."""
        self._serve(Nbdkit(self.root, "file", f"dir={self.root / 'disks'}"))

    def qemu(self) -> None:
        """Another one. nbdkit 1.32 aborts at times when a connection is cut under its replies."""
        self._serve(QemuNbd(self.root, "-f", "raw", "-x", "d0", self.image))

    def volatile(self, *flags: str, record: bool = True) -> VolatileServer:
        """A server whose unflushed writes die with it."""
        server = VolatileServer(self.root, self.root / "disks", *flags)
        self._serve(server)
        self.lossy = True
        self.fua_flushes = "--no-fua" in flags
        if record:
            self.recorder = Recorder(self.root / "recorder", self.server.socket)
            self.stack.enter_context(self.recorder)
        return server

    def _serve(self, server: Server) -> None:
        self.server = self.stack.enter_context(server)

    def gateway(self, *flags: str, kind: type[Gateway] = Gateway, **more: object) -> Gateway:
        socket = self.server.socket if self.recorder is None else self.recorder.path
        common = ("--tls-dir", self.pki, "--socket", socket, "--listen", "127.0.0.1:0")
        running = kind(*common, "--any-export", *flags, **more)  # type: ignore[arg-type]
        self.running = self.stack.enter_context(running)
        self.stack.callback(lambda: print(self.running.log()))  # if a test fails
        return self.running

    def writer(self, region: int = 0, **more: object) -> Writer:
        """Begins with what earlier writers of the region have left there, as `compare` found it."""
        self.writers += 1
        book = Book(self.writers).start_from(self._found.get(region, {}))
        writer = Writer(
            self.running.uri,
            book,
            first=region * SECTORS,
            count=SECTORS,
            certificates=self.pki,
            export="d0",
            seed=self.writers,
            lossy=lambda: self.lossy and (self.dies_by_itself or bool(book.losses)),
            **more,  # type: ignore[arg-type]
        )
        return self.stack.enter_context(writer)

    def load(self) -> Load:
        return Load([self.writer(region) for region in range(WRITERS)])

    def compare(self, load: Load, *, lossy: bool = False) -> list[Finding]:
        """All rules, once the server has done with everybody."""
        wait_idle(self.server.socket)
        assert not load.bad_ends()
        findings = load.findings(fua_flushes=self.fua_flushes)
        for region, book in enumerate(load.books):
            findings += self.compare_disk(book, region, lossy=lossy)
            if self.recorder is not None:
                findings += made_up(book, self.recorder.acknowledged)
        return findings

    def compare_disk(self, book: Book, region: int, *, lossy: bool) -> list[Finding]:
        disk = in_file(self.image, region * SECTORS, SECTORS)
        findings, self._found[region] = examine(book, disk, region * SECTORS, lossy=lossy)
        return findings

    def restart(self, load: Load, *, at_once: bool = False) -> None:
        """Kill the server under load, and start it again when the gateway has seen it."""
        before = len(self.running.log())
        load.kill_upstream(self.server.kill)
        if not at_once:
            self.running.wait_log("upstream lost: dialling it anew", after=before)
        self.server.start()
        self.running.wait_log("upstream is back after", after=before, timeout_s=30)


@pytest.fixture
def proof(tmp_path: Path, pki: Path) -> Iterator[Proof]:
    with contextlib.ExitStack() as stack:
        yield Proof(tmp_path, pki, stack)


# ---------------------------------------------------------------- clients and gateways are killed


def test_clients_that_vanish(proof: Proof) -> None:
    """By end of file and by reset, wherever they are just then."""
    proof.nbdkit()
    proof.gateway()
    for how in (Writer.close, Writer.reset):
        load = proof.load()
        load.go_on()
        load.cut(how)
        assert not proof.compare(load)


def test_a_client_killed_as_a_process(proof: Proof, tmp_path: Path) -> None:
    """Its log is on the disk."""
    proof.nbdkit()
    uri = proof.gateway().uri
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.soak.writer", uri, str(log), "--export", "d0"]
    command += ["--certificates", str(proof.pki), "--count", str(SECTORS)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_until(lambda: log.exists() and log.stat().st_size > 20_000, "a log")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    wait_idle(proof.server.socket)
    book = Book.load(log)
    assert len(book.requests) > 200
    assert book.open
    assert not proof.compare_disk(book, 0, lossy=False)
    assert not told(book)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_gateway(proof: Proof, workers: int) -> None:
    """All of its processes at once, by SIGKILL."""
    proof.qemu()
    running = proof.gateway(
        "--workers", str(workers), kind=Crew if workers > 1 else Gateway, faults_allowed=True
    )
    load = proof.load()
    load.go_on()
    os.kill(running.pid, signal.SIGKILL)
    for pid in running.pids.values() if isinstance(running, Crew) else ():
        os.kill(pid, signal.SIGKILL)
    load.wait_ended()
    running.wait()
    assert not proof.compare(load)


def test_a_killed_worker(proof: Proof) -> None:
    """Only the clients of that one lose their connection."""
    proof.qemu()
    running = proof.gateway("--workers", "2", kind=Crew)
    assert isinstance(running, Crew)
    load = proof.load()
    load.go_on()
    os.kill(running.wait_worker(1), signal.SIGKILL)
    running.wait_worker(3)
    load.go_on()
    lost = sum(end is not None for end in load.ended.values())
    load.stop()
    assert 0 < lost < WRITERS
    assert not proof.compare(load)


# ---------------------------------------------------------------- the server is killed


def test_a_killed_server_without_reconnect(proof: Proof) -> None:
    """What was flushed is there, and the session ends."""
    proof.volatile("--shuffle")
    running = proof.gateway()
    load = proof.load()
    load.go_on()
    load.kill_upstream(proof.server.kill)
    wait_until(lambda: running.log().count("closed: upstream lost") == WRITERS, "all to be ended")
    load.wait_ended()
    assert not proof.compare(load, lossy=True)
    assert all(writer.over for writer in load.writers)


@pytest.mark.parametrize(
    ("record", "flags"),
    [
        (True, ()),
        (True, ("--shuffle", "--delay-ms=1")),
        (True, ("--no-fua", "--no-structured-replies")),
        (False, ("--shuffle",)),
    ],
    ids=["recorded", "shuffled", "poor", "direct"],
)
def test_a_killed_server_and_the_next_one(
    proof: Proof, record: bool, flags: tuple[str, ...]
) -> None:
    """Sessions go on; each loss is told once; what is promised afterwards is kept."""
    proof.volatile(*flags, record=record)
    proof.gateway("--reconnect", "60")
    load = proof.load()
    for _ in range(2):
        load.go_on()
        proof.restart(load)
    load.go_on()
    load.kill_upstream(proof.server.kill)  # what it has promised after two of them
    proof.server.start()
    load.go_on()
    load.stop()
    assert load.all_well
    assert not proof.compare(load, lossy=True)
    assert any(one.error for book in load.books for one in book.requests.values())


@pytest.mark.parametrize(
    "flag", ["--die-after-requests=300", "--die-after-bytes=2000000", "--leave-after-requests=300"]
)
def test_servers_that_end_again_and_again(proof: Proof, flag: str) -> None:
    """In the middle of a reply, between two, or with NBD_ESHUTDOWN; the next is there at once."""
    proof.dies_by_itself = True
    server = proof.volatile(flag, "--shuffle", record="leave" not in flag)
    proof.gateway("--reconnect", "60")
    load = proof.load()
    for left in reversed(range(3)):
        wait_until(lambda: not server.alive, "the server to end", 60)
        load.kill_upstream(server.kill)
        if not left:
            server.argv.remove(flag)
        server.start()
    load.go_on()
    load.stop()
    assert load.all_well
    findings = proof.compare(load, lossy=True)
    # The server dies by itself, before anybody notes it: what came between is in doubt.
    assert [one for one in findings if one.rule not in ("untold", "false alarm")] == []


def test_each_loss_is_told_exactly_once(proof: Proof) -> None:
    """To one client that does one thing at a time: flushes, FUA, and nothing to tell."""
    proof.volatile()
    proof.gateway("--reconnect", "60")
    writer = proof.writer()
    load = Load([])
    load.writers = [writer]

    def again(*, at_once: bool = False) -> None:
        proof.restart(load, at_once=at_once)

    assert not writer.ask(Cmd.WRITE, 0, 8)
    again()
    assert writer.ask(Cmd.FLUSH) == Err.EIO
    assert not writer.ask(Cmd.FLUSH)
    again()
    assert not writer.ask(Cmd.FLUSH)  # nothing was written
    assert not writer.ask(Cmd.WRITE, 8, 8)
    assert not writer.ask(Cmd.FLUSH)
    again()
    assert not writer.ask(Cmd.FLUSH)  # it was flushed
    assert not writer.ask(Cmd.WRITE, 16, 8, fua=True)
    again()
    assert not writer.ask(Cmd.WRITE, 24, 8, fua=True)
    assert not writer.ask(Cmd.WRITE_ZEROES, 24, 4)
    again()
    again(at_once=True)  # nobody has asked the last one anything
    assert not writer.ask(Cmd.READ, 0, 64)
    assert not writer.ask(Cmd.WRITE, 32, 8)
    assert writer.ask(Cmd.WRITE, 40, 8, fua=True) == Err.EIO
    assert not writer.ask(Cmd.WRITE, 40, 8, fua=True)
    assert not writer.ask(Cmd.FLUSH)
    writer.leave()
    assert not proof.compare(load, lossy=True)


# ---------------------------------------------------------------- a gateway that lies is caught

LIARS = {
    "forgets the loss": (
        "from gateway.nbd.journal import Journal as Liar\nLiar.take_loss = lambda self: False",
        {"untold", "lost", "read back"},
    ),
}


@pytest.mark.parametrize("liar", LIARS)
def test_a_gateway_that_lies_is_caught(proof: Proof, tmp_path: Path, liar: str) -> None:
    code, expected = LIARS[liar]
    (tmp_path / "liar").mkdir()
    (tmp_path / "liar" / "sitecustomize.py").write_text(code)
    proof.volatile()
    path = f"{tmp_path / 'liar'}:{ROOT}"
    proof.gateway("--reconnect", "60", env={"PYTHONPATH": path}, faults_allowed=True)
    writer = proof.writer()
    for number in range(8):
        assert not writer.ask(Cmd.WRITE, 8 * number, 8)
    load = Load([])
    load.writers = [writer]
    proof.restart(load)
    found = set()
    with contextlib.suppress(PeerClosedError):
        writer.ask(Cmd.FLUSH)
        writer.leave()
        found = {finding.rule for finding in proof.compare(load, lossy=True)}
    assert found & expected, found
