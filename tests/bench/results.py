"""What a run leaves behind: cases, samples, facts; and the file of JSON that holds them all."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FORMAT = 1  # of the file


@dataclass(frozen=True)
class Case:
    """One line of the tables."""

    name: str  # for --only
    title: str
    unit: str
    better: Literal["more", "less"] = "more"
    per: str = ""  # what the CPU seconds are counted by: "operation", "GiB"; empty: not at all


@dataclass(frozen=True)
class Sample:
    """One measurement of one server."""

    value: float  # in the case's unit
    cpu_s: float | None = None  # of the server's processes, for each of what the case says
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A sample in its place, or why there is none.

    `others` is what share of the machine's CPU time other programs took meanwhile, 0 to 1.
    """

    case: str
    server: str
    round: int
    sample: Sample | None
    failed: str = ""
    others: float = 0.0


@dataclass
class Results:
    """A whole run. `servers`: name to title, command line, and what TLS was negotiated."""

    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # server to reason
    cases: list[Case] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def case(self, name: str) -> Case | None:
        return next((case for case in self.cases if case.name == name), None)

    def samples(self, case: str, server: str) -> dict[int, Sample]:
        """By round."""
        return {
            record.round: record.sample
            for record in self.records
            if record.case == case and record.server == server and record.sample is not None
        }

    def failures(self, case: str, server: str) -> list[str]:
        return [
            record.failed
            for record in self.records
            if record.case == case and record.server == server and record.sample is None
        ]

    def title(self, server: str) -> str:
        return str(self.servers[server]["title"])

    def dump(self, path: Path) -> None:
        words = {"format": FORMAT, **dataclasses.asdict(self)}
        path.write_text(json.dumps(words, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises OSError, and ValueError for what is no such file."""
        words = json.loads(path.read_text())
        if not isinstance(words, dict) or words.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a file of this bench, or of another version of it")
        words["cases"] = [Case(**case) for case in words["cases"]]
        words["records"] = [
            Record(**{**one, "sample": Sample(**one["sample"]) if one["sample"] else None})
            for one in words["records"]
        ]
        return cls(**words)
