"""README's table of bounds, held to gateway.limits: each of them, with default and meaning."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from gateway.limits import Limits, option_name
from tests.support.gateway import ROOT

MARK = "<!-- limits -->"
HEAD = ["`--limit`", "default", "bounds", "why this much"]


class Row(NamedTuple):
    name: str
    default: str
    meaning: str
    reason: str


def rows() -> list[Row]:
    """The table between the marks."""
    parts = (ROOT / "README.md").read_text().split(MARK)
    assert len(parts) == 3, f"README has not two lines {MARK}"
    head, rule, *lines = [line for line in parts[1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert re.fullmatch(r"\|(-+\|)+", rule)
    assert cells.pop(0) == HEAD
    return [Row(*one) for one in cells]


def written(value: float, unit: str) -> str:
    """A value as the table has it: with its unit, and bytes in MiB."""
    if not value:
        return "none"
    if unit == "bytes":
        assert value % (1 << 20) == 0
        return f"{int(value) >> 20} MiB"
    return f"{value:g} {unit}"


def test_it_has_every_bound_in_order() -> None:
    assert [row.name for row in rows()] == [
        f"`{option_name(one.name)}`" for one in dataclasses.fields(Limits)
    ]


def test_defaults_and_meanings_are_those_of_the_program() -> None:
    for row, one in zip(rows(), dataclasses.fields(Limits), strict=True):
        assert row.default == written(one.default, one.metadata["unit"]), row
        off = " (0: no bound)" if one.metadata["off"] else ""
        assert row.meaning == one.metadata["meaning"] + off, row
        assert row.reason, row
