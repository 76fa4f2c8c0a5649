"""`--workers N`: one gateway in several processes, that look like one from outside."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import workers_rig
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import ROOT, Output, environment, warnings_in
from tests.support.peers import wait_until
from tests.support.rawclient import GREETING, Opt, RawClient, Rep, client_hello, tls_context
from tests.workers_rig import (
    Start,
    descriptors,
    exists,
    is_up,
    leave,
    opened,
    read_works,
)

fake, crew, stack = workers_rig.fake, workers_rig.crew, workers_rig.stack


# ---------------------------------------------------------------- one gateway


def test_it_looks_like_one(pki: Path, crew: Start, stack: ExitStack, tmp_path: Path) -> None:
    """URIs once, each listener served by each worker, numbers of sessions unique."""
    path = tmp_path / "front"
    with crew("--listen", f"unix:{path}", "--listen", "[::1]:0") as running:
        assert set(running.pids) == {1, 2}
        assert all(is_up(pid) for pid in running.pids.values())
        assert "INFO 2 workers, 50 clients each at most" in running.log()
        for uri in running.uris:
            assert running.log().count(f"INFO listening on {uri}\n") == 1
            for _ in range(4):
                client = stack.enter_context(RawClient(uri))
                client.greet()
                client.start_tls(tls_context(pki))
                client.go()
                read_works(client)
        names = re.findall(r"INFO \[(\d+)\.(\d+)\] \S+: open: ", running.log())
        assert len(names) == len(set(names)) == 12
        assert {number for number, _ in names} == {"1", "2"}
        stack.close()
    assert running.stdout() == "".join(f"{uri}\n" for uri in running.uris)
    assert len(running.uris) == 3
    assert not path.exists()


@pytest.mark.parametrize("count", [4, 16])
def test_clients_that_come_one_by_one_are_spread(
    count: int, pki: Path, crew: Start, stack: ExitStack
) -> None:
    """As evenly as can be, if each worker looks at the queue within some milliseconds. On a machine
    with much else to do one may not, so this asks for less."""
    with crew() as running:
        clients = [stack.enter_context(opened(running, pki)) for _ in range(count)]
        _, least = running.spread(clients)
        assert least >= count // 4
        # Those who leave make room for those who come.
        first = running.worker_of(clients[0])
        for client in [one for one in clients if running.worker_of(one) == first]:
            leave(client)
            clients.remove(client)
        clients += [stack.enter_context(opened(running, pki)) for _ in range(count // 2)]
        _, least = running.spread(clients)
        assert least >= count // 4
        stack.close()


def test_clients_that_come_at_once_are_spread(pki: Path, crew: Start, stack: ExitStack) -> None:
    with crew() as running:
        clients: list[RawClient] = []
        gate = threading.Barrier(16)

        def connect() -> None:
            gate.wait()
            clients.append(opened(running, pki))

        threads = [threading.Thread(target=connect) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            stack.enter_context(client)
        most, least = running.spread(clients)
        assert most + least == 16
        assert least >= 4
        stack.close()


@pytest.mark.parametrize("workers", ["auto", "1"])
def test_auto_and_one(workers: str, crew: Start) -> None:
    """One for each core that this process may use; for one there is no second process."""
    cores = len(os.sched_getaffinity(0)) if workers == "auto" else 1
    with crew(workers=workers) as running:
        assert len(running.pids) == (cores if cores > 1 else 0)


def test_auto_is_what_the_process_may_use(pki: Path, fake: FakeUpstream) -> None:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})  # handed down
    try:
        flags = ("--socket", fake.path, "--listen", "127.0.0.1:0", "--workers", "auto")
        with workers_rig.Crew("--tls-dir", pki, *flags) as running:
            assert running.pids == {}
    finally:
        os.sched_setaffinity(0, mine)


# ---------------------------------------------------------------- limits are the gateway's


def is_waiting(client: RawClient) -> bool:
    """No greeting has come: it is in the listen queue."""
    client.sock.settimeout(0.3)
    try:
        return not client.sock.recv(1)
    except TimeoutError:
        return True
    finally:
        client.sock.settimeout(15)


def test_max_connections_is_for_all_workers(pki: Path, crew: Start, stack: ExitStack) -> None:
    with crew("--max-connections", "3") as running:
        assert "INFO 2 workers, 2 clients each at most" in running.log()
        clients = [stack.enter_context(opened(running, pki)) for _ in range(3)]
        fourth = stack.enter_context(RawClient(running.uri))
        assert is_waiting(fourth), "greeted beyond the limit"
        for leaving in clients:  # whichever worker it was with
            read_works(leaving)
            leave(leaving)
            fourth.greet()
            fourth.start_tls(tls_context(pki))
            fourth.go()
            read_works(fourth)
            fourth = stack.enter_context(RawClient(running.uri))
            assert is_waiting(fourth), "greeted beyond the limit"
        stack.close()


def test_silent_clients_make_room(pki: Path, crew: Start, stack: ExitStack) -> None:
    limit = ("--max-connections", "5", "--handshake-timeout", "600")
    with crew(*limit) as running:
        held = stack.enter_context(opened(running, pki))
        silent = [stack.enter_context(RawClient(running.uri)) for _ in range(10)]
        good = stack.enter_context(opened(running, pki))
        read_works(good)
        read_works(held)
        assert "others wait for its place" in running.log()
        for client in silent:
            client.close()
        stack.close()


def test_no_more_workers_than_clients(crew: Start, pki: Path, stack: ExitStack) -> None:
    with crew("--max-connections", "3", workers=50) as running:
        assert set(running.pids) == {1, 2, 3}
        assert "INFO 3 workers, 1 clients each at most" in running.log()
        clients = [stack.enter_context(opened(running, pki)) for _ in range(3)]
        assert running.spread(clients) == [1, 1, 1]
        stack.close()
    with crew("--max-connections", "1", workers=2) as running:
        assert running.pids == {}


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
os.execv(sys.executable, [sys.executable, "-m", "gateway", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("clients", "workers", "hard", "needed", "said"),
    [
        (10000, 1, 4096, 20064, "10000 clients need 20064 descriptors"),
        (10000, 2, 4096, 10064, "5000 clients in each of 2 workers need 10064 descriptors"),
        (1000, 1, 4096, 2064, ""),
        (1000, 2, 1064, 1064, ""),
    ],
)
def test_ten_thousand_clients_and_too_few_descriptors(
    clients: int,
    workers: int,
    hard: int,
    needed: int,
    said: str,
    pki: Path,
    fake: FakeUpstream,
) -> None:
    """What is needed, what is allowed and what to do is said once, at the start."""
    arguments = ["--tls-dir", str(pki), "--socket", str(fake.path), "--listen", "127.0.0.1:0"]
    arguments += ["--max-connections", str(clients), "--workers", str(workers)]
    out, err = Output(), Output()
    process = subprocess.Popen(
        [sys.executable, "-c", LIMITED.format(soft=256, hard=hard), *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=out.file,
        stderr=err.file,
    )
    try:
        wait_until(lambda: out.text().endswith("\n"), "the gateway to start")
        log = err.text()
        pids = [process.pid, *map(int, re.findall(r"\(process (\d+)\) started", log))]
        for pid in pids:
            limits = Path(f"/proc/{pid}/limits").read_text()
            (soft,) = re.findall(r"^Max open files +(\d+)", limits, re.MULTILINE)
            assert int(soft) == min(hard, needed)
        process.terminate()
        assert process.wait(30) == 0
        log = err.text()
    finally:
        process.kill()
        process.wait()
        out.close()
        err.close()
    remedy = (
        "and 4096 are allowed: raise LimitNOFILE= or ulimit -n, or lower --max-connections, or "
        "spread them over more --workers\n"
    )
    if said:
        assert log.count(f" WARNING {said}, {remedy}") == 1
    assert log.count("descriptors") == bool(said)


# ---------------------------------------------------------------- processes


def test_workers_hold_nothing_of_each_other(pki: Path, crew: Start, stack: ExitStack) -> None:
    """Beside what every gateway has, a worker holds one pipe: that of its orders."""
    with crew(workers=1) as alone:
        expected = descriptors(alone.pid)
    with crew(workers=3) as running:
        clients = [stack.enter_context(opened(running, pki)) for _ in range(6)]
        have = Counter(map(running.worker_of, clients))
        os.kill(running.pids[2], 9)
        running.wait_worker(4)
        for number in (1, 3, 4):
            found = descriptors(running.pids[number])
            found["socket"] -= 2 * have[number]  # a client and its upstream
            assert found - expected == {"pipe": 1}, number
            assert not expected - found, number
        supervisor = descriptors(running.pid)
        assert supervisor["pipe"] == 3
        assert supervisor["socket"] == 1
        assert supervisor["anon_inode"] == 0
        stack.close()


def test_a_worker_has_a_thread_and_no_more(pki: Path, crew: Start) -> None:
    """To fork from a process with threads is unsafe, and newer Pythons warn of it."""
    with crew() as running:
        for pid in (running.pid, *running.pids.values()):
            assert len(os.listdir(f"/proc/{pid}/task")) == 1
    assert "Warning" not in running.log()


def server_random(client: RawClient, pki: Path) -> bytes:
    """What the server adds to a TLS handshake: of its first answer, the 32 random bytes."""
    client.greet()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    client.send(client_hello(tls_context(pki)))
    record = client.recv_exactly(5 + 4 + 2 + 32)
    assert record[0] == 22
    assert record[5] == 2  # ServerHello
    return record[11:]


def test_workers_do_not_share_randomness(pki: Path, crew: Start) -> None:
    """The first handshakes of processes that were one a moment ago, and of one that came later."""
    assert ssl.OPENSSL_VERSION_INFO[0] >= 3  # earlier ones need a hand in each child
    with crew(workers=4) as running:

        def randoms() -> set[bytes]:
            with ExitStack() as stack:  # held, so that each worker gets some
                clients = [stack.enter_context(RawClient(running.uri)) for _ in range(40)]
                return {server_random(client, pki) for client in clients}

        def served() -> set[str]:
            return set(re.findall(r"INFO \[(\d+)\.", running.log()))

        first = randoms()
        wait_until(lambda: len(served()) == 4, "sessions in all workers")
        os.kill(running.pids[1], 9)
        running.wait_worker(5)
        second = randoms()
        wait_until(lambda: "5" in served(), "sessions in worker 5")
    assert len(first | second) == 80


def test_lines_of_the_log_are_whole(pki: Path, crew: Start, stack: ExitStack) -> None:
    """Four processes write to one file at once."""
    flags = ("--log-level", "debug", "--limit", "handshake-rate=0")
    with crew(*flags, workers=4) as running:

        def clients() -> None:
            for _ in range(60):
                with RawClient(running.uri) as client:
                    client.recv_exactly(GREETING.size)
                    client.send(b"garbage, and a good deal of it")
                    client.recv_to_end()

        threads = [threading.Thread(target=clients) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = running.log().splitlines()
    assert len([line for line in lines if ": closed: " in line]) == 240
    levels = "DEBUG|INFO|WARNING"  # the last one about root
    assert not warnings_in(running.log())
    for line in lines:
        assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} ({levels}) \S", line), line
        assert len(re.findall(rf" (?:{levels}) ", line)) == 1, line


def test_nothing_is_left(crew: Start) -> None:
    with crew(workers=3) as running:
        pids = [running.pid, *running.pids.values()]
        assert len(pids) == 4
    assert not any(map(exists, pids))
