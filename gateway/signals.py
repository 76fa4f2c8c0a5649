"""SIGTERM, SIGINT and SIGHUP, from a command's first step to its last.

While there is nothing but memory to give back, `interrupt` has them raised. What must not be left
behind half done is done while they are on `hold`, and what comes then is there after `release`. At
the end, when the exit code is known, `ignore`: nothing that comes so late may change it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final

ALL: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal that came before there was anybody to receive it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number  # as a shell has it


def interrupt() -> None:
    """Raise Interrupted for the first SIGTERM or SIGINT, where the main thread is then; no more
    follow, so nothing disturbs what is tidied up on the way out."""

    def handle(number: int, frame: FrameType | None) -> None:
        ignore()
        raise Interrupted(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def hold(*numbers: signal.Signals) -> None:
    """Keep these back (all of them by default) until `release`. For a process of one thread.

    Handlers that are set meanwhile get them. Those that Trio puts back behind itself are of no
    effect, however late it hands a signal on.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers or ALL)
    for number in numbers or ALL:
        signal.signal(number, lambda *_: None)  # SIG_IGN would drop what has come


def release() -> None:
    """From here on they come through, also for whom who started us had them blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keep them back for a moment. They keep their handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """From now on they mean nothing, in any thread, and also while the interpreter ends: a handler
    would give way to the default there, which is to die of the signal."""
    for number in ALL:
        signal.signal(number, signal.SIG_IGN)
