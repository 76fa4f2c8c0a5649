"""Signals before the gateway serves and while it ends, at each step where one could do harm, and
signals to the commands that do not serve.

Each is sent by the process to itself, by lines that are put into it, so it comes exactly there.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.peers import wait_until
from tests.workers_rig import STARTED, Patched, exists

BOTH = ("SIGTERM", "SIGINT")
FAULT = re.compile(r" ERROR |Traceback|Exception ignored|Warning: |never awaited|Fatal")

# What is called before or after something else, once.
COMING = """
import os, signal
def then(after, owner, name, numbers):
    inner = getattr(owner, name)
    def signalling(*args, **flags):
        setattr(owner, name, inner)
        if not after:
            send(numbers)
        try:
            return inner(*args, **flags)
        finally:
            if after:
                send(numbers)
    setattr(owner, name, signalling)
def send(numbers):
    first, _, others = numbers.partition(" ")
    try:
        os.kill(os.getpid(), getattr(signal, first))
    finally:
        if others:
            send(others)
"""

# Before anything is there; between the making of the socket file and its owner's; before anybody
# listens to signals; while URIs are said.
STEPS = {
    "loading": "import gateway.trust as t; then(False, t.Snapshot, 'take', 'SIGHUP ' + {0!r})",
    "bound": "import gateway.listeners as l; then(False, l, '_inode', 'SIGHUP ' + {0!r})",
    "opened": "import gateway.listeners as l; then(True, l.Listeners, 'open', 'SIGHUP ' + {0!r})",
    "saying": "import click; then(False, click, 'echo', 'SIGHUP ' + {0!r})",
}

# At every step of the end, all signals that we know; from the last one on, by another process.
STORM = """
import atexit, trio
ALL = "SIGTERM SIGINT SIGHUP"
close, run = trio._signals.SignalReceiver._redeliver_remaining, trio.run
def closing(receiver):
    send(ALL)
    close(receiver)
    send(ALL)
def running(*args):
    try:
        return run(*args)
    finally:
        send(ALL)
def storm():
    gateway = os.getpid()
    if os.fork() == 0:
        while os.getppid() == gateway:
            os.kill(gateway, signal.SIGTERM)
            os.kill(gateway, signal.SIGINT)
            os.kill(gateway, signal.SIGHUP)
        os._exit(0)
trio._signals.SignalReceiver._redeliver_remaining, trio.run = closing, running
atexit.register(storm)
"""


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter complains of what is not closed."""
    monkeypatch.setenv("PYTHONWARNINGS", "always::ResourceWarning")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


def serving(pki: Path, fake: FakeUpstream, front: Path, workers: int) -> tuple[str | Path, ...]:
    return (
        *("--tls-dir", pki, "--socket", fake.path, "--workers", str(workers)),
        *("--listen", f"unix:{front}", "--listen", "127.0.0.1:0", "--drain-timeout", "5"),
    )


@pytest.mark.parametrize(
    ("step", "number", "workers"),
    [(step, "SIGTERM", 1) for step in STEPS]
    + [("loading", "SIGINT", 1), ("bound", "SIGINT", 1)]
    + [("loading", "SIGTERM", 2), ("bound", "SIGTERM", 2), ("opened", "SIGINT", 2)],
)
def test_start(
    pki: Path, fake: FakeUpstream, tmp_path: Path, step: str, number: str, workers: int
) -> None:
    """There is nothing to drain, so the exit code is 0. SIGHUP is a reload from the first."""
    front = tmp_path / "front"
    patch = COMING + STEPS[step].format(number)
    with Patched(patch, *serving(pki, fake, front, workers)) as gateway:
        assert gateway.ends() == 0, gateway.log()
        log = gateway.log()
        assert f"INFO {number}: ending" in log
        assert ("before anybody was served" in log) is (step == "loading")
        assert not FAULT.search(log), log
        assert len(gateway.uris) == (2 if workers == 1 and step != "loading" else 0)
        assert not any(exists(int(pid)) for _, pid in STARTED.findall(log))
    assert not front.exists()


def test_start_that_fails(pki: Path, fake: FakeUpstream, tmp_path: Path) -> None:
    """A signal that waits does not change what is said about it."""
    front = tmp_path / "front"
    front.touch()
    patch = COMING + STEPS["opened"].format("SIGTERM")
    with Patched(patch, *serving(pki, fake, front, 1)) as gateway:
        assert gateway.ends() == 1
        assert "error: cannot listen on unix:" in gateway.log()
        assert "Traceback" not in gateway.log()
    assert front.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_end(pki: Path, fake: FakeUpstream, tmp_path: Path, workers: int) -> None:
    front = tmp_path / "front"
    with Patched(COMING + STORM, *serving(pki, fake, front, workers)) as gateway:
        wait_until(lambda: len(gateway.uris) == 2, "the gateway to serve")
        gateway.process.terminate()
        assert gateway.ends() == 0, gateway.log()
        assert not FAULT.search(gateway.log()), gateway.log()
    assert not front.exists()


# ---------------------------------------------------------------- other commands


@pytest.mark.parametrize("numbers", ["SIGTERM SIGINT", "SIGINT SIGTERM"])
def test_check(pki: Path, fake: FakeUpstream, tmp_path: Path, numbers: str) -> None:
    """It has said nothing good or bad: neither 0 nor 1. The first signal counts, no other disturbs
    what it has begun."""
    patch = COMING + f"import gateway.check as c; then(False, c, 'check_rules', {numbers!r})"
    with Patched(patch, "check", *serving(pki, fake, tmp_path / "front", 1)) as check:
        assert check.ends() == 128 + signal.Signals[numbers.split()[0]]
        assert check.log() == ""


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize(
    ("step", "whole"),
    [
        ("import gateway.pki as p; then(True, p.CertificateAuthority, 'create', {!r})", False),
        ("import os as o; then(True, o, 'fchmod', {!r})", True),
    ],
    ids=["making keys", "writing"],
)
def test_certs(tmp_path: Path, step: str, whole: bool, number: str) -> None:
    """All files, or none."""
    folder = tmp_path / "tls"
    with Patched(COMING + step.format(number), "certs", "init", folder) as init:
        assert init.ends() == 128 + signal.Signals[number]
        assert init.log() == ""
    found = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not any(name.startswith(".") for name in found), found
    assert bool(found) is whole
    assert not whole or {"ca-cert.pem", "server-key.pem", "client-key.pem"} < found


@pytest.mark.parametrize("step", ["start", "end"])
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Its folder is gone, whatever comes, and however late."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    start = "import gateway.certs as c; then(True, c, 'init', 'SIGTERM SIGINT')"
    with Patched(COMING + (start if step == "start" else STORM), "demo") as demo:
        if step == "end":
            wait_until(lambda: "Ctrl-C removes everything" in demo.text(), "the demo")
            demo.process.send_signal(signal.SIGINT)
        assert demo.ends() == 0, demo.log()
        assert not FAULT.search(demo.log()), demo.log()
    assert list(tmp_path.iterdir()) == []
