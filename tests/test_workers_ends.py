"""The end of a gateway with workers: all drain, whatever ends first, and nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import workers_rig
from tests.support.fake_upstream import FakeUpstream, pattern
from tests.support.gateway import Gateway, warnings_in
from tests.support.peers import wait_until
from tests.support.rawclient import Cmd, RawClient, Request
from tests.test_systemd import Activated
from tests.workers_rig import (
    STARTED,
    Crew,
    Patched,
    Slow,
    Start,
    exists,
    one_each,
    opened,
    state,
)

fake, crew, stack, slow = (
    workers_rig.fake,
    workers_rig.crew,
    workers_rig.stack,
    workers_rig.slow,
)


def busy_clients(
    running: Crew, pki: Path, stack: ExitStack, fake: FakeUpstream
) -> dict[int, RawClient]:
    """One for each worker, with a request that the upstream has."""
    clients = one_each(running, pki, stack)
    for client in clients.values():
        client.send(Request(Cmd.READ, 0, 512).pack())

    def reached() -> bool:
        return sum(len(link.requests) > 0 and link.end is None for link in fake.links) == 2

    fake.wait(reached, "the requests upstream")
    return clients


def all_drained(clients: dict[int, RawClient], slow: Slow) -> None:
    """What is in flight is answered, then the session ends in order."""
    slow.go_on.set()
    for client in clients.values():
        assert client.recv_exactly(16 + 512)[16:] == pattern(0, 512)
        assert client.recv_to_end() == b""
        assert client.ended == "close_notify"
        client.close()


def refused(running: Gateway) -> bool:
    try:
        RawClient(running.uri).close()
    except ConnectionRefusedError:
        return True
    return False


# ---------------------------------------------------------------- signals to the gateway


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_workers_drain(
    number: signal.Signals,
    pki: Path,
    crew: Start,
    stack: ExitStack,
    fake: FakeUpstream,
    slow: Slow,
    tmp_path: Path,
) -> None:
    path = tmp_path / "front"
    with crew("--listen", f"unix:{path}") as running:
        clients = busy_clients(running, pki, stack, fake)
        os.kill(running.pid, number)
        running.wait_log(f"INFO {number.name}: ending\n")
        for worker in (1, 2):
            running.wait_log(f"INFO worker {worker}: listeners closed, 1 sessions to end\n")
        assert refused(running)
        assert not path.exists()
        assert running.alive()
        all_drained(clients, slow)
        assert running.wait() == 0
    assert not warnings_in(running.log())
    assert running.log().count(" has ended\n") == 2
    assert [fake.wait_end(-index).end for index in (1, 2)] == ["disc", "disc"]


def test_second_signal_cuts_all(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    with crew() as running:
        clients = busy_clients(running, pki, stack, fake)
        running.terminate()
        for worker in (1, 2):
            running.wait_log(f"INFO worker {worker}: listeners closed, 1 sessions to end\n")
        running.terminate()
        for client in clients.values():
            assert client.recv_to_end() == b""
            client.close()
        running.exit_code = 1
        assert running.wait() == 1
    assert running.log().count("WARNING second signal: ending now\n") == 1
    assert running.log().count("has ended, sessions had to be cut\n") == 2
    assert running.log().count("WARNING sessions had to be cut\n") == 1


def test_drain_timeout_is_for_all(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    with crew("--drain-timeout", "0.2") as running:
        clients = busy_clients(running, pki, stack, fake)
        running.terminate()
        for client in clients.values():
            assert client.recv_to_end() == b""
            client.close()
        running.exit_code = 1
        assert running.wait() == 1


def test_one_worker_that_cuts_is_enough_for_exit_code_1(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    with crew("--drain-timeout", "0.2") as running:
        client = stack.enter_context(opened(running, pki))
        client.send(Request(Cmd.READ, 0, 512).pack())
        fake.wait(lambda: fake.links[-1].requests, "the request upstream")
        running.terminate()
        assert client.recv_to_end() == b""
        client.close()
        running.exit_code = 1
        assert running.wait() == 1
    assert running.log().count(" has ended, sessions had to be cut\n") == 1
    assert running.log().count(" has ended\n") == 1


GROUP = "import os; os.setsid()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_counts_once(
    number: signal.Signals, pki: Path, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    """Ctrl-C in a terminal; and systemd, which signals all processes of a service."""
    flags = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0", "--workers", "2")
    with Patched(GROUP, *flags) as running:
        wait_until(lambda: running.uris, "the gateway to start")
        client = stack.enter_context(RawClient(running.uris[0]))
        client.greet()
        client.start_tls(workers_rig.tls_context(pki))
        client.go()
        client.send(Request(Cmd.READ, 0, 512).pack())
        fake.wait(lambda: fake.links[-1].requests, "the request upstream")
        os.killpg(running.process.pid, number)
        running.wait_log(r"worker \d: listeners closed, 1 sessions to end\n")
        running.wait_log(r"worker \d \(process \d+\) has ended\n")  # the one that is idle
        all_drained({1: client}, slow)
        assert running.ends() == 0
        assert not warnings_in(running.log())


def test_second_ctrl_c_cuts(pki: Path, stack: ExitStack, fake: FakeUpstream, slow: Slow) -> None:
    flags = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0", "--workers", "2")
    with Patched(GROUP, *flags) as running:
        wait_until(lambda: running.uris, "the gateway to start")
        client = stack.enter_context(RawClient(running.uris[0]))
        client.greet()
        client.start_tls(workers_rig.tls_context(pki))
        client.go()
        client.send(Request(Cmd.READ, 0, 512).pack())
        fake.wait(lambda: fake.links[-1].requests, "the request upstream")
        os.killpg(running.process.pid, signal.SIGINT)
        running.wait_log(r"worker \d: listeners closed, 1 sessions to end\n")
        os.killpg(running.process.pid, signal.SIGINT)
        assert client.recv_to_end() == b""
        client.close()
        assert running.ends() == 1
        assert running.log().count("second signal: ending now") == 1


# ---------------------------------------------------------------- what ends before its time


def test_nobody_serves_on_without_the_supervisor(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    """However it went: its workers drain, and end."""
    with crew() as running:
        clients = busy_clients(running, pki, stack, fake)
        pids = list(running.pids.values())
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        for worker in (1, 2):
            running.wait_log(f"WARNING worker {worker}: the supervisor is gone: ending\n")
            running.wait_log(f"INFO worker {worker}: listeners closed, 1 sessions to end\n")
        assert refused(running)
        all_drained(clients, slow)
        wait_until(lambda: all(state(pid) in ("", "Z") for pid in pids), "the workers to end")
        running.exit_code = -signal.SIGKILL


def test_a_worker_that_dies_during_the_drain_is_not_replaced(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    """Its sessions were cut, and the exit code says so."""
    with crew() as running:
        clients = busy_clients(running, pki, stack, fake)
        running.terminate()
        for worker in (1, 2):
            running.wait_log(f"INFO worker {worker}: listeners closed, 1 sessions to end\n")
        os.kill(running.pids[1], signal.SIGKILL)
        running.wait_log(r"WARNING worker 1 \(process \d+\) died: SIGKILL\n")
        assert clients.pop(1).recv_to_end() == b""
        all_drained(clients, slow)
        running.exit_code = 1
        assert running.wait() == 1
        assert running.pids.keys() == {1, 2}


def test_a_worker_that_is_waited_for_is_not_started_any_more(
    pki: Path, crew: Start, stack: ExitStack, fake: FakeUpstream, slow: Slow
) -> None:
    with crew() as running:
        clients = busy_clients(running, pki, stack, fake)
        del clients[1]
        os.kill(running.pids[1], signal.SIGKILL)
        running.wait_worker(3)
        os.kill(running.pids[3], signal.SIGKILL)
        running.wait_log(r"worker 3 \(process \d+\) died: SIGKILL; the next one starts in 0.2 s\n")
        running.terminate()
        running.wait_log("INFO worker 2: listeners closed, 1 sessions to end\n")
        time.sleep(0.4)  # past the time at which it would have been
        all_drained(clients, slow)
        assert running.wait() == 0  # those deaths were before the end
        assert running.pids.keys() == {1, 2, 3}


def test_a_worker_that_does_not_end_is_killed(pki: Path, fake: FakeUpstream) -> None:
    flags = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0", "--workers", "2")
    patch = "import gateway.workers; gateway.workers._GRACE_S = 0.3"
    with Patched(patch, *flags, "--drain-timeout", "0.2") as running:
        wait_until(lambda: running.uris, "the gateway to start")
        pids = {int(number): int(pid) for number, pid in STARTED.findall(running.log())}
        os.kill(pids[1], signal.SIGSTOP)
        running.process.terminate()
        assert running.ends() == 1
        log = running.log()
    assert f"WARNING worker 1 (process {pids[1]}) does not end: killing it\n" in log
    assert f"WARNING worker 1 (process {pids[1]}) died: SIGKILL\n" in log
    assert f"INFO worker 2 (process {pids[2]}) has ended\n" in log
    assert not any(map(exists, pids.values()))


# ---------------------------------------------------------------- signals before it has begun

SIGNAL_AT = """
import os, signal
fork, calls = os.fork, 0
def signalling():
    global calls
    calls += 1
    supervisor = os.getpid()
    if calls == {call} and {when!r} == "before":
        os.kill(supervisor, signal.SIGTERM)
    pid = fork()
    if calls == {call} and {when!r} == ("child" if pid == 0 else "parent"):
        os.kill({whom}, signal.SIGTERM)
    return pid
os.fork = signalling
"""


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("when", ["before", "child", "parent"])
def test_signal_while_workers_start(call: int, when: str, pki: Path, fake: FakeUpstream) -> None:
    """None is lost: it ends in order, as if it had begun."""
    flags = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0", "--workers", "2")
    with Patched(SIGNAL_AT.format(call=call, when=when, whom="supervisor"), *flags) as running:
        assert running.ends() == 0
        assert "INFO SIGTERM: ending" in running.log()
        assert not warnings_in(running.log())
        assert running.uris == []
        pids = [int(pid) for _, pid in STARTED.findall(running.log())]
        assert not any(map(exists, pids))


@pytest.mark.parametrize("when", ["child", "parent"])
def test_signal_to_a_worker_that_starts(when: str, pki: Path, fake: FakeUpstream) -> None:
    """It waits until the worker can obey."""
    flags = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0", "--workers", "2")
    whom = "os.getpid()" if when == "child" else "pid"
    with Patched(SIGNAL_AT.format(call=1, when=when, whom=whom), *flags) as running:
        running.wait_log(r"INFO worker 1: SIGTERM: ending\n")
        running.wait_log(r"INFO worker 3 \(process \d+\) started\n")
        wait_until(lambda: running.uris, "the gateway to start")
        running.process.terminate()
        assert running.ends() == 0


# ---------------------------------------------------------------- listeners


def test_socket_file_is_the_supervisors(crew: Start, tmp_path: Path) -> None:
    """It outlives workers, whichever way they end, and serves those who come later."""
    path = tmp_path / "front"
    with crew("--listen", f"unix:{path}") as running:
        for number, end in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
            os.kill(running.pids[number], end)
            running.wait_worker(number + 2)
            assert path.is_socket()
        with RawClient(running.uris[1]) as client:
            client.greet()
    assert not path.exists()


@pytest.fixture
def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_sockets_of_systemd(
    listening: socket.socket,
    pki: Path,
    fake: FakeUpstream,
    stack: ExitStack,
) -> None:
    """They are handed to the supervisor, and served by all."""
    with listening:
        flags = ("--tls-dir", pki, "--socket", fake.path, "--listen", "systemd", "--workers", "2")
        with Activated([listening], *flags) as running:
            uri = running.uri()
            for _ in range(4):
                stack.enter_context(RawClient(uri)).greet()
            stack.close()
            running.process.terminate()
            code, out, err = running.ends()
        assert (code, out) == (0, "")
        assert err.count(" started\n") == 2
        # The queue is systemd's: who connects now waits for the next gateway.
        RawClient(uri).close()


@pytest.mark.parametrize(
    ("listen", "code"), [("unix:/nowhere/at/all", 1), ("a..b:0", 2), ("systemd", 1)]
)
def test_errors_come_before_workers(listen: str, code: int, pki: Path, fake: FakeUpstream) -> None:
    flags = ("--tls-dir", pki, "--socket", fake.path, "--workers", "2", "--listen", listen)
    with Patched("", *flags) as running:
        assert running.ends() == code
        assert running.uris == []
        assert " started" not in running.log()
        assert running.log().splitlines()[-1].startswith("nbd-gateway: error: ")


def test_a_file_that_is_missing(fake: FakeUpstream, tmp_path: Path) -> None:
    with Patched("", "--tls-dir", tmp_path, "--socket", fake.path, "--workers", "2") as running:
        assert running.ends() == 2
        assert " started" not in running.log()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nobody_reads_the_uris(workers: str, pki: Path, fake: FakeUpstream, tmp_path: Path) -> None:
    """It ends, as other programs do, without many words, and leaves nothing behind."""
    path = tmp_path / "front"
    reader, writer = os.pipe()
    os.close(reader)
    patch = f"import os; os.dup2({writer}, 1)"
    flags = ("--tls-dir", pki, "--socket", fake.path, "--listen", f"unix:{path}")
    with Patched(patch, *flags, "--workers", workers, pass_fds=(writer,)) as running:
        os.close(writer)
        assert running.ends() == 1
        assert not path.exists()
        pids = [int(pid) for _, pid in STARTED.findall(running.log())]
        wait_until(lambda: all(state(pid) in ("", "Z") for pid in pids), "the workers to end")
        assert "Traceback" not in running.log()
