"""Requests that the upstream cannot do in one go: taken apart, done in other words, joined again.

A plan stands for one request of the client. Its parts are requests of the upstream, sent in place
of the client's (the parts of a WRITE, around the payload as it comes) or as follow-ups: zeroes to
write, pieces to read, the NBD_CMD_FLUSH behind a command whose FUA the upstream does not know.
Few parts are under way at a time. One reply answers it all; the first error wins.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from gateway.nbd.constants import Cmd, CmdFlag, Error
from gateway.nbd.framing import Framing
from gateway.nbd.in_flight import ErrorChunk, InFlight, Plan, Request
from gateway.nbd.replies import Replies
from gateway.nbd.requests import CHANGES_DATA, RequestRules

WRITES_UNDER_WAY: Final = 4  # of one plan: each may be 32 MiB of somebody's memory
READS_UNDER_WAY: Final = 8
MAX_PLANS: Final = 64  # of one session: a request costs its client less than it costs us
MAX_BATCH: Final = 64  # follow-ups made in one go
ZEROES: Final = memoryview(bytes(256 << 10))  # all the zeroes that are ever sent

_FUA = int(CmdFlag.FUA)
_KEPT_FLAGS: Final = int(CmdFlag.PAYLOAD_LEN | CmdFlag.FUA)


class Plans:
    """The plans of one session."""

    def __init__(
        self,
        rules: RequestRules,
        in_flight: InFlight,
        framing: Framing,
        replies: Replies,
        *,
        most_bytes: int,
    ) -> None:
        """`most_bytes` of READs and WRITEs may be under way before a follow-up waits."""
        self._rules = rules
        self._in_flight = in_flight
        self._framing = framing
        self._replies = replies
        self._most_bytes = most_bytes
        self._live: dict[Plan, None] = {}  # in the order of the requests
        self._due: deque[Plan] = deque()
        self._waiting: deque[Plan] = deque()  # for their turn to hold a reply
        self.said: list[bytes | bytearray] = []  # to the client, not taken yet

    def __len__(self) -> int:
        return len(self._live)

    # -- beginnings

    def write(self, request: Request) -> Plan:
        """A WRITE whose parts are to be sent with `part`, and then `seal`."""
        return self._begin(Plan(request, Cmd.WRITE))

    def one(self, request: Request) -> Plan:
        """A command in one `part`, then a FLUSH. To be sealed at once."""
        return self._begin(Plan(request, request.kind))

    def zeroes(self, request: Request) -> None:
        """A WRITE_ZEROES as writes of zeroes."""
        self._queue(self._begin(Plan(request, Cmd.WRITE, WRITES_UNDER_WAY)))

    def read(self, request: Request) -> None:
        """A READ in pieces. If the reply must be one message, one such plan goes at a time."""
        plan = self._begin(Plan(request, Cmd.READ, READS_UNDER_WAY))
        plan.holds = not self._rules.chunks_above or bool(request.flags & CmdFlag.DF)
        if not plan.holds:
            self._queue(plan)
            return
        self._waiting.append(plan)
        if len(self._waiting) == 1:
            self._queue(plan)

    def _begin(self, plan: Plan) -> Plan:
        plan.flush = bool(plan.request.flags & CmdFlag.FUA and self._rules.adds_fua)
        if plan.kind == Cmd.READ:
            plan.flush = False
        self._live[plan] = None
        return plan

    # -- parts

    def part(self, plan: Plan, length: int) -> tuple[int, bytes]:
        """The next part of a plan, as if it was sent now: its cookie and its header."""
        flags = plan.request.flags
        if plan.kind == Cmd.READ:
            flags = 0
            if plan.holds and plan.held is None:
                plan.held = bytearray(plan.request.length)
        elif plan.kind == Cmd.WRITE:
            flags = flags & _KEPT_FLAGS | (CmdFlag.PAYLOAD_LEN if self._rules.extended else 0)
        if self._rules.adds_fua:
            flags &= ~CmdFlag.FUA
        part = Request(plan.request.cookie, plan.kind, int(flags), plan.at, length, plan)
        plan.at += length
        return self._send(plan, part)

    def _send(self, plan: Plan, part: Request) -> tuple[int, bytes]:
        plan.unanswered += 1
        mine = self._in_flight.add(part)
        header = self._framing.pack_request(part.flags, part.kind, mine, part.offset, part.length)
        return mine, header

    def seal(self, plan: Plan) -> None:
        """There will be no more `part` of this one."""
        plan.complete = True
        self._go_on(plan)

    @property
    def follow_ups_due(self) -> bool:
        """Whether there are any, and the next may be sent now."""
        if not self._due:
            return False
        return not self._in_flight.crowds(self._next_length(self._due[0]), self._most_bytes)

    def _next_length(self, plan: Plan) -> int:
        """How many bytes of data its next part has."""
        if plan.complete:
            return 0
        piece = self._rules.piece if plan.kind == Cmd.READ else self._rules.zero_piece
        return min(piece, plan.stop - plan.at)

    def take_follow_ups(self) -> list[bytes | memoryview]:
        """Whole requests for the upstream, one behind the other; at most one has a payload."""
        batch: list[bytes | memoryview] = []
        while len(batch) < MAX_BATCH and self.follow_ups_due:
            plan = self._due.popleft()
            plan.queued = False
            if plan.complete:
                plan.flush = False
                flush = Request(plan.request.cookie, Cmd.FLUSH, 0, 0, 0, plan)
                batch.append(self._send(plan, flush)[1])
                continue
            length = self._next_length(plan)
            batch.append(self.part(plan, length)[1])
            plan.complete = plan.at == plan.stop
            if not plan.complete and plan.unanswered < plan.under_way:
                self._queue(plan)
            if plan.kind == Cmd.WRITE:
                batch += [ZEROES[:left] for left in range(length, 0, -len(ZEROES))]
                break
        return batch

    def _queue(self, plan: Plan) -> None:
        if not plan.queued:
            plan.queued = True
            self._due.append(plan)

    # -- answers

    def answered(self, plan: Plan, error: int = 0, chunk: ErrorChunk | None = None) -> None:
        """The upstream has answered one part."""
        plan.unanswered -= 1
        if plan.kind in CHANGES_DATA and (self._rules.adds_fua or not plan.request.flags & _FUA):
            plan.volatile = True
        if error and not plan.error:
            plan.error, plan.error_chunk = error, chunk
        self._go_on(plan)

    def fail_unfinished(self) -> None:
        """No more follow-ups: what needs them has failed with NBD_ESHUTDOWN."""
        for plan in list(self._live):
            if not plan.error and (plan.flush or not plan.complete):
                plan.error = Error.ESHUTDOWN
                self._go_on(plan)

    def fail_flushes(self, error: int) -> bool:
        """Fail what has yet to send its flush, and what has had a part done that may be lost: its
        reply would say that all of it is. Returns whether there was any of the former."""
        plans = [plan for plan in self._live if not plan.error]
        found = any(plan.flush for plan in plans)
        for plan in plans:
            if plan.flush or plan.volatile:
                plan.error = error
                self._go_on(plan)
        return found

    def refuse(self, request: Request, error: int) -> None:
        """Answer a request of the upstream's, out of flight already, in its place."""
        if request.plan is not None:
            self.answered(request.plan, error)
        else:
            self.said.append(self._replies.error(request, error))

    def take_replies(self) -> list[bytes | bytearray]:
        """What the client is to be told of plans that have come to their end."""
        said, self.said = self.said, []
        return said

    def abandon(self, but: Plan | None) -> list[Request]:
        """The upstream is gone. Forget all plans; return the client's requests, less `but`'s."""
        unanswered = [plan.request for plan in self._live if plan is not but]
        self._live.clear()
        self._due.clear()
        self._waiting.clear()
        return unanswered

    def _go_on(self, plan: Plan) -> None:
        if plan.error:
            plan.flush = False
            plan.complete = plan.complete or bool(plan.under_way)
            if plan.queued:
                self._due.remove(plan)
                plan.queued = False
        if not plan.complete:
            if plan.under_way:
                self._queue(plan)
        elif not plan.unanswered:
            if plan.flush:
                self._queue(plan)
            else:
                self._finish(plan)

    def _finish(self, plan: Plan) -> None:
        del self._live[plan]
        request, held = plan.request, plan.held
        if plan.error:
            self.said.append(self._replies.error(request, plan.error, plan.error_chunk))
        elif held is not None:
            header = self._replies.data(request, request.offset, request.length, done=True)
            self.said += [header, held]
        else:
            self.said.append(self._replies.success(request))
        if plan.holds:
            plan.held = None
            was_next = self._waiting[0] is plan
            self._waiting.remove(plan)
            if was_next and self._waiting:
                self._queue(self._waiting[0])
