"""One process that fuzzes one target, until its time is up: `python -m tests.fuzz.worker JSON`.

The engine is atheris, which is libFuzzer with coverage of Python's own bytecode: it sees branches
and what bytes are compared with, at a fraction of what a tracing function costs. It is a wheel of
its own for Linux on x86-64, so that nothing has to be compiled. An input that fails does not end
the run: it is made small and kept, and the engine goes on.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz import dictionary, findings
from tests.fuzz.findings import fault_of, keep, smaller

MAX_LENGTH = 4096  # bytes of one input
HANG_S = 60  # for one input: libFuzzer then ends the process, and leaves the input behind
MEMORY_MB = 2048
_MOST_FINDINGS = 10  # of one process: more of them are the same few


@dataclass(frozen=True)
class Job:
    """What one process is told. Paths are of folders, and of the file that it reports in."""

    target: str
    work: str  # new inputs go here
    findings: str
    status: str
    seed: int
    seconds: int = 0  # 0: no limit
    runs: int = -1
    plant: str = ""  # a bug to be planted, for tests

    def text(self) -> str:
        return json.dumps(asdict(self))


class Worker:
    """Counts, and keeps what fails."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._inputs = 0
        self._places: set[tuple[str, ...]] = set()
        self._paths: list[str] = []
        self._reported = 0.0

    def start(self) -> None:
        import atheris

        from tests.fuzz import targets

        job = self._job
        assert not any(name.partition(".")[0] == "gateway" for name in sys.modules), "too late"
        with atheris.instrument_imports(include=["gateway"]):
            self._run = targets.target(job.target)
            from tests.fuzz import planted
        planted.plant(job.plant)
        words = dictionary.TEXTS if targets.TARGETS[job.target].writes else dictionary.NBD
        work = Path(job.work)
        words_file = work.with_suffix(".dict")
        words_file.write_text(dictionary.written(words))
        seeds = [findings.CORPUS / job.target, findings.FINDINGS / job.target]
        flags = {
            "seed": job.seed,
            "runs": job.runs,
            "max_total_time": job.seconds,
            "max_len": MAX_LENGTH,
            "timeout": HANG_S,
            "rss_limit_mb": MEMORY_MB,
            "dict": words_file,
            "artifact_prefix": f"{work}.",
            "print_final_stats": 1,
            "reload": 0,
            "handle_int": 0,
            "handle_term": 0,
        }
        argv = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), job.work]
        atheris.Setup([*argv, *(str(one) for one in seeds if one.is_dir())], self.one)
        self._report()
        atheris.Fuzz()

    def one(self, data: bytes) -> None:
        self._inputs += 1
        fault = fault_of(self._run, data)
        if fault is not None and fault.place not in self._places:
            self._found(data, fault.place)
        if time.monotonic() - self._reported > 0.5 or self._inputs == self._job.runs:
            self._report()

    def _found(self, data: bytes, place: tuple[str, ...]) -> None:
        self._places.add(place)
        if len(self._places) > _MOST_FINDINGS:
            return
        data = smaller(self._run, data, place)
        fault = fault_of(self._run, data)
        words = "it fails sometimes only" if fault is None else fault.words
        path = keep(Path(self._job.findings), self._job.target, data, words)
        self._paths.append(str(path))
        self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        path = Path(self._job.status)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"inputs": self._inputs, "findings": self._paths}))
        os.replace(new, path)


def _end_with_parent() -> None:
    """Whoever kills the parent does not want to find this process running."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    _end_with_parent()
    Worker(Job(**json.loads(sys.argv[1]))).start()
