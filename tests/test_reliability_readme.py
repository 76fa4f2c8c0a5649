"""README says what the kept figures say, and these are of whole runs that found nothing."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import figures
from tests.support.readme import README, Section


@pytest.fixture
def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(figures.KEPT.read_text())
    return found


def test_readme_has_what_was_kept(kept: dict[str, Any]) -> None:
    assert figures.SECTION.text == figures.section(kept)


def test_nothing_was_found_in_hours(kept: dict[str, Any]) -> None:
    assert figures.faults(kept) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: run["soak"].update(seconds=3599), "the soak took 3599 s of 3600"),
        (lambda run: run["soak"].update(losses=1), "the soak: 1 losses"),
        (lambda run: run["soak"].update(violations=["lost: sector 7"]), "the soak: lost: sector 7"),
        (lambda run: run["soak"].update(verified_bytes=0), "the soak: no verified_bytes"),
        (lambda run: run["fuzz"].update(seconds=60), "the fuzzing took 60 s of 3600"),
        (lambda run: run["fuzz"].update(findings=2), "the fuzzing: 2 findings"),
        (lambda run: run["fuzz"]["targets"][0].update(inputs=0, target="x"), "x had no inputs"),
        (lambda run: run["idle"]["steps"].pop(), "7500 idle clients of 10000"),
    ],
    ids=lambda one: one.replace(" ", "-") if isinstance(one, str) else "",
)
def test_other_figures_are_refused(
    kept: dict[str, Any], spoil: Callable[[dict[str, Any]], object], words: str
) -> None:
    spoilt = copy.deepcopy(kept)
    spoil(spoilt)
    assert figures.faults(spoilt) == [words]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("soak", None, "No such file or directory"),
        ("fuzz", "not JSON", "Expecting value"),
        ("idle", "{}", "'steps' is missing: one of these is another program's file"),
        ("soak", '{"samples": [], "violations": []}', "'seconds' is missing"),
    ],
    ids=["none", "no JSON", "another's", "half"],
)
def test_other_files_are_refused_in_words_and_nothing_is_written(
    kept: dict[str, Any], tmp_path: Path, file: str, text: str | None, words: str
) -> None:
    before = README.read_text(), figures.KEPT.read_text()
    kept["soak"]["samples"] = []
    for name, found in kept.items():
        (tmp_path / name).write_text(json.dumps(found))
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    argv = [f"--{name}={tmp_path / name}" for name in kept]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.reliability", *argv],
        cwd=README.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, "no traceback"
    assert (README.read_text(), figures.KEPT.read_text()) == before


def test_section_without_its_marks_is_not_written() -> None:
    before = README.read_text()
    with pytest.raises(ValueError, match="no <!-- nothing -->"):
        Section("nothing").write("words")
    assert README.read_text() == before


def test_growth_is_that_of_the_process_that_grew_most() -> None:
    def sample(pid: int, descriptors: int, rss_kib: int) -> dict[str, int]:
        return {"pid": pid, "descriptors": descriptors, "tasks": 9, "rss_kib": rss_kib}

    cold, warm = [sample(1, 5, 1024)] * 2, [sample(1, 9, 2048)] * 3
    other = [sample(2, 9, 1024)] * 5
    seldom = [sample(3, 9, 1024), sample(3, 30, 1 << 20)]
    life = [*cold, *warm, *other, *seldom, sample(1, 9, 5120), sample(2, 11, 1024)]
    words = "2 descriptors, 0 tasks and 3.0 MiB of memory more than when it was warm"
    assert figures._growth([life]) == words
