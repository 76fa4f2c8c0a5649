"""What long runs have counted: kept as JSON, put into words, and held to what they have to be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.bench.report import table
from tests.support.readme import Section

KEPT: Final = Path(__file__).with_name("kept.json")
SECTION: Final = Section("reliability")
AT_LEAST_S: Final = 3600
HELD_AT_LEAST: Final = 10_000
OFTEN: Final = 6  # a process that was looked at less often was not warm for long
ABORTS: Final = "server died by itself"  # of nbdkit only; of another, that is a violation

Figures = Mapping[str, Any]


def load(soak: Path, fuzz: Path, idle: Path) -> dict[str, Any]:
    """The three reports, without what nobody reads again. Raises OSError, ValueError, KeyError."""
    figures = {
        name: json.loads(path.read_text())
        for name, path in (("soak", soak), ("fuzz", fuzz), ("idle", idle))
    }
    del figures["soak"]["samples"]  # thousands, from its whole course
    return figures


def faults(figures: Figures) -> list[str]:
    """Why these figures are none to be shown. A part of a run, or one that has found something."""
    soak, fuzz, idle = figures["soak"], figures["fuzz"], figures["idle"]
    found = [
        f"{name} took {run['seconds']} s of {AT_LEAST_S}"
        for name, run in (("the soak", soak), ("the fuzzing", fuzz))
        if run["seconds"] < AT_LEAST_S
    ]
    found += [f"the soak: {one}" for one in soak["violations"]]
    if soak["losses"]:
        found.append(f"the soak: {soak['losses']} losses")
    for name in ("acknowledged_writes_checked", "verified_bytes", "sessions"):
        if not soak[name]:
            found.append(f"the soak: no {name}")
    if fuzz["findings"]:
        found.append(f"the fuzzing: {fuzz['findings']} findings")
    found += [
        f"the fuzzing: {one['target']}: {failure}"
        for one in fuzz["targets"]
        for failure in one["failures"]
    ]
    found += [f"{one['target']} had no inputs" for one in fuzz["targets"] if not one["inputs"]]
    if idle["steps"][-1]["clients"] < HELD_AT_LEAST:
        found.append(f"{idle['steps'][-1]['clients']} idle clients of {HELD_AT_LEAST}")
    return found


def section(figures: Figures) -> str:
    """What is between the marks in README."""
    soak, fuzz, idle = figures["soak"], figures["fuzz"], figures["idle"]
    injected = {name: count for name, count in soak["faults"].items() if name != ABORTS}
    rows = [
        ("what", "how much", "again with"),
        ("soak", _course(soak), f"`make soak SOAK_SECONDS={_round(soak['seconds'])}`"),
        ("clients", _clients(soak["clients"]), ""),
        ("faults injected", _counts(injected), ""),
        ("nbdkit 1.32 aborted under a killed gateway", f"{soak['faults'].get(ABORTS, 0)}", ""),
        ("sessions that went on with another server", f"{soak['sessions_resumed']}", ""),
        ("data read or written, and compared", f"{soak['verified_bytes'] / (1 << 30):.0f} GiB", ""),
        (
            "acknowledged writes looked for on the disk",
            f"{soak['acknowledged_writes_checked']}",
            "",
        ),
        ("flushes and FUA that told of a possible loss", f"{soak['losses_told']}", ""),
        ("**acknowledged writes lost untold**", f"**{soak['losses']}**", ""),
        ("held at the end, by one process", _growth(soak["quiet"]), ""),
        (
            "inputs fuzzed",
            f"{fuzz['inputs']}, of {len(fuzz['targets'])} kinds, in {_hours(fuzz['seconds'])}, "
            f"{fuzz['jobs']} at a time: {fuzz['findings']} findings",
            f"`make fuzz FUZZ_SECONDS={_round(fuzz['seconds'])} FUZZ_JOBS={fuzz['jobs']}`",
        ),
        ("clients held", _held(idle), "`make bench-idle`"),
    ]
    versions = f"{soak['machine']}; fuzzing with Python {fuzz['python']}."
    return f"{versions}\n\n{table(rows)}"


def write(figures: Figures) -> None:
    """Into the file that is kept, and into README."""
    SECTION.write(section(figures))
    KEPT.write_text(json.dumps(figures, indent=1) + "\n")


# ---------------------------------------------------------------- words


def _round(seconds: float) -> int:
    """As it was asked for: a run goes on until the last client is through."""
    return int(seconds // 60 * 60)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours"


def _course(soak: Figures) -> str:
    lives = len(soak["quiet"])
    return (
        f"{_hours(soak['seconds'])}, {lives} gateways with one worker and two in turn, "
        f"{soak['sessions']} sessions in front of {'; '.join(soak['episodes'])}"
    )


def _clients(clients: Figures) -> str:
    ends = {name: sum(kinds.values()) for name, kinds in clients.items()}
    kinds = sorted({kind for one in clients.values() for kind in one})
    return (
        f"{sum(ends.values())} ({', '.join(kinds)}): {ends['ok']} ran to their end, "
        f"{ends['killed']} were killed, {ends['failed for a reason']} met a fault and failed"
    )


def _counts(counts: Mapping[str, int]) -> str:
    most_first = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return f"{sum(counts.values())}: " + ", ".join(f"{name} {count}" for name, count in most_first)


def _growth(lives: Iterable[Iterable[Figures]]) -> str:
    """Of each process that was looked at often, between the first third and the end: the most."""
    more = {"descriptors": 0, "tasks": 0, "rss_kib": 0}
    for life in lives:
        by_process: dict[int, list[Figures]] = {}
        for sample in life:
            by_process.setdefault(sample["pid"], []).append(sample)
        for looks in by_process.values():
            if len(looks) >= OFTEN:
                warm, last = looks[len(looks) // 3], looks[-1]
                more = {name: max(most, last[name] - warm[name]) for name, most in more.items()}
    return (
        f"{more['descriptors']} descriptors, {more['tasks']} tasks and "
        f"{more['rss_kib'] / 1024:.1f} MiB of memory more than when it was warm"
    )


def _held(idle: Figures) -> str:
    last = idle["steps"][-1]
    return (
        f"{last['clients']} idle, with {idle['workers']} workers, in {last['mib']:.0f} MiB; one "
        f"more was served in {last['one_more_s'] * 1000:.0f} ms"
    )
