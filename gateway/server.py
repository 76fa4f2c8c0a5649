"""The gateway as a whole: accept, one nursery task a client, and the orderly end."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
from typing import Final

import trio

from gateway.listeners import Listeners
from gateway.session import Session
from gateway.settings import Settings
from gateway.tls import server_context, server_names

logger = logging.getLogger(__name__)

_OTHER_DESCRIPTORS: Final = 64  # listeners, log, epoll, ...
# How long a client without TLS is safe from being put out when all slots are taken; a handshake
# takes five round trips at most.
_UNPROVEN_S: Final = 1.5
_BACK_OFF_S: Final = (0.005, 1.0)  # first and longest wait after an accept that failed
# Out of descriptors or memory: it may get better. Everything else about a listener is a bug.
_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# accept(2): errors of the connection itself, "treat them like EAGAIN".
_GONE = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
    }
)


class Server:
    """Serves clients until SIGTERM or SIGINT. `run` it once."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError for files that cannot be used."""
        self._settings = settings
        self._context = None if settings.tls is None else server_context(settings.tls)
        self._slots = trio.Semaphore(settings.max_connections)
        self._sessions: dict[Session, None] = {}  # a set in the order of their beginning
        self._count = 0

    async def run(
        self,
        *,
        handle_signals: bool = True,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> bool:
        """Listen and serve. Starts with the NBD URIs that are listened on.

        Returns True when every session came to its own end after the signal, False when what was
        left had to be cut: after `drain_timeout_s`, or by a second signal. Cancelled: cuts.
        Raises ListenError, and SettingsError for an address that `--tls off` forbids.
        """
        settings = self._settings
        _allow_descriptors(settings.max_connections)
        listeners = Listeners.open(
            settings.listen, local_only=settings.tls is None, environ=os.environ
        )
        async with trio.open_nursery() as signals:
            async with trio.open_nursery() as sessions:
                with listeners:
                    async with trio.open_nursery() as accepting:
                        for sock in listeners.sockets:
                            accepting.start_soon(self._accept_from, sock, sessions)
                        if handle_signals:
                            await signals.start(self._end_on_signal, accepting, sessions)
                        task_status.started(self._uris(listeners))
                logger.info("listeners closed, %d sessions to end", len(self._sessions))
                sessions.cancel_scope.deadline = trio.current_time() + settings.drain_timeout_s
                for session in list(self._sessions):
                    session.shutdown()
            signals.cancel_scope.cancel()
        return not sessions.cancel_scope.cancelled_caught

    def _uris(self, listeners: Listeners) -> list[str]:
        tls = self._settings.tls
        names = [] if tls is None else server_names(tls.cert)
        return listeners.uris(self._settings.export or "", names, tls=tls is not None)

    async def _accept_from(self, listener: socket.socket, sessions: trio.Nursery) -> None:
        back_off_s, longest_s = _BACK_OFF_S
        while True:
            await trio.lowlevel.wait_readable(listener)
            # Taken before accept: a client that cannot be served waits in the backlog.
            await self._take_slot()
            try:
                sock, address = listener.accept()
            except OSError as error:
                self._slots.release()
                if isinstance(error, BlockingIOError) or error.errno in _GONE:
                    continue
                if error.errno not in _OUT_OF:
                    raise
                logger.warning("cannot accept, trying again: %s", error.strerror)
                await trio.sleep(back_off_s)
                back_off_s = min(2 * back_off_s, longest_s)
                continue
            back_off_s = _BACK_OFF_S[0]
            sessions.start_soon(self._serve, sock, address)

    async def _take_slot(self) -> None:
        """Wait for a slot. If none is free, end a session without TLS that is no longer new.

        So silent clients keep nobody out for long. The oldest goes first.
        """
        while True:
            if not self._slots.value:
                for session in self._sessions:
                    if session.unproven_s > _UNPROVEN_S:
                        session.evict()
                        break
            with trio.move_on_after(_UNPROVEN_S):
                await self._slots.acquire()
                return

    async def _serve(self, sock: socket.socket, address: object) -> None:
        self._count += 1
        session = Session(sock, _peer(sock, address), self._count, self._settings, self._context)
        self._sessions[session] = None
        try:
            await session.run()
        finally:
            del self._sessions[session]
            self._slots.release()

    async def _end_on_signal(
        self,
        accepting: trio.Nursery,
        sessions: trio.Nursery,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if accepting.cancel_scope.cancel_called:
                    logger.warning("second signal: ending now")
                    sessions.cancel_scope.cancel()
                    return
                logger.info("%s: ending", signal.Signals(number).name)
                accepting.cancel_scope.cancel()


def _allow_descriptors(clients: int) -> None:
    """Two sockets a client: raise our soft limit as far as it takes, and say if it cannot be."""
    needed = 2 * clients + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < needed:
        logger.warning(
            "%d clients need %d descriptors, and %d are allowed: raise LimitNOFILE= or ulimit -n, "
            "or lower --max-connections",
            clients,
            needed,
            limit,
        )


def _peer(sock: socket.socket, address: object) -> str:
    if sock.family == socket.AF_UNIX:
        return "unix"
    assert isinstance(address, tuple)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
