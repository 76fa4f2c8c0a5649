"""What is wrong, told in full at the moment it is found: a soak that is killed has told it."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TextIO

PAST_S: Final = 30.0  # how much of what went before is told
_LINES: Final = 150  # of a gateway's log, at the most


class History:
    """What was done to whom, lately. Safe from all threads."""

    def __init__(self) -> None:
        self._lines: deque[tuple[float, str]] = deque(maxlen=500)

    def note(self, what: str) -> None:
        stamp = datetime.now().strftime("%H:%M:%S.%f")[:-3]
        self._lines.append((time.monotonic(), f"{stamp} {what}"))

    def lately(self) -> list[str]:
        since = time.monotonic() - PAST_S
        return [line for at, line in list(self._lines) if at >= since]


class Findings:
    """Tells one after the other, to people and in a file."""

    def __init__(
        self, path: Path, out: TextIO, history: History, heading: str, log: Callable[[], str]
    ) -> None:
        """`log`: the end of the gateway's, as it is now."""
        self.path = path
        self._out, self._history, self._heading, self._log = out, history, heading, log
        self._lock = threading.Lock()

    def tell(self, what: str, *, loss: bool) -> None:
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        head = f"{'LOSS' if loss else 'VIOLATION'}: {stamp}: {what}"
        try:
            log = lately(self._log())
        except (OSError, ValueError) as error:  # it has just ended
            log = [f"no log: {error}"]
        parts = (
            [head, f"({self._heading})", f"-- the last {PAST_S:g} s"],
            self._history.lately() or ["nothing"],
            ["-- the gateway's log"],
            log or ["nothing"],
        )
        text = "\n".join(line for part in parts for line in part) + "\n\n"
        with self._lock:
            print(f"\n{text}", end="", file=self._out, flush=True)
            with self.path.open("a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())


def lately(log: str) -> list[str]:
    """The lines of the last seconds, the last ones if there are many."""
    since = (datetime.now() - timedelta(seconds=PAST_S)).strftime("%Y-%m-%d %H:%M:%S")
    found = [line for line in log.splitlines() if line[:19] >= since]
    return found[-_LINES:]
