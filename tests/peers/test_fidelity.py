"""What can be seen of an upstream is the same through the gateway as without it.

For each upstream of tests/interop/catalogue.py: what nbdinfo tells of it, what libnbd can negotiate
with it, the answers to every request that libnbd can send, legal or not, and the disk afterwards.
Where the view through the gateway is another, tests/interop/rules.py has to say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop import judge
from tests.interop.catalogue import NEWER, VARIANTS, Stage
from tests.interop.comparison import NewerTools, Tools
from tests.interop.examination import MODES, Case, Examination, Front
from tests.support.gateway import warnings_in
from tests.support.trixie import Trixie

SHOWN = 12  # differences, in one test


@pytest.fixture(scope="module")
def fronts(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Front]]:
    with contextlib.ExitStack() as stack:
        fronts = {}
        for mode, upgrades in MODES.items():
            fronts[mode] = Front(tmp_path_factory.mktemp("front"), pki, upgrades)
            stack.enter_context(fronts[mode].gateway)
        yield fronts


@pytest.fixture(
    scope="module",
    params=[*((name, False) for name in VARIANTS), *((name, True) for name in NEWER)],
    ids=lambda param: f"{param[0]}{'-libnbd-1.22' if param[1] else ''}",
)
def case(
    request: pytest.FixtureRequest,
    fronts: dict[str, Front],
    pki: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Case]:
    name, is_newer = request.param
    with contextlib.ExitStack() as stack:
        if is_newer:
            found: Trixie = request.getfixturevalue("newer")
            variant, tools = NEWER[name], NewerTools(found)
            stage = Stage(found.directory(), pki, stack, found)
        else:
            variant, tools = VARIANTS[name], Tools()
            stage = Stage(tmp_path_factory.mktemp("case"), pki, stack)
        yield Examination(variant, stage, tools).case(fronts)


def none_of(faults: list[str]) -> None:
    if faults:
        shown = "\n".join(faults[:SHOWN])
        pytest.fail(f"{len(faults)} differences that no rule explains:\n{shown}", pytrace=False)


def test_nbdinfo_tells_the_same(case: Case) -> None:
    for mode, direct in case.direct.items():
        seen = case.through[mode].nbdinfo
        none_of(judge.in_nbdinfo(direct.nbdinfo, seen, MODES[mode], options=case.options))


def test_options_have_the_same_answers(case: Case) -> None:
    for mode, way, direct, through in case.connections():
        none_of(judge.in_options(way, direct, through, MODES[mode]))


def test_requests_have_the_same_answers(case: Case) -> None:
    for mode, way, direct, through in case.connections():
        none_of(judge.in_requests(way, direct, through, MODES[mode]))


def test_disks_are_the_same_afterwards(case: Case) -> None:
    for mode, direct in case.direct.items():
        none_of(judge.in_disks(direct.disk, case.through[mode].disk))


def test_nothing_was_worth_a_warning(case: Case) -> None:
    assert not warnings_in(case.log)
    assert "ERROR" not in case.log
