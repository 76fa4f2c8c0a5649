"""What may be sent upstream for the client's requests, and what the client may be told of them."""

from __future__ import annotations

from collections import deque

from gateway.nbd.pairing import Terms
from tests.fuzz.model.entries import Ask, Sent, covers
from tests.fuzz.model.frames import (
    CACHE,
    DF,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ESHUTDOWN,
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
)
from tests.fuzz.source import require

CHANGES = frozenset({WRITE, TRIM, ZEROES})


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
        self.lost = False  # there is no upstream any more, nor will be
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
                return ask
            self._unlinked.popleft()  # not for the upstream, as it seems
        require(False, "the upstream is sent what the client did not ask for", sent)
        raise AssertionError

    def _fits(self, ask: Ask, sent: Sent) -> bool:
        if ask.answered or ask.kind != sent.kind or self.refusal(ask):
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
        require(sent.flags == wanted, f"flags {sent.flags:#x}, where {wanted:#x} fit", ask)

    def link_follow_up(self, sent: Sent) -> None:
        """A request of the gateway's own: for whom it may be."""
        found = [ask for ask in self.live.values() if self._may_need(ask, sent)]
        require(found, "a request for nobody", sent)
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
        require(sent.kind in (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS), "kind", sent)
        require(flags & features == features, "not a feature of the upstream", sent)
        if sent.kind in CHANGES:
            require(not self.flags & READ_ONLY, "a change of a read-only export", sent)
        require(not sent.flags & FUA or flags & SEND_FUA, "FUA is not known", sent)
        require(not sent.flags & DF or flags & SEND_DF, "DF is not known", sent)
        require(not sent.flags & FAST_ZERO or flags & SEND_FAST_ZERO, "FAST_ZERO", sent)
        if sent.kind == FLUSH:
            require(not (sent.offset or sent.length), "a flush of something", sent)
            return
        require(sent.length > 0, "of no bytes", sent)
        require(sent.offset + sent.length <= self.terms.size, "beyond the end", sent)
        require(not (sent.offset | sent.length) % sizes.minimum, "not aligned", sent)
        if sent.kind == STATUS:
            require(self.ids, "no meta contexts", sent)
            require(sent.ids is None or sent.ids <= self.ids, "unknown contexts", sent)
        if sent.kind in (READ, WRITE):
            most = sizes.maximum
            if sent.kind == READ and (
                self.chunks_below or (self.chunks_above and self.terms.split)
            ):
                most = 1 << 64  # in chunks the client may be told any
            if self.terms.split:
                most = min(most, self.served.block_sizes.maximum)
            if self.resumable:
                most = min(most, MAX_PAYLOAD)
            require(sent.length <= most, "long", sent)

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
        for error in ask.errors:
            self._check_error(ask, error)
        if not ask.errors:
            self._check_success(ask)

    def _check_error(self, ask: Ask, error: int) -> None:
        parts = (*ask.parts, *ask.follow_ups)
        if error == self.refusal(ask) or any(error in one.all_errors for one in parts):
            return
        if error == ESHUTDOWN and self.refusing:
            return
        if error == EIO and self.losses:
            # Or else it was done in parts, of which some are lost.
            durable = ask.kind == FLUSH or (ask.kind in CHANGES and ask.flags & FUA)
            require(durable or len(parts) > 1, "EIO for nothing", ask)
            return
        require(False, f"error {error}, which nobody has had", ask)

    def check_data(self, ask: Ask, offset: int, count: int, data: bytes | None) -> None:
        """Whether this is what the upstream has told; `data` None: zeroes."""
        end = offset + count
        parts = [one for one in (*ask.parts, *ask.follow_ups) if one.kind == READ]
        reached, todo = {offset}, [offset]
        while todo and end not in reached:
            at = todo.pop()
            for part in parts:
                step = min(part.offset + part.length, end) - at
                if part.offset <= at and step > 0 and at + step not in reached:
                    piece = None if data is None else data[at - offset : at - offset + step]
                    if part.has(at, step, piece):
                        reached.add(at + step)
                        todo.append(at + step)
        if end not in reached:
            made_up = self.lost and (data is None or not any(data))
            require(made_up, f"not the upstream's data at {offset}+{count}", ask)
            ask.padded = True

    def _check_success(self, ask: Ask) -> None:
        require(not self.refusal(ask), "success of what is to be refused", ask)
        require(not ask.padded, "success with made-up data", ask)
        if ask.kind == READ:
            require(covers(ask.told, ask.offset, ask.length), "a short read", ask)
        if not ask.length and ask.kind != FLUSH:
            return
        if ask.kind == WRITE or (ask.parts and ask.kind != READ):
            require(all(one.ok for one in ask.parts), "success without the upstream's", ask)
        good = [one for one in (*ask.parts, *ask.follow_ups) if one.ok and one.kind != FLUSH]
        if ask.kind in (FLUSH, STATUS):
            require(any(one.ok for one in ask.parts), "success without the upstream's", ask)
        else:
            spans = [(one.offset, one.offset + one.length) for one in good]
            require(covers(spans, ask.offset, ask.length), "not all parts were done", ask)
        if ask.kind == STATUS:
            require(ask.contexts == (self.ids if ask.ids is None else ask.ids), "short", ask)
        if ask.kind in CHANGES and ask.flags & FUA and self.adds_fua:
            require(self._made_durable(ask, good), "FUA without a flush behind it", ask)

    def _made_durable(self, ask: Ask, good: list[Sent]) -> bool:
        for flush in ask.follow_ups:
            if flush.kind == FLUSH and flush.ok:
                before = [one for one in good if one.answered < flush.number]
                spans = [(one.offset, one.offset + one.length) for one in before]
                if covers(spans, ask.offset, ask.length):
                    return True
        return False
