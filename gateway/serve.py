"""From Settings to the end of the gateway: in this process, or in several workers.

With one worker nothing is forked. With more, all that can be wrong (files, addresses) is found out
by the supervisor before the first fork; TLS context and listening sockets are made once, for all.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import trio

from gateway.errors import GatewayError
from gateway.places import Places
from gateway.server import (
    Part,
    Server,
    allow_descriptors,
    make_context,
    open_listeners,
    uris,
)
from gateway.settings import Settings
from gateway.workers import CUT, Post, WorkerLog, Workers

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
"""What is done with each NBD URI, once clients are served. BrokenPipeError ends the gateway."""


def run_gateway(settings: Settings, say: Say) -> bool:
    """Serve until SIGTERM or SIGINT. Returns whether all sessions came to their own end then.

    Raises SettingsError and ListenError, with several workers before any of them is there.
    """
    if len(settings.shares) > 1:
        return _serve_with_workers(settings, say)
    server = Server(settings)
    _announce(settings)
    return trio.run(_run, server, say)


# -- in this process


async def _run(server: Server, say: Say) -> bool:
    """Raises what the server and `say` raise, ungrouped."""
    drained = False

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        nonlocal drained
        drained = await server.run(task_status=task_status)

    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            _say_all(await nursery.start(run), say)
    except* (GatewayError, BrokenPipeError) as group:
        failure = _first(group)
    if failure is not None:
        raise failure
    return drained


def _first(group: ExceptionGroup[Exception]) -> Exception:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, ExceptionGroup) else found


# -- in workers


def _serve_with_workers(settings: Settings, say: Say) -> bool:
    context = make_context(settings)
    _announce(settings)
    allow_descriptors(settings)
    with open_listeners(settings) as listeners:
        listening = uris(settings, listeners)

        def work(post: Post) -> bool:
            server = Server(settings, Part(context, listeners.shared(), post))
            return trio.run(_work, server, post)

        shares = settings.shares
        logger.info("%d workers, %d clients each at most", len(shares), shares[0])
        workers = Workers(Places(shares), work, drain_timeout_s=settings.drain_timeout_s)
        return workers.run(up=lambda: _say_all(listening, say), ending=listeners.close)


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


def _announce(settings: Settings) -> None:
    """Say aloud what was decided, and from which files."""
    tls = settings.tls
    if tls is None:
        logger.warning("TLS is off: whoever reaches the listener may open the export")
        return
    logger.info("certificate %s, key %s", tls.cert, tls.key)
    if tls.client_ca is None:
        logger.warning("anonymous clients are allowed: everybody may open the export")
    else:
        logger.info("clients need a certificate of the CA in %s", tls.client_ca)
    if tls.crl is not None:
        logger.info("revocations from %s", tls.crl)
