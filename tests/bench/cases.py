"""What is measured: the lines of the tables, and how each comes about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.bench import clients
from tests.bench.clients import BUSY_CLIENTS, IDLE_STEPS
from tests.bench.kinds import Kind
from tests.bench.processes import Failed
from tests.bench.results import Case, Sample
from tests.bench.servers import Stage, StageName

AT_A_TIME = 16  # handshakes under way
CROWD = 1000
FEW_ROUNDS = 3  # of what takes long and differs little from round to round


@dataclass(frozen=True)
class Probe:
    """One measurement of one server, which may fill several lines."""

    cases: tuple[Case, ...]
    stage: StageName
    measure: Callable[[Stage, Kind, float], dict[str, Sample]]
    rounds: int | None = None  # at most; None: as many as are asked for
    one_connection: bool = False  # which stays in one worker: no use in counting the others
    has_ceiling: bool = True  # whether the upstream alone can be measured in the same way

    def suits(self, kind: Kind) -> bool:
        if kind.direct:
            return self.has_ceiling
        return kind.workers == 1 or not self.one_connection


def _one(
    case: Case,
    stage: StageName,
    measure: Callable[[Stage, Kind, float], Sample],
    *,
    rounds: int | None = None,
    one_connection: bool = False,
    has_ceiling: bool = True,
) -> Probe:
    return Probe(
        (case,),
        stage,
        lambda at, kind, seconds: {case.name: measure(at, kind, seconds)},
        rounds,
        one_connection,
        has_ceiling,
    )


def _with(connections: int) -> str:
    return "" if connections == 1 else f", {connections} connections"


def _operations(way: str, depth: int, connections: int = 1) -> Probe:
    name = f"{way}-4k-d{depth}" + (f"-c{connections}" if connections > 1 else "")
    title = f"4 KiB random {way}, depth {depth}{_with(connections)}"
    measure = clients.operations(f"rand{way}", depth, connections)
    return _one(
        Case(name, title, "op/s", per="operation"),
        "data",
        measure,
        one_connection=connections == 1,
    )


def _bulk(way: str, block_kib: int, connections: int = 1, depth: int = 16) -> Probe:
    name = f"{way}-{block_kib}k" + (f"-c{connections}" if connections > 1 else "")
    title = f"{block_kib} KiB sequential {way}, depth {depth}{_with(connections)}"
    measure = clients.bulk(way, block_kib, depth, connections)
    return _one(
        Case(name, title, "MiB/s", per="GiB"), "data", measure, one_connection=connections == 1
    )


def _idle() -> Probe:
    cases = {
        count: Case(
            f"idle-{count}",
            f"memory per client, {count} idle" if count > 1 else "memory of 1 idle client",
            "KiB",
            "less",
        )
        for count in IDLE_STEPS
    }

    def measure(stage: Stage, kind: Kind, seconds: float) -> dict[str, Sample]:
        found = clients.idle_memory(stage, kind, seconds)
        return {cases[count].name: sample for count, sample in found.items()}

    return Probe(tuple(cases.values()), "clients", measure, FEW_ROUNDS, has_ceiling=False)


WAYS = ("read", "write")

PROBES: tuple[Probe, ...] = (
    *(_operations(way, depth) for depth in (1, 8, 32, 64) for way in WAYS),
    *(_bulk(way, block_kib) for block_kib in (64, 256) for way in WAYS),
    _one(
        Case("copy-out", "nbdcopy from the disk, one connection", "MiB/s", per="GiB"),
        "data",
        clients.copy_out,
        one_connection=True,
    ),
    _one(
        Case("copy-in", "nbdcopy to the disk, one connection", "MiB/s", per="GiB"),
        "data",
        clients.copy_in,
        one_connection=True,
    ),
    *(_operations(way, 32, connections) for connections in (4, 16) for way in WAYS),
    *(_bulk(way, 256, connections) for connections in (4, 16) for way in WAYS),
    _one(
        Case(
            "zeroes",
            f"64 MiB of zeroes by {clients.ZEROES_BLOCK // 1024} KiB, depth {clients.ZEROES_DEPTH}",
            "op/s",
            per="operation",
        ),
        "clients",
        clients.zeroes,
        one_connection=True,
    ),
    _one(
        Case("handshakes", f"handshakes, {AT_A_TIME} at a time", "1/s", per="operation"),
        "clients",
        clients.handshakes(AT_A_TIME),
    ),
    _one(
        Case("first-byte", "connect until the first 4 KiB are read", "ms", "less", "operation"),
        "clients",
        clients.first_byte,
        one_connection=True,
    ),
    _one(
        Case("crowd", f"{CROWD} clients at once, each doing a little", "s", "less", "operation"),
        "clients",
        clients.crowd(CROWD),
        rounds=FEW_ROUNDS,
    ),
    _idle(),
    _one(
        Case(f"busy-{BUSY_CLIENTS}", f"memory per client, {BUSY_CLIENTS} busy", "KiB", "less"),
        "clients",
        clients.busy_memory,
        rounds=FEW_ROUNDS,
        has_ceiling=False,
    ),
)

QUICK = ("read-4k-d32", "write-4k-d32", "read-4k-d1", "write-4k-d1", "read-256k", "write-256k")


def chosen(patterns: tuple[str, ...]) -> list[Probe]:
    """Those with a case that one of the patterns fits, all without patterns. Raises Failed."""
    if not patterns:
        return list(PROBES)
    names = [case.name for probe in PROBES for case in probe.cases]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise Failed(f"no case is called {pattern}; there are: {', '.join(names)}")
    return [
        probe
        for probe in PROBES
        if any(fnmatchcase(case.name, pattern) for case in probe.cases for pattern in patterns)
    ]
