"""From Settings to the end of the gateway: in this process, or in several workers.

With one worker nothing is forked. With more, all that can be wrong (files, addresses) is found out
by the supervisor before the first fork; listening sockets are made once, for all. Each worker looks
for new files and rules by itself.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Final

import trio

from gateway import signals
from gateway.errors import GatewayError, SettingsError
from gateway.listeners import Listeners
from gateway.places import Places
from gateway.privileges import account_of, become, remedy, warning
from gateway.reload import Reread
from gateway.server import Part, Server, allow_descriptors, open_listeners, uris
from gateway.settings import Settings
from gateway.snapshot import Snapshot
from gateway.trust import (
    Guards,
    Trust,
    check_guards,
    digest_of,
    guards_of,
    load_trust,
    parts_of,
)
from gateway.workers import CUT, RELOAD, Post, WorkerLog, Workers

logger = logging.getLogger(__name__)

_AGAIN_S: Final = 1.0  # between two reads of a new worker
_READS: Final = 4  # at the most, until two in a row are equal

Say = Callable[[str], None]
"""What is done with each NBD URI, once clients are served. BrokenPipeError ends the gateway."""


def run_gateway(settings: Settings, say: Say, reread: Reread | None = None) -> bool:
    """Serve until SIGTERM or SIGINT. Returns whether all sessions came to their own end then; from
    the moment in which the listeners open, signals have no other effect.

    On SIGHUP, and when they have changed, the files are loaded anew, and the rules that `reread`
    gives. With `settings.user` this process is that user's from here on.
    Raises SettingsError, ListenError and GatewayError, with several workers before any of them is
    there.
    """
    drop = _giving_up_root(settings)
    if len(settings.shares) > 1:
        return _serve_with_workers(settings, say, reread, drop)
    server = Server(settings, reread=reread)
    _announce(settings, server.trust)
    allow_descriptors(settings)
    signals.hold()  # until the server receives them
    with open_listeners(settings, drop) as listeners:
        return trio.run(_run, server, say, listeners)


def _giving_up_root(settings: Settings) -> Callable[[], None]:
    """What is to be done once files are read and ports bound. Raises SettingsError: whom nobody
    can become is said before anything is done."""
    user = settings.user
    account = None if user is None else account_of(user)

    def drop() -> None:
        if account is not None:
            become(account)
            logger.info("now %s", account)
        elif unprivileged := warning():
            logger.warning("%s", unprivileged)

    return drop


# -- in this process


async def _run(server: Server, say: Say, listeners: Listeners) -> bool:
    """Raises what the server and `say` raise, ungrouped."""
    drained = False

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        nonlocal drained
        drained = await server.run(listeners=listeners, task_status=task_status)
        nursery.cancel_scope.cancel()

    failure: Exception | None = None
    try:
        with trio.open_signal_receiver(signal.SIGHUP) as hangups:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_reload_on, hangups, server)
                listening = await nursery.start(run)
                signals.release()
                _say_all(listening, say)
    except* (GatewayError, BrokenPipeError) as group:
        failure = _first(group)
    if failure is not None:
        raise failure
    return drained


async def _reload_on(hangups: AsyncIterator[int], server: Server) -> None:
    async for _ in hangups:
        logger.info("SIGHUP: reloading")
        server.reload()


def _first(group: ExceptionGroup[Exception]) -> Exception:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, ExceptionGroup) else found


# -- in workers


class _InUse:
    """What the workers tell each other, in memory that they share: the digest of the set that was
    loaded last, and the guards that any set has had."""

    def __init__(self, trust: Trust) -> None:
        self._memory = mmap.mmap(-1, len(trust.digest) + 1)
        self._size = len(trust.digest)
        self.put(trust)

    def put(self, trust: Trust) -> None:
        """A worker has loaded this one. Half of it from one and half from another is no digest."""
        self._memory[: self._size] = trust.digest
        self._memory[self._size] |= guards_of(trust)

    def still_is(self, trust: Trust) -> bool:
        """Whether nothing newer has been loaded."""
        return self._memory[: self._size] == trust.digest

    @property
    def guards(self) -> Guards:
        return Guards(self._memory[self._size])


def _serve_with_workers(
    settings: Settings, say: Say, reread: Reread | None, drop: Callable[[], None]
) -> bool:
    trust = load_trust(settings)
    in_use = _InUse(trust)
    _announce(settings, trust)
    allow_descriptors(settings)
    signals.hold()  # the supervisor waits for them, and workers release them
    with open_listeners(settings, drop) as listeners:
        listening = uris(settings, listeners, trust)

        def work(post: Post) -> bool:
            now: Trust | None = trust
            if post.number > len(settings.shares):
                now = _load_again(settings, reread, trust, in_use, post)
            if now is None:
                return True
            part = Part(now, listeners.shared(), post, in_use.put, in_use.still_is)
            return trio.run(_work, Server(settings, part, reread=reread), post)

        shares = settings.shares
        logger.info("%d workers, %d clients each at most", len(shares), shares[0])
        workers = Workers(Places(shares), work, drain_timeout_s=settings.drain_timeout_s)
        return workers.run(up=lambda: _say_all(listening, say), ending=listeners.close)


def _load_again(
    settings: Settings, reread: Reread | None, first: Trust, in_use: _InUse, post: Post
) -> Trust | None:
    """The set for a worker that takes another's place; None: it is to end before it has one.

    With files that cannot be used it takes the `first` set, which the supervisor has; but if the
    others have gone on to a later one, nobody enters here until the files are good: what was
    revoked since then would be good again.
    """
    log, said = WorkerLog(logger, post.number), ""
    while True:
        try:
            trust = _load_steadily(settings if reread is None else reread, first)
            check_guards(in_use.guards, trust)
        except Exception as wrong:
            why = f"{wrong}{remedy(wrong, settings.user)}"
            if not isinstance(wrong, SettingsError):
                log.exception("bug: the files cannot be looked at")
            if in_use.still_is(first):
                log.error("the files cannot be used, those of the start serve on: %s", why)
                return first
            if why != said:
                log.error("the files cannot be used, and nobody enters here until then: %s", why)
            said = why
            if _waits_for_order(post, settings.reload_interval_s):
                return None
        else:
            in_use.put(trust)
            if said:  # and who asked for a reload meanwhile has an answer
                log.info("reload: the files can be used again")
            return trust


def _load_steadily(reread: Settings | Reread, first: Trust) -> Trust:
    """As the others do it: two reads have to be equal, since it may be half of what is being
    written. That they are not is nobody's mistake: it waits a little. Raises SettingsError."""

    def read() -> tuple[Settings, Snapshot, bytes]:
        settings = reread if isinstance(reread, Settings) else reread()
        files = Snapshot.take(settings.tls)
        return settings, files, digest_of(parts_of(settings, files))

    settings, files, digest = read()
    if digest == first.digest:
        return load_trust(settings, files, first)
    for _ in range(_READS - 1):
        before = digest
        time.sleep(_AGAIN_S)
        settings, files, digest = read()
        if digest == before:
            return load_trust(settings, files, first)
    raise SettingsError("the files are being written")


def _waits_for_order(post: Post, seconds: float) -> bool:
    """Whether it is to end. Returns for RELOAD, and after some seconds too, if they are not 0."""
    queue = select.poll()
    queue.register(post.orders, select.POLLIN)
    if not queue.poll(seconds * 1000 or None):
        return False
    return os.read(post.orders, 1) != RELOAD


async def _work(server: Server, post: Post) -> bool:
    """A worker's whole life. SIGTERM to it alone is for it alone: it drains, and is replaced."""
    log = WorkerLog(logger, post.number)
    drained = False

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        nonlocal drained
        drained = await server.run(handle_signals=False, task_status=task_status)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        nursery.start_soon(_obey, server, post, log)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            post.up()
            async for _ in signals:
                log.info("SIGTERM: ending")
                server.drain()
    return drained


async def _obey(server: Server, post: Post, log: WorkerLog) -> None:
    """Do what the supervisor says, and end when there is none any more."""
    while True:
        await trio.lowlevel.wait_readable(post.orders)
        order = os.read(post.orders, 1)
        if order == RELOAD:
            server.reload()
            continue
        if order == CUT:
            server.cut()
            continue
        server.drain()
        if not order:
            log.warning("the supervisor is gone: ending")
            return


# -- what is said


def _say_all(listening: list[str], say: Say) -> None:
    for uri in listening:
        say(uri)
        logger.info("listening on %s", uri)


def _announce(settings: Settings, trust: Trust) -> None:
    """Say aloud what was decided, and from which files."""
    if settings.config is not None:
        logger.info("rules from %s", settings.config)
    for concern in trust.concerns(datetime.now(UTC)):
        logger.warning("%s", concern)
    tls = settings.tls
    if tls is None:
        logger.warning("TLS is off: whoever reaches the listener may open the export")
        return
    if tls.psk is not None:
        logger.info("clients need a pre-shared key out of %s", tls.psk)
        return
    logger.info("certificate %s, key %s", tls.cert, tls.key)
    if tls.client_ca is None:
        logger.warning("anonymous clients are allowed: everybody may open the export")
    else:
        logger.info("clients need a certificate of the CA in %s", tls.client_ca)
    if tls.crl is not None:
        logger.info("revocations from %s", tls.crl)
