"""`make bench` and `make bench-quick`: measures, and writes tables, a file of JSON and plots.

    python -m tests.bench                                  all, in about 20 minutes
    python -m tests.bench --only 'read-4k-*' --rounds 3    some of it
    python -m tests.bench --quick                          the gateway beside nbdkit, 2 minutes
    python -m tests.bench --beside ../other                another checkout's gateway too

Nothing here is a test. Figures mean little unless the machine has nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench import facts, report
from tests.bench.cases import QUICK, Probe, chosen
from tests.bench.kinds import KINDS, ROOT, Kind, gateway
from tests.bench.processes import Failed, Machine
from tests.bench.results import Record, Results
from tests.bench.servers import Stages, negotiated

PROGRAMS = ("fio", "nbdkit", "nbdcopy", "nbdinfo")
QUICK_SERVERS = ("gateway", "nbdkit")
DESCRIPTORS = 8192  # a server with 1000 clients has two connections for each


def _without_places(words: str, folder: Path) -> str:
    """A command line as it would read on any machine."""
    words = re.sub(r"^\S+/python\S*", "python", words)
    words = re.sub(r"^chroot \S+", "chroot TRIXIE", words)
    return re.sub(rf"[^\s=]*/{re.escape(folder.name)}", "DIR", words)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases, the gateway and nbdkit alone")
    add("--only", action="append", default=[], metavar="GLOB", help="cases; may be repeated")
    add("--servers", metavar="NAME,...", help=f"out of {','.join(KINDS)}")
    add("--beside", action="append", default=[], type=Path, metavar="DIR", help="a checkout")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=1.0, help="of each measurement")
    add("--out", type=Path, default=ROOT / "build/bench", metavar="DIR")
    add("--list", action="store_true", help="name the cases, and measure nothing")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be above zero")
    return options


class Bench:
    """One run: `measure` fills `results`, and can be interrupted at any time."""

    def __init__(self, kinds: list[Kind], probes: list[Probe], rounds: int, seconds: float) -> None:
        self.results = Results()
        self.results.cases = [case for probe in probes for case in probe.cases]
        self._kinds = kinds
        self._probes = probes
        self._rounds = rounds
        self._seconds = seconds
        self._start = time.monotonic()

    def describe(self, stages: Stages) -> None:
        """Start every server, and note what it is. Those that do not start are left out."""
        stage = stages[self._probes[0].stage]
        for kind in list(self._kinds):
            try:
                server = stage.server(kind)
                command = [str(word) for word in kind.command(server.place)]
                tls = negotiated(server)
            except Failed as error:
                self.results.skipped[kind.name] = str(error)
                self._kinds.remove(kind)
                continue
            words = _without_places(" ".join(command), stages.folder)
            self.results.servers[kind.name] = {"title": kind.title, "command": words, "tls": tls}

    def measure(self, stages: Stages) -> None:
        machine = Machine(stages.processes)
        total = sum(min(self._rounds, probe.rounds or self._rounds) for probe in self._probes)
        done = 0
        for number in range(self._rounds):
            for probe in self._probes:
                if number < (probe.rounds or self._rounds):
                    self._progress(f"{100 * done // total:3} %, round {number + 1}", probe)
                    for kind in self._order(number):
                        if probe.suits(kind):
                            machine.others()
                            self._measure(stages, probe, kind, number, machine)
                    print(file=sys.stderr, flush=True)
                    done += 1

    def _order(self, number: int) -> list[Kind]:
        """Another one first in each round, and every other round backwards."""
        turned = number % len(self._kinds)
        order = self._kinds[turned:] + self._kinds[:turned]
        return order[::-1] if number % 2 else order

    def _measure(
        self, stages: Stages, probe: Probe, kind: Kind, number: int, machine: Machine
    ) -> None:
        samples, failed, stage = {}, "", None
        try:
            stage = stages[probe.stage]
            samples = probe.measure(stage, kind, self._seconds)
        except Exception as error:  # a server that fails says so in the table; the rest goes on
            failed = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            if stage is not None:
                stage.replace(kind)
        others = machine.others()
        for case in probe.cases:
            sample = samples.get(case.name)
            why = "" if sample else failed
            self.results.records.append(Record(case.name, kind.name, number, sample, why, others))
        last = samples.get(probe.cases[-1].name)
        words = f"failed: {failed}" if last is None else report.short(last.value)
        print(f" {kind.name} {words};", end="", file=sys.stderr, flush=True)

    def _progress(self, where: str, probe: Probe) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        case = probe.cases[-1]
        head = f"[{minutes}:{seconds:02}, {where}] {case.name}, {case.unit}:"
        print(head, end="", file=sys.stderr, flush=True)


def find_kinds(names: Sequence[str], beside: Sequence[Path], skipped: dict[str, str]) -> list[Kind]:
    """Those that can be run here; why not, of the others, is added to `skipped`."""
    found = []
    makers = [(name, KINDS[name]) for name in names]
    for root in beside:
        name = f"gateway in {root.resolve().name}"
        place = root.resolve()
        makers.insert(1, (name, functools.partial(gateway, 1, place, name)))
    for name, make in makers:
        try:
            found.append(make())
        except Failed as error:
            skipped[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def _plots(results: Results, folder: Path) -> None:
    try:
        from tests.bench import plots
    except ImportError:
        print("no plots: matplotlib is not installed (extra bench)", file=sys.stderr)
        return
    for path in plots.draw(results, folder):
        print(f"wrote {path}", file=sys.stderr)


def _warn_of_others() -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the load is {load:.1f}: others are at work on this machine", file=sys.stderr)


def _enough_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        print(f"only {hard} descriptors: 1000 clients may be too many", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    names = options.servers.split(",") if options.servers else None
    names = names or list(QUICK_SERVERS if options.quick else KINDS)
    if unknown := [name for name in names if name not in KINDS]:
        sys.exit(f"no such server: {', '.join(unknown)}; there are: {', '.join(KINDS)}")
    try:
        probes = chosen(tuple(options.only) or (QUICK if options.quick else ()))
    except Failed as error:
        sys.exit(str(error))
    if options.list:
        for probe in probes:
            for case in probe.cases:
                print(f"{case.name:20} {case.title}")
        return
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        sys.exit(f"not installed: {', '.join(missing)} (tests/peers/install gets them)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended
    _enough_descriptors()
    _warn_of_others()
    options.out.mkdir(parents=True, exist_ok=True)
    skipped: dict[str, str] = {}
    kinds = find_kinds(names, options.beside, skipped)
    bench = Bench(kinds, probes, options.rounds, options.seconds)
    results = bench.results
    results.skipped = skipped
    results.facts = facts.facts()
    results.options = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "only": options.only,
        "quick": options.quick,
    }
    with Stages(trixie=any(kind.name == "nbdkit-trixie" for kind in kinds)) as stages:
        try:
            bench.describe(stages)
        except Failed as error:
            sys.exit(str(error))
        if not results.servers:
            sys.exit(report.failures(results))
        with contextlib.suppress(KeyboardInterrupt):  # what was measured is still of use
            bench.measure(stages)
    results.facts["load at the end"] = facts.load()
    file = options.out / ("quick.json" if options.quick else "bench.json")
    results.dump(file)
    if options.quick:
        print(report.quick_report(results))
        return
    text = report.report(results)
    print(text)
    (options.out / "bench.md").write_text(text + "\n")
    print(f"wrote {file}", file=sys.stderr)
    _plots(results, options.out)


if __name__ == "__main__":
    main()
