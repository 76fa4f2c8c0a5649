"""README's formula of what clients can make the gateway hold, held to what a few of them do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.memory import KINDS, Kind, formula, measure

SLACK_MIB = 4.0  # what a process does not give back, whoever comes
COUNTS = {
    "handshake: half an option of 64 KiB": 50,
    "reads and writes, nobody takes anything": 16,
    "1024 requests, no answer": 16,
    "block status of a million extents": 4,
}


@pytest.mark.parametrize("kind", [one for one in KINDS if one.name in COUNTS], ids=lambda k: k.name)
def test_no_client_holds_more(kind: Kind, pki: Path, tmp_path: Path) -> None:
    count = COUNTS[kind.name]
    figures = measure(kind, count, pki, tmp_path)
    sizes = formula()
    each = sizes.handshake if kind.handshake else sizes.client + kind.more_mib
    assert figures.peak - figures.alone < count * each + SLACK_MIB
    assert figures.alone < 1.25 * sizes.program  # other Pythons are a little larger


def test_those_who_were_here_hold_nothing(pki: Path, tmp_path: Path) -> None:
    """The third crowd finds what the first did, but for the buffers that are kept."""
    kind = next(one for one in KINDS if one.name.startswith("reads and writes"))
    figures = measure(kind, 8, pki, tmp_path, rounds=3)
    sizes = formula()
    assert figures.peak - figures.alone < 8 * sizes.client + sizes.kept + SLACK_MIB
