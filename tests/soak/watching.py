"""What the gateway's processes hold: descriptors, memory, threads, tasks, objects.

Tasks and objects are not to be seen from outside, so each process is told to count them itself:
`sitecustomize`, put in its path, has it write them to a file at SIGUSR2, behind a full collection.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.gateway import ROOT, Gateway
from tests.support.peers import wait_until

_COUNTER = """\
import gc, json, os, signal, sys

def count(*_):
    gc.collect()
    trio = sys.modules.get("trio")
    tasks = 0
    if trio is not None:
        try:
            tasks = trio.lowlevel.current_statistics().tasks_living
        except RuntimeError:
            pass
    path = os.path.join(os.environ["SOAK_COUNTS"], str(os.getpid()))
    with open(path + ".new", "w") as file:
        json.dump({"tasks": tasks, "objects": len(gc.get_objects())}, file)
    os.rename(path + ".new", path)

signal.signal(signal.SIGUSR2, count)
"""
_COUNT_S = 20.0


@dataclass(frozen=True)
class Sample:
    """One process at one moment; `tasks` and `objects` only where it was asked for them."""

    at_s: float
    pid: int
    descriptors: int
    rss_kib: int
    threads: int
    tasks: int | None = None
    objects: int | None = None


class WatchedGateway(Gateway):
    """A gateway that can be asked what it holds."""

    def __init__(self, counts: Path, *args: str | Path, began: float) -> None:
        counts.mkdir(exist_ok=True)
        counts.chmod(0o777)  # its processes write there, whoever they are
        (counts / "sitecustomize.py").write_text(_COUNTER)
        env = {"PYTHONPATH": f"{counts}:{ROOT}", "SOAK_COUNTS": str(counts)}
        super().__init__(*args, env=env)
        self._counts = counts
        self._began = began
        self._numbers: dict[int, int] = {}  # of workers, by process
        self._read_to = 0

    def log_from(self, offset: int) -> str:
        """The log behind so many bytes: it becomes too long to be read as a whole each time."""
        file = self._stderr.file.fileno()
        return os.pread(file, os.fstat(file).st_size - offset, offset).decode(errors="replace")

    @property
    def log_bytes(self) -> int:
        return os.fstat(self._stderr.file.fileno()).st_size

    def await_log(self, pattern: str, after: int, timeout_s: float = 20.0) -> None:
        wait_until(
            lambda: re.search(pattern, self.log_from(after)), f"{pattern!r} in the log", timeout_s
        )

    def workers(self) -> list[int]:
        """The processes of its workers."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
            return [int(pid) for pid in text.split()]
        return []

    def number(self, pid: int) -> int:
        """Of a worker, as the log has it: the last with this process's number, which another had
        perhaps before it."""
        text = self.log_from(self._read_to)
        whole = text[: text.rfind("\n") + 1]
        self._read_to += len(whole.encode())
        found = re.findall(r"INFO worker (\d+) \(process (\d+)\) started\n", whole)
        self._numbers.update((int(other), int(number)) for number, other in found)
        return self._numbers.get(pid, 0)

    def reload(self) -> None:
        """SIGHUP, and wait until each process that serves, and lives, has looked at what is new.
        One of them may say so twice, by its clock and because it was asked."""
        after, asked = self.log_bytes, self.workers()
        os.kill(self.pid, signal.SIGHUP)

        def answered() -> bool:
            said = self.log_from(after)
            if not asked:
                return " INFO reload: " in said
            live = set(asked).intersection(self.workers())
            return all(f" INFO worker {self.number(pid)}: reload: " in said for pid in live)

        wait_until(answered, "the reload", 30)

    def processes(self) -> list[int]:
        return [self.pid, *self.workers()]

    def sample(self, pid: int) -> Sample | None:
        """None: it has just ended."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            return None
        found = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
        if "VmRSS" not in found:
            return None  # a zombie
        at_s = round(time.monotonic() - self._began, 1)
        return Sample(at_s, pid, descriptors, int(found["VmRSS"]), int(found["Threads"]))

    def count(self, pid: int) -> Sample | None:
        """With tasks and objects."""
        path = self._counts / str(pid)
        path.unlink(missing_ok=True)
        try:
            os.kill(pid, signal.SIGUSR2)
            wait_until(lambda: path.exists() or not os.path.exists(f"/proc/{pid}"), "it", _COUNT_S)
            counted = json.loads(path.read_text())
        except (OSError, AssertionError):
            return None
        seen = self.sample(pid)
        return None if seen is None else Sample(**{**asdict(seen), **counted})


def versions() -> str:
    return f"Python {sys.version.split()[0]}, Linux {os.uname().release}, {os.cpu_count()} cores"
