"""What a soak makes of what it sees: which ends are excused, who has to answer, what is kept."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from tests.soak import faults, watching
from tests.soak.episode import Episode, Event
from tests.soak.soak import Soak
from tests.soak.tally import Tally
from tests.soak.watching import WatchedGateway
from tests.support.rawclient import PeerClosedError

# ---------------------------------------------------------------- told at once


def test_what_is_found_is_told_in_full_before_the_end(tmp_path: Path) -> None:
    out = io.StringIO()
    soak = Soak(1.0, 4711, out=out, findings=tmp_path / "findings")
    soak.folder.rmdir()
    soak.tally.history.note("server killed begins")
    soak.tally.violation("checker 7: sector 8 holds nothing", loss=True)
    told = (tmp_path / "findings").read_text()
    assert told.startswith("LOSS: ")
    for part in ("checker 7: sector 8 holds nothing", "seed 4711", "server killed begins"):
        assert part in told
        assert part in out.getvalue()
    soak.tally.violation("another thing")
    assert "VIOLATION: " in (tmp_path / "findings").read_text()


def test_the_gateways_last_words_are_told(tmp_path: Path) -> None:
    soak = Soak(1.0, 1, out=io.StringIO(), findings=tmp_path / "findings")
    soak.folder.rmdir()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    log = f"2020-01-01 00:00:00,000 INFO long ago\n{stamp},000 INFO [1.1] just now\n"
    fake = SimpleNamespace(log_bytes=len(log), log_from=lambda offset: log[offset:])
    soak._gateway = fake  # type: ignore[assignment]
    soak.tally.violation("x")
    told = (tmp_path / "findings").read_text()
    assert "INFO [1.1] just now" in told
    assert "long ago" not in told


# ---------------------------------------------------------------- excused or not


def episode(tally: Tally) -> Episode:
    nothing: Any = None
    return Episode(
        *(nothing, nothing, Path(), Path(), "nbdkit", tally, random.Random(1)),
        recorded=False,
        pictures=[],
    )


@pytest.mark.parametrize(
    ("error", "connected", "fault", "wrong"),
    [
        (PeerClosedError("fin"), False, "worker killed", False),
        (PeerClosedError("fin"), False, "server killed", False),
        (ConnectionResetError(), False, "worker killed", False),
        (PeerClosedError("fin"), False, "server frozen", True),
        (PeerClosedError("fin"), False, "", True),
        (PeerClosedError("fin"), True, "worker killed", True),  # while its data was looked at
        (RuntimeError("a bug"), False, "worker killed", True),
    ],
)
@pytest.mark.parametrize("expected", [False, True])
def test_a_client_that_does_not_get_in(
    error: Exception, connected: bool, fault: str, wrong: bool, expected: bool
) -> None:
    """A worker may be killed in the middle of a handshake; nothing else excuses it."""
    tally = Tally()
    place = episode(tally)
    if fault:
        place._events.append(Event(fault, time.monotonic()))

    def run() -> None:
        raise error

    checker = Mock(run=run, connected=connected)
    place._check(checker, expected)
    assert bool(tally.violations) == wrong
    assert sum(tally.excused.values()) == (not wrong)


# ---------------------------------------------------------------- faults


class Workers(WatchedGateway):
    """Workers 1 and 2, as processes 11 and 12, with a log that comes once SIGHUP is sent."""

    pid = 10

    def __init__(self, says: str, alive: list[int]) -> None:
        self._numbers, self._read_to = {}, 0
        self.text = "".join(f"x INFO worker {n} (process {n + 10}) started\n" for n in (1, 2))
        self.says, self.alive_later = says, alive
        self.now = [11, 12] if alive else []

    @property
    def log_bytes(self) -> int:
        return len(self.text)

    def log_from(self, offset: int) -> str:
        return self.text[offset:]

    def workers(self) -> list[int]:
        return self.now


@pytest.mark.parametrize(
    ("says", "alive", "answered"),
    [
        ("x INFO worker 1: reload: a\nx INFO worker 2: reload: b\n", [11, 12], True),
        ("x INFO worker 1: reload: a\nx INFO worker 1: reload: b\n", [11, 12], False),
        ("x INFO worker 1: reload: a\n", [11, 12], False),
        ("x INFO worker 1: reload: a\n", [11], True),  # the other one has died
        ("x INFO worker 1: reload: a\n", [11, 13], True),  # and who replaces it was not asked
        ("x ERROR worker 1: reload refused\nx INFO worker 2: reload: b\n", [11, 12], False),
        ("x INFO reload: a\n", [], True),
        ("x INFO SIGHUP: reloading\n", [], False),
    ],
)
def test_every_worker_has_to_answer_a_reload(
    says: str, alive: list[int], answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Workers(says, alive)

    def kill(*_: int) -> None:
        gateway.text += says
        gateway.now = alive

    def look(condition: Callable[[], object], *_: object) -> None:
        assert condition()

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(watching, "wait_until", look)
    if answered:
        gateway.reload()
    else:
        with pytest.raises(AssertionError):
            gateway.reload()


def test_nobody_stays_revoked_behind_a_fault_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next one finds a client that cannot enter, and blames the gateway."""
    revoked: list[tuple[str, ...]] = []

    def fails() -> None:
        raise AssertionError("no answer")

    bob = SimpleNamespace(connected=True, ended="")
    scene = SimpleNamespace(
        scene=SimpleNamespace(upstream=SimpleNamespace(lease=lambda: "a disk")),
        checker=lambda *_, **__: bob,
        start_checker=lambda _: SimpleNamespace(is_alive=lambda: True),
        gateway=SimpleNamespace(log_bytes=0, reload=fails),
        authority=SimpleNamespace(revoke=lambda *names: revoked.append(names)),
    )
    source = SimpleNamespace(random=lambda: 0.0)
    with pytest.raises(AssertionError, match="no answer"):
        faults.client_revoked(scene, source)  # type: ignore[arg-type]
    assert revoked == [("bob",), ()]
