"""Worker processes: started, replaced when they die, and brought to an end together.

The supervisor has one thread and no event loop, so it may fork at any time. Its signals are blocked
and taken one by one: none comes between two steps, and none is lost.

A pipe leads to each worker. Orders go through it, and not by signal: a signal to a process group
(Ctrl-C in a terminal) or a control group (how systemd stops a service) reaches the workers too, and
what the supervisor passes on would count a second time. The end of the pipe tells a worker that the
supervisor is gone, however it went.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from gateway.places import Place, Places

logger = logging.getLogger(__name__)

DRAIN: Final = b"d"  # orders, one byte each
CUT: Final = b"c"
RELOAD: Final = b"r"
DRAINED, CUT_SHORT, _BUG = 0, 1, 70  # exit codes of a worker

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
# First and longest wait before a worker is replaced that died young: younger than the longest.
_BACK_OFF_S: Final = (0.1, 10.0)
_GRACE_S: Final = 10.0  # beyond the drain, for sessions that are cut, before a worker is killed
_LOOK_S: Final = 0.01  # how often the supervisor looks whether all workers are up, at the start
_FOREVER_S: Final = 3600.0


class WorkerLog(logging.LoggerAdapter[logging.Logger]):
    """Puts the worker's number in front of every line."""

    def __init__(self, inner: logging.Logger, number: int) -> None:
        super().__init__(inner, {})
        self._prefix = f"worker {number}: "

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{self._prefix}{msg}", kwargs


@dataclass(frozen=True, slots=True)
class Post:
    """What a new worker process is given.

    `number` is given once only: who replaces worker 2 of 2 is worker 3. `orders` is the read end of
    the pipe: DRAIN, CUT, RELOAD, or the end of the pipe, which means DRAIN.
    """

    number: int
    place: Place
    orders: int

    def up(self) -> None:
        """Clients are served, and SIGTERM is handled: it comes through from here on."""
        self.place.open()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@dataclass(frozen=True, slots=True)
class _Worker:
    """A worker process, as the supervisor knows it."""

    number: int
    index: int  # of its place
    pid: int
    orders: int  # the write end
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.pid})"

    def tell(self, order: bytes) -> None:
        # It has just ended, or has not looked at thousands of orders: it will be killed.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self.orders, order)


class Workers:
    """One process a place, until SIGTERM or SIGINT. `run` it once, in a process of one thread."""

    def __init__(
        self, places: Places, work: Callable[[Post], bool], *, drain_timeout_s: float
    ) -> None:
        """`work` is what a worker does; it returns whether all came to its own end there.

        A worker that has not ended `drain_timeout_s`, and some seconds, after DRAIN is killed.
        """
        self._places = places
        self._work = work
        self._drain_timeout_s = drain_timeout_s
        self._started = 0
        self._live: dict[int, _Worker] = {}  # by process
        self._due = dict.fromkeys(range(len(places)), -math.inf)  # when to start one, by place
        self._delay_s = dict.fromkeys(range(len(places)), 0.0)  # the last wait, by place
        self._ending = False
        self._deadline = math.inf
        self._drained = True

    def run(self, *, up: Callable[[], None], ending: Callable[[], None]) -> bool:
        """Returns whether all workers ended by themselves with nothing cut.

        `up` is called when all workers take clients, `ending` before they are told to drain. A
        second signal cuts. SIGHUP is passed on as RELOAD. The signals stay blocked: all that
        follows is the end of the process.
        """
        _take_signals()
        gc.collect()
        gc.freeze()  # what is there stays shared with the workers: no collection writes to it
        is_up = False
        while self._live or not self._ending:
            self._start_those_due()
            came = signal.sigtimedwait(_SIGNALS, self._timeout_s(is_up))
            if came is not None and came.si_signo == signal.SIGHUP:
                logger.info("SIGHUP: reloading")
                self._tell_all(RELOAD)
            elif came is not None and came.si_signo != signal.SIGCHLD:
                self._end(signal.Signals(came.si_signo), ending)
            self._reap()
            if time.monotonic() >= self._deadline:
                self._kill()
            if not is_up and not self._ending and self._places.all_open:
                is_up = True
                up()
        return self._drained

    def _timeout_s(self, is_up: bool) -> float:
        events = [self._deadline, *self._due.values()]
        wait_s = min(events) - time.monotonic()
        return max(0.0, min(wait_s, _FOREVER_S if is_up or self._ending else _LOOK_S))

    # -- starting

    def _start_those_due(self) -> None:
        now = time.monotonic()
        for index in [index for index, due in self._due.items() if due <= now]:
            del self._due[index]
            try:
                self._start(index)
            except OSError as error:  # no memory, or no more processes
                delay_s = self._put_off(index, 0.0)
                logger.warning(
                    "cannot start a worker: %s; trying again in %g s", error.strerror, delay_s
                )

    def _start(self, index: int) -> None:
        number = self._started + 1
        reader, writer = os.pipe()
        os.set_blocking(writer, False)  # nobody is waited for here
        try:
            pid = os.fork()
        except OSError:
            os.close(reader)
            os.close(writer)
            raise
        if pid == 0:
            self._be_worker(Post(number, Place(self._places, index), reader), writer)
        os.close(reader)
        self._started = number
        self._live[pid] = worker = _Worker(number, index, pid, writer)
        logger.info("%s started", worker)

    def _be_worker(self, post: Post, writer: int) -> NoReturn:
        """Never returns: what is further up the stack is the supervisor's."""
        code = _BUG
        try:
            for other in (writer, *(worker.orders for worker in self._live.values())):
                os.close(other)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C, and a reload, are the supervisor's
            # Not ignored, which would drop what is pending. Late ones, at the end, do no harm.
            signal.signal(signal.SIGTERM, lambda *_: None)
            code = DRAINED if self._work(post) else CUT_SHORT
        except BaseException:
            WorkerLog(logger, post.number).exception("bug: this worker ends")
        finally:
            os._exit(code)

    def _put_off(self, index: int, lived_s: float) -> float:
        """Plan the next start in this place. Returns in how many seconds."""
        first_s, longest_s = _BACK_OFF_S
        delay_s = 0.0
        if lived_s < longest_s:
            delay_s = min(max(first_s, 2 * self._delay_s[index]), longest_s)
        self._delay_s[index] = delay_s
        self._due[index] = time.monotonic() + delay_s
        return delay_s

    # -- ending

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # there is none
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                # Not one of ours: whoever became this gateway by exec had a child, or we are PID 1.
                if (worker := self._live.pop(pid, None)) is not None:
                    os.close(worker.orders)
                    self._places.clear(worker.index)
                    self._lost(worker, os.waitstatus_to_exitcode(status))

    def _lost(self, worker: _Worker, code: int) -> None:
        how, level = _how_it_ended(code)
        if self._ending:
            self._drained &= code == DRAINED
            logger.log(level, "%s %s", worker, how)
            return
        delay_s = self._put_off(worker.index, time.monotonic() - worker.started)
        logger.log(level, "%s %s; the next one starts in %g s", worker, how, delay_s)

    def _end(self, number: signal.Signals, ending: Callable[[], None]) -> None:
        if self._ending:
            logger.warning("second signal: ending now")
            order, patience_s = CUT, 0.0
        else:
            logger.info("%s: ending", number.name)
            self._ending = True
            self._due.clear()
            ending()
            order, patience_s = DRAIN, self._drain_timeout_s
        self._deadline = min(self._deadline, time.monotonic() + patience_s + _GRACE_S)
        self._tell_all(order)

    def _tell_all(self, order: bytes) -> None:
        for worker in self._live.values():
            worker.tell(order)

    def _kill(self) -> None:
        self._deadline = math.inf
        for worker in self._live.values():
            logger.warning("%s does not end: killing it", worker)
            os.kill(worker.pid, signal.SIGKILL)


def _take_signals() -> None:
    """Block our signals, to be waited for. Whoever started us may have had them ignored."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


_ENDS: Final[Mapping[int, tuple[str, int]]] = {
    DRAINED: ("has ended", logging.INFO),
    CUT_SHORT: ("has ended, sessions had to be cut", logging.WARNING),
}


def _how_it_ended(code: int) -> tuple[str, int]:
    """In words, and at which level to log them. Negative: the number of a signal."""
    if code >= 0:
        return _ENDS.get(code, (f"died: exit code {code}", logging.WARNING))
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"died: {name}", logging.WARNING
