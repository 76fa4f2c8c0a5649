"""README says what the kept figures say, and these are of whole runs that found nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.reliability import figures


@pytest.fixture
def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(figures.KEPT.read_text())
    return found


def test_readme_has_what_was_kept(kept: dict[str, Any]) -> None:
    between = figures.README.read_text().partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert between.strip() == figures.section(kept)


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


def test_growth_is_that_of_the_process_that_grew_most() -> None:
    def sample(pid: int, descriptors: int, rss_kib: int) -> dict[str, int]:
        return {"pid": pid, "descriptors": descriptors, "tasks": 9, "rss_kib": rss_kib}

    cold, warm = [sample(1, 5, 1024)] * 2, [sample(1, 9, 2048)] * 3
    other = [sample(2, 9, 1024)] * 5
    seldom = [sample(3, 9, 1024), sample(3, 30, 1 << 20)]
    life = [*cold, *warm, *other, *seldom, sample(1, 9, 5120), sample(2, 11, 1024)]
    words = "2 descriptors, 0 tasks and 3.0 MiB of memory more than when it was warm"
    assert figures._growth([life]) == words
