"""Reload of the command itself: SIGHUP, the timer, workers, and a hundred clients under load."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import workers_rig
from tests.support.fake_upstream import FakeUpstream, simple
from tests.support.gateway import Gateway
from tests.support.peers import wait_until
from tests.support.rawclient import (
    SIMPLE,
    Cmd,
    PeerClosedError,
    RawClient,
    Request,
    tls_context,
)
from tests.test_reload import Folder
from tests.workers_rig import Crew, leave, opened, read_works

fake, stack = workers_rig.fake, workers_rig.stack

CLIENTS = 100


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "tls")


def flags(folder: Folder, fake: FakeUpstream) -> tuple[str | Path, ...]:
    common = ("--tls-dir", folder.path, "--socket", fake.path, "--listen", "127.0.0.1:0")
    return (*common, "--handshake-timeout", "60")


class Load:
    """Clients that read and write all the time, each in a thread of its own; none may ever fail."""

    def __init__(self, clients: list[RawClient]) -> None:
        self._stop = threading.Event()
        self.done = [0] * len(clients)
        self.failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._read, args=(index, client), daemon=True)
            for index, client in enumerate(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, index: int, client: RawClient) -> None:
        try:
            while not self._stop.is_set():
                read_works(client, 512 * (1 + self.done[index] % 8))
                client.send(Request(Cmd.WRITE, 0, 512, cookie=9, payload=bytes(512)).pack())
                assert client.recv_exactly(SIMPLE.size) == simple(9)
                self.done[index] += 1
        except BaseException as error:
            self.failures.append(error)

    def go_on(self) -> None:
        """Until each client has had some more answers."""
        goal = [count + 2 for count in self.done]
        wait_until(
            lambda: self.failures or all(map(int.__le__, goal, self.done)),
            "answers for every client",
            60,
        )
        assert not self.failures

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not self.failures


@pytest.mark.parametrize("workers", [1, 2])
def test_nobody_under_load_notices(
    workers: int, folder: Folder, fake: FakeUpstream, stack: ExitStack
) -> None:
    """New certificate, CRL and rules, another client revoked: a hundred others go on."""
    alice, bob = folder.client("alice"), folder.client("bob")
    gateway = Gateway if workers == 1 else Crew
    rules = folder.path.parent / "rules.toml"
    rules.write_text('allow = ["cn=alice", "cn=bob"]\n')
    more = ("--workers", str(workers), "--max-connections", "120", "--config", str(rules))
    more += ("--limit", "clients-per-identity=0")
    with gateway(*flags(folder, fake), *more, "--reload-interval", "0") as running:
        clients = [stack.enter_context(opened(running, alice)) for _ in range(CLIENTS)]
        revoked = [stack.enter_context(opened(running, bob)) for _ in range(4)]
        load = Load(clients)
        load.go_on()
        for count in range(1, 6):
            folder.server()
            if count == 2:
                rules.write_text('allow = ["cn=alice", "cn=bob"]\ndeny = ["cn=carol"]\n')
            if count == 3:
                folder.crl(folder.credential(bob))
            os.kill(running.pid, signal.SIGHUP)
            wait_until(
                lambda count=count: _count(running) == count * workers,  # type: ignore[misc]
                f"reload {count}",
                60,
            )
            load.go_on()
        for client in revoked:
            client.recv_to_end()
            client.close()
        cut = "closed: client no longer allowed (revoked: CN=bob"
        wait_until(lambda: running.log().count(cut) == 4, "four to be cut")
        load.stop()
        assert running.log().count("closed: ") == 4
        for client in clients:
            leave(client)
        stack.close()


def _count(running: Gateway) -> int:
    return running.log().count("reload: now in use: ")


def _open(client: RawClient, folder: Path) -> None:
    client.start_tls(tls_context(folder))
    client.go()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_timer(workers: int, folder: Folder, fake: FakeUpstream, stack: ExitStack) -> None:
    gateway = Gateway if workers == 1 else Crew
    more = ("--workers", str(workers), "--reload-interval", "0.1")
    bob = folder.client("bob")
    with gateway(*flags(folder, fake), *more) as running:
        clients = [stack.enter_context(opened(running, bob)) for _ in range(3)]
        folder.crl(folder.credential(bob))
        wait_until(lambda: _count(running) == workers, "all to reload")
        for client in clients:
            client.recv_to_end()
        stack.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_during_the_drain(
    workers: int, folder: Folder, fake: FakeUpstream, stack: ExitStack
) -> None:
    gateway = Gateway if workers == 1 else Crew
    alice = folder.client("alice")
    slow = fake.script = workers_rig.Slow()
    try:
        with gateway(*flags(folder, fake), "--workers", str(workers)) as running:
            client = stack.enter_context(opened(running, alice))
            client.send(workers_rig.Request(workers_rig.Cmd.READ, 0, 512, cookie=1).pack())
            running.terminate()
            running.wait_log("listeners closed, 1 sessions to end")
            for _ in range(5):
                os.kill(running.pid, signal.SIGHUP)
            running.wait_log("reload: the files and rules are those in use")
            slow.go_on.set()
            client.recv_exactly(16 + 512)
            client.recv_to_end()
            assert running.wait() == 0
            stack.close()
    finally:
        slow.go_on.set()


def test_hangup_of_a_whole_process_group(
    folder: Folder, fake: FakeUpstream, stack: ExitStack
) -> None:
    """A worker that gets SIGHUP itself does not mind it: the order comes from the supervisor."""
    with Crew(*flags(folder, fake), "--workers", "2") as running:
        alice = folder.client("alice")
        client = stack.enter_context(opened(running, alice))
        for pid in (*running.pids.values(), running.pid):
            os.kill(pid, signal.SIGHUP)
        running.wait_log("worker 2: reload: the files and rules are those in use")
        read_works(client)
        assert len(running.pids) == 2
        leave(client)


def test_bad_set(folder: Folder, fake: FakeUpstream, stack: ExitStack) -> None:
    alice = folder.client("alice")
    with Gateway(*flags(folder, fake), faults_allowed=True) as running:
        client = stack.enter_context(opened(running, alice))
        folder.put("server-key.pem", b"no key")
        os.kill(running.pid, signal.SIGHUP)
        running.wait_log(r"ERROR reload refused, .*: --key: .*/server-key\.pem is no usable PEM")
        read_works(client)
        leave(client)
        stack.enter_context(opened(running, alice))
        stack.close()


def test_new_worker_does_not_bring_the_set_of_the_start_back(
    folder: Folder, fake: FakeUpstream, stack: ExitStack
) -> None:
    """Bob was revoked since then. With files that cannot be used nobody enters by a new worker,
    until they can."""
    alice, bob = folder.client("alice"), folder.client("bob")
    more = ("--workers", "2", "--reload-interval", "0.1")
    with Crew(*flags(folder, fake), *more, faults_allowed=True) as running:
        folder.crl(folder.credential(bob))
        wait_until(lambda: _count(running) == 2, "both to reload")
        crl = (folder.path / "ca-crl.pem").read_bytes()
        folder.put("ca-crl.pem", b"")
        for number in (1, 2):
            os.kill(running.pids[number], signal.SIGKILL)
        for number in (3, 4):
            running.wait_log(f"worker {number}: the files cannot be used, and nobody enters here")
        folder.put("ca-crl.pem", crl)
        for number in (3, 4):
            running.wait_worker(number)
        stack.enter_context(opened(running, alice))
        client = stack.enter_context(RawClient(running.uri))
        client.greet()
        with pytest.raises(PeerClosedError, match="REVOKED"):
            _open(client, bob)
        stack.close()


def test_new_worker_that_waits_for_files_ends_when_it_is_told(
    folder: Folder, fake: FakeUpstream
) -> None:
    with Crew(
        *flags(folder, fake), "--reload-interval", "0.1", "--workers", "2", faults_allowed=True
    ) as running:
        folder.crl()
        folder.server()
        wait_until(lambda: _count(running) >= 2, "both to reload")
        folder.put("ca-crl.pem", b"")
        os.kill(running.pids[1], signal.SIGKILL)
        running.wait_log("worker 3: the files cannot be used, and nobody enters here")
        running.terminate()
        assert running.wait() == 0
