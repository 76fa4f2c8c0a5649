"""When a session may wait for its two sides in the kernel, and let the others of its process wait.

A turn of Trio's loop costs more than all the rest of a small request. While a session is the only
busy one it therefore looks for what comes next by itself, for a few microseconds at a time, and
gives the loop its turn only now and then. With company everybody takes turns, and who has many
requests in flight lets the others go first, so that more has come when it is its turn.
"""

from __future__ import annotations

import time
from typing import Final

LOOK_S: Final = 100e-6  # how long to look for what comes next; seldom in vain, see `Luck`
TURN_S: Final = 500e-6  # how long to go on like that: what all others may have to wait
MANY: Final = 8  # requests in flight
OTHERS: Final = 3  # turns of the loop in which the others go first
_COMPANY_S: Final = 50e-3  # how long after another session was busy nobody goes on like that
_FAIR_MISSES: Final = 2  # in a row, without consequences
_LONGEST_PAUSE: Final = 64  # looks left out after many misses


class Attention:
    """Which session of this process was busy last, and whether it has been the only one."""

    def __init__(self) -> None:
        self._last: object = None
        self._shared_until = 0.0

    def undivided(self, session: object) -> bool:
        """Note that `session` is busy. Returns whether no other has been for a while."""
        now = time.perf_counter()
        if self._last is not session:
            self._last = session
            self._shared_until = now + _COMPANY_S
            return False
        return now >= self._shared_until

    def forget(self, session: object) -> None:
        """`session` is over."""
        if self._last is session:
            self._last = None


class Luck:
    """Whether looking has paid lately: to wait for a slow peer like that is a waste."""

    def __init__(self) -> None:
        self._misses = 0  # in a row
        self._pause = 0

    def worth_it(self) -> bool:
        """Whether to look this time. If so, tell `found`."""
        if self._pause:
            self._pause -= 1
            return False
        return True

    def found(self, something: bool) -> None:
        """How the last look ended."""
        self._misses = 0 if something else self._misses + 1
        if self._misses > _FAIR_MISSES:
            self._pause = min(1 << self._misses, _LONGEST_PAUSE)


attention = Attention()
"""Of this process."""
