"""`--reconnect` with real servers, killed and started again under real clients.

The server stays away until the gateway has seen that it is gone. No server here loses what it has
written when it is killed (the kernel has it); that unflushed writes count as lost all the same is
what FLUSH and FUA tell, and what a client does with that is the client's.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Bench, Front, same
from tests.soak.book import Book
from tests.soak.disks import in_file, wait_idle
from tests.soak.load import Load
from tests.soak.sectors import SECTOR
from tests.soak.verdict import examine
from tests.soak.writer import Writer
from tests.support.gateway import Output, environment
from tests.support.peers import (
    Client,
    NbdServer,
    Server,
    check,
    find,
    nbdsh,
    run,
    start_nbdsh,
    wait_until,
)
from tests.support.rawclient import Cmd, Err, Tf

SIZE = 16 * MIB
LOST = "upstream lost: dialling it anew"
BACK = "upstream is back after"

KINDS: dict[str, Callable[[Bench, Path], Server]] = {
    "nbdkit": lambda bench, image: bench.nbdkit("file", image),
    "qemu-nbd": lambda bench, image: bench.qemu_nbd("-f", "raw", image),
    "nbd-server": lambda bench, image: bench.nbd_server(image, name="disk"),
}
SIGNALS = pytest.mark.parametrize(
    ("scene", "how"),
    [
        *((kind, signal.SIGKILL) for kind in KINDS),
        ("nbdkit", signal.SIGTERM),
        ("qemu-nbd", signal.SIGTERM),
    ],
    ids=lambda value: getattr(value, "name", value),
    indirect=["scene"],
)


def one(kind: str) -> pytest.MarkDecorator:
    """What is the client's, and not the server's, is looked at with one server."""
    return pytest.mark.parametrize("scene", [kind], indirect=True)


class Scene:
    """One server with a disk, and a gateway that dials it anew."""

    def __init__(self, bench: Bench, kind: str) -> None:
        self.bench = bench
        self.image = bench.image(SIZE)
        self.server = KINDS[kind](bench, self.image)
        self.export = "disk" if isinstance(self.server, NbdServer) else ""
        self.jobs: list[Job] = []
        self.front: Front = bench.gateway(self.server, "--any-export", "--reconnect", "60")

    @property
    def client(self) -> Client:
        return self.front.client(self.export)

    @property
    def log(self) -> str:
        return self.front.gateway.log()

    def end(self, how: signal.Signals) -> None:
        """The server ends, by this signal, with all its processes."""
        pid = int(self.server.pidfile.read_text())
        os.killpg(pid, how)
        wait_until(lambda: not alive(pid), f"{self.server.argv[0]} to end by {how.name}")
        self.server.kill()

    def restart(self, how: signal.Signals = signal.SIGKILL) -> None:
        """The server ends, is seen to be gone, and comes back."""
        before = len(self.log)
        self.end(how)
        self.front.gateway.wait_log(LOST, after=before)
        self.server.start()
        self.front.gateway.wait_log(BACK, after=before)


class Job:
    """A client in the background that works on the scene's disk. `half`: bytes of it written."""

    def __init__(self, scene: Scene, *argv: str | Path, half: int = SIZE // 4) -> None:
        self._image, self._half = scene.image, half
        self._said = Output()
        self._process = subprocess.Popen(
            [find(argv[0]), *map(str, argv[1:])],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._said.file,
            stderr=self._said.file,
            start_new_session=True,
        )
        scene.jobs.append(self)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def is_under_way(self) -> bool:
        return os.stat(self._image).st_blocks * SECTOR >= self._half

    def done(self) -> tuple[int, str]:
        """Exit code, and all that it has printed."""
        self._process.wait(60)
        return self._process.returncode, self._said.text()

    def kill(self) -> None:
        if self.running:  # else its number may be somebody else's by now
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._said.close()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, bench: Bench) -> Iterator[Scene]:
    scene = Scene(bench, request.param)
    yield scene
    for job in scene.jobs:
        job.kill()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is nowhere zero."""
    path = tmp_path_factory.mktemp("picture") / "picture"
    path.write_bytes(random.Random(4).randbytes(SIZE))
    return path


@pytest.fixture
def hop(bench: Bench) -> Callable[[Scene], Client]:
    """fio cannot show certificates: nbdkit does that for it."""

    def hop(scene: Scene) -> Client:
        gateway = f"hostname=127.0.0.1 port={scene.front.gateway.port} export={scene.export}"
        tls = ("tls=require", f"tls-certificates={scene.front.pki}")
        return Client(bench.nbdkit("nbd", *gateway.split(), *tls).uri())

    return hop


# ---------------------------------------------------------------- fio --verify


def test_fio_verifies_across_restarts(
    scene: Scene, hop: Callable[[Scene], Client], tmp_path: Path
) -> None:
    """16 writes and reads under way, each read with its checksum; the server ends up to twice."""
    job = Job(
        scene,
        *("fio", "--name=crc", "--ioengine=nbd", f"--uri={hop(scene).uri}", "--rw=randrw"),
        *("--bs=4k", "--iodepth=16", f"--size={SIZE}", "--verify=crc32c", "--verify_fatal=1"),
        *("--verify_backlog=256", "--time_based", "--runtime=900ms", f"--aux-path={tmp_path}"),
        half=MIB,
    )
    wait_until(lambda: job.is_under_way() or not job.running, "the job to be under way", 60)
    hits = 0
    while job.running and hits < 2:
        hits += restart_under(scene, job, signal.SIGKILL)
    code, printed = job.done()
    assert code == 0, printed
    assert "verify:" not in printed
    assert hits


# ---------------------------------------------------------------- copies


def restart_under(scene: Scene, job: Job, how: signal.Signals) -> bool:
    """The server ends and comes back. False: the job was over before, and nobody noticed."""
    before = len(scene.log)
    scene.end(how)
    # That the loss is seen is not said in the log if the last one had not answered anything.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: LOST in scene.log[before:] or not job.running, "it to be seen", 1.0)
    scene.server.start()
    wait_until(lambda: BACK in scene.log[before:] or not job.running, "it to be back", 30)
    return BACK in scene.log[before:]


def hit(scene: Scene, start: Callable[[], Job], how: signal.Signals) -> Job:
    """A job that was under way when the server was restarted; a quick one may be over before."""
    for _ in range(5):
        with scene.image.open("wb") as file:
            file.truncate(SIZE)
        job = start()
        wait_until(lambda job=job: job.is_under_way() or not job.running, "half of it", 60)  # type: ignore[misc]
        if restart_under(scene, job, how):
            return job
        job.done()
    raise AssertionError("it was over each time")


def test_nbdcopy_to_the_disk(scene: Scene, picture: Path) -> None:
    job = hit(scene, lambda: Job(scene, "nbdcopy", picture, scene.client.uri), signal.SIGKILL)
    code, printed = job.done()
    assert code == 0, printed
    assert same(picture, scene.image)


@one("nbdkit")
def test_nbdcopy_with_a_flush_fails_and_can_be_repeated(scene: Scene, picture: Path) -> None:
    copy = ("nbdcopy", "--flush", picture, scene.client.uri)
    code, printed = hit(scene, lambda: Job(scene, *copy), signal.SIGKILL).done()
    assert code != 0
    assert "Input/output error" in printed
    check(*copy)
    assert same(picture, scene.image)


@one("nbdkit")
def test_nbdcopy_from_the_disk(scene: Scene, picture: Path, tmp_path: Path) -> None:
    """Reads that were half answered are completed."""
    scene.image.write_bytes(picture.read_bytes())
    copy = tmp_path / "copy"
    for _ in range(5):
        copy.write_bytes(b"")
        job = Job(scene, "nbdcopy", scene.client.uri, copy)
        wait_until(
            lambda: os.stat(copy).st_blocks * SECTOR > SIZE // 8 or not job.running,  # noqa: B023
            "a part of it",
            60,
        )
        before = len(scene.log)
        scene.end(signal.SIGKILL)
        scene.server.start()
        code, printed = job.done()
        assert code == 0, printed
        assert same(picture, copy)
        if BACK in scene.log[before:]:
            return
    raise AssertionError("it was over each time")


@one("qemu-nbd")
def test_qemu_img_convert(scene: Scene, picture: Path) -> None:
    """Its last flush fails; it does not say so (fio would not either), and its data is there."""
    client = scene.client
    convert = ("qemu-img", "convert", "-n", "-t", "writeback", "-r", "40M", *client.qemu_object())
    convert += ("-f", "raw", "--target-image-opts", str(picture), client.qemu_image())
    code, printed = hit(scene, lambda: Job(scene, *convert), signal.SIGKILL).done()
    assert code == 0, printed
    assert same(picture, scene.image)


# ---------------------------------------------------------------- our checker


@SIGNALS
def test_nothing_is_lost(scene: Scene, how: signal.Signals) -> None:
    """Three connections, two restarts: all that was acknowledged is there, and losses are told."""
    count = SIZE // SECTOR // 3
    writers = (
        Writer(
            scene.front.gateway.uri,
            Book(number + 1),
            first=number * count,
            count=count,
            certificates=scene.front.pki,
            export=scene.export,
            seed=number,
        )
        for number in range(3)
    )
    with contextlib.ExitStack() as stack:
        load = Load([stack.enter_context(writer) for writer in writers])
        _restarted_twice(scene, load, how)
    wait_idle(scene.server.socket)
    findings = load.findings()
    for number, book in enumerate(load.books):
        disk = in_file(scene.image, number * count, count)
        findings += examine(book, disk, number * count, lossy=False)[0]
    assert not findings


def _restarted_twice(scene: Scene, load: Load, how: signal.Signals) -> None:
    for _ in range(2):
        load.go_on()
        before = len(scene.log)
        load.kill_upstream(lambda: scene.end(how))
        wait_until(lambda before=before: scene.log.count(LOST, before) == 3, "all to see it")  # type: ignore[misc]
        scene.server.start()
    load.go_on()
    load.stop()
    assert load.all_well, load.ended


# ---------------------------------------------------------------- one that is not as it was


class Other:
    """An idle session of libnbd, whose server comes back with other arguments."""

    def __init__(self, bench: Bench, server: Server, *flags: str) -> None:
        self.server = server
        self.front = bench.gateway(server, "--reconnect", *(flags or ("30",)))

    def comes_back(self, change: Callable[[list[str]], None] | None, words: str) -> None:
        script = """
        h = nbd.NBD()
        h.set_uri_allow_local_file(True)
        for context in ("base:allocation", "qemu:allocation-depth"):
            h.add_meta_context(context)
        h.connect_uri(args["uri"])
        assert h.pread(512, 0) == bytes(512)
        report(open=True)
        deadline = time.monotonic() + 60
        while failed(h.pread, 512, 0) is None:
            assert time.monotonic() < deadline
        report(error=failed(h.pread, 512, 0))
        """
        with start_nbdsh(script, self.front.client()) as process:
            assert process.stdout is not None
            assert "open" in process.stdout.readline()
            self.server.kill()
            self.front.gateway.wait_log(LOST)
            if change is not None:
                change(self.server.argv)
                self.server.start()
            self.front.gateway.wait_log(words, timeout_s=30)
            output, errors = process.communicate(timeout=60)
        assert "ESHUTDOWN" in output or "ENOTCONN" in output, output + errors
        self.front.gateway.wait_log("closed: upstream lost")


def swap(old: str, new: str) -> Callable[[list[str]], None]:
    def change(argv: list[str]) -> None:
        argv[:] = [arg.replace(old, new) if arg == old else arg for arg in argv]
        assert new in argv

    return change


def test_another_size(bench: Bench) -> None:
    other = Other(bench, bench.nbdkit("memory", "8M"))
    other.comes_back(swap("8M", "9M"), "it has 9437184 bytes where it had 8388608: giving it up")


def test_read_only(bench: Bench) -> None:
    server = bench.nbdkit("-r", "memory", "8M")
    server.argv.remove("-r")
    server.kill()
    server.start()
    other = Other(bench, server)
    other.comes_back(lambda argv: argv.insert(1, "-r"), "back, but its flags are")


def test_a_context_that_is_gone(bench: Bench) -> None:
    image = bench.image(8 * MIB)
    server = bench.qemu_nbd("-A", "-f", "raw", image)
    other = Other(bench, server)
    other.comes_back(lambda argv: argv.remove("-A"), "its meta contexts are not what they were")


def test_never(bench: Bench) -> None:
    other = Other(bench, bench.nbdkit("memory", "8M"), "0.5")
    other.comes_back(None, "did not come back within 0.5 s: giving it up")


def test_without_the_flag_the_session_ends(bench: Bench) -> None:
    other = Other(bench, bench.nbdkit("memory", "8M"), "0")
    client = other.front.client()
    assert run("nbdinfo", "--size", client.uri).stdout.strip() == str(8 * MIB)
    other.server.kill()
    other.server.start()
    assert LOST not in other.front.gateway.log()
    assert run("nbdinfo", "--size", client.uri).stdout.strip() == str(8 * MIB)


# ---------------------------------------------------------------- flags


def test_several_connections_are_not_offered_where_flushes_count(bench: Bench) -> None:
    """CAN_MULTI_CONN says that a flush of one connection is one of all. None can say that now."""
    server = bench.nbdkit("memory", "8M")
    script = "h = connect(); report(multi=h.can_multi_conn(), flush=h.can_flush())"
    plain = nbdsh(script, bench.gateway(server).client())
    assert plain == {"multi": True, "flush": True}
    anew = bench.gateway(server, "--reconnect", "5")
    assert nbdsh(script, anew.client()) == {"multi": False, "flush": True}
    reading = bench.gateway(server, "--reconnect", "5", "--read-only")
    assert nbdsh(script, reading.client())["multi"]


def test_an_idle_session_outlives_its_server(scene: Scene) -> None:
    """Nobody asks anything while it is away; then FUA, a flush, and data are as they should be."""
    with Writer(
        scene.front.gateway.uri,
        Book(1),
        first=0,
        count=1024,
        certificates=scene.front.pki,
        export=scene.export,
    ) as writer:
        assert not writer.ask(Cmd.WRITE, 0, 8)
        scene.restart()
        assert not writer.ask(Cmd.READ, 0, 64)
        assert writer.ask(Cmd.FLUSH) == Err.EIO
        assert not writer.ask(Cmd.FLUSH)
        # nbdkit in its turn would wait until its client says something.
        scene.restart(signal.SIGKILL if scene.export == "" else signal.SIGTERM)
        assert not writer.ask(Cmd.FLUSH)
        assert not writer.ask(Cmd.WRITE, 8, 8)
        scene.restart()
        assert Tf.SEND_FUA & writer.flags
        assert writer.ask(Cmd.WRITE, 16, 8, fua=True) == Err.EIO
        assert not writer.ask(Cmd.WRITE, 16, 8, fua=True)
        writer.leave()
        assert not writer.findings
        wait_idle(scene.server.socket)
        assert not examine(writer.book, in_file(scene.image, 0, 1024), 0, lossy=False)[0]
