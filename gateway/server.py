"""One process of the gateway: accept, one nursery task a client, and the orderly end."""

from __future__ import annotations

import functools
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from gateway.accepting import accept_from
from gateway.errors import Refusal, SessionEnd
from gateway.few_lines import FewLines
from gateway.gate import Entry, Gate, Refused
from gateway.identity import Identity
from gateway.listeners import Listeners
from gateway.places import Place, Places
from gateway.reload import Reloader, Reread
from gateway.session import Session
from gateway.settings import Settings
from gateway.trust import Keeper, Trust, load_trust
from gateway.workers import Post, WorkerLog

logger = logging.getLogger(__name__)

_OTHER_DESCRIPTORS: Final = 64  # listeners, log, epoll, ...


@dataclass(frozen=True, slots=True)
class Part:
    """A worker's part of the gateway: what was made for all of them, and its own post."""

    trust: Trust
    listeners: Listeners
    post: Post
    in_use: Callable[[Trust], None] = lambda _: None  # told of each new set
    is_newest: Callable[[Trust], bool] = lambda _: True  # whether no other has a newer one


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
        self._keeper = Keeper(load_trust(settings) if part is None else part.trust)
        self._log = logger if part is None else WorkerLog(logger, part.post.number)
        alone = Places((settings.max_connections,))
        self._place = Place(alone, 0) if part is None else part.post.place
        self._gate = Gate(settings.limits, self._place)
        self._refused = FewLines(self._log, "clients were closed without a word")
        self._sessions: dict[Session, Entry] = {}  # in the order of their beginning
        self._count = 0
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._has_cut = False
        self._reloader = Reloader(
            settings,
            self._keeper,
            self._recheck,
            refused=self._look_at_others,
            reread=reread,
            log=self._log,
        )

    async def run(
        self,
        *,
        handle_signals: bool = True,
        listeners: Listeners | None = None,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> bool:
        """Listen and serve. Starts with the NBD URIs that are listened on; none for a worker,
        whose supervisor says them, since the files of the start may be gone when it is forked.

        `listeners` are those that are open already; whoever's they are, they are closed here. With
        `handle_signals`, SIGTERM and SIGINT are `drain`, a second one is `cut`. Returns True when
        every session came to its own end, False when what was left had to be cut: after
        `drain_timeout_s`, or by `cut`. Cancelled: cuts.
        Raises ListenError, and SettingsError for an address that `--tls off` forbids.
        """
        settings = self._settings
        if self._part is not None:
            listeners = self._part.listeners
        elif listeners is None:
            allow_descriptors(settings)
            listeners = open_listeners(settings)
        async with trio.open_nursery() as signals:
            signals.start_soon(self._reloader.run)
            signals.start_soon(self._refused.run)
            with self._serving:
                async with trio.open_nursery() as sessions:
                    with listeners, self._accepting:
                        async with trio.open_nursery() as accepting:
                            for sock in listeners.sockets:
                                accepting.start_soon(
                                    accept_from,
                                    sock,
                                    self._gate,
                                    functools.partial(self._bring_in, sessions),
                                    self._log,
                                )
                            if handle_signals:
                                await signals.start(self._end_on_signal)
                            task_status.started(
                                uris(settings, listeners, self._keeper.trust)
                                if self._part is None
                                else []
                            )
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

    # -- one client

    def _bring_in(self, sessions: trio.Nursery, sock: socket.socket, address: object) -> None:
        """A client has come: give it a session, or close it without a word."""
        self._count += 1
        number, part = str(self._count), self._part
        name = number if part is None else f"{part.post.number}.{number}"
        host, peer = _host(sock, address), _peer(sock, address)
        try:
            if host is not None and not self._keeper.trust.rules.admits(host):
                raise Refused(Refusal.ADDRESS_NOT_ALLOWED, "by --allow-from or --deny-from")
            entry = self._gate.enter(host)
        except Refused as refused:
            sock.close()
            self._refused.info(
                refused.reason,
                f"[{name}] {peer}: closed: {SessionEnd.NOT_ALLOWED} ({refused.reason}: {refused}); "
                "0 bytes in, 0 out, 0.0 s",
            )
            return
        try:
            session = Session(sock, peer, name, self._settings, self._keeper, entry.prove)
        except OSError as error:  # of the connection, or memory
            sock.close()
            entry.close()
            self._log.warning("cannot serve %s: %s", peer, error.strerror)
            return
        entry.evict = session.evict
        self._sessions[session] = entry
        sessions.start_soon(self._serve, session, entry)

    async def _serve(self, session: Session, entry: Entry) -> None:
        try:
            await session.run()
        except BaseException:  # one trio.Cancelled or a group of them: it raises nothing else
            self._has_cut = True
            raise
        finally:
            del self._sessions[session]
            entry.close()

    # -- another set

    async def _recheck(self, trust: Trust) -> None:
        """Ask each session whether its client may stay. Those that come meanwhile are measured by
        this set already."""
        if self._part is not None:
            self._part.in_use(trust)
        elsewhere = _Elsewhere(trust.context, trust.rules)
        keep = self._settings.on_revoke == "keep"
        self._gate.reopen()
        for session, entry in list(self._sessions.items()):
            try:
                admitted = entry.host is None or trust.rules.admits(entry.host)
                session.recheck(trust if admitted else elsewhere, keep=keep)
                if not admitted and not entry.proven:
                    session.expel(f"{Refusal.ADDRESS_NOT_ALLOWED}: its address is kept out now")
            except Exception:  # of one client we know nothing then
                self._log.exception("bug: a client cannot be measured by the new set: ending it")
                session.expel("it could not be measured by the new set")
            await trio.lowlevel.checkpoint()

    def _look_at_others(self) -> None:
        """The files cannot be used. Has another worker something newer than this one?"""
        if self._part is not None and not self._part.is_newest(self._keeper.trust):
            if not self._gate.is_shut:
                self._log.error(
                    "other workers have gone on to later files: nobody enters here until they can "
                    "be read again"
                )
            self._gate.shut()

    # -- the end

    async def _end_on_signal(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if self._serving.cancel_called:
                    continue  # a third must not find its default again, which is to kill
                if self._accepting.cancel_called:
                    self._log.warning("second signal: ending now")
                    self.cut()
                    continue
                self._log.info("%s: ending", signal.Signals(number).name)
                self.drain()


def open_listeners(settings: Settings, drop: Callable[[], None] = lambda: None) -> Listeners:
    """`drop` gives privileges up once ports are bound, and before socket files are made.

    Raises what it raises, ListenError, and SettingsError for an address that `--tls off` forbids.
    """
    return Listeners.open(
        settings.listen, local_only=settings.tls is None, environ=os.environ, drop=drop
    )


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
