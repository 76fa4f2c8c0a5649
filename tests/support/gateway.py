"""The gateway as a child process: started as its users start it, known only by what it prints."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0  # to bind and to print; a loaded machine imports slowly
STOP_S = 45.0  # longer than the default --drain-timeout
POLL_S = 0.02

# What a log must not hold: our own ERROR level, and what the interpreter itself complains about.
_FAULT = re.compile(
    r"\bERROR\b|\bCRITICAL\b|Traceback|Exception ignored|ResourceWarning|never awaited"
)


def environment() -> dict[str, str]:
    """For our child processes: messages in English, and none of the gateway's own settings."""
    ours = "NBD_GATEWAY_"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "LC_ALL": "C.UTF-8"}


def descriptors_of(pid: int) -> list[str]:
    """The numbers of a gateway's descriptors. It lets nobody look into its memory, and so the
    kernel shows these to root only: skips for anybody else."""
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        pytest.skip("only root sees the descriptors of a process that dumps no core")


def warnings_in(log: str) -> list[str]:
    """Its lines at WARNING, but for the one about root, which is of who runs the tests."""
    lines = [line for line in log.splitlines() if " WARNING " in line]
    return [line for line in lines if " WARNING running as root: " not in line]


class Output:
    """What a child process writes; readable while it runs, and after `close`.

    A file and not a pipe: the child never waits for a reader, and nothing is lost if it is killed.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._kept = ""

    @property
    def file(self) -> IO[bytes]:
        """For the child."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()
        return self._file

    def text(self) -> str:
        if self._file is None:
            return self._kept
        # pread: the child shares the file's offset, and seeking would move where it writes.
        descriptor = self._file.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        if self._file is not None:
            self._kept = self.text()
            self._file.close()
            self._file = None


class Gateway:
    """`python -m gateway ARGS...`; a context manager.

    On leaving it gets SIGTERM; that it then exits with 0, and that its log holds no ERROR and no
    traceback, is asserted, unless the test itself has failed or `faults_allowed` is set.
    """

    def __init__(
        self,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
        faults_allowed: bool = False,
        python: Sequence[str] = (sys.executable,),
    ) -> None:
        self.args = [str(arg) for arg in args]
        self.uris: list[str] = []
        self.exit_code = 0  # what `stop` expects
        self._env = {**environment(), **(env or {})}
        self._pass_fds = pass_fds
        self._faults_allowed = faults_allowed
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._stdout = Output()
        self._stderr = Output()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.kill()

    # The process

    def start(self) -> None:
        """Start, and wait for one URI per listener."""
        self._process = subprocess.Popen(
            [*self._python, "-W", "always::ResourceWarning", "-m", "gateway", *self.args],
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._stdout.file,
            stderr=self._stderr.file,
            pass_fds=self._pass_fds,
        )
        wanted = max(1, sum(arg.split("=")[0] == "--listen" for arg in self.args))
        deadline = time.monotonic() + START_S
        while len(self.uris) < wanted:
            if not self.alive() or time.monotonic() > deadline:
                status, log = self._process.poll(), self.log()
                self.kill()
                raise AssertionError(f"the gateway did not start (exit code {status}):\n{log}")
            time.sleep(POLL_S)
            text = self.stdout()
            self.uris = text[: text.rfind("\n") + 1].split()

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """The exit code, once it is there."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """SIGTERM, wait, and assert that all went well."""
        if self._process is None:
            return
        if self.alive():
            self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait()
        status, log = self._process.poll(), self.log()
        self.kill()
        if self._faults_allowed:
            return
        assert status == self.exit_code, f"the gateway's exit code is {status}:\n{log}"
        assert not _FAULT.search(log), f"the gateway's log:\n{log}"

    def kill(self) -> None:
        """Make sure that it is gone; asserts nothing. Its output stays readable."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._stderr.close()

    # What it says

    @property
    def uri(self) -> str:
        """The first listener's URI, as printed."""
        return self.uris[0]

    @property
    def port(self) -> int:
        """The first listener's TCP port."""
        port = urlsplit(self.uri).port
        assert port is not None, f"no TCP port in {self.uri}"
        return port

    def stdout(self) -> str:
        return self._stdout.text()

    def log(self) -> str:
        """All of standard error so far."""
        return self._stderr.text()

    def wait_log(self, pattern: str, *, after: int = 0, timeout_s: float = 10.0) -> re.Match[str]:
        """The first match of a regular expression in the log behind its `after`th character."""
        deadline = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.log()[after:])) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in the log:\n{self.log()[after:]}"
            time.sleep(POLL_S)
        return match
