"""SIGTERM and SIGINT while clients stand in every phase of a session at once.

What has begun is finished and byte-exact, what has not is refused in words, upstreams get
NBD_CMD_DISC, and nothing is left: no process, no socket file, no complaint of the interpreter.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import open_phases, phases
from tests.hostile.open_phases import ALL, QUICK
from tests.hostile.phases import Phase
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import Gateway
from tests.support.peers import wait_until
from tests.workers_rig import STARTED, exists

TERM, INT = signal.SIGTERM, signal.SIGINT
PATIENT = ("--handshake-timeout", "60")  # a slow machine brings nobody to an end
CUT_S = 15.0  # a cut session may take some seconds for its last words, and the machine is slow
BEGUN = re.compile(r"listeners closed, \d+ sessions to end\n")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


class Scene:
    """A gateway, a client in each of these phases, and in the end nothing."""

    def __init__(self, gateway: Gateway, pki: Path, fake: FakeUpstream, workers: int) -> None:
        self.gateway, self.pki, self.fake, self.workers = gateway, pki, fake, workers
        self.phases: list[Phase] = []

    def enter(self, *kinds: type[Phase]) -> None:
        for kind in kinds:
            phase = kind(self.gateway.uri, self.pki, self.fake)
            self.phases.append(phase)
            phase.enter()
        self.children = {int(pid) for _, pid in STARTED.findall(self.gateway.log())}
        assert len(self.children) == (self.workers if self.workers > 1 else 0)

    def signal(self, *numbers: int) -> None:
        for number in numbers:
            os.kill(self.gateway.pid, number)

    def begun(self) -> None:
        """Each process has closed its listeners, and told its sessions."""
        wait_until(
            lambda: len(BEGUN.findall(self.gateway.log())) == self.workers, "the end to begin"
        )

    def ends(self, code: int) -> None:
        self.gateway.exit_code = code
        assert self.gateway.wait(CUT_S) == code, self.gateway.log()
        assert not any(map(exists, self.children))

    def close(self) -> None:
        for phase in self.phases:
            phase.close()


@contextlib.contextmanager
def scene(
    pki: Path,
    fake: FakeUpstream,
    folder: Path,
    *flags: str,
    workers: int = 1,
    development: bool = False,
) -> Iterator[Scene]:
    path = folder / "front"
    where = ("--listen", "127.0.0.1:0", "--listen", f"unix:{path}", "--workers", str(workers))
    common = ("--tls-dir", pki, "--socket", fake.path, *where, *flags)
    env = {"PYTHONDEVMODE": "1"} if development else {}
    with Gateway(*common, env=env) as gateway:
        assert path.is_socket()
        made = Scene(gateway, pki, fake, workers)
        with contextlib.closing(made):
            yield made
        assert not path.exists()
        assert not made.gateway.alive()


@pytest.mark.parametrize(("number", "workers"), [(TERM, 1), (INT, 1), (TERM, 2)])
def test_drain(pki: Path, fake: FakeUpstream, tmp_path: Path, number: int, workers: int) -> None:
    with scene(pki, fake, tmp_path, *PATIENT, workers=workers, development=True) as all_of_them:
        all_of_them.enter(*ALL)
        all_of_them.signal(number)
        all_of_them.begun()
        for phase in all_of_them.phases:
            phase.drained()
            phase.look_at_upstream(phase.upstream)
        all_of_them.ends(0)


@pytest.mark.parametrize(
    ("numbers", "workers"), [((TERM, INT), 1), ((INT, TERM), 1), ((TERM, INT), 2)]
)
def test_second_signal_at_once(
    pki: Path, fake: FakeUpstream, tmp_path: Path, numbers: tuple[int, ...], workers: int
) -> None:
    with scene(pki, fake, tmp_path, *PATIENT, workers=workers) as all_of_them:
        all_of_them.enter(*(ALL if workers > 1 else QUICK))
        all_of_them.signal(*numbers)
        for phase in all_of_them.phases:
            phase.cut()
            phase.look_at_upstream(phase.upstream_cut)
        all_of_them.ends(1)


def test_all_signals_after_the_second(pki: Path, fake: FakeUpstream, tmp_path: Path) -> None:
    """While sessions are cut, which takes a moment, no signal has its default effect."""
    with scene(pki, fake, tmp_path) as all_of_them:
        all_of_them.enter(open_phases.ReadInFlight)
        all_of_them.signal(TERM)
        all_of_them.begun()
        all_of_them.signal(TERM)
        all_of_them.gateway.wait_log("WARNING second signal: ending now\n")
        while all_of_them.gateway.alive():
            all_of_them.signal(TERM, INT, signal.SIGHUP)
            time.sleep(0.002)  # its pace
        all_of_them.ends(1)
        for phase in all_of_them.phases:
            phase.close()
            phase.look_at_upstream(phase.upstream_cut)
        assert all_of_them.gateway.log().count("second signal") == 1


# What nobody ends: each alone, since one is enough for exit code 1.
@pytest.mark.parametrize(
    "kind",
    [
        phases.Accepted,
        phases.UpstreamIsMute,
        open_phases.HalfPayload,
        open_phases.ReadInFlight,
        open_phases.BetweenChunks,
        open_phases.UnreadReply,
    ],
    ids=lambda kind: kind.__name__,
)
def test_drain_timeout(pki: Path, fake: FakeUpstream, tmp_path: Path, kind: type[Phase]) -> None:
    with scene(pki, fake, tmp_path, "--drain-timeout", "0.3") as alone:
        alone.enter(kind)
        alone.signal(TERM)
        (phase,) = alone.phases
        phase.cut()
        phase.look_at_upstream(phase.upstream_cut)
        alone.ends(1)
        assert "WARNING sessions had to be cut\n" in alone.gateway.log()


@pytest.mark.parametrize("kind", [open_phases.LostIdle, open_phases.LostInFlight])
def test_drain_without_an_upstream(
    pki: Path, fake: FakeUpstream, tmp_path: Path, kind: type[Phase]
) -> None:
    with scene(pki, fake, tmp_path, "--reconnect", "30") as alone:
        alone.enter(kind)
        alone.signal(TERM)
        alone.begun()
        (phase,) = alone.phases
        phase.drained()
        phase.look_at_upstream(phase.upstream)
        alone.ends(0)


def test_drain_timeout_without_an_upstream(pki: Path, fake: FakeUpstream, tmp_path: Path) -> None:
    flags = ("--reconnect", "30", "--drain-timeout", "0.3")
    with scene(pki, fake, tmp_path, *flags) as alone:
        alone.enter(open_phases.LostInFlight)
        alone.signal(TERM)
        alone.phases[0].cut()
        alone.ends(1)


def test_the_silent_end_by_their_own_deadline(
    pki: Path, fake: FakeUpstream, tmp_path: Path
) -> None:
    """Which is no cut: nobody was promised more."""
    kinds = (phases.Accepted, phases.HalfFlags, phases.BeforeHello, phases.HalfHello)
    with scene(pki, fake, tmp_path, "--handshake-timeout", "1") as silent:
        silent.enter(*kinds)
        silent.signal(TERM)
        for phase in silent.phases:
            phase.cut()
        silent.ends(0)
