"""From the client to the upstream: every request's header checked, its payload only counted.

The walk reads whole headers, writes our cookie over the client's in place, and names what of the
buffer may go on. Payload that runs past the buffer is passed by count, so that large writes are
never assembled. Requests that the upstream must not see are answered here.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from gateway.errors import PeerError
from gateway.nbd.constants import Cmd, CmdFlag, Error
from gateway.nbd.framing import COOKIE_AT, FLAGS_AT, LENGTH_AT, Framing
from gateway.nbd.in_flight import InFlight, Plan, Request
from gateway.nbd.plans import MAX_PLANS, Plans
from gateway.nbd.replies import Replies
from gateway.nbd.requests import ANSWERED_HERE, CHANGES_DATA, PLANNED, RequestRules
from gateway.nbd.wire import U16, U32, U64

Piece = tuple[int, int] | bytes | bytearray | memoryview
"""What to send next: from start to stop of the caller's buffer as it is now, or these bytes."""

_WRITE, _DISC, _BLOCK_STATUS = int(Cmd.WRITE), int(Cmd.DISC), int(Cmd.BLOCK_STATUS)
_FUA, _DF, _PAYLOAD_LEN = int(CmdFlag.FUA), int(CmdFlag.DF), int(CmdFlag.PAYLOAD_LEN)
# A block status may always tell less than was asked. Asked for nearly 4 GiB, some servers come to
# grief in their own arithmetic (CVE-2025-47711), so they are asked for less, in whole blocks. Not
# with extended headers, which only servers have that reckon in 64 bits.
_MAX_STATUS_LENGTH: Final = (1 << 32) - (1 << 16)
_STOP: Final = -1  # in place of a position: read no further, for now or for ever


class InFlightLimits(NamedTuple):
    """How much of one session the upstream may owe an answer to."""

    requests: int = 1024
    payload: int = 64 << 20  # bytes, of READs and WRITEs; one request is always let through


class RequestWalk:
    """One direction of a `Transmission`, which says what the attributes mean."""

    def __init__(
        self,
        rules: RequestRules,
        framing: Framing,
        in_flight: InFlight,
        plans: Plans,
        replies: Replies,
        limits: InFlightLimits,
    ) -> None:
        self.done = False
        self.crowded = False
        self.fault: PeerError | None = None
        self._rules = rules
        self._framing = framing
        self._in_flight = in_flight
        self._plans = plans
        self._replies = replies
        self._most = limits.requests
        self._most_bytes = limits.payload
        # As many of these as there may be requests are never too much, so nobody has to count.
        self._small = limits.payload // limits.requests
        self._has_large = False  # one that has to be counted may be in flight
        self._crowding = 0  # the length of what was left because of `_most_bytes`
        self._local: list[bytes | bytearray] = []
        self._pieces: list[Piece] = []
        self._start = 0  # of what is not in `_pieces` yet
        # A payload on its way from the client. `InFlight.unfinished` is what it belongs to, 0 when
        # it is thrown away.
        self._payload_left = 0
        self._payload_reply = b""  # what to say behind a payload that is thrown away
        self._plan: Plan | None = None  # the WRITE that is being taken apart
        self._plan_left = 0  # of its payload, behind the part under way

    @property
    def full(self) -> bool:
        """Whether what was left as `crowded` has to wait still."""
        return (
            len(self._plans) >= MAX_PLANS
            or len(self._in_flight.requests) >= self._most
            or (self._crowding > 0 and self._crowds(self._crowding))
        )

    def _uncounted(self) -> int:
        """Requests up to this length are not too much, whatever is in flight."""
        if self._has_large:
            requests = self._in_flight.requests.values()
            self._has_large = any(r.length > self._small and r.kind < 2 for r in requests)
        return 0 if self._has_large else self._small

    def _crowds(self, length: int) -> bool:
        """Whether a READ or WRITE of this many bytes is too much, beside those in flight."""
        return self._in_flight.crowds(length, self._most_bytes)

    @property
    def mid_payload(self) -> bool:
        return bool(self._payload_left or self._plan_left)

    @property
    def mid_request(self) -> bool:
        return bool(self._payload_left and self._in_flight.unfinished)

    def take_local_replies(self) -> bytes:
        if not self._local:
            return b""
        replies = b"".join(self._local)
        self._local.clear()
        return replies

    def walk(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        """See `Transmission.requests`."""
        pieces: list[Piece] = []
        self._pieces, self._start = pieces, at
        self.crowded = False
        self._crowding = 0
        if self._payload_left or self._plan_left:
            at = self._take_payload(at, end)
        rules, framing, in_flight = self._rules, self._framing, self._in_flight
        size, mask, limits = rules.size, rules.mask, rules.limits
        checked, needed = rules.checked_flags, rules.needed_flags
        header, expected = framing.request.size, framing.request_magic
        unpack, pack_cookie, requests = (
            framing.request.unpack_from,
            U64.pack_into,
            in_flight.requests,
        )
        last = in_flight.next_cookie + self._most - len(requests)
        small = self._uncounted()
        while end - at >= header:
            magic, flags, kind, cookie, offset, length = unpack(buffer, at)
            if magic != expected:
                self.fault = PeerError("client", f"request magic {magic:#010x}")
                break
            if not (
                kind < 2
                and 0 < length <= limits[kind]
                and offset + length <= size
                and not (offset | length) & mask
                and flags & checked[kind] == needed[kind]
            ):
                after = self._examine(buffer, at, end, Request(cookie, kind, flags, offset, length))
                if after == _STOP:
                    break
                at = after
                continue
            mine = in_flight.next_cookie
            if mine >= last or (length > small and self._crowds(length)):
                self._leave(length)
                break
            if length > self._small:
                small, self._has_large = 0, True
            in_flight.next_cookie = mine + 1
            requests[mine] = Request(cookie, kind, flags, offset, length)
            pack_cookie(buffer, at + COOKIE_AT, mine)
            at += header
            if kind == _WRITE:
                if length > end - at:
                    self._payload_left = length - (end - at)
                    in_flight.unfinished = mine
                    at = end
                    break
                at += length
        self._cut(at, at)
        self._pieces = []  # an idle session must not own what it has sent
        return at, pieces

    def _leave(self, length: int) -> None:
        """Leave a request where it is until others are answered."""
        self.crowded = True
        self._crowding = length

    def _cut(self, at: int, resume: int) -> None:
        """Up to `at` all may go on; what is between there and `resume` may not."""
        if self._start < at:
            self._pieces.append((self._start, at))
        self._start = resume

    # -- requests that need a closer look

    def _examine(self, buffer: bytearray, at: int, end: int, request: Request) -> int:
        """Deal with one request. Returns where it ends in this buffer, or _STOP."""
        if request.kind == _DISC:
            self.done = True
            return _STOP
        if len(self._in_flight.requests) >= self._most:
            self._leave(0)
            return _STOP
        rules = self._rules
        if rules.extended and request.kind == _WRITE and not request.flags & _PAYLOAD_LEN:
            # The flag "MUST be set", and QEMU 10 forgets it; "the write command always sends a
            # payload" all the same. The upstream gets it as it should be.
            U16.pack_into(buffer, at + FLAGS_AT, request.flags | _PAYLOAD_LEN)
            return at  # to be looked at again
        try:
            payload = rules.payload(request.kind, request.flags, request.length)
        except PeerError as fault:
            self.fault = fault
            return _STOP
        behind = at + self._framing.request.size
        if payload and request.kind == _BLOCK_STATUS and rules.filters_contexts:
            return self._examine_filter(buffer, at, behind, end, request)
        verdict = rules.verdict(request.kind, request.flags, request.offset, request.length)
        if verdict == 0:
            if request.kind < 2 and self._crowds(request.length):
                self._leave(request.length)
                return _STOP
            self._has_large |= request.length > self._small
            mine = self._forward(buffer, at, request)
            if request.kind != _WRITE:
                return behind
            self._payload_left, self._in_flight.unfinished = payload, mine
            return self._take_payload(behind, end)
        if verdict == PLANNED:
            return self._take_apart(buffer, at, behind, end, request)
        if verdict == ANSWERED_HERE:
            reply = self._replies.success(request)
        else:
            reply = self._replies.error(request, verdict)
        self._cut(at, behind)
        return self._drop(behind, end, payload, reply)

    def _examine_filter(
        self, buffer: bytearray, at: int, behind: int, end: int, request: Request
    ) -> int:
        """A BLOCK_STATUS with a payload: 64 bits of effect length, and meta context ids.

        proto.md, branch extension-ext-header, "Request types", NBD_CMD_BLOCK_STATUS.
        """
        known = self._rules.context_ids
        count, odd = divmod(request.length - U64.size, U32.size)
        if odd or not 1 <= count <= len(known):
            self._cut(at, behind)
            reply = self._replies.error(request, Error.EINVAL)
            return self._drop(behind, end, request.length, reply)
        if end - behind < request.length:
            return _STOP
        (length,) = U64.unpack_from(buffer, behind)
        ids = frozenset(struct.unpack_from(f">{count}I", buffer, behind + U64.size))
        flags = request.flags & ~_PAYLOAD_LEN
        verdict = self._rules.verdict(request.kind, flags, request.offset, length)
        if not verdict and (len(ids) != count or not ids <= known):
            verdict = Error.EINVAL
        stop = behind + request.length
        if verdict:
            self._cut(at, stop)
            self._local.append(self._replies.error(request, verdict))
        else:
            self._forward(buffer, at, request._replace(length=length, context_ids=ids))
        return stop

    def _forward(self, buffer: bytearray, at: int, request: Request) -> int:
        """Send a request on as it is, or nearly. Returns its cookie there."""
        if request.kind not in CHANGES_DATA:  # FUA is legal there, but means nothing
            dropped = _FUA | _DF if self._rules.drops_df else _FUA
            U16.pack_into(buffer, at + FLAGS_AT, request.flags & ~dropped)
        if (
            request.kind == _BLOCK_STATUS
            and request.length > _MAX_STATUS_LENGTH
            and not self._framing.extended
        ):
            request = request._replace(length=_MAX_STATUS_LENGTH)
            U32.pack_into(buffer, at + LENGTH_AT, _MAX_STATUS_LENGTH)
        mine = self._in_flight.add(request)
        U64.pack_into(buffer, at + COOKIE_AT, mine)
        return mine

    def _take_apart(
        self, buffer: bytearray, at: int, behind: int, end: int, request: Request
    ) -> int:
        """Make a plan for a request. `plans` has the rest."""
        has_data = request.kind in (_WRITE, Cmd.READ)
        if len(self._plans) >= MAX_PLANS or (has_data and self._crowds(request.length)):
            self._leave(request.length if has_data else 0)
            return _STOP
        self._has_large |= has_data  # its parts are counted
        if request.kind == Cmd.READ:
            self._cut(at, behind)
            self._plans.read(request)
        elif request.kind == Cmd.WRITE_ZEROES and self._rules.adds_zeroes:
            self._cut(at, behind)
            self._plans.zeroes(request)
        elif request.kind == _WRITE:
            self._cut(at, behind)
            self._plan, self._plan_left = self._plans.write(request), request.length
            return self._take_payload(behind, end)
        else:
            self._cut(at, behind)
            plan = self._plans.one(request)
            self._pieces.append(self._plans.part(plan, request.length)[1])
            self._plans.seal(plan)
        return behind

    # -- payload

    def _drop(self, at: int, end: int, length: int, reply: bytes) -> int:
        """Throw `length` bytes away, then say `reply`: "rejected" does not mean "not sent"."""
        self._payload_left, self._payload_reply = length, reply
        return self._take_payload(at, end)

    def _take_payload(self, at: int, end: int) -> int:
        """Pass the client's payload, to the upstream or to nowhere. Returns where that ends."""
        while True:
            if self._payload_left:
                passed = min(self._payload_left, end - at)
                self._payload_left -= passed
                at += passed
                if not self._in_flight.unfinished:
                    self._start = at
                if self._payload_left:
                    return at
                self._in_flight.unfinished = 0
            if not self._plan_left:
                self._end_payload()
                return at
            if at == end:
                return at
            self._begin_part(at)

    def _begin_part(self, at: int) -> None:
        """The next part of the WRITE that is being taken apart, if it is still worth while."""
        plan = self._plan
        assert plan is not None
        if plan.error:
            self._payload_left, self._plan_left = self._plan_left, 0
            self._in_flight.unfinished = 0
            self._cut(at, at)
            return
        length = min(self._rules.piece, self._plan_left)
        self._in_flight.unfinished, header = self._plans.part(plan, length)
        self._payload_left = length
        self._plan_left -= length
        self._cut(at, at)
        self._pieces.append(header)

    def _end_payload(self) -> None:
        if self._plan is not None:
            plan, self._plan = self._plan, None
            self._plans.seal(plan)
            self._local += self._plans.take_replies()
        elif self._payload_reply:
            self._local.append(self._payload_reply)
            self._payload_reply = b""

    def lose_upstream(self) -> Plan | None:
        """Whatever the client still sends goes nowhere. The reply to a WRITE whose payload is under
        way comes behind that payload. Returns the plan that this is, if it is one."""
        cut = self._in_flight.requests.pop(self._in_flight.unfinished, None)
        self._in_flight.unfinished = 0
        plan, self._plan = self._plan, None
        self._payload_left += self._plan_left
        self._plan_left = 0
        if plan is not None and plan.error:
            self._payload_reply = self._replies.error(plan.request, plan.error, plan.error_chunk)
        elif (request := plan.request if plan is not None else cut) is not None:
            self._payload_reply = self._replies.error(request, Error.ESHUTDOWN)
        return plan
