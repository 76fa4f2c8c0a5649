"""One client from accept to close: its handshake, its transmission, and how it ended."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable
from typing import Final

import trio

from gateway.admission import Admission
from gateway.client_handshake import Agreed, ClientHandshake, Ended
from gateway.errors import ChannelClosed, PeerError, Refusal, SessionEnd, TLSRefused
from gateway.identity import Identity
from gateway.limits import Limits
from gateway.nbd.haggling import Haggling
from gateway.nbd.negotiation import Barred
from gateway.nbd.oldstyle import OldstyleHaggling
from gateway.nbd.transmission import InFlightLimits, Transmission
from gateway.relay import Relay
from gateway.settings import Settings
from gateway.transport import Channel
from gateway.trust import Keeper, Trust

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S: Final = 3.0
_QUIET_ENDS: Final = frozenset({SessionEnd.PROBE})


class SessionLog(logging.LoggerAdapter[logging.Logger]):
    """Puts the session's name and the client's address in front of every line."""

    def __init__(self, name: str, peer: str) -> None:
        super().__init__(logger)
        self._prefix = f"[{name}] {peer}: "

    def process(self, msg: object, kwargs: object) -> tuple[object, object]:  # type: ignore[override]
        return f"{self._prefix}{msg}", kwargs


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
        self._admission = Admission(settings)
        self._handshake = ClientHandshake(
            Channel(sock), settings, keeper, self._admission, counts_in, self._log
        )
        self._relay: Relay | None = None
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
                agreed = await self._handshake.run()
                self._scope.deadline = math.inf
                relay = self._relay = self._enter_transmission(agreed)
                end = await relay.run(agreed.rest)
                detail = relay.detail
            if self._scope.cancelled_caught:
                end = self._cut_short()
                detail = self._detail(end)
        except Ended as over:
            end, detail = over.end, self._detail(over.end)
        except TLSRefused as refused:
            end, detail = SessionEnd.TLS_FAILED, f"{refused.reason}: {refused}"
        except PeerError as fault:
            end, detail = SessionEnd.CLIENT_BROKE_PROTOCOL, fault.what
        except ChannelClosed as closed:
            # Perhaps behind a refusal: clients need not wait for the answer to an ABORT.
            end = self._handshake.left()
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
                elif self._handshake.upstream is not None:
                    self._handshake.upstream.close()
                self._log_end(end, detail, trio.current_time() - self._started)

    def shutdown(self) -> None:
        """Begin to end: no new options or requests, what is in flight goes on to its end.

        proto.md, "Termination of the session during option haggling" (NBD_REP_ERR_SHUTDOWN) and
        "Terminating the transmission phase" (NBD_ESHUTDOWN).
        """
        self._shutting_down = True
        if self._relay is not None:
            self._relay.shutdown()
        else:
            self._handshake.shutdown()
            if isinstance(self._handshake.machine, OldstyleHaggling):
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

    @property
    def proven(self) -> bool:
        """Whether the client may open something."""
        return self._handshake.proven

    @property
    def _channel(self) -> Channel:
        """The client's: another one, on the same socket, once TLS is on."""
        return self._handshake.channel

    def _enter_transmission(self, agreed: Agreed) -> Relay:
        assert self._handshake.upstream is not None
        terms, limits = agreed.terms, self._settings.limits
        relay = Relay(
            self._channel,
            self._handshake.upstream,
            Transmission(
                terms,
                limits=InFlightLimits(limits.requests_in_flight, limits.bytes_in_flight),
                resumable=agreed.redial is not None,
            ),
            redial=agreed.redial,
            idle_s=limits.idle_timeout or math.inf,
        )
        self._log.info(
            "open: export %r, %d bytes, %s, %s, %s",
            terms.export[:80],
            terms.size,
            "read-only" if terms.read_only else "read-write",
            self._admission.identity,
            agreed.tls,
        )
        self._admission.open(terms.export, read_only=terms.read_only)
        if self._shutting_down:
            relay.shutdown()
        return relay

    # -- the end

    def _cut_short(self) -> SessionEnd:
        """What it means that the scope was cancelled."""
        if self._objection:
            return SessionEnd.EXPELLED
        machine = self._handshake.machine
        known = isinstance(machine, Haggling | Barred)
        if self._evicted or not known:
            self._channel.close()  # before TLS there is no end to be polite about
        if isinstance(machine, Barred):
            return SessionEnd.NOT_ALLOWED
        if isinstance(machine, OldstyleHaggling) and self._shutting_down:
            return SessionEnd.SHUTDOWN
        return SessionEnd.TIMEOUT

    def _detail(self, end: SessionEnd) -> str:
        """For the log. Of a client that did not get in: a `Refusal`, and words."""
        machine, seconds = self._handshake.machine, self._settings.handshake_timeout_s
        match end:
            case SessionEnd.PROBE:
                return f"{Refusal.PROBE}: it sent nothing"
            case SessionEnd.PLAINTEXT_CLIENT:
                return f"{Refusal.PLAINTEXT_CLIENT}: it asked for an export without TLS"
            case SessionEnd.CLIENT_LEFT if self._handshake.awaits_tls:
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
            await self._channel.aclose(clean=self._relay is None or self._relay.left_whole)
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
