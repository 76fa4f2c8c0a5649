"""The fuzzer on bugs that were put there: each is seen by its target, and found by the engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.findings import HERE, fault_of, inputs, smaller
from tests.fuzz.planted import BUGS, plant
from tests.fuzz.targets import target
from tests.support.peers import missing

_BUGS = HERE / "bugs"  # an input for each, as the engine has found it


@pytest.mark.parametrize("name", BUGS)
def test_target_sees_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same input passes without the bug, and fails with it."""
    check, data = target(BUGS[name].target), (_BUGS / name).read_bytes()
    assert fault_of(check, data) is None
    plant(name, monkeypatch.setattr)
    assert fault_of(check, data) is not None


def test_no_input_is_for_no_bug() -> None:
    assert {one.name for one in inputs(_BUGS)} == BUGS.keys()


@pytest.mark.parametrize("name", ["told", "plaintext", "size"])
def test_engine_finds_bug(name: str, tmp_path: Path) -> None:
    """Within so many inputs, from a fixed seed; and keeps it with the way to see it again."""
    done = _fuzz(tmp_path, name, "--plant", name)
    assert done.returncode == 1, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    (found,) = figures["targets"]
    assert found["inputs"] <= 4000
    assert not found["failures"]
    for path in map(Path, found["findings"]):
        how = path.with_suffix(".txt").read_text()
        assert how.startswith(f"python -m tests.fuzz --target {BUGS[name].target} --replay {path}")
        assert fault_of(target(BUGS[name].target), path.read_bytes()) is None, "not of the bug"
    assert f"{found['inputs']}" in done.stdout


def test_engine_finds_nothing_where_nothing_is(tmp_path: Path) -> None:
    done = _fuzz(tmp_path, "size")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "figures").read_text())["targets"]
    assert found["inputs"] == 4000
    assert found["branches"] > 50, "the gateway is not instrumented"


def _fuzz(folder: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("atheris") is None:
        missing("atheris is not installed: a wheel for Linux on x86-64, Python 3.11 to 3.13")
    argv = ["--target", BUGS[name].target, "--runs", "4000", "--seconds", "60", "--seed", "1"]
    argv += ["--findings", str(folder / "found"), "--json", str(folder / "figures"), *flags]
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *argv],
        cwd=run.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_input_is_made_smaller() -> None:
    def check(data: bytes) -> None:
        assert b"x" not in data or b"y" not in data

    fault = fault_of(check, b"abcxdefghyij")
    assert fault is not None
    assert smaller(check, b"abcxdefghyij", fault.place) == b"xy"


def test_replay_says_whether_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"cn=vm1")
    argv = [sys.executable, "-m", "tests.fuzz", "--target", "rules", "--replay", str(path)]
    done = subprocess.run(argv, cwd=run.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{path}: passes\n")
