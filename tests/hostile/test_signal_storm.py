"""Signals by the hundred while clients are at work (CVE-2015-0847: unsafe handlers in nbd-server).

Reloads and signals that mean nothing cost nobody anything; SIGTERM ends it, however often it comes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.session import Session
from tests.support.fake_upstream import FakeUpstream, pattern
from tests.support.gateway import Gateway
from tests.support.rawclient import (
    TIMEOUT_S,
    Cmd,
    Err,
    PeerClosedError,
    RawClient,
    tls_context,
)

SIGNALS = 300
HARMLESS = (signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGWINCH, signal.SIGURG)
FAULTS = ("ERROR", "CRITICAL", "Traceback", "Exception ignored")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


class Load(threading.Thread):
    """A client that reads and writes until it is told to stop, or the gateway ends it."""

    def __init__(self, gateway: Gateway, pki: Path, number: int) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.written: list[bytes] = []  # acknowledged
        self.rounds = 0
        self.wrong: list[BaseException] = []
        self._number = number
        self._client = RawClient(gateway.uri)
        self._client.greet()
        self._client.start_tls(tls_context(pki))
        self._client.ask_structured()
        self._session = Session(self._client, self._client.go(), {})

    def run(self) -> None:
        with contextlib.closing(self._client):
            try:
                while not self.stop.is_set():
                    if not self._round():
                        break
            except (PeerClosedError, ConnectionError):
                pass
            except BaseException as error:  # the test that started it fails
                self.wrong.append(error)

    def _round(self) -> bool:
        stamp = f"client {self._number} round {self.rounds} ".encode() * 100
        answer = self._session.ask(Cmd.WRITE, 4096 * self._number, payload=stamp)
        if answer.error == 0:
            self.written.append(stamp)
        read = self._session.ask(Cmd.READ, 4093, 50_000)
        self.rounds += 1
        if Err.ESHUTDOWN in (answer.error, read.error):
            return False
        assert answer.error == read.error == 0
        assert read.data == pattern(4093, 50_000)
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_storm(pki: Path, fake: FakeUpstream, workers: int) -> None:
    flags = ("--drain-timeout", "5", "--workers", str(workers))
    where = ("--socket", fake.path, "--listen", "127.0.0.1:0")
    with Gateway("--tls-dir", pki, *where, *flags) as gateway:
        loads = [Load(gateway, pki, number) for number in range(4)]
        for load in loads:
            load.start()
        chance = random.Random(workers)
        for _ in range(SIGNALS):
            os.kill(gateway.pid, chance.choice(HARMLESS))
            time.sleep(0.001)  # its pace
        seen = [load.rounds for load in loads]
        deadline = time.monotonic() + TIMEOUT_S
        while not all(load.rounds > rounds for load, rounds in zip(loads, seen, strict=True)):
            assert time.monotonic() < deadline, "a client is stuck"
            assert all(load.is_alive() for load in loads), [load.wrong for load in loads]
            time.sleep(0.01)
        fresh = Load(gateway, pki, 5)
        assert fresh._round(), "a new client after the storm"
        fresh._client.close()

        begun = time.monotonic()
        for _ in range(50):  # a second one may cut; it never breaks
            with contextlib.suppress(ProcessLookupError):
                os.kill(gateway.pid, chance.choice([signal.SIGTERM, signal.SIGINT]))
        gateway.exit_code = gateway.wait()
        assert gateway.exit_code in (0, 1)
        assert time.monotonic() - begun < 10
        for load in loads:
            load.join(TIMEOUT_S)
            assert not load.is_alive()
            assert not load.wrong
        assert not any(word in gateway.log() for word in FAULTS), gateway.log()
    written = [one.payload for link in fake.links for one in link.requests if one.cmd == Cmd.WRITE]
    for load in loads:
        assert len(load.written) > 1
        assert set(load.written) <= set(written), "acknowledged, and not with the upstream"
