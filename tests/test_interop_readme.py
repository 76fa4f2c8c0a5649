"""README has the table of clients and servers of tests/interop/matrix.py, and nothing failed."""

from __future__ import annotations

import re

import pytest

from tests.interop.clients import PROGRAMS
from tests.interop.matrix import ADDED, CORNER, FAILED, SECTION, UPSTREAMS, title
from tests.interop.rules import UPGRADES

VERSION = re.compile(r" \d+\.\d+(\.\d+)?")


@pytest.fixture(scope="module")
def table() -> list[list[str]]:
    """Its cells, without the line under the head."""
    lines = [line for line in SECTION.text.splitlines() if line]
    assert lines, "empty: make interop-matrix fills it"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rows.pop(1)) == {"---"}
    assert {len(row) for row in rows} == {len(UPSTREAMS) + 1}
    return rows


def without_version(cell: str) -> str:
    without, count = VERSION.subn("", cell)
    assert count == 1, f"{cell!r} names no version"
    return without


def test_every_upstream_is_a_column_and_no_other(table: list[list[str]]) -> None:
    corner, *columns = table[0]
    assert corner == CORNER
    assert list(map(without_version, columns)) == [title(one, "") for one in UPSTREAMS]


def test_every_client_is_a_row_and_no_other(table: list[list[str]]) -> None:
    rows = [row[0] for row in table[1:-1]]
    assert list(map(without_version, rows)) == [title(one, "") for one in PROGRAMS]


def test_newer_programs_are_newer(table: list[list[str]]) -> None:
    """The same program twice: the second one is that of the later Debian."""
    for names in (table[0][1:], [row[0] for row in table[1:-1]]):
        found: dict[str, list[tuple[int, ...]]] = {}
        for name in names:
            numbers = tuple(map(int, VERSION.search(name)[0].strip().split(".")))  # type: ignore[index]
            found.setdefault(name.split()[0], []).append(numbers)
        for program, versions in found.items():
            assert versions == sorted(versions), program


def test_no_cell_has_failed(table: list[list[str]]) -> None:
    for row in table[1:-1]:
        for column, cell in zip(table[0][1:], row[1:], strict=True):
            assert FAILED not in cell, f"{row[0]} in front of {column}: {cell}"
            assert cell.startswith("ok, ")


def test_all_upgrades_and_all_kinds_of_replies_are_among_them(table: list[list[str]]) -> None:
    label, *added = table[-1]
    assert label == ADDED
    assert {name for cell in added for name in re.findall(r"`(.+?)`", cell)} == set(UPGRADES)
    words = {cell.removeprefix("ok, ") for row in table[1:-1] for cell in row[1:]}
    assert {"extended", "structured", "simple→structured"} <= words
