"""The client's requests, what the upstream was sent for each, and what may come of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from gateway.nbd.pairing import Terms
from tests.fuzz.model.frames import (
    CACHE,
    DF,
    EINVAL,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    MAX_PAYLOAD,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    READ_ONLY,
    REQ_ONE,
    SEND_CACHE,
    SEND_DF,
    SEND_FAST_ZERO,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_ZEROES,
    STATUS,
    STATUS_PAYLOAD,
    TRIM,
    WRITE,
    ZEROES,
    legal,
)
from tests.fuzz.source import require

CHANGES = frozenset({WRITE, TRIM, ZEROES})


@dataclass(eq=False, slots=True)
class Sent:
    """One request as the upstream got it, and all that it has said to it."""

    cookie: int
    kind: int
    flags: int
    offset: int
    length: int
    number: int  # a count over requests and answers: what was before what
    ids: frozenset[int] | None = None
    payload_left: int = 0
    segments: list[tuple[int, bytearray | int]] = field(default_factory=list)  # int: zeroes
    errors: list[int] = field(default_factory=list)
    statuses: dict[int, bytes] = field(default_factory=dict)
    chunks: int = 0
    answered: int = 0  # the count, when its last chunk was through

    @property
    def ok(self) -> bool:
        return bool(self.answered) and not self.errors

    def start_anew(self) -> None:
        """Another upstream is asked."""
        self.segments.clear()
        self.errors.clear()
        self.statuses.clear()
        self.chunks = 0
        self.answered = 0

    def has(self, offset: int, count: int, data: bytes | None) -> bool:
        """Whether it has told this data; None: zeroes."""
        at = 0
        while at < count:
            for begin, told in self.segments:
                size = told if isinstance(told, int) else len(told)
                skip = offset + at - begin
                if not 0 <= skip < size:
                    continue
                step = min(size - skip, count - at)
                theirs = bytes(step) if isinstance(told, int) else told[skip : skip + step]
                mine = bytes(step) if data is None else data[at : at + step]
                if mine != theirs:
                    return False
                at += step
                break
            else:
                return False
        return True


@dataclass(eq=False, slots=True)
class Ask:
    """One request of the client."""

    cookie: int
    kind: int
    flags: int
    offset: int
    length: int  # the effect length
    header_end: int  # position in the client's stream
    end: int  # behind its payload
    payload: bytearray = field(default_factory=bytearray)
    ids: frozenset[int] | None = None
    bad_filter: bool = False  # a payload of a block status that cannot be one
    parts: list[Sent] = field(default_factory=list)
    follow_ups: list[Sent] = field(default_factory=list)
    # What the client was told:
    told: list[tuple[int, int]] = field(default_factory=list)  # data, from and to
    contexts: set[int] = field(default_factory=set)
    error: int = 0
    padded: bool = False  # with zeroes, where the upstream's data did not come
    answered: bool = False


class Book:
    """One session's. `terms` are what was negotiated."""

    def __init__(self, terms: Terms, *, resumable: bool) -> None:
        self.terms = terms
        self.served = terms.served
        self.resumable = resumable
        self.extended = terms.extended_headers
        self.chunks_above = terms.structured_replies or self.extended
        self.chunks_below = self.served.structured_replies or self.extended
        self.flags = int(terms.flags)
        self.adds_fua = bool(self.flags & SEND_FUA and not self.served.flags & SEND_FUA)
        self.adds_zeroes = bool(self.flags & SEND_ZEROES and not self.served.flags & SEND_ZEROES)
        self.ids = frozenset(one.id for one in terms.contexts)
        self.live: dict[int, Ask] = {}  # taken by the gateway, not answered, by the client's cookie
        self._unlinked: deque[Ask] = deque()
        self.sent: dict[int, Sent] = {}  # all that upstreams were ever sent, by our cookie
        self._clock = 0
        self.refusing = False  # ESHUTDOWN is an answer to anything
        self.losses = 0  # how many times a flush may be answered EIO for the writes before it

    def tick(self) -> int:
        self._clock += 1
        return self._clock

    def take(self, ask: Ask) -> None:
        """The gateway has consumed this request's header."""
        self.live[ask.cookie] = ask
        self._unlinked.append(ask)

    # -- what the upstream is sent

    def link(self, sent: Sent) -> Ask:
        """Whose request this is, which came out of a walk over the client's bytes."""
        while self._unlinked:
            ask = self._unlinked[0]
            if self._fits(ask, sent):
                self._check_flags(ask, sent)
                ask.parts.append(sent)
                done = sum(one.length for one in ask.parts)
                if ask.kind != WRITE or done == ask.length:
                    self._unlinked.popleft()
                require(not self.refusal(ask), f"sent on what is to be refused: {ask}")
                return ask
            self._unlinked.popleft()
        require(False, f"the upstream is sent what the client did not ask for: {sent}")
        raise AssertionError

    def _fits(self, ask: Ask, sent: Sent) -> bool:
        if ask.answered or ask.kind != sent.kind:
            return False
        if ask.kind == WRITE:
            done = sum(one.length for one in ask.parts)
            return sent.offset == ask.offset + done and sent.length <= ask.length - done
        if ask.kind == STATUS and not self.extended:
            clamped = sent.length == (1 << 32) - (1 << 16) < ask.length
            return sent.offset == ask.offset and (sent.length == ask.length or clamped)
        return (sent.offset, sent.length, sent.ids) == (ask.offset, ask.length, ask.ids)

    def _check_flags(self, ask: Ask, sent: Sent) -> None:
        keeps = NO_HOLE | REQ_ONE | FAST_ZERO
        if ask.kind in CHANGES and self.served.flags & SEND_FUA:
            keeps |= FUA
        if self.chunks_below and self.served.flags & SEND_DF:
            keeps |= DF
        wanted = ask.flags & keeps
        if self.extended and (ask.kind == WRITE or ask.ids is not None):
            wanted |= PAYLOAD_LEN
        require(sent.flags == wanted, f"flags {sent.flags:#x}, where {wanted:#x} fit: {ask}")

    def link_follow_up(self, sent: Sent) -> None:
        """A request of the gateway's own: for whom it may be."""
        found = [ask for ask in self.live.values() if self._may_need(ask, sent)]
        require(found, f"a request for nobody: {sent}")
        for ask in found:
            ask.follow_ups.append(sent)

    def _may_need(self, ask: Ask, sent: Sent) -> bool:
        if sent.kind == FLUSH:
            return bool(self.adds_fua and ask.flags & FUA and ask.kind in CHANGES)
        inside = ask.offset <= sent.offset and (
            sent.offset + sent.length <= ask.offset + ask.length
        )
        if sent.kind == READ:
            return inside and ask.kind == READ and not ask.parts
        return inside and ask.kind == ZEROES and self.adds_zeroes

    def check_request(self, sent: Sent) -> None:
        """Whether the upstream may be sent this at all."""
        flags, sizes = int(self.served.flags), self.terms.block_sizes
        features = {
            FLUSH: SEND_FLUSH,
            TRIM: SEND_TRIM,
            CACHE: SEND_CACHE,
            ZEROES: SEND_ZEROES,
        }.get(sent.kind, 0)
        require(sent.kind in (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS), f"kind: {sent}")
        require(flags & features == features, f"not a feature of the upstream: {sent}")
        if sent.kind in CHANGES:
            require(not self.flags & READ_ONLY, f"a change of a read-only export: {sent}")
        require(not sent.flags & FUA or flags & SEND_FUA, f"FUA is not known: {sent}")
        require(not sent.flags & DF or flags & SEND_DF, f"DF is not known: {sent}")
        require(not sent.flags & FAST_ZERO or flags & SEND_FAST_ZERO, f"FAST_ZERO: {sent}")
        if sent.kind == FLUSH:
            require(not (sent.offset or sent.length), f"a flush of something: {sent}")
            return
        require(sent.length > 0, f"of no bytes: {sent}")
        require(sent.offset + sent.length <= self.terms.size, f"beyond the end: {sent}")
        require(not (sent.offset | sent.length) % sizes.minimum, f"not aligned: {sent}")
        if sent.kind == STATUS:
            require(self.ids, f"no meta contexts: {sent}")
            require(sent.ids is None or sent.ids <= self.ids, f"unknown contexts: {sent}")
        if sent.kind in (READ, WRITE):
            most = sizes.maximum
            if self.terms.split:
                most = min(most, self.served.block_sizes.maximum)
            if self.resumable:
                most = min(most, MAX_PAYLOAD)
            in_chunks = sent.kind == READ and self.chunks_below and not self.terms.split
            require(sent.length <= most or (in_chunks and not self.resumable), f"long: {sent}")

    # -- what the client has to be told

    def refusal(self, ask: Ask) -> int:
        """The error that this request has to be answered with, whatever the upstream says; or 0."""
        if ask.bad_filter:
            return EINVAL
        if ask.kind in CHANGES and self.flags & READ_ONLY:
            return EPERM
        allowed = self._allowed(ask)
        if allowed is None or ask.flags & ~allowed:
            return EINVAL
        if ask.kind == FLUSH:
            return EINVAL if ask.offset or ask.length else 0
        if ask.offset + ask.length > self.terms.size:
            return ENOSPC if ask.kind in (WRITE, ZEROES) else EINVAL
        if not ask.length:
            return EINVAL if ask.kind == STATUS else 0
        if (ask.offset | ask.length) % self.terms.block_sizes.minimum:
            return EINVAL
        if ask.kind == WRITE and ask.length > self.terms.block_sizes.maximum:
            return EINVAL
        if ask.kind == READ:
            return self._read_refusal(ask)
        fast = ask.kind == ZEROES and self.adds_zeroes and ask.flags & FAST_ZERO
        return ENOTSUP if fast else 0

    def _read_refusal(self, ask: Ask) -> int:
        most = self.terms.block_sizes.maximum
        in_chunks = self.chunks_below or (self.chunks_above and self.terms.split)
        if ask.length > most and not in_chunks:
            return EINVAL
        # A single chunk that the gateway has to put together itself.
        joins = ask.flags & DF and (
            (self.chunks_below and not self.served.flags & SEND_DF) or ask.length > self.whole
        )
        return EOVERFLOW if joins and ask.length > min(most, MAX_PAYLOAD) else 0

    @property
    def whole(self) -> int:
        """The longest READ or WRITE that goes on in one piece."""
        sizes = self.served.block_sizes
        whole = sizes.maximum & -sizes.minimum if self.terms.split else 1 << 64
        return min(whole, MAX_PAYLOAD & -sizes.minimum) if self.resumable else whole

    def _allowed(self, ask: Ask) -> int | None:
        flags = self.flags
        fua = FUA if flags & SEND_FUA else 0
        match ask.kind:
            case 0:
                return fua | (DF if flags & SEND_DF else 0)
            case 1:
                return fua | (PAYLOAD_LEN if self.extended else 0)
            case 3 if flags & SEND_FLUSH:
                return fua
            case 4 if flags & SEND_TRIM:
                return fua
            case 5 if flags & SEND_CACHE:
                return fua
            case 6 if flags & SEND_ZEROES:
                return fua | NO_HOLE | (FAST_ZERO if flags & SEND_FAST_ZERO else 0)
            case 7 if self.ids:
                payload = PAYLOAD_LEN if flags & STATUS_PAYLOAD and ask.ids is not None else 0
                return fua | REQ_ONE | payload
            case _:
                return None

    # -- ends

    def close(self, ask: Ask) -> None:
        """The client has the last of this reply."""
        ask.answered = True
        del self.live[ask.cookie]
        if ask.error:
            self._check_error(ask)
        else:
            self._check_success(ask)

    def _check_error(self, ask: Ask) -> None:
        theirs = [legal(one) for part in (*ask.parts, *ask.follow_ups) for one in part.errors]
        if ask.error in theirs or ask.error == self.refusal(ask):
            return
        if ask.error == 108 and self.refusing:
            return
        if ask.error == 5 and self.losses:
            durable = ask.kind == FLUSH or (ask.kind in CHANGES and ask.flags & FUA)
            require(durable, f"EIO for nothing: {ask}")
            return
        require(False, f"an error that nobody has had: {ask}")

    def _check_success(self, ask: Ask) -> None:
        require(not self.refusal(ask), f"success of what is to be refused: {ask}")
        require(not ask.padded, f"success with made-up data: {ask}")
        if ask.kind == READ:
            require(_covers(ask.told, ask.offset, ask.length), f"a short read: {ask}")
        if not ask.length and ask.kind != FLUSH:
            return
        if ask.kind == WRITE or (ask.parts and ask.kind != READ):
            require(all(one.ok for one in ask.parts), f"success without the upstream's: {ask}")
        good = [one for one in (*ask.parts, *ask.follow_ups) if one.ok and one.kind != FLUSH]
        if ask.kind in (FLUSH, STATUS):
            require(any(one.ok for one in ask.parts), f"success without the upstream's: {ask}")
        else:
            spans = [(one.offset, one.offset + one.length) for one in good]
            require(_covers(spans, ask.offset, ask.length), f"not all parts were done: {ask}")
        if ask.kind == STATUS:
            require(ask.contexts == (self.ids if ask.ids is None else ask.ids), f"short: {ask}")
        if ask.kind in CHANGES and ask.flags & FUA and self.adds_fua:
            require(self._made_durable(ask, good), f"FUA without a flush behind it: {ask}")

    def _made_durable(self, ask: Ask, good: list[Sent]) -> bool:
        for flush in ask.follow_ups:
            if flush.kind == FLUSH and flush.ok:
                before = [one for one in good if one.answered < flush.number]
                spans = [(one.offset, one.offset + one.length) for one in before]
                if _covers(spans, ask.offset, ask.length):
                    return True
        return False


def _covers(spans: list[tuple[int, int]], offset: int, length: int) -> bool:
    """Whether all these bytes are in one of the spans."""
    at = offset
    for start, stop in sorted(spans):
        if start > at:
            return False
        at = max(at, stop)
    return at >= offset + length

