"""A short soak, and soaks of gateways that are not as they should be."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import soak as soaking
from tests.soak import watching
from tests.soak.soak import SLACK_OBJECTS, SLACK_RSS_KIB, Soak
from tests.soak.watching import Sample
from tests.support.gateway import ROOT, environment

pytestmark = pytest.mark.peers


def test_a_short_soak(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.soak", "--seconds", "4", "--seed", "1"]
    done = subprocess.run(
        [*command, "--json", str(report)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())
    assert told["violations"] == []
    assert told["losses"] == 0
    assert told["seed"] == 1
    assert sum(told["clients"]["ok"].values()) > 3
    assert told["acknowledged_writes_checked"] > 1000
    assert told["verified_bytes"] > 10 << 20
    assert sum(told["faults"].values()) > 1
    # One gateway as one process, and one with two workers; each was quiet in the end.
    assert len(told["quiet"]) == 2
    assert {one["tasks"] > 0 for one in told["quiet"][1]} == {False, True}
    assert "| losses | 0 |" in done.stdout


def test_a_gateway_that_leaks_and_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sabotage = (
        "import gateway.session as session, logging\n"
        "real = session.Session._log_end\n"
        "def leaking(self, *args):\n"
        "    real(self, *args)\n"
        "    os.dup(2)\n"
        "    logging.getLogger('gateway').error('something is wrong')\n"
        "session.Session._log_end = leaking\n"
    )
    monkeypatch.setattr(watching, "_COUNTER", watching._COUNTER + sabotage)
    monkeypatch.setattr(soaking, "_TELL_S", 0.5)
    figures: list[str] = []  # as they are told while it runs
    soak = Soak(
        *(1.0, 1),
        out=io.StringIO(),
        lives=1,
        quiet_s=0.3,
        each_minute=lambda: figures.append(json.dumps(soak.report())),
    )
    assert not soak.run()
    assert json.loads(figures[0])["seed"] == 1
    assert "ERROR something is wrong" in (soak.folder / "findings").read_text()
    words = "\n".join(soak.tally.violations)
    assert "not quiet" in words
    assert "the gateway's end" in words
    assert "ERROR something is wrong" in words
    assert (soak.folder / "gateway-0.log").exists()  # what is left is kept
    shutil.rmtree(soak.folder)


@pytest.mark.parametrize(
    ("kib", "objects", "grows"),
    [
        (0, 0, False),
        (SLACK_RSS_KIB, SLACK_OBJECTS, False),
        (SLACK_RSS_KIB + 1, 0, True),
        (0, SLACK_OBJECTS + 1, True),
    ],
)
def test_memory_that_grows(kib: int, objects: int, grows: bool, tmp_path: Path) -> None:
    soak = Soak(1.0, 1, out=io.StringIO(), findings=tmp_path / "findings")
    soak.folder.rmdir()
    # While it is getting warm it may take what it likes.
    quiet = [Sample(n, 7, 9, 1000 * n, 1, 8, 40_000 * n) for n in range(3)]
    quiet += [
        Sample(3 + n, 7, 9, 2000 + kib * n // 6, 1, 8, 80_000 + objects * n // 6) for n in range(7)
    ]
    soak._judge_memory(quiet)
    assert bool(soak.tally.violations) == grows
