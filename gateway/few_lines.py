"""A log for what a flood of clients can cause: some lines, and how many more there were."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Final

import trio

logger = logging.getLogger(__name__)

_LINES: Final = 20  # in WINDOW_S; the rest are counted
WINDOW_S: Final = 10.0


class FewLines:
    """At most 20 lines in ten seconds, and then one for all the others. `run` says that one."""

    def __init__(self, log: logging.Logger | logging.LoggerAdapter[Any], what: str) -> None:
        """`log` is for that one, and `what` they were: "clients were closed"."""
        self._log = log
        self._what = what
        self._begun = -WINDOW_S  # when the first line of this window was
        self._said = 0
        self._left_out: Counter[str] = Counter()
        self._wake = trio.Event()

    def info(self, kind: str, line: str) -> None:
        """One line, or one more of this kind."""
        now = trio.current_time()
        if now - self._begun >= WINDOW_S and not self._left_out:
            self._begun, self._said = now, 0
        if self._said < _LINES and not self._left_out:
            self._said += 1
            logger.info("%s", line)
            return
        self._left_out[kind] += 1
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                await self._wake.wait()
                await trio.sleep_until(self._begun + WINDOW_S)
                self._sum_up()
        finally:
            self._sum_up()

    def _sum_up(self) -> None:
        if not self._left_out:
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self._left_out.items()))
        self._log.info("%d more %s: %s", self._left_out.total(), self._what, kinds)
        self._left_out.clear()
        self._wake = trio.Event()
