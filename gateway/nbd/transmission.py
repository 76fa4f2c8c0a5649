"""The transmission phase of one session: every header checked, payload only counted.

Two walks over the caller's buffers, one in each direction, with the requests between them that the
upstream has not answered. Where the upstream does all that the client was told, the bytes of the
buffers go on in place; where the gateway has to help, `plans` has the requests in other words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gateway.errors import PeerError
from gateway.nbd.constants import Cmd, CmdFlag, Error
from gateway.nbd.framing import framing
from gateway.nbd.in_flight import InFlight
from gateway.nbd.journal import Journal
from gateway.nbd.pairing import Terms
from gateway.nbd.plans import Plans
from gateway.nbd.replies import Replies
from gateway.nbd.reply_walk import ReplyWalk
from gateway.nbd.request_walk import InFlightLimits, Piece, RequestWalk
from gateway.nbd.requests import CHANGES_DATA, RequestRules
from gateway.nbd.resumption import Resumption

__all__ = ["InFlightLimits", "Piece", "Transmission"]


class Transmission:
    """Both directions of one session. Not aware of time, sockets or TLS.

    Feed `requests` with what the client sent and `replies` with what the upstream sent, and send
    on what they name. Then look at the properties.

    If it is `resumable`, the upstream may be replaced by another one: `record` all that is sent
    upstream, before it is sent, and after `resume` send what there is in `again`. Such a session
    passes on whole replies and chunks only, each of 32 MiB at most.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        limits: InFlightLimits = InFlightLimits(),  # noqa: B008  (immutable)
        resumable: bool = False,
    ) -> None:
        self._framing = framing(extended=terms.extended_headers)
        self._rules = rules = RequestRules(terms, resumable=resumable)
        self._in_flight = in_flight = InFlight()
        replies = Replies(structured=terms.structured_replies, extended=terms.extended_headers)
        self._plans = plans = Plans(
            rules, in_flight, self._framing, replies, most_bytes=limits.payload
        )
        self._resumption = (
            Resumption(in_flight, plans, replies, maximum=rules.told_maximum) if resumable else None
        )
        self._from_client = RequestWalk(rules, self._framing, in_flight, plans, replies, limits)
        self._from_upstream = ReplyWalk(
            rules,
            self._framing,
            in_flight,
            plans,
            replies,
            chunks_below=terms.served.structured_replies or terms.extended_headers,
            resumption=self._resumption,
        )
        self._journal = Journal(self._framing, in_flight) if resumable else None
        self._upstream_lost = False

    # -- the walks

    def requests(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        """Walk `buffer[at:end]`. Returns up to where it is done with, and what to send upstream.

        Bytes that are not done with are one unfinished message; bring them again with the next.
        """
        return self._from_client.walk(buffer, at, end)

    def replies(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        """Walk `buffer[at:end]`. Returns up to where it is done with, and what the client gets.

        Bytes that are not done with are one unfinished message; bring them again with the next, in
        a buffer that has room for `wanted` bytes of them.
        """
        walked = self._from_upstream.walk(buffer, at, end)
        if self._journal is not None:
            self._journal.settle()
        return walked

    def take_local_replies(self) -> bytes:
        """Replies to requests that were not forwarded, in the order of the requests."""
        return self._from_client.take_local_replies()

    @property
    def follow_ups_due(self) -> bool:
        """Whether there are requests of our own to be sent. Either walk may have made some."""
        return self._plans.follow_ups_due

    def take_follow_ups(self) -> list[bytes | memoryview]:
        """The next of them, to be sent one behind the other. Not to be sent while `mid_request`."""
        return self._plans.take_follow_ups()

    # -- what a shell wants to know

    @property
    def client_done(self) -> bool:
        """The client sent NBD_CMD_DISC; nothing behind it is read."""
        return self._from_client.done

    @property
    def crowded(self) -> bool:
        """A whole request was left where it is until we are not `full` any more: walk again."""
        return self._from_client.crowded

    @property
    def full(self) -> bool:
        """What was left as `crowded` has to wait until the upstream has answered more."""
        return self._from_client.full

    @property
    def client_fault(self) -> PeerError | None:
        """The client broke the protocol, at this point of its stream."""
        return self._from_client.fault

    @property
    def upstream_fault(self) -> PeerError | None:
        """The upstream broke the protocol, at this point of its stream."""
        return self._from_upstream.fault

    @property
    def upstream_ends(self) -> bool:
        """The upstream has answered NBD_ESHUTDOWN; disconnect once nothing is in flight."""
        return self._from_upstream.upstream_ends

    @property
    def wanted(self) -> int:
        """See `replies`."""
        return self._from_upstream.wanted

    @property
    def in_flight(self) -> int:
        """Requests that the upstream has not answered yet."""
        return len(self._in_flight.requests)

    @property
    def idle(self) -> bool:
        """Whether every request is answered, to its last byte."""
        return not (self._in_flight.requests or self._plans or self.mid_reply)

    @property
    def mid_request(self) -> bool:
        """Whether the upstream is owed payload. It would take anything else for data."""
        return self._from_client.mid_request

    @property
    def mid_payload(self) -> bool:
        """Whether the client owes payload, forwarded or not."""
        return self._from_client.mid_payload

    @property
    def mid_reply(self) -> bool:
        """Whether the client is in the middle of a message, so that no other may start."""
        return self._from_upstream.mid_reply

    # -- another upstream in place of the first

    def record(self, buffer: bytearray, pieces: Sequence[Piece]) -> None:
        """Keep a copy of what is to be sent upstream, until it is answered."""
        assert self._journal is not None
        with memoryview(buffer) as view:
            for piece in pieces:
                if isinstance(piece, tuple):
                    with view[piece[0] : piece[1]] as span:
                        self._journal.record(span)
                else:
                    self._journal.record(memoryview(piece))

    @property
    def upstream_leaves(self) -> bool:
        """The upstream has answered NBD_ESHUTDOWN, which the client is not told: another one is
        to be asked. Send this one nothing more."""
        return self._resumption is not None and bool(self._resumption.refused)

    @property
    def upstream_has_left(self) -> bool:
        """It owes no answer but to what it has refused, and to a payload that it does not have."""
        assert self._journal is not None
        assert self._resumption is not None
        owed = self._journal.open_at_upstream & self._in_flight.requests.keys()
        return owed - {self._in_flight.unfinished} <= self._resumption.refused.keys()

    @property
    def answered(self) -> int:
        """How many requests upstreams have answered, ever."""
        assert self._journal is not None
        return self._journal.settled

    def suspend(self) -> None:
        """From now on what is recorded is not sent, but waits for `again`."""
        assert self._journal is not None
        self._journal.suspend()

    def resume(self) -> bool:
        """There is another upstream, to be sent what there is in `again`.

        Returns whether completed writes may be lost: then those in flight that ask for durability
        fail with NBD_EIO, or else the next one that does. Walk replies afterwards, of no bytes:
        there may be something to tell the client.
        """
        assert self._journal is not None
        self._from_upstream.resume()
        self._journal.settle()
        lost = self._journal.take_loss()
        if lost and not self._fail_flushes(self._journal):
            self._rules.owe_error()
        return lost

    def _fail_flushes(self, journal: Journal) -> bool:
        """Returns whether there were any, so that the client will know."""
        in_flight, found = self._in_flight, False
        for cookie, request in list(in_flight.requests.items()):
            durable = request.kind in CHANGES_DATA and request.flags & CmdFlag.FUA
            # Whose payload is half here answers for itself; the next one is told.
            if (request.kind == Cmd.FLUSH or durable) and cookie != in_flight.unfinished:
                del in_flight.requests[cookie]
                journal.forget(cookie)
                self._plans.refuse(request, Error.EIO)
                found = True
        return self._plans.fail_flushes(Error.EIO) or found

    def again(self) -> Iterator[bytes]:
        """All that is not answered, in order, to be sent to the new upstream; see `Journal`."""
        assert self._journal is not None
        return self._journal.again()

    # -- ends

    def disconnect_request(self) -> bytes:
        """NBD_CMD_DISC for the upstream. Not to be sent while `mid_request`."""
        assert not self.mid_request, "DISC would be taken for data"
        return self._framing.disconnect()

    def shutdown(self) -> None:
        """Answer NBD_ESHUTDOWN from now on; what is in flight goes on to its end."""
        self._rules.refuse_all()

    def lose_upstream(self) -> Iterator[bytes | memoryview] | None:
        """The upstream is gone. Returns what the client is to be sent, once and in full.

        Everything in flight is answered NBD_ESHUTDOWN, and so is every later request. None when
        the client cannot be told: a payload was promised without a way to say that it failed, and
        "the server MUST immediately initiate a hard disconnect".
        """
        self.shutdown()
        if self._journal is not None:
            self._journal.clear()
        if self._upstream_lost:
            return iter(())
        unfinished = self._from_client.lose_upstream()
        unanswered = [one for one in self._in_flight.requests.values() if one.plan is None]
        self._in_flight.requests.clear()
        unanswered += self._plans.abandon(unfinished)
        words = self._from_upstream.lose_upstream(unanswered)
        self._upstream_lost = words is not None
        return words
