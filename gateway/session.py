"""One client from accept to close. Owns the order of things: TLS, identity, upstream, data."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import trio

from gateway.access import Identity
from gateway.errors import ChannelClosed, PeerError, SessionEnd, TLSRefused
from gateway.nbd.haggling import Haggling
from gateway.nbd.negotiation import (
    Ask,
    Close,
    Effect,
    EnterTransmission,
    Greeted,
    Greeting,
    PlainHaggling,
    Send,
    StartTLS,
)
from gateway.nbd.oldstyle import OldstyleHaggling
from gateway.nbd.pairing import Question, Terms
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.transmission import Transmission
from gateway.relay import Relay
from gateway.settings import Settings
from gateway.tls import LEFT, identity, refusal
from gateway.transport import Channel
from gateway.upstream import Upstream

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S: Final = 3.0
# Bytes at a time of options. Between two such portions the others have their turn, so that one
# client's options, which come by the thousand if it likes, do not starve them.
_RECEIVE: Final = 4096
_QUIET_ENDS: Final = frozenset({SessionEnd.PROBE})
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


class SessionLog(logging.LoggerAdapter[logging.Logger]):
    """Puts the session's name and the client's address in front of every line."""

    def __init__(self, name: str, peer: str) -> None:
        super().__init__(logger)
        self._prefix = f"[{name}] {peer}: "

    def process(self, msg: object, kwargs: object) -> tuple[object, object]:  # type: ignore[override]
        return f"{self._prefix}{msg}", kwargs


class _Ended(Exception):
    """The session is over, in a way that is no failure of anybody."""

    def __init__(self, end: SessionEnd, detail: str = "") -> None:
        super().__init__(end, detail)
        self.end, self.detail = end, detail


@dataclass(frozen=True, slots=True)
class _Agreed:
    """The outcome of the negotiation."""

    terms: Terms
    rest: bytes  # the client's first bytes of the transmission phase, if it was that quick


class Session:
    """One client. `run` it once; it closes the socket and never raises but for cancellation.

    `name` is for the log. `context` None is NOTLS mode (proto.md, "NOTLS mode"), for loopback and
    Unix sockets. In transmission, which may last for months, it holds on to nothing of the
    negotiation.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        name: str,
        settings: Settings,
        context: ssl.SSLContext | None,
    ) -> None:
        self._log = SessionLog(name, peer)
        self._settings = settings
        self._context = context
        self._channel = Channel(sock)
        self._upstream: Channel | None = None  # in transmission
        self._machine: PlainHaggling | Haggling | OldstyleHaggling | None = None
        self._relay: Relay | None = None
        self._identity: Identity | None = None
        self._tls_words = "no TLS"
        self._shutting_down = False
        self._negotiation = trio.CancelScope()
        self._evicted = False
        self._started = trio.current_time()
        _tune(sock)

    async def run(self) -> None:
        """Serve the client to its end. Cancelled: everything is closed in CLOSE_TIMEOUT_S."""
        end, detail = SessionEnd.SHUTDOWN, ""
        try:
            agreed = await self._negotiate_in_time()
            relay = self._relay = self._enter_transmission(agreed)
            end = await relay.run(agreed.rest)
            detail = relay.detail
        except _Ended as over:
            end, detail = over.end, over.detail
        except TLSRefused as refused:
            end, detail = SessionEnd.TLS_FAILED, f"{refused.reason}: {refused}"
        except PeerError as fault:
            end, detail = SessionEnd.CLIENT_BROKE_PROTOCOL, fault.what
        except ChannelClosed as closed:
            if self._channel.bytes_read == 0 and self._machine is None:
                end = SessionEnd.PROBE  # gone with our greeting unread, which makes it a reset
            else:  # perhaps behind a refusal: clients need not wait for the answer to an ABORT
                end, detail = SessionEnd.CLIENT_LEFT, self._refused() or str(closed)
        except Exception:  # a bug costs this client only
            end = SessionEnd.BUG
            self._log.exception("bug: dropping this client only")
        finally:
            try:
                await self._close_client()
                if self._relay is not None:
                    await self._relay.aclose()
            except Exception:
                self._log.exception("bug: closing this session in disorder")
            finally:
                if self._upstream is not None:
                    self._upstream.close()
                self._log_end(end, detail, trio.current_time() - self._started)

    def shutdown(self) -> None:
        """Begin to end: no new options or requests, what is in flight goes on to its end.

        proto.md, "Termination of the session during option haggling" (NBD_REP_ERR_SHUTDOWN) and
        "Terminating the transmission phase" (NBD_ESHUTDOWN).
        """
        self._shutting_down = True
        if self._relay is not None:
            self._relay.shutdown()
        elif self._machine is not None:
            self._machine.shutdown()
            if isinstance(self._machine, OldstyleHaggling):
                self._negotiation.cancel()  # there is no word to say, so none to wait for

    @property
    def unproven_s(self) -> float:
        """For how many seconds this client has not proved anything; 0 once TLS is up or `evict`
        was called."""
        proven = isinstance(self._machine, Haggling) or self._relay is not None
        if self._context is None or proven or self._evicted:
            return 0.0
        return trio.current_time() - self._started

    def evict(self) -> None:
        """End a session that is `unproven_s`, to make room."""
        self._evicted = True
        self._negotiation.cancel()

    # -- the order of things

    async def _negotiate_in_time(self) -> _Agreed:
        self._negotiation.deadline = self._started + self._settings.handshake_timeout_s
        with self._negotiation:
            return await self._negotiate()
        if not isinstance(self._machine, Haggling):
            self._channel.close()  # before TLS there is no end to be polite about
        if isinstance(self._machine, OldstyleHaggling) and self._shutting_down:
            raise _Ended(SessionEnd.SHUTDOWN)
        raise _Ended(SessionEnd.TIMEOUT, "others wait for its place" if self._evicted else "")

    async def _negotiate(self) -> _Agreed:
        settings = self._settings
        policy = ExportPolicy(settings.export, settings.read_only, settings.upgrades)
        if settings.oldstyle:
            oldstyle = self._machine = OldstyleHaggling(policy)
            if self._shutting_down:
                oldstyle.shutdown()
            return await self._haggle(oldstyle, oldstyle.begin())
        greeting = Greeting(tls_required=self._context is not None)
        await self._channel.send_all(greeting.hello())
        greeted = await self._greet(greeting)
        rest = greeting.rest()
        if self._context is not None:
            await self._haggle_in_plaintext(rest)
            rest = b""
            await self._start_tls(self._context)
        haggling = self._machine = Haggling(
            policy, tls=self._context is not None, no_zeroes=greeted.no_zeroes
        )
        if self._shutting_down:
            haggling.shutdown()
        return await self._haggle(haggling, haggling.receive(rest))

    async def _greet(self, greeting: Greeting) -> Greeted:
        while True:
            data = await self._channel.receive(_RECEIVE)
            if not data:
                left = self._channel.bytes_read
                raise _Ended(SessionEnd.CLIENT_LEFT if left else SessionEnd.PROBE)
            for effect in greeting.receive(data):
                assert isinstance(effect, Greeted)
                return effect

    async def _haggle_in_plaintext(self, rest: bytes) -> None:
        machine = self._machine = PlainHaggling()
        if self._shutting_down:
            machine.shutdown()
        data = rest
        while True:
            for effect in _joined(machine.receive(data)):
                if isinstance(effect, StartTLS):
                    return
                await self._act(effect)
            data = await self._channel.receive(_RECEIVE)
            if not data:
                left = machine.end is SessionEnd.ABORTED
                raise _Ended(SessionEnd.CLIENT_LEFT if left else machine.end)

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        try:
            self._channel = channel = await self._channel.start_tls(context)
        except ssl.SSLError as error:
            raise refusal(error) from None
        except ChannelClosed:
            raise TLSRefused("eof", LEFT) from None
        self._identity = identity(channel.tls)
        cipher = channel.tls.cipher()
        self._tls_words = f"{channel.tls.version()} {cipher[0] if cipher else ''}"

    async def _haggle(self, machine: Haggling | OldstyleHaggling, effects: list[Effect]) -> _Agreed:
        settings = self._settings
        upstream = Upstream(
            settings.socket,
            self._log,
            oldstyle_name=settings.export or "",
            timeout_s=settings.handshake_timeout_s / 2,
        )
        try:
            terms = await self._haggle_with(upstream, machine, effects)
            self._upstream = upstream.take_channel()
        finally:
            if self._upstream is None:
                await upstream.aclose()
        self._machine = None
        return _Agreed(terms, machine.rest())

    async def _haggle_with(
        self, upstream: Upstream, machine: Haggling | OldstyleHaggling, effects: list[Effect]
    ) -> Terms:
        while True:
            question: Question | None = None
            for effect in _joined(effects):
                match effect:
                    case Ask(question):
                        pass  # always the last one: what else there is depends on the answer
                    case EnterTransmission(terms):
                        return terms
                    case _:
                        await self._act(effect)
            if question is not None:
                effects = machine.answer(await upstream.ask(question))
                continue
            assert isinstance(machine, Haggling)
            data = await self._channel.receive(_RECEIVE)
            if not data:
                raise _Ended(SessionEnd.CLIENT_LEFT, machine.refused)
            effects = machine.receive(data)

    async def _act(self, effect: Effect) -> None:
        match effect:
            case Send(data):
                await self._channel.send_all(data)
            case Close(reason):
                raise _Ended(reason, self._refused())
            case _:
                raise AssertionError(effect)

    def _refused(self) -> str:
        machine = self._machine
        return machine.refused if isinstance(machine, Haggling | OldstyleHaggling) else ""

    def _enter_transmission(self, agreed: _Agreed) -> Relay:
        assert self._upstream is not None
        terms = agreed.terms
        relay = Relay(self._channel, self._upstream, Transmission(terms))
        self._log.info(
            "open: export %r, %d bytes, %s, %s, %s",
            terms.export[:80],
            terms.size,
            "read-only" if terms.read_only else "read-write",
            self._identity or "anonymous",
            self._tls_words,
        )
        self._identity, self._tls_words = None, ""
        if self._shutting_down:
            relay.shutdown()
        return relay

    async def _close_client(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT_S):
            await self._channel.aclose()
        self._channel.close()

    def _log_end(self, end: SessionEnd, detail: str, seconds: float) -> None:
        level = logging.DEBUG if end in _QUIET_ENDS else logging.INFO
        self._log.log(
            level,
            "closed: %s%s; %d bytes in, %d out, %.1f s",
            end.value,
            f" ({detail})" if detail else "",
            self._channel.bytes_read,
            self._channel.bytes_written,
            seconds,
        )


def _joined(effects: list[Effect]) -> Iterator[Effect]:
    """The same, with neighbouring `Send`s in one: each costs a system call and a TLS record."""
    words: list[bytes] = []
    for effect in effects:
        if isinstance(effect, Send):
            words.append(effect.data)
            continue
        if words:
            yield Send(b"".join(words))
            words.clear()
        yield effect
    if words:
        yield Send(b"".join(words))


def _tune(sock: socket.socket) -> None:
    """Socket options of a client's connection."""
    if sock.family == socket.AF_UNIX:
        return
    # Requests and replies are whole messages already (proto.md: "SHOULD disable Nagle").
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
