"""The handshake with one client: greeting, TLS, identity, haggling, and an upstream to serve it.

Owns the order of these things; what is said in each of them is up to the machines of `nbd`.
"""

from __future__ import annotations

import logging
import math
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from gateway.admission import Admission, proven_by_kernel
from gateway.errors import ChannelClosed, Refusal, SessionEnd, TLSRefused
from gateway.identity import Identity
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
from gateway.redial import Redialler
from gateway.settings import Settings
from gateway.tls import LEFT, refusal
from gateway.transport import Channel
from gateway.trust import Keeper
from gateway.upstream import Upstream

# Bytes at a time of options. Between two such portions the others have their turn, so that one
# client's options, which come by the thousand if it likes, do not starve them.
_RECEIVE: Final = 4096


class Ended(Exception):
    """The session is over, in a way that is no failure of anybody."""

    def __init__(self, end: SessionEnd) -> None:
        super().__init__(end)
        self.end = end


@dataclass(frozen=True, slots=True)
class Agreed:
    """The outcome of the negotiation."""

    terms: Terms
    rest: bytes  # the client's first bytes of the transmission phase, if it was that quick
    redial: Redialler | None  # with `reconnect_s`
    tls: str  # in words, for the log


class ClientHandshake:
    """`run` it once. Who does closes `channel` then, and `upstream` if there is one.

    Who may enter is what the keeper's set says at that moment. `counts_in` is told who the client
    is once it may open something; False: too many of them are here.
    """

    def __init__(
        self,
        channel: Channel,
        settings: Settings,
        keeper: Keeper,
        admission: Admission,
        counts_in: Callable[[Identity], bool],
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self.channel = channel  # the client's; another one, on the same socket, once TLS is on
        self.upstream: Channel | None = None  # once there are terms
        # What talks to the client now; none before the greeting is answered, nor in transmission.
        self.machine: PlainHaggling | Haggling | Barred | OldstyleHaggling | None = None
        self.proven = False  # that it may open something
        self._log = log
        self._settings = settings
        self._keeper = keeper
        self._tls = keeper.trust.context is not None
        self._admission = admission
        self._counts_in = counts_in
        self._tls_words = "no TLS"
        self._shutting_down = False

    def shutdown(self) -> None:
        """Say NBD_REP_ERR_SHUTDOWN to whatever is asked from now on."""
        self._shutting_down = True
        if self.machine is not None:
            self.machine.shutdown()

    @property
    def awaits_tls(self) -> bool:
        """Whether TLS is still to come."""
        machine = self.machine
        return self._tls and (machine is None or isinstance(machine, PlainHaggling))

    async def run(self) -> Agreed:
        """Up to the transmission phase. Raises Ended, TLSRefused, PeerError and ChannelClosed."""
        if self._settings.oldstyle:
            policy = self._admit(Identity())
            if policy is None:
                raise Ended(SessionEnd.NOT_ALLOWED)
            oldstyle = self.machine = OldstyleHaggling(policy)
            if self._shutting_down:
                oldstyle.shutdown()
            return await self._haggle(oldstyle, oldstyle.begin(), policy)
        greeting = Greeting(tls_required=self._tls)
        await self.channel.send_all(greeting.hello())
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
        haggling = self.machine = Haggling(
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
        identity = proven_by_kernel(self.channel.socket, identity)
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
        machine = self.machine = PlainHaggling(self._before_tls)
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
            self.channel = channel = await self.channel.start_tls(trust.context)
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
        await self.channel.readable()
        try:
            left = not self.channel.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            left = False
        except OSError:
            left = True
        if left:
            raise TLSRefused(Refusal.EOF_BEFORE_HELLO, "it left before it began TLS")

    async def _turn_away(self, rest: bytes) -> NoReturn:
        """Tell a client, as often as it asks, that there is nothing for it here."""
        barred = self.machine = Barred(self._admission.barred, self._before_tls)
        if self._shutting_down:
            barred.shutdown()
        data = rest
        while True:
            for effect in joined(barred.receive(data)):
                await self._act(effect)
            data = await self._receive()

    async def _haggle(
        self, machine: Haggling | OldstyleHaggling, effects: list[Effect], policy: ExportPolicy
    ) -> Agreed:
        settings = self._settings
        upstream = self._dial(policy.name or "")
        try:
            terms = await self._haggle_with(upstream, machine, effects)
            self.upstream = upstream.take_channel()
            self.channel.stall_s = self.upstream.stall_s = settings.limits.stall_timeout or math.inf
            redial = None
            if settings.reconnect_s:
                name = policy.name or ""
                redial = Redialler(
                    lambda: self._dial(name, quiet=True),
                    upstream.agreed,
                    self._log,
                    within_s=settings.reconnect_s,
                )
        finally:
            if self.upstream is None:
                await upstream.aclose()
        self.machine = None
        return Agreed(terms, machine.rest(), redial, self._tls_words)

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
        """At least a byte. Raises Ended and ChannelClosed."""
        data = await self.channel.receive(_RECEIVE)
        if not data:
            raise Ended(self.left())
        return data

    async def _act(self, effect: Effect) -> None:
        match effect:
            case Send(data):
                await self.channel.send_all(data)
            case Close(reason):
                raise Ended(reason)
            case _:
                raise AssertionError(effect)

    def left(self) -> SessionEnd:
        """What it means if the client is gone now."""
        match self.machine:
            case None if not self.channel.bytes_read:
                return SessionEnd.PROBE  # with our greeting unread it is a reset
            case Barred():
                return SessionEnd.NOT_ALLOWED
            case PlainHaggling(end=SessionEnd.PLAINTEXT_CLIENT):
                return SessionEnd.PLAINTEXT_CLIENT
            case _:
                return SessionEnd.CLIENT_LEFT
