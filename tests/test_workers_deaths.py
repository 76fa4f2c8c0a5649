"""A worker dies: it is replaced, and nobody but its own clients notices."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import workers_rig
from tests.support.fake_upstream import FakeUpstream, pattern
from tests.support.gateway import warnings_in
from tests.support.peers import wait_until
from tests.support.rawclient import Cmd, RawClient, Request
from tests.workers_rig import (
    Crew,
    Patched,
    Slow,
    Start,
    is_up,
    leave,
    one_each,
    opened,
    read_works,
    state,
)

fake, crew, stack, slow = (
    workers_rig.fake,
    workers_rig.crew,
    workers_rig.stack,
    workers_rig.slow,
)


class Reader(threading.Thread):
    """A client that reads and compares without a pause until `stop`."""

    def __init__(self, client: RawClient) -> None:
        super().__init__()
        self.client = client
        self.count = 0
        self.failure: BaseException | None = None
        self._ending = threading.Event()

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                read_works(self.client, 512 * (self.count % 2000))
                self.count += 1
        except BaseException as failure:
            self.failure = failure

    def stop(self) -> None:
        self._ending.set()
        self.join()
        assert self.failure is None
        assert self.count > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_only_its_own_clients_notice(
    number: signal.Signals, pki: Path, crew: Start, stack: ExitStack
) -> None:
    with crew() as running:
        clients = one_each(running, pki, stack)
        witness = Reader(clients[2])
        witness.start()
        read_works(clients[1])
        killed = running.pids[1]
        os.kill(killed, number)
        assert clients[1].recv_to_end() == b""
        assert clients[1].ended in ("fin", "reset")
        said = f"worker 1 \\(process {killed}\\) died: {number.name}; the next one starts in 0.1 s"
        running.wait_log(f"WARNING {said}\n")
        replacement = running.wait_worker(3)
        assert state(killed) == ""  # no zombie
        assert running.pids.keys() == {1, 2, 3}
        newcomers = one_each(running, pki, stack)
        assert newcomers.keys() == {2, 3}
        for newcomer in newcomers.values():
            read_works(newcomer)
        witness.stop()
        assert running.worker_of(clients[2]) == 2
        assert replacement != killed
        stack.close()


def test_clients_are_served_while_one_is_missing(pki: Path, crew: Start, stack: ExitStack) -> None:
    """Those in the queue too: the listening sockets are not the dead worker's."""
    with crew() as running:
        clients = one_each(running, pki, stack)
        os.kill(running.pids[2], signal.SIGSTOP)  # so that worker 1 has to do without it
        os.kill(running.pids[2], signal.SIGKILL)
        for _ in range(5):
            read_works(stack.enter_context(opened(running, pki)))
        read_works(clients[1])
        stack.close()


def test_a_stuck_worker_keeps_nobody_out(pki: Path, crew: Start, stack: ExitStack) -> None:
    """It has the fewest clients, so each newcomer is left to it, but not for long."""
    with crew() as running:
        os.kill(running.pids[2], signal.SIGSTOP)
        try:
            clients = [stack.enter_context(opened(running, pki)) for _ in range(20)]
            assert running.spread(clients) == [20]
            for client in clients:
                leave(client)
        finally:
            os.kill(running.pids[2], signal.SIGCONT)


def test_a_replacement_needs_no_files(
    pki: Path, fake: FakeUpstream, stack: ExitStack, tmp_path: Path
) -> None:
    """What was read at the start is enough as long as nothing newer has been loaded: privileges
    may have been dropped, files be gone."""
    files = tmp_path / "tls"
    shutil.copytree(pki, files)
    flags = ("--socket", fake.path, "--listen", "127.0.0.1:0", "--workers", "2")
    with Crew("--tls-dir", files, *flags, faults_allowed=True) as running:
        shutil.rmtree(files)
        for number in (1, 2):
            os.kill(running.pids[number], signal.SIGKILL)
        for number in (3, 4):
            running.wait_worker(number)
            assert f"worker {number}: the files cannot be used, those of the start" in running.log()
        read_works(stack.enter_context(opened(running, pki)))
        stack.close()


def test_those_that_die_young_are_replaced_more_and_more_slowly(crew: Start) -> None:
    with crew() as running:
        for number in range(3, 7):
            os.kill(max(running.pids.values()), signal.SIGKILL)
            running.wait_worker(number)
        delays = re.findall(r"starts in (\S+) s", running.log())
        assert delays == ["0.1", "0.2", "0.4", "0.8"]
        assert len(running.pids) == 6


def test_one_that_is_told_to_end_drains_and_is_replaced(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    """SIGTERM to a worker is for this worker, however often it comes."""
    with crew() as running:
        clients = one_each(running, pki, stack)
        for client in clients.values():
            client.send(Request(Cmd.READ, 0, 512).pack())
        for link in fake.links[-2:]:
            fake.wait(lambda link=link: link.requests, "the request upstream")
        for _ in range(2):
            os.kill(running.pids[1], signal.SIGTERM)
            running.wait_log(r"INFO worker 1: listeners closed, 1 sessions to end\n")
        # All newcomers are the other's now, and nobody waits for this one.
        newcomer = stack.enter_context(RawClient(running.uri))
        newcomer.greet()
        slow.go_on.set()
        for client in clients.values():
            assert client.recv_exactly(16 + 512)[16:] == pattern(0, 512)
        assert clients[1].recv_to_end() == b""
        assert clients[1].ended == "close_notify"
        clients[1].close()
        running.wait_log(r"INFO worker 1 \(process \d+\) has ended; the next one starts in 0.1 s\n")
        running.wait_worker(3)
        read_works(clients[2])
        assert not warnings_in(running.log())
        stack.close()


def test_one_that_had_to_cut_is_replaced_too(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    with crew("--drain-timeout", "0.1") as running:
        client = stack.enter_context(opened(running, pki))
        client.send(Request(Cmd.READ, 0, 512).pack())
        fake.wait(lambda: fake.links[-1].requests, "the request upstream")
        number = running.worker_of(client)
        os.kill(running.pids[number], signal.SIGTERM)
        assert client.recv_to_end() == b""
        client.close()
        running.wait_log(
            rf"WARNING worker {number} \(process \d+\) has ended, sessions had to be cut; "
            "the next one starts in 0.1 s\n"
        )
        running.wait_worker(3)


PLACES = """
import logging, os, signal, sys
import gateway.workers
from gateway.places import Places
logging.basicConfig(stream=sys.stderr)
gateway.workers._BACK_OFF_S = (60.0, 60.0)

def work(post):
    post.up()
    if post.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.read(post.orders, 1) == gateway.workers.DRAIN

places = Places((9, 9))
workers = gateway.workers.Workers(places, work, drain_timeout_s=9)
drained = workers.run(up=lambda: None, ending=lambda: print(list(places.entries)))
assert drained
sys.exit(0)
"""


def test_nobody_waits_for_the_dead() -> None:
    """Its place is cleared: until it is replaced, no client is left to it."""
    with Patched(PLACES) as running:
        running.wait_log(r"worker 1 \(process \d+\) died: SIGKILL; the next one starts in 60 s")
        running.process.terminate()
        assert running.ends() == 0
        assert running.text() == "[0, 1]\n"


# ---------------------------------------------------------------- starting is what fails

COMMON = ("--listen", "127.0.0.1:0", "--workers", "2")

DIES_AT_ONCE = """
from gateway.server import Server
async def run(*_, **__):
    raise RuntimeError("something is amiss")
Server.run = run
"""


def test_workers_that_cannot_start(pki: Path, fake: FakeUpstream) -> None:
    """Each time is logged, with the reason; no URI is printed, since nobody is served."""
    flags = ("--tls-dir", pki, "--socket", fake.path)
    with Patched(DIES_AT_ONCE, *flags, *COMMON) as running:
        running.wait_log(r"starts in 0.8 s")
        running.process.terminate()
        assert running.ends() in (0, 1)  # the last one dies on its own, or before it is told to end
        log = running.log()
        assert running.uris == []
    delays = re.findall(r"WARNING worker \d+ \(process \d+\) died: exit code 70; .* (\S+) s\n", log)
    assert sorted(delays)[:6] == ["0.1", "0.1", "0.2", "0.2", "0.4", "0.4"]
    died = log.count("died: exit code 70")
    assert log.count("bug: this worker ends") == log.count("RuntimeError: something is ami") == died


FORK_FAILS = """
import errno, os
fork, calls = os.fork, 0
def failing():
    global calls
    calls += 1
    if {condition}:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()
os.fork = failing
"""


@pytest.mark.parametrize("condition", ["calls in (1, 3)", "calls in (2, 3)", "calls <= 3"])
def test_fork_fails_at_the_start(
    condition: str, pki: Path, fake: FakeUpstream, stack: ExitStack
) -> None:
    """It may get better: it is tried again, and the URIs are there once all workers are."""
    flags = ("--tls-dir", pki, "--socket", fake.path)
    with Patched(FORK_FAILS.format(condition=condition), *flags, *COMMON) as running:
        wait_until(lambda: running.uris, "the gateway to start")
        failures = re.findall(
            r"WARNING cannot start a worker: Resource temporarily unavailable; "
            r"trying again in (\S+) s\n",
            running.log(),
        )
        assert len(failures) == (3 if "<" in condition else 2)
        assert set(failures) <= {"0.1", "0.2"}
        assert running.log().count(" started\n") == 2
        with RawClient(running.uris[0]) as client:
            client.greet()
        running.process.terminate()
        assert running.ends() == 0


def test_fork_fails_later(pki: Path, fake: FakeUpstream) -> None:
    flags = ("--tls-dir", pki, "--socket", fake.path)
    with Patched(FORK_FAILS.format(condition="3 <= calls <= 4"), *flags, *COMMON) as running:
        wait_until(lambda: running.uris, "the gateway to start")
        pids = dict(workers_rig.STARTED.findall(running.log()))
        os.kill(int(pids["2"]), signal.SIGKILL)
        running.wait_log(r"INFO worker 3 \(process \d+\) started")
        delays = re.findall(r" in (\S+) s\n", running.log())
        assert delays == ["0.1", "0.2", "0.4"]
        running.process.terminate()
        assert running.ends() == 0


IGNORED = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
"""


def test_what_the_parent_had_ignored(pki: Path, fake: FakeUpstream) -> None:
    """Dispositions and masks are inherited; ours are what we need."""
    flags = ("--tls-dir", pki, "--socket", fake.path)
    with Patched(IGNORED, *flags, *COMMON) as running:
        wait_until(lambda: running.uris, "the gateway to start")
        pids = {int(n): int(pid) for n, pid in workers_rig.STARTED.findall(running.log())}
        assert all(map(is_up, pids.values()))
        os.kill(pids[1], signal.SIGKILL)
        running.wait_log(r"worker 1 \(process \d+\) died: SIGKILL")
        os.kill(pids[2], signal.SIGTERM)
        running.wait_log(r"worker 2 \(process \d+\) has ended")
        running.wait_log(r"worker 4 \(process \d+\) started")
        running.process.send_signal(signal.SIGINT)
        assert running.ends() == 0


STRANGER = """
import os
if os.fork() == 0:
    os._exit(3)
"""


def test_children_that_are_not_ours(pki: Path, fake: FakeUpstream) -> None:
    """Whoever becomes the gateway by exec may have had some; they are reaped and no more."""
    flags = ("--tls-dir", pki, "--socket", fake.path)
    with Patched(STRANGER, *flags, *COMMON) as running:
        wait_until(lambda: running.uris, "the gateway to start")
        running.process.terminate()
        assert running.ends() == 0
        assert not warnings_in(running.log())
