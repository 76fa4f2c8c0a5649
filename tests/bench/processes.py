"""Child processes of the bench: started, waited for, ended; their CPU time and memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_POLL_S = 0.01
_STOP_S = 10.0  # after SIGTERM; then SIGKILL
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A measurement that came to nothing, and why. It stands in the table; the run goes on."""


class Process:
    """A program in the background, with its words in a file. End it with `stop`."""

    def __init__(self, argv: Sequence[str | Path], log: Path, *, cwd: Path | None = None) -> None:
        self._log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                list(map(str, argv)),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that Ctrl-C ends the bench first, in order
            )

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._popen.poll()}, no message"

    def stop(self) -> None:
        if self.alive:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)  # what it may have left behind
        self._popen.wait()

    def wait_until(self, ready: Callable[[], object], what: str, timeout_s: float) -> None:
        """Raises Failed if it ends before, or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.alive:
                raise Failed(f"{what}: it ended: {self.last_words()}")
            if time.monotonic() > deadline:
                raise Failed(f"{what}: not within {timeout_s:g} s")
            time.sleep(_POLL_S)

    # The figures are those of all its processes: itself and its descendants.

    def cpu_s(self) -> float:
        """User and system time so far, of threads and children that have ended too."""
        total = 0.0
        for pid in self._family():
            with contextlib.suppress(OSError):  # it ended just now: see `_reaped_s` of its parent
                total += _cpu_clock(pid) + _reaped_s(pid)
        return total

    def anonymous_kib(self) -> int:
        """Memory of its own: not of files, which it may share; each shared page in parts."""
        return sum(_rollup_kib(pid, "Pss_Anon") for pid in self._family())

    def threads(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self._family())

    def _family(self) -> Iterator[int]:
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    children.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
        todo = [self._popen.pid]
        while todo:
            pid = todo.pop()
            yield pid
            todo += children.get(pid, [])


class Machine:
    """Who else is at work: what the machine's CPUs did, less what the bench's programs did."""

    def __init__(self, own: Callable[[], Iterable[Process]]) -> None:
        self._own = own
        self._since = self._now()

    def others(self) -> float:
        """Their share of all CPU time since the last call, 0 to 1."""
        before, now = self._since, self._now()
        self._since = now
        wall, busy, ours = (new - old for new, old in zip(now, before, strict=True))
        return min(max((busy - ours) / (wall * (os.cpu_count() or 1)), 0.0), 1.0)

    def _now(self) -> tuple[float, float, float]:
        """Seconds: of the clock, of all programs, of ours."""
        ticks = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]  # user, nice, system
        ended = [
            resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        ours = sum(one.ru_utime + one.ru_stime for one in ended)
        ours += sum(process.cpu_s() for process in self._own())
        return time.monotonic(), sum(map(int, ticks)) / _TICKS_PER_S, ours


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _cpu_clock(pid: int) -> float:
    """Seconds of CPU of one process, to the nanosecond; /proc has it in ticks of 10 ms only.

    The identifier is what clock_getcpuclockid(3) returns on Linux.
    """
    return time.clock_gettime((~pid << 3) | 2)


def _reaped_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[13]) + int(fields[14])) / _TICKS_PER_S


def _rollup_kib(pid: int, field: str) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError as error:
        raise Failed(f"its memory cannot be read: {error.strerror}") from None
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise Failed(f"this kernel does not tell {field}")


def run(argv: Sequence[str | Path], timeout_s: float, **options: Any) -> str:
    """Run a client to its end; what it printed. Raises Failed with its last words."""
    command = list(map(str, argv))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    out: str
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"{Path(command[0]).name} took more than {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        lines = (err.strip() or out.strip() or "no message").splitlines()
        raise Failed(f"{Path(command[0]).name}: {lines[-1]}")
    return out
