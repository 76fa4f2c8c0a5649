"""Fuzzes targets for a given time, several processes at a time, and says how it goes."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from tests.fuzz import findings
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import Job

ROOT: Final = Path(__file__).parents[2]
_COVERED: Final = re.compile(r"\bcov: (\d+).* corp: (\d+)/")
_EXECUTED: Final = re.compile(r"stat::number_of_executed_units: (\d+)")
_STARTS: Final = 10  # of processes for one target: each may end by an input that hangs
_SLACK_S: Final = 180  # for a process to begin, and to come to its end


@dataclass
class Figures:
    """How one target is getting on."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    branches: int = 0
    corpus: int = 0
    findings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of the fuzzer itself

    @property
    def per_second(self) -> float:
        return self.inputs / self.seconds if self.seconds else 0.0

    def row(self) -> list[str]:
        rate = f"{self.per_second:.0f}"
        counts = (str(self.inputs), rate, str(self.branches), str(self.corpus))
        return [self.target, *counts, str(len(self.findings))]


@dataclass(frozen=True)
class Plan:
    """What is to be run. `runs` inputs a target at most, or -1."""

    targets: Sequence[str]
    seconds: int
    seed: int
    jobs: int = 1
    runs: int = -1
    plant: str = ""
    findings: Path = findings.FINDINGS
    work: Path | None = None  # the inputs that were worth keeping; None: they are thrown away

    def share(self, target: str) -> int:
        """Seconds for one target."""
        shares = sum(TARGETS[one].share for one in self.targets)
        jobs = min(self.jobs, len(self.targets))
        return max(self.seconds * jobs * TARGETS[target].share // shares, 1)


def run(plan: Plan, out: TextIO) -> list[Figures]:
    """Raises nothing for what fails: see `Figures.findings` and `Figures.failures`."""
    with tempfile.TemporaryDirectory(prefix="nbd-fuzz-") as scratch:
        work = plan.work or Path(scratch)
        figures = {name: Figures(name) for name in plan.targets}
        # Those with the most to do first, so that no process is left with one at the end.
        order = sorted(plan.targets, key=lambda name: -TARGETS[name].share)
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in order:
            todo.put(name)
        threads = [
            threading.Thread(target=_take_turns, args=(plan, todo, figures, work))
            for _ in range(min(plan.jobs, len(order)))
        ]
        for one in threads:
            one.start()
        progress = Progress(plan, figures, out)
        while any(one.is_alive() for one in threads):
            time.sleep(0.2)
            progress.look()
        progress.end()
    return list(figures.values())


def _take_turns(
    plan: Plan, todo: queue.SimpleQueue[str], figures: dict[str, Figures], work: Path
) -> None:
    while True:
        try:
            name = todo.get_nowait()
        except queue.Empty:
            return
        _fuzz(plan, figures[name], work / name)


def _fuzz(plan: Plan, figures: Figures, work: Path) -> None:
    """One target, for its share of the time."""
    work.mkdir(parents=True, exist_ok=True)
    begun, share = time.monotonic(), plan.share(figures.target)
    base, runs = 0, plan.runs
    for start in range(_STARTS):
        left = int(share - (time.monotonic() - begun))
        if left < 1 or runs == 0:
            break
        status = work.with_suffix(f".{start}.json")
        job = Job(
            figures.target,
            str(work),
            str(plan.findings),
            str(status),
            plan.seed + start or 1,
            left,
            runs,
            plan.plant,
        )
        follower = _Follower(job, figures, base, begun)
        if follower.run(left + _SLACK_S):
            break
        base, runs = figures.inputs, max(runs - figures.inputs, 0) if runs > 0 else runs
        figures.findings += _left_behind(plan, figures.target, work, follower.log)
    figures.seconds = time.monotonic() - begun


def _left_behind(plan: Plan, target: str, work: Path, log: Sequence[str]) -> list[str]:
    """The input with which a process has ended: it took for ever, or too much memory."""
    found = []
    for kind in ("timeout", "oom", "crash", "leak"):
        for path in sorted(work.parent.glob(f"{work.name}.{kind}-*")):
            words = f"{kind}: the fuzzer's process ended with it\n\n" + "\n".join(log)
            found.append(str(findings.keep(plan.findings, target, path.read_bytes(), words)))
            path.unlink()
    return found


class _Follower:
    """One process, and what is read of its words."""

    def __init__(self, job: Job, figures: Figures, base: int, begun: float) -> None:
        self._job = job
        self._figures = figures
        self._base = base  # inputs of the processes before
        self._begun = begun
        self._found = list(figures.findings)
        self.log: deque[str] = deque(maxlen=30)

    def run(self, limit_s: float) -> bool:
        """Whether it has come to its end by itself."""
        argv = [sys.executable, "-m", "tests.fuzz.worker", self._job.text()]
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        killer = threading.Timer(limit_s, process.kill)
        killer.start()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                self._read(line.rstrip())
            status = process.wait()
        finally:
            killer.cancel()
            process.kill()
            process.wait()
        self._look()
        if status not in (0, 70, 71, 77):  # libFuzzer's: a hang, memory, anything else
            words = "\n".join(self.log)
            self._figures.failures.append(f"{self._job.target} ended with {status}:\n{words}")
            return True
        return status == 0

    def _read(self, line: str) -> None:
        self.log.append(line)
        if found := _COVERED.search(line):
            self._figures.branches = max(self._figures.branches, int(found[1]))
            self._figures.corpus = int(found[2])
        elif found := _EXECUTED.search(line):
            self._figures.inputs = self._base + int(found[1])
            return
        self._look()

    def _look(self) -> None:
        try:
            said = json.loads(Path(self._job.status).read_text())
        except OSError:
            return
        self._figures.inputs = max(self._figures.inputs, self._base + said["inputs"])
        self._figures.seconds = time.monotonic() - self._begun
        self._figures.findings = [*self._found, *said["findings"]]


class Progress:
    """A line that changes on a terminal; in a pipe, one a minute."""

    def __init__(self, plan: Plan, figures: dict[str, Figures], out: TextIO) -> None:
        self._plan = plan
        self._figures = figures
        self._out = out
        self._begun = time.monotonic()
        self._every = 1.0 if out.isatty() else 60.0
        self._next = self._begun + self._every

    def look(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            self._say(now)

    def _say(self, now: float) -> None:
        figures = self._figures.values()
        busy = ", ".join(one.target for one in figures if one.inputs and not self._over(one))
        count, found = sum(o.inputs for o in figures), sum(len(o.findings) for o in figures)
        line = f"{now - self._begun:6.0f} s  {count} inputs  {found} findings  {busy}"
        if self._out.isatty():
            self._out.write(f"\r\x1b[K{line[:100]}")
        else:
            self._out.write(f"{line}\n")
        self._out.flush()

    def _over(self, one: Figures) -> bool:
        return one.seconds >= self._plan.share(one.target)

    def end(self) -> None:
        if self._out.isatty():
            self._out.write("\r\x1b[K")


def table(figures: Sequence[Figures]) -> str:
    """For people."""
    head = ["target", "inputs", "inputs/s", "branches", "corpus", "findings"]
    total = Figures("all", sum(o.inputs for o in figures), sum(o.seconds for o in figures))
    last = ["all", str(total.inputs), f"{total.per_second:.0f}", "", ""]
    last.append(str(sum(len(one.findings) for one in figures)))
    rows = [head, *(one.row() for one in figures), last]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)
