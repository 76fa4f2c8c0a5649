"""Every input that was ever kept, through its target, with all that the target looks at."""

from __future__ import annotations

import pytest

from tests.fuzz import findings
from tests.fuzz.findings import fault_of, inputs
from tests.fuzz.targets import TARGETS, target


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_passes(name: str) -> None:
    """What was recorded of real programs, and samples."""
    found = inputs(findings.CORPUS / name)
    assert found, "a target without a single input"
    _pass(name, found)


@pytest.mark.parametrize("name", TARGETS)
def test_findings_pass(name: str) -> None:
    """What was found once is not found again."""
    _pass(name, inputs(findings.FINDINGS / name))


def _pass(name: str, paths: list[findings.Path]) -> None:
    run = target(name)
    faults = [(path.name, fault_of(run, path.read_bytes())) for path in paths]
    wrong = [f"{name}: {fault.words}" for name, fault in faults if fault is not None]
    assert not wrong, "\n".join(wrong)


def test_corpus_is_small() -> None:
    """It is in the repository."""
    kept = [one.stat().st_size for one in findings.CORPUS.rglob("*") if one.is_file()]
    assert sum(kept) < 300 << 10


def test_every_folder_is_of_a_target() -> None:
    for folder in (findings.CORPUS, findings.FINDINGS):
        if folder.is_dir():
            assert {one.name for one in folder.iterdir()} <= TARGETS.keys()
