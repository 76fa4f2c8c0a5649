"""Dialling an upstream that was lost, until there is one that is as it was: `--reconnect`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import trio

from gateway.nbd.pairing import Answer, Granted, Question, Refused, Unavailable
from gateway.transport import Channel
from gateway.upstream import Upstream

_BACK_OFF_S: Final = (0.02, 0.25)  # first and longest wait between two attempts


class Redialler:
    """One session's. `agreed` is what the first upstream was asked, in order, and answered."""

    def __init__(
        self,
        dial: Callable[[], Upstream],
        agreed: Sequence[tuple[Question, Answer]],
        log: logging.LoggerAdapter[logging.Logger],
        *,
        within_s: float,
    ) -> None:
        self._dial = dial
        self._agreed = tuple(agreed)
        self._log = log
        self._within_s = within_s
        self._since = self._came = -math.inf  # the loss that began it, and the last upstream
        self._wait_s = 0.0

    async def __call__(self, *, progress: bool) -> Channel | None:
        """See `lifeline.Redial`. An upstream that goes again and again, and answers nothing, has no
        more time than one that stays away."""
        now = trio.current_time()
        if progress or now - self._came > self._within_s:
            self._since, self._wait_s = now, 0.0
            self._log.warning("upstream lost: dialling it anew, for %g s", self._within_s)
        first_s, longest_s = _BACK_OFF_S
        with trio.move_on_at(self._since + self._within_s):
            while True:
                await trio.sleep(self._wait_s)
                self._wait_s = min(2 * self._wait_s, longest_s) or first_s
                channel, changed = await self._attempt(self._dial())
                if changed:
                    self._log.warning("upstream is back, but %s: giving it up", changed)
                if changed or channel is not None:
                    self._came = trio.current_time()
                    return channel
        self._log.warning("upstream did not come back within %g s: giving it up", self._within_s)
        return None

    def resumed(self, requests: int, *, lost: bool) -> None:
        """See `lifeline.Redial`."""
        seconds = trio.current_time() - self._since
        self._log.warning(
            "upstream is back after %.1f s; %d requests sent again", seconds, requests
        )
        if lost:
            self._log.warning("writes before that had not been flushed: the next flush fails")

    async def _attempt(self, upstream: Upstream) -> tuple[Channel | None, str | None]:
        """A channel, if it is as it was; else what has changed, or nothing."""
        channel: Channel | None = None
        try:
            if (changed := await self._ask_all(upstream)) is None:
                channel = upstream.take_channel()
        finally:
            if channel is None:
                await upstream.aclose()
        return channel, changed

    async def _ask_all(self, upstream: Upstream) -> str | None:
        """None: all is as it was. Empty: not yet. Else what has changed."""
        for question, was in self._agreed:
            now = await upstream.ask(question)
            if isinstance(now, Refused) and isinstance(was, Refused):
                continue
            if isinstance(now, Unavailable | Refused):
                return ""  # perhaps it is only starting
            if _essence(now) != _essence(was):
                return _difference(was, now)
        return None


def _essence(answer: Answer) -> Answer:
    """What a client relies on."""
    return replace(answer, infos=()) if isinstance(answer, Granted) else answer


def _difference(was: Answer, now: Answer) -> str:
    if not (isinstance(was, Granted) and isinstance(now, Granted)):
        return "its meta contexts are not what they were"
    if was.size != now.size:
        return f"it has {now.size} bytes where it had {was.size}"
    if was.flags != now.flags:
        return f"its flags are {now.flags:#x} where they were {was.flags:#x}"
    return "its block sizes are not what they were"
