"""`--workers N` from outside: its processes as the log and /proc show them, and raw clients."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fake_upstream import FakeUpstream, Link, Script, pattern
from tests.support.gateway import ROOT, Gateway, Output, descriptors_of, environment
from tests.support.peers import wait_until
from tests.support.rawclient import Cmd, RawClient, Request, tls_context

STARTED = re.compile(r"INFO worker (\d+) \(process (\d+)\) started$", re.MULTILINE)


class Slow(Script):
    """Keeps its answers back until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def requested(self, link: Link, request: Request) -> None:
        self.go_on.wait()
        super().requested(link, request)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


@pytest.fixture
def slow(fake: FakeUpstream) -> Iterator[Slow]:
    fake.script = slow = Slow()
    try:
        yield slow
    finally:
        slow.go_on.set()


class Crew(Gateway):
    """A gateway with workers. On leaving it, none of its processes may be left."""

    def stop(self) -> None:
        super().stop()
        wait_until(lambda: not any(map(exists, self.pids.values())), "the workers to be gone")

    @property
    def pids(self) -> dict[int, int]:
        """Number to process of every worker that was ever started."""
        return {int(number): int(pid) for number, pid in STARTED.findall(self.log())}

    def wait_worker(self, number: int) -> int:
        """The process of a worker, once it serves."""
        wait_until(lambda: number in self.pids, f"worker {number}")
        pid = self.pids[number]
        wait_until(lambda: is_up(pid), f"worker {number} to be up")
        return pid

    def worker_of(self, client: RawClient) -> int:
        """The number of the worker that has this client, which has opened an export."""
        port = client.sock.getsockname()[1]
        return int(self.wait_log(rf" \[(\d+)\.\d+\] 127\.0\.0\.1:{port}: open: ")[1])

    def spread(self, clients: list[RawClient]) -> list[int]:
        """How many of these clients the workers have, most first."""
        return sorted(Counter(map(self.worker_of, clients)).values(), reverse=True)


Start = Callable[..., Crew]


@pytest.fixture
def crew(pki: Path, fake: FakeUpstream) -> Start:
    """A gateway with two workers, or more flags; not yet started."""

    def crew(*more: str | Path, workers: int | str = 2) -> Crew:
        common = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0")
        return Crew(*common, "--workers", str(workers), *more)

    return crew


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """For clients, which are closed before the fake looks for errors."""
    with contextlib.ExitStack() as stack:
        yield stack


def opened(running: Gateway, pki: Path) -> RawClient:
    """A client in transmission."""
    client = RawClient(running.uri)
    client.greet()
    client.start_tls(tls_context(pki))
    client.go()
    return client


def read_works(client: RawClient, offset: int = 512) -> None:
    client.send(Request(Cmd.READ, offset, 512, cookie=7).pack())
    assert client.recv_exactly(16 + 512)[16:] == pattern(offset, 512)


def one_each(running: Crew, pki: Path, stack: contextlib.ExitStack) -> dict[int, RawClient]:
    """Clients of as many workers as there are, by the number of the worker."""
    found: dict[int, RawClient] = {}
    for _ in range(20):
        client = stack.enter_context(opened(running, pki))
        if found.setdefault(running.worker_of(client), client) is not client:
            leave(client)
        if len(found) == 2:
            return found
    raise AssertionError("one worker has all the clients")


def leave(client: RawClient) -> None:
    client.send(Request(Cmd.DISC, cookie=0).pack())
    assert client.recv_to_end() == b""
    client.close()


# ---------------------------------------------------------------- /proc


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def state(pid: int) -> str:
    """One letter; Z is a zombie, T one that was stopped. Empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return ""


def is_up(pid: int) -> bool:
    """It handles SIGTERM, and lets it through: the last that a worker does before it serves."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = {name: int(mask, 16) for name, mask in re.findall(r"^Sig(\w+):\t(\w+)$", status, re.M)}
    term = 1 << 14
    return bool(masks["Cgt"] & term) and not masks["Blk"] & term


def descriptors(pid: int) -> Counter[str]:
    """The open files of a process, by kind, and their number."""
    found: Counter[str] = Counter()
    for fd in descriptors_of(pid):
        with contextlib.suppress(FileNotFoundError):
            found[os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0]] += 1
    return found


# ---------------------------------------------------------------- the command with something amiss

PATCHED = """
import sys
{patch}
from gateway.cli import main
sys.argv[0] = "nbd-gateway"
main()
"""


class Patched:
    """The command after some lines of Python that make things go wrong in it.

    Asserts nothing by itself; on leaving it, it is killed, and its workers end with it.
    """

    def __init__(self, patch: str, *args: str | Path, pass_fds: tuple[int, ...] = ()) -> None:
        self._out, self._err = Output(), Output()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PATCHED.format(patch=patch), *map(str, args)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._out.file,
            stderr=self._err.file,
            pass_fds=pass_fds,
        )

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._out.close()
        self._err.close()

    @property
    def uris(self) -> list[str]:
        return self.text().split()

    def text(self) -> str:
        """All of standard output so far."""
        return self._out.text()

    def log(self) -> str:
        return self._err.text()

    def wait_log(self, pattern: str, timeout_s: float = 20.0) -> None:
        wait_until(lambda: re.search(pattern, self.log()), f"{pattern!r} in the log", timeout_s)

    def ends(self, timeout_s: float = 30.0) -> int:
        """The exit code, once it has ended by itself or on a signal."""
        return self.process.wait(timeout_s)
