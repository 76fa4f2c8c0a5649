"""New files and rules without a restart: looked for on a timer, and when somebody asks."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import trio

from gateway.errors import SettingsError
from gateway.privileges import remedy
from gateway.settings import Settings
from gateway.snapshot import Snapshot
from gateway.trust import Keeper, Trust, digest_of, load_trust, parts_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

Reread = Callable[[], Settings]
"""The settings again, as the flags and the files that they name have them now. Blocks. Raises
SettingsError."""

_AGAIN_S: Final = 1.0  # between the two reads that have to be equal
_READ_S: Final = 30.0  # for all the files; then the set of before stays, and it is said
_RETRY_S: Final = 60.0  # until what was refused is looked at once more, unless somebody asks
# What a reload takes over. The name of the URI that is printed is nobody's right.
_RELOADED: Final = frozenset({"tls", "rules", "export"})


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was in all the files at one moment."""

    settings: Settings
    files: Snapshot
    parts: dict[str, bytes]

    @property
    def digest(self) -> bytes:
        return digest_of(self.parts)


class Reloader:
    """Puts a new set into the keeper when there is a good one. `run` it once."""

    def __init__(
        self,
        settings: Settings,
        keeper: Keeper,
        apply: Callable[[Trust], Awaitable[None]],
        *,
        refused: Callable[[], None] = lambda: None,
        reread: Reread | None = None,
        log: logging.Logger | logging.LoggerAdapter[Any] = logger,
    ) -> None:
        """`apply` is called with each new set, when the keeper has it, and with the old one when
        the files are good again; `refused` whenever they cannot be used. Without `reread` the
        rules stay, and the files are those of `settings`."""
        self._settings = settings
        self._keeper = keeper
        self._apply = apply
        self._tell_refused = refused
        self._reread = reread
        self._log = log
        self._asked = trio.Event()
        self._refused = ""  # what was last said against a set
        self._refused_digest = b""  # of which, if it was complete,
        self._retry_at = -math.inf  # and when to look at that once more
        self._restart_for: tuple[str, ...] = ()  # what was last said to need a restart

    def ask(self) -> None:
        """Load now, or once more if a load is under way. Returns at once."""
        self._asked.set()

    async def run(self) -> None:
        """Until it is cancelled. Raises nothing else."""
        interval_s = self._settings.reload_interval_s or math.inf
        while True:
            with trio.move_on_after(interval_s):
                await self._asked.wait()
            asked, self._asked = self._asked.is_set(), trio.Event()
            try:
                await self._look(asked=asked)
            except Exception:  # the set of before serves on
                self._log.exception("bug: the reload failed")
                self._tell_refused()

    async def _look(self, *, asked: bool) -> None:
        seen: _Seen | None = None
        try:
            seen = await self._read() if asked else await self._read_quietly()
            if seen is None:
                return
            if not asked:
                if seen.digest == self._keeper.trust.digest:
                    await self._good_again()
                    return
                if seen.digest == self._refused_digest and trio.current_time() < self._retry_at:
                    return  # to load it takes time, and only its dates can make it good
                await self._pause()  # it may be half of what is being written
                if (again := await self._read()).digest != seen.digest:
                    return
                seen = again
            before = self._keeper.trust
            if seen.digest == before.digest:
                self._log.info("reload: the files and rules are those in use")
                await self._good_again()
                return
            self._refused_digest = seen.digest
            self._retry_at = trio.current_time() + _RETRY_S
            trust = await _in_thread(load_trust, seen.settings, seen.files, before)
        except SettingsError as wrong:
            self._refuse(f"{wrong}{remedy(wrong, self._settings.user)}", asked=asked)
            return
        self._refused, self._refused_digest = "", b""
        self._keeper.replace(trust)
        self._log.info("reload: %s", _changes(before, trust))
        for concern in trust.concerns(datetime.now(UTC)):
            self._log.warning("%s", concern)
        self._warn_of_restart(seen.settings)
        await self._apply(trust)

    async def _good_again(self) -> None:
        """The files are those in use."""
        if self._refused:
            self._refused, self._refused_digest = "", b""
            await self._apply(self._keeper.trust)

    async def _read(self) -> _Seen:
        with trio.move_on_after(_READ_S):
            return await _in_thread(self._read_now)
        raise SettingsError(f"files not read within {_READ_S:g} s: does a network mount hang?")

    async def _read_quietly(self) -> _Seen | None:
        """The same. What cannot be read now and can be a moment later is nobody's mistake: None."""
        try:
            return await self._read()
        except SettingsError:
            await self._pause()
            await self._read()
            return None

    async def _pause(self) -> None:
        await trio.sleep(min(_AGAIN_S, self._settings.reload_interval_s))

    def _read_now(self) -> _Seen:
        settings = self._settings if self._reread is None else self._reread()
        files = Snapshot.take(settings.tls)
        return _Seen(settings, files, dict(parts_of(settings, files)))

    def _refuse(self, wrong: str, *, asked: bool) -> None:
        """Once for each wrong, however often it is looked at; each time for who has asked."""
        if asked or wrong != self._refused:
            self._refused = wrong
            self._log.error("reload refused, the files and rules of before stay: %s", wrong)
        self._tell_refused()

    def _warn_of_restart(self, now: Settings) -> None:
        changed = tuple(
            one.name
            for one in fields(Settings)
            if one.name not in _RELOADED
            and getattr(now, one.name) != getattr(self._settings, one.name)
        )
        if changed and changed != self._restart_for:
            self._log.warning("reload: %s: changed, and needs a restart", ", ".join(changed))
        self._restart_for = changed


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    """A network mount may hang: the end of the gateway does not wait for it."""
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def _changes(before: Trust, after: Trust) -> str:
    """What is another, and until when the certificate is good."""
    names = sorted(before.parts.keys() | after.parts.keys())
    changed = [one for one in names if before.parts.get(one) != after.parts.get(one)]
    text = f"now in use: new {', '.join(changed)}"
    if after.own is not None:
        text += f"; our certificate is good until {after.own.not_after:%Y-%m-%d %H:%M} UTC"
    if ends := [one.next_update for one in after.crls if one.next_update is not None]:
        text += f", the CRL until {min(ends):%Y-%m-%d %H:%M} UTC"
    return text
