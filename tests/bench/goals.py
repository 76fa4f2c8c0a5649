"""What the gateway is to reach, as ratios to nbdkit doing the same job in the same run."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.results import Results
from tests.bench.summary import Summary, cpu_ratio, ratio, value

YARDSTICKS = ("nbdkit", "nbdkit-trixie")
NEVER_BELOW = "qemu-nbd"
CPU_LIMIT = 1.0  # of the yardstick's, for each operation or GiB


@dataclass(frozen=True)
class Goal:
    """`at_least` and `aim` are ratios; `aim_value`, where it is given, is in the case's unit."""

    title: str
    cases: tuple[str, ...]
    at_least: float
    aim: float | None = None
    aim_value: float | None = None
    server: str = "gateway"


GOALS = (
    Goal("4 KiB read, depth 32", ("read-4k-d32",), 1.8, 2.2),
    Goal("4 KiB write, depth 32", ("write-4k-d32",), 1.6, 2.0),
    Goal("4 KiB read and write, depth 1", ("read-4k-d1", "write-4k-d1"), 1.0, 1.2),
    Goal("bulk read, one connection", ("read-256k", "read-64k", "copy-out"), 1.1, 1.25),
    Goal("bulk write, one connection", ("write-256k", "write-64k", "copy-in"), 1.0, 1.15),
    Goal(
        "4 connections, two workers, both cores",
        ("read-4k-d32-c4", "write-4k-d32-c4", "read-256k-c4", "write-256k-c4"),
        1.1,
        1.3,
        server="gateway-2w",
    ),
    Goal("handshakes per second", ("handshakes",), 1.0, 1.5),
    Goal("memory per idle client", ("idle-1000", "idle-100"), 4.0, aim_value=32.0),
)


@dataclass(frozen=True)
class Against:
    """One case of a goal beside one yardstick."""

    yardstick: str
    ratio: Summary | None
    cpu: Summary | None


@dataclass(frozen=True)
class Verdict:
    """How one case of a goal came out. `words` begins with "ok", "short", "failed" or "not"."""

    goal: Goal
    case: str
    against: tuple[Against, ...]
    words: str


def judge(results: Results) -> list[Verdict]:
    yardsticks = [name for name in YARDSTICKS if name in results.servers]
    return [_judge(results, goal, case, yardsticks) for goal in GOALS for case in goal.cases]


def _judge(results: Results, goal: Goal, name: str, yardsticks: list[str]) -> Verdict:
    case = results.case(name)
    if case is None or goal.server not in results.servers:
        return Verdict(goal, name, (), "not measured")
    against = tuple(
        Against(
            one,
            ratio(results, case, goal.server, one),
            cpu_ratio(results, case, goal.server, one),
        )
        for one in yardsticks
    )
    if results.failures(name, goal.server):
        return Verdict(goal, name, against, "failed")
    if all(one.ratio is None for one in against):
        return Verdict(goal, name, against, "not measured")
    if short := _shortcomings(goal, against):
        return Verdict(goal, name, against, f"short: {', '.join(short)}")
    ours = value(results, case, goal.server)
    assert ours is not None
    if goal.aim_value is not None:
        reached = ours.median <= goal.aim_value
    else:
        assert goal.aim is not None
        reached = all(one.ratio is None or one.ratio.median >= goal.aim for one in against)
    return Verdict(goal, name, against, "ok, aim reached" if reached else "ok")


def _shortcomings(goal: Goal, against: tuple[Against, ...]) -> list[str]:
    """In how far it is short of any of the yardsticks; by as many digits as are shown."""
    found = []
    ratios = [round(one.ratio.median, 2) for one in against if one.ratio is not None]
    if min(ratios) < goal.at_least:
        found.append(
            f"{goal.at_least - min(ratios):.2f} too slow" if goal.aim else "too much memory"
        )
    work = [round(one.cpu.median, 2) for one in against if one.cpu is not None]
    if work and max(work) > CPU_LIMIT:
        found.append(f"{max(work) - CPU_LIMIT:.2f} too much CPU")
    return found


def below_qemu(results: Results) -> list[str]:
    """The cases in which the gateway is below qemu-nbd, with the ratio: as it comes, with one
    worker, and with two where that was measured too."""
    found = []
    for case in results.cases:
        one, two = (ratio(results, case, name, NEVER_BELOW) for name in ("gateway", "gateway-2w"))
        if one is not None and round(one.median, 2) < 1:
            more = "" if two is None else f"; 2 workers {two.median:.2f}"
            found.append(f"{case.title} ({one.median:.2f}{more})")
    return found
