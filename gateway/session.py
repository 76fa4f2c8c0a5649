"""One client from accept to close. Owns the order of things: TLS, identity, upstream, data."""

from __future__ import annotations

import logging
import math
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import trio

from gateway.admission import Admission, proven_by_kernel
from gateway.errors import ChannelClosed, PeerError, Refusal, SessionEnd, TLSRefused
from gateway.identity import Identity
from gateway.limits import Limits
from gateway.nbd.haggling import Haggling
from gateway.nbd.negotiation import (
    Allowance,
    Ask,
    Barred,
    Close,
    Effect,
    EnterTransmission,
    Greeted,
    Greeting,
    PlainHaggling,
    Send,
    StartTLS,
    joined,
)
from gateway.nbd.oldstyle import OldstyleHaggling
from gateway.nbd.pairing import Question, Terms
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.transmission import InFlightLimits, Transmission
from gateway.redial import Redialler
from gateway.relay import Relay
from gateway.settings import Settings
from gateway.tls import LEFT, refusal
from gateway.transport import Channel
from gateway.trust import Keeper, Trust
from gateway.upstream import Upstream

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S: Final = 3.0
# Bytes at a time of options. Between two such portions the others have their turn, so that one
# client's options, which come by the thousand if it likes, do not starve them.
_RECEIVE: Final = 4096
_QUIET_ENDS: Final = frozenset({SessionEnd.PROBE})


class SessionLog(logging.LoggerAdapter[logging.Logger]):
    """Puts the session's name and the client's address in front of every line."""

    def __init__(self, name: str, peer: str) -> None:
        super().__init__(logger)
        self._prefix = f"[{name}] {peer}: "

    def process(self, msg: object, kwargs: object) -> tuple[object, object]:  # type: ignore[override]
        return f"{self._prefix}{msg}", kwargs


class _Ended(Exception):
    """The session is over, in a way that is no failure of anybody."""

    def __init__(self, end: SessionEnd) -> None:
        super().__init__(end)
        self.end = end


@dataclass(frozen=True, slots=True)
class _Agreed:
    """The outcome of the negotiation."""

    terms: Terms
    rest: bytes  # the client's first bytes of the transmission phase, if it was that quick


class Session:
    """One client. `run` it once; it closes the socket and never raises but for cancellation.

    `name` is for the log. `counts_in` is told who the client is once it may open something; False:
    too many of them are here. Who may enter is what the keeper's set says at that moment; without a
    context in it this is NOTLS mode (proto.md, "NOTLS mode"), for loopback and Unix sockets.
    In transmission, which may last for months, it holds on to nothing of the negotiation but who
    the client is and what it has opened.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        name: str,
        settings: Settings,
        keeper: Keeper,
        counts_in: Callable[[Identity], bool] = lambda _: True,
    ) -> None:
        self._log = SessionLog(name, peer)
        self._settings = settings
        self._keeper = keeper
        self._tls = keeper.trust.context is not None
        self._channel = Channel(sock)
        self._upstream: Channel | None = None  # in transmission
        self._redial: Redialler | None = None
        self._machine: PlainHaggling | Haggling | Barred | OldstyleHaggling | None = None
        self._relay: Relay | None = None
        self._admission = Admission(settings)
        self._counts_in = counts_in
        self.proven = False  # that it may open something
        self._tls_words = "no TLS"
        self._shutting_down = False
        self._evicted = False
        self._objection = ""  # to the client's being here any longer
        self._started = trio.current_time()
        deadline = self._started + settings.handshake_timeout_s
        self._scope = trio.CancelScope(deadline=deadline)  # until the end, the deadline until GO
        _tune(sock, settings.limits)

    async def run(self) -> None:
        """Serve the client to its end. Cancelled: everything is closed in CLOSE_TIMEOUT_S."""
        end, detail = SessionEnd.SHUTDOWN, ""
        try:
            with self._scope:
                agreed = await self._negotiate()
                self._scope.deadline = math.inf
                relay = self._relay = self._enter_transmission(agreed)
                end = await relay.run(agreed.rest)
                detail = relay.detail
            if self._scope.cancelled_caught:
                end = self._cut_short()
                detail = self._detail(end)
        except _Ended as over:
            end, detail = over.end, self._detail(over.end)
        except TLSRefused as refused:
            end, detail = SessionEnd.TLS_FAILED, f"{refused.reason}: {refused}"
        except PeerError as fault:
            end, detail = SessionEnd.CLIENT_BROKE_PROTOCOL, fault.what
        except ChannelClosed as closed:
            # Perhaps behind a refusal: clients need not wait for the answer to an ABORT.
            end = self._left()
            detail = self._detail(end) or str(closed)
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
                if self._relay is not None:
                    self._relay.upstream.close()
                elif self._upstream is not None:
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
                self._scope.cancel()  # there is no word to say, so none to wait for

    def recheck(self, trust: Trust, *, keep: bool) -> None:
        """End this session if its client could not do by this set what it may do now.

        For who is not known yet there is nothing to do: it will be measured by the keeper's set.
        With `keep`, what is open stays open; what is still negotiated does not.
        """
        objection = self._admission.objection(trust)
        if not objection:
            return
        if keep and self._admission.opened is not None:
            self._log.info("stays, though no longer allowed (%s)", objection)
            return
        self.expel(objection)

    def expel(self, objection: str) -> None:
        """End it now, whatever it is at. `objection` is for the log: a `Refusal`, and words.

        The relay keeps its writers across the cut, so nothing follows half a message.
        """
        self._objection = objection
        self._scope.cancel()

    def evict(self) -> None:
        """End a session that has not `proven` anything, to make room."""
        self._evicted = True
        self._scope.cancel()

    # -- the order of things

    async def _negotiate(self) -> _Agreed:
        if self._settings.oldstyle:
            policy = self._admit(Identity())
            if policy is None:
                raise _Ended(SessionEnd.NOT_ALLOWED)
            oldstyle = self._machine = OldstyleHaggling(policy)
            if self._shutting_down:
                oldstyle.shutdown()
            return await self._haggle(oldstyle, oldstyle.begin(), policy)
        greeting = Greeting(tls_required=self._tls)
        await self._channel.send_all(greeting.hello())
        greeted = await self._greet(greeting)
        rest, identity = greeting.rest(), Identity()
        if self._tls:
            await self._haggle_in_plaintext(rest)
            rest, identity = b"", await self._start_tls()
        # Here nobody has been asked, dialled or looked up yet.
        policy = self._admit(identity)
        if policy is None:
            await self._turn_away(rest)
        limits = self._settings.limits
        haggling = self._machine = Haggling(
            policy,
            Allowance(limits.options, limits.option_bytes),
            tls=self._tls,
            no_zeroes=greeted.no_zeroes,
        )
        if self._shutting_down:
            haggling.shutdown()
        return await self._haggle(haggling, haggling.receive(rest), policy)

    def _admit(self, identity: Identity) -> ExportPolicy | None:
        """What this client may open by the rules as they are now; None: nothing."""
        identity = proven_by_kernel(self._channel.socket, identity)
        policy = self._admission.admit(identity, self._keeper.trust.rules)
        if policy is not None and not self._counts_in(identity):
            self._admission.crowded()
            policy = None
        self.proven = policy is not None
        return policy

    @property
    def _before_tls(self) -> Allowance:
        """Of options, for who has proved nothing."""
        limits = self._settings.limits
        return Allowance(limits.plain_options, limits.plain_option_bytes)

    async def _greet(self, greeting: Greeting) -> Greeted:
        while True:
            for effect in greeting.receive(await self._receive()):
                assert isinstance(effect, Greeted)
                return effect

    async def _haggle_in_plaintext(self, rest: bytes) -> None:
        machine = self._machine = PlainHaggling(self._before_tls)
        if self._shutting_down:
            machine.shutdown()
        data = rest
        while True:
            for effect in joined(machine.receive(data)):
                if isinstance(effect, StartTLS):
                    return
                await self._act(effect)
            data = await self._receive()

    async def _start_tls(self) -> Identity:
        """Shake hands. Raises TLSRefused."""
        await self._await_hello()
        trust = self._keeper.trust
        assert trust.context is not None, "TLS cannot be switched off by a reload"
        try:
            self._channel = channel = await self._channel.start_tls(trust.context)
        except ssl.SSLError as error:
            raise refusal(error) from None
        except ChannelClosed:
            raise TLSRefused(Refusal.EOF, LEFT) from None
        identity = trust.identify(channel.tls)
        cipher = channel.tls.cipher()
        self._tls_words = f"{channel.tls.version()} {cipher[0] if cipher else ''}"
        if self._keeper.trust is not trust:  # replaced meanwhile, and nobody asked about this one
            objection = self._keeper.trust.objection(identity)
            if objection not in (None, Refusal.NOT_ALLOWED):  # that is for the rules to say
                raise TLSRefused(objection, f"{identity}, by what was loaded during its handshake")
        return identity

    async def _await_hello(self) -> None:
        """Who leaves behind NBD_OPT_STARTTLS has not even tried TLS."""
        await self._channel.readable()
        try:
            left = not self._channel.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            left = False
        except OSError:
            left = True
        if left:
            raise TLSRefused(Refusal.EOF_BEFORE_HELLO, "it left before it began TLS")

    async def _turn_away(self, rest: bytes) -> NoReturn:
        """Tell a client, as often as it asks, that there is nothing for it here."""
        barred = self._machine = Barred(self._admission.barred, self._before_tls)
        if self._shutting_down:
            barred.shutdown()
        data = rest
        while True:
            for effect in joined(barred.receive(data)):
                await self._act(effect)
            data = await self._receive()

    async def _haggle(
        self, machine: Haggling | OldstyleHaggling, effects: list[Effect], policy: ExportPolicy
    ) -> _Agreed:
        settings = self._settings
        upstream = self._dial(policy.name or "")
        try:
            terms = await self._haggle_with(upstream, machine, effects)
            self._upstream = upstream.take_channel()
            self._channel.stall_s = self._upstream.stall_s = (
                settings.limits.stall_timeout or math.inf
            )
            if settings.reconnect_s:
                name = policy.name or ""
                self._redial = Redialler(
                    lambda: self._dial(name, quiet=True),
                    upstream.agreed,
                    self._log,
                    within_s=settings.reconnect_s,
                )
        finally:
            if self._upstream is None:
                await upstream.aclose()
        self._machine = None
        return _Agreed(terms, machine.rest())

    def _dial(self, oldstyle_name: str, *, quiet: bool = False) -> Upstream:
        """An upstream that has not been asked anything yet."""
        return Upstream(
            self._settings.socket,
            self._log,
            oldstyle_name=oldstyle_name,
            timeout_s=self._settings.handshake_timeout_s / 2,
            quiet=quiet,
        )

    async def _haggle_with(
        self, upstream: Upstream, machine: Haggling | OldstyleHaggling, effects: list[Effect]
    ) -> Terms:
        while True:
            question: Question | None = None
            for effect in joined(effects):
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
            data = await self._receive()
            effects = machine.receive(data)

    async def _receive(self) -> bytes:
        """At least a byte. Raises _Ended and ChannelClosed."""
        data = await self._channel.receive(_RECEIVE)
        if not data:
            raise _Ended(self._left())
        return data

    async def _act(self, effect: Effect) -> None:
        match effect:
            case Send(data):
                await self._channel.send_all(data)
            case Close(reason):
                raise _Ended(reason)
            case _:
                raise AssertionError(effect)

    def _enter_transmission(self, agreed: _Agreed) -> Relay:
        assert self._upstream is not None
        terms, limits = agreed.terms, self._settings.limits
        redial, self._redial = self._redial, None
        relay = Relay(
            self._channel,
            self._upstream,
            Transmission(
                terms,
                limits=InFlightLimits(limits.requests_in_flight, limits.bytes_in_flight),
                resumable=redial is not None,
            ),
            redial=redial,
            idle_s=limits.idle_timeout or math.inf,
        )
        self._log.info(
            "open: export %r, %d bytes, %s, %s, %s",
            terms.export[:80],
            terms.size,
            "read-only" if terms.read_only else "read-write",
            self._admission.identity,
            self._tls_words,
        )
        self._admission.open(terms.export, read_only=terms.read_only)
        self._tls_words = ""
        if self._shutting_down:
            relay.shutdown()
        return relay

    # -- the end

    def _left(self) -> SessionEnd:
        """What it means if the client is gone now."""
        match self._machine:
            case None if not self._channel.bytes_read:
                return SessionEnd.PROBE  # with our greeting unread it is a reset
            case Barred():
                return SessionEnd.NOT_ALLOWED
            case PlainHaggling(end=SessionEnd.PLAINTEXT_CLIENT):
                return SessionEnd.PLAINTEXT_CLIENT
            case _:
                return SessionEnd.CLIENT_LEFT

    def _cut_short(self) -> SessionEnd:
        """What it means that the scope was cancelled."""
        if self._objection:
            return SessionEnd.EXPELLED
        known = isinstance(self._machine, Haggling | Barred)
        if self._evicted or not known:
            self._channel.close()  # before TLS there is no end to be polite about
        if isinstance(self._machine, Barred):
            return SessionEnd.NOT_ALLOWED
        if isinstance(self._machine, OldstyleHaggling) and self._shutting_down:
            return SessionEnd.SHUTDOWN
        return SessionEnd.TIMEOUT

    def _detail(self, end: SessionEnd) -> str:
        """For the log. Of a client that did not get in: a `Refusal`, and words."""
        machine, seconds = self._machine, self._settings.handshake_timeout_s
        before_tls = self._tls and (machine is None or isinstance(machine, PlainHaggling))
        match end:
            case SessionEnd.PROBE:
                return f"{Refusal.PROBE}: it sent nothing"
            case SessionEnd.PLAINTEXT_CLIENT:
                return f"{Refusal.PLAINTEXT_CLIENT}: it asked for an export without TLS"
            case SessionEnd.CLIENT_LEFT if before_tls:
                return f"{Refusal.EOF_BEFORE_HELLO}: it left before it asked for TLS"
            case SessionEnd.TIMEOUT if self._evicted:
                return f"{Refusal.TIMEOUT}: others wait for its place"
            case SessionEnd.TIMEOUT:
                return f"{Refusal.TIMEOUT}: it opened no export within {seconds:g} s"
            case SessionEnd.NOT_ALLOWED:
                return f"{self._admission.refusal}: {self._admission.barred}"
            case SessionEnd.EXPELLED:
                return self._objection
            case _:
                return machine.refused if isinstance(machine, Haggling | OldstyleHaggling) else ""

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


def _tune(sock: socket.socket, limits: Limits) -> None:
    """Socket options of a client's connection."""
    if sock.family == socket.AF_UNIX:
        return
    # Requests and replies are whole messages already (proto.md: "SHOULD disable Nagle").
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, limits.keepalive_idle),
        (socket.TCP_KEEPINTVL, limits.keepalive_interval),
        (socket.TCP_KEEPCNT, limits.keepalive_count),
        (socket.TCP_USER_TIMEOUT, round(limits.user_timeout * 1000)),  # 0: no such bound
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
