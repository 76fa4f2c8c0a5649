"""From samples to figures: medians with their spread, and ratios taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from tests.bench.results import Case, Results


@dataclass(frozen=True)
class Summary:
    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary | None:
        """None if there are no values."""
        found = sorted(values)
        if not found:
            return None
        return cls(statistics.median(found), found[0], found[-1], len(found))

    def times(self, factor: float) -> Summary:
        return Summary(self.median * factor, self.low * factor, self.high * factor, self.count)


def value(results: Results, case: Case, server: str) -> Summary | None:
    """In the case's unit."""
    return Summary.of(one.value for one in results.samples(case.name, server).values())


def cpu(results: Results, case: Case, server: str) -> Summary | None:
    """CPU seconds of the server for each operation or GiB."""
    found = (one.cpu_s for one in results.samples(case.name, server).values())
    return Summary.of(one for one in found if one is not None)


def ratio(results: Results, case: Case, server: str, to: str) -> Summary | None:
    """How many times as good as `to`: above 1 is better, whichever way the case counts.

    Of each round in which both were measured, one shortly after the other; so what slows the whole
    machine down for a while slows both.
    """
    ours, theirs = results.samples(case.name, server), results.samples(case.name, to)
    pairs = [(ours[number].value, theirs[number].value) for number in ours if number in theirs]
    if case.better == "less":
        pairs = [(them, us) for us, them in pairs]
    return Summary.of(above / below for above, below in pairs if below)


def cpu_ratio(results: Results, case: Case, server: str, to: str) -> Summary | None:
    """CPU for each operation or GiB, `to` = 1: below 1 is less CPU for the same work."""
    ours, theirs = results.samples(case.name, server), results.samples(case.name, to)
    pairs = [(ours[number].cpu_s, theirs[number].cpu_s) for number in ours if number in theirs]
    return Summary.of(us / them for us, them in pairs if us is not None and them)
