"""One process of the gateway: accept, one nursery task a client, and the orderly end."""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from gateway.errors import Refusal, SessionEnd
from gateway.identity import Identity
from gateway.listeners import Listeners
from gateway.reload import Reloader, Reread
from gateway.session import Session
from gateway.settings import Settings
from gateway.trust import Keeper, Trust, load_trust
from gateway.workers import Post, WorkerLog

logger = logging.getLogger(__name__)

_OTHER_DESCRIPTORS: Final = 64  # listeners, log, epoll, ...
# A client in the queue is left to a worker that has fewer, and looked for again after each of these
# waits; after the last one that worker is taken to be busy or stuck.
_OTHERS_FIRST_S: Final = (0.001, 0.002, 0.003, 0.004)
# How long a client without TLS is safe from being put out when all slots are taken; a handshake
# takes five round trips at most.
_UNPROVEN_S: Final = 1.5
_RECHECKED: Final = 64  # sessions after a reload, between two turns of the others
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


@dataclass(frozen=True, slots=True)
class Part:
    """A worker's part of the gateway: what was made for all of them, and its own post."""

    trust: Trust
    listeners: Listeners
    post: Post
    in_use: Callable[[Trust], None] = lambda _: None  # told of each new set


class _Elsewhere(Trust):
    """The set, for a client at an address that it keeps out."""

    def objection(self, identity: Identity) -> Refusal | None:
        return Refusal.ADDRESS_NOT_ALLOWED


class Server:
    """Serves clients until it is told to end. `run` it once."""

    def __init__(
        self, settings: Settings, part: Part | None = None, *, reread: Reread | None = None
    ) -> None:
        """With a `part` this is one of several workers, and obeys no signals by itself. `reread`
        gives the settings for a reload.

        Raises SettingsError for files that cannot be used.
        """
        self._settings = settings
        self._part = part
        self._place = None if part is None else part.post.place
        self._keeper = Keeper(load_trust(settings) if part is None else part.trust)
        self._log = logger if part is None else WorkerLog(logger, part.post.number)
        limit = settings.max_connections if self._place is None else self._place.limit
        self._slots = trio.Semaphore(limit)
        # In the order of their beginning, each with its client's IP address.
        self._sessions: dict[Session, str | None] = {}
        self._clients = 0  # accepted and not yet closed
        self._count = 0
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._has_cut = False
        self._reloader = Reloader(
            settings, self._keeper, self._recheck, reread=reread, log=self._log
        )

    async def run(
        self,
        *,
        handle_signals: bool = True,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> bool:
        """Listen and serve. Starts with the NBD URIs that are listened on; none for a worker,
        whose supervisor says them, since the files of the start may be gone when it is forked.

        With `handle_signals`, SIGTERM and SIGINT are `drain`, a second one is `cut`. Returns True
        when every session came to its own end, False when what was left had to be cut: after
        `drain_timeout_s`, or by `cut`. Cancelled: cuts.
        Raises ListenError, and SettingsError for an address that `--tls off` forbids.
        """
        settings = self._settings
        if self._part is None:
            allow_descriptors(settings)
            listeners = open_listeners(settings)
        else:
            listeners = self._part.listeners
        async with trio.open_nursery() as signals:
            signals.start_soon(self._reloader.run)
            with self._serving:
                async with trio.open_nursery() as sessions:
                    with listeners, self._accepting:
                        async with trio.open_nursery() as accepting:
                            for sock in listeners.sockets:
                                accepting.start_soon(self._accept_from, sock, sessions)
                            if handle_signals:
                                await signals.start(self._end_on_signal)
                            task_status.started(
                                uris(settings, listeners, self._keeper.trust)
                                if self._part is None
                                else []
                            )
                    if self._place is not None:
                        self._place.close()
                    self._log.info("listeners closed, %d sessions to end", len(self._sessions))
                    self._serving.deadline = trio.current_time() + settings.drain_timeout_s
                    for session in list(self._sessions):
                        session.shutdown()
            signals.cancel_scope.cancel()
        return not self._has_cut

    def drain(self) -> None:
        """Begin to end: the listeners close, and what is in flight goes on to its end. Idempotent.

        With workers, clients in the queue go to the others.
        """
        self._accepting.cancel()

    def cut(self) -> None:
        """End now, whatever is in flight."""
        self._serving.cancel()

    def reload(self) -> None:
        """Begin to read files and rules anew. What is wrong with them is logged."""
        self._reloader.ask()

    @property
    def trust(self) -> Trust:
        """What new clients are measured by."""
        return self._keeper.trust

    # -- accepting

    async def _accept_from(self, listener: socket.socket, sessions: trio.Nursery) -> None:
        back_off_s, longest_s = _BACK_OFF_S
        while True:
            await trio.lowlevel.wait_readable(listener)
            if not await self._is_ours(listener):
                continue
            # Taken before accept: a client that cannot be served waits in the backlog.
            if not await self._take_slot(listener):
                continue
            try:
                sock, address = listener.accept()
            except OSError as error:
                self._slots.release()
                if isinstance(error, BlockingIOError) or error.errno in _GONE:
                    continue
                if error.errno not in _OUT_OF:
                    raise
                self._log.warning("cannot accept, trying again: %s", error.strerror)
                await trio.sleep(back_off_s)
                back_off_s = min(2 * back_off_s, longest_s)
                continue
            back_off_s = _BACK_OFF_S[0]
            self._count += 1
            if not self._admits(sock, address):
                self._slots.release()
                continue
            self._add_client(1)
            sessions.start_soon(self._serve, sock, address, self._name())

    def _admits(self, sock: socket.socket, address: object) -> bool:
        """Whether a client of this address is listened to; else it is closed without a word."""
        host = _host(sock, address)
        if host is None or self._keeper.trust.rules.admits(host):
            return True
        logger.info(
            "[%s] %s: closed: %s (%s: by --allow-from or --deny-from); 0 bytes in, 0 out, 0.0 s",
            self._name(),
            _peer(sock, address),
            SessionEnd.NOT_ALLOWED,
            Refusal.ADDRESS_NOT_ALLOWED,
        )
        sock.close()
        return False

    def _name(self) -> str:
        """Of the session that was accepted last."""
        return str(self._count) if self._part is None else f"{self._part.post.number}.{self._count}"

    async def _is_ours(self, listener: socket.socket) -> bool:
        """Leave a client to a worker that has fewer, for a while. False: it has been taken."""
        if self._place is None:
            return True
        for wait_s in _OTHERS_FIRST_S:
            if not self._place.others_first():
                break
            await trio.sleep(wait_s)
            if not _has_client(listener):
                return False
        return True

    async def _take_slot(self, listener: socket.socket) -> bool:
        """Wait for a slot. If none is free, end a session without TLS that is no longer new.

        So silent clients keep nobody out for long. The oldest goes first; with workers, the oldest
        of each, since each that is full makes room for whoever waits in the queue they share.
        False: the client that waited is gone, or another worker has it.
        """
        while True:
            if not self._slots.value:
                if not _has_client(listener):
                    return False
                for session in self._sessions:
                    if session.unproven_s > _UNPROVEN_S:
                        session.evict()
                        break
            with trio.move_on_after(_UNPROVEN_S):
                await self._slots.acquire()
                return True

    def _add_client(self, change: int) -> None:
        self._clients += change
        if self._place is not None:
            self._place.count(self._clients)

    # -- one client

    async def _serve(self, sock: socket.socket, address: object, name: str) -> None:
        session = Session(sock, _peer(sock, address), name, self._settings, self._keeper)
        self._sessions[session] = _host(sock, address)
        try:
            await session.run()
        except BaseException:  # one trio.Cancelled or a group of them: it raises nothing else
            self._has_cut = True
            raise
        finally:
            del self._sessions[session]
            self._slots.release()
            self._add_client(-1)

    # -- another set

    async def _recheck(self, trust: Trust) -> None:
        """Ask each session whether its client may stay. Those that come meanwhile are measured by
        this set already."""
        if self._part is not None:
            self._part.in_use(trust)
        elsewhere = _Elsewhere(trust.context, trust.rules)
        keep = self._settings.on_revoke == "keep"
        for number, (session, host) in enumerate(list(self._sessions.items()), 1):
            try:
                admitted = host is None or trust.rules.admits(host)
                session.recheck(trust if admitted else elsewhere, keep=keep)
                if not admitted and session.unproven_s:
                    session.expel(f"{Refusal.ADDRESS_NOT_ALLOWED}: its address is kept out now")
            except Exception:  # of one client we know nothing then
                self._log.exception("bug: a client cannot be measured by the new set: ending it")
                session.expel("it could not be measured by the new set")
            if number % _RECHECKED == 0:
                await trio.lowlevel.checkpoint()

    # -- the end

    async def _end_on_signal(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if self._accepting.cancel_called:
                    self._log.warning("second signal: ending now")
                    self.cut()
                    return
                self._log.info("%s: ending", signal.Signals(number).name)
                self.drain()


def open_listeners(settings: Settings) -> Listeners:
    """Raises ListenError, and SettingsError for an address that `--tls off` forbids."""
    return Listeners.open(settings.listen, local_only=settings.tls is None, environ=os.environ)


def uris(settings: Settings, listeners: Listeners, trust: Trust) -> list[str]:
    """One NBD URI per address that is listened on."""
    return listeners.uris(settings.export or "", trust.names, tls=settings.tls is not None)


def allow_descriptors(settings: Settings) -> None:
    """Two sockets a client: raise our soft limit as far as it takes, and say if it cannot be.

    The limit is one of each process, so with workers it is the share of one that has to fit;
    called before they are forked.
    """
    clients, workers = settings.shares[0], len(settings.shares)
    needed = 2 * clients + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < needed:
        logger.warning(
            "%d clients%s need %d descriptors, and %d are allowed: raise LimitNOFILE= or "
            "ulimit -n, or lower --max-connections, or spread them over more --workers",
            clients,
            f" in each of {workers} workers" if workers > 1 else "",
            needed,
            limit,
        )


def _has_client(listener: socket.socket) -> bool:
    """Whether a client waits in its queue."""
    queue = select.poll()
    queue.register(listener, select.POLLIN)
    return bool(queue.poll(0))


def _host(sock: socket.socket, address: object) -> str | None:
    """The client's IP address; None on a Unix socket."""
    if sock.family == socket.AF_UNIX:
        return None
    assert isinstance(address, tuple)
    return str(address[0])


def _peer(sock: socket.socket, address: object) -> str:
    if sock.family == socket.AF_UNIX:
        return "unix"
    assert isinstance(address, tuple)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
