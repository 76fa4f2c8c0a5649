"""What a client is entitled to: a plain disk in memory, a verdict on each request, and who asked.

Requests in flight at the same time may be done in any order, so a byte has the values of all writes
that no later one has certainly replaced. Everything that the upstream hears must have been asked
for by a request that is not answered yet; so the book knows which part belongs to which request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from gateway.nbd.constants import Cmd, Error
from tests.nbd.masked.eyes import Outcome
from tests.nbd.masked.frames import (
    DF,
    FAST_ZERO,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    REQ_ONE,
    WRITES,
    Ask,
    Style,
)
from tests.nbd.masked.setups import MAX_UNADVERTISED, Setup, Tf
from tests.nbd.masked.upstream import Op, legal_error, true_status

NEVER = 1 << 62
BLOCK = 4096  # of zeroes, aligned in the export: it is found
UNFRAGMENTED = 65536  # "the server MUST support unfragmented reads" up to here


@dataclass(eq=False)
class Entry:
    """One request of the client, and what has become of it. Times are those of the book."""

    ask: Ask
    refusals: frozenset[int]  # errors, one of which it must get; empty: it has to be done
    planned: bool  # the gateway has to put it into other words
    begun: int
    heard: bool = False  # by the gateway: it has all that it needs to judge
    ended: int = NEVER
    ok: bool = False
    refused_as_slow: bool = False  # FAST_ZERO, ENOTSUP: "SHOULD NOT alter the contents"
    ops: list[Op] = field(default_factory=list)  # the upstream's, certainly or perhaps of this one
    certain: bool = True  # no other request can have asked for these
    flushes: list[Op] = field(default_factory=list)
    answered_before: list[Entry] = field(default_factory=list)  # a FLUSH has to cover them

    @property
    def has_effect(self) -> bool:
        """Whether the upstream has to be asked."""
        return not self.refusals and bool(self.ask.effect or self.ask.kind == Cmd.FLUSH)

    @property
    def may_change(self) -> bool:
        """Whether there may be other bytes on the disk, for what this one did or may still do."""
        return self.has_effect and self.ask.kind in WRITES and not self.refused_as_slow


class Book:
    """`initial` is the disk at the start."""

    def __init__(self, setup: Setup, initial: bytes) -> None:
        self.entries: dict[int, Entry] = {}  # by the client's cookie
        self.lost = False  # the upstream
        self.ending = False  # the upstream has answered ESHUTDOWN
        self.unsure = False  # when the gateway learns of either
        self.refusing = False  # ESHUTDOWN is the answer to whatever comes now
        self._setup = setup
        self._initial = initial
        self._now = 0

    def tick(self) -> int:
        self._now += 1
        return self._now

    @property
    def unanswered(self) -> list[Entry]:
        return [one for one in self.entries.values() if one.ended == NEVER]

    # -- events

    def begin(self, ask: Ask) -> Entry:
        """The first byte of it is about to reach the gateway."""
        entry = Entry(ask, refusals(self._setup, ask), planned(self._setup, ask), self.tick())
        if ask.kind == Cmd.FLUSH:
            entry.answered_before = [
                one for one in self.entries.values() if one.ok and one.may_change
            ]
        self.entries[ask.cookie] = entry
        return entry

    def judged(self, entry: Entry) -> None:
        """The gateway has all of the header."""
        if not entry.heard and self.refusing:
            entry.refusals |= {Error.ESHUTDOWN}
        entry.heard = True

    def heard(self, op: Op) -> None:
        """The upstream has a whole request: who asked for it?"""
        self.tick()
        assert not self.lost, f"{op} for an upstream that is gone"
        known = [one for one in self.unanswered if one.heard and one.has_effect]
        wanting = [one for one in known if self._wants(one, op)]
        assert wanting, f"{op}, and nobody has asked for it"
        for one in wanting:
            (one.flushes if op.ask.kind == Cmd.FLUSH else one.ops).append(op)
            if len(wanting) > 1:
                one.certain = False

    def finished(self, outcome: Outcome) -> None:
        """The client has all of a reply."""
        entry = self.entries[outcome.ask.cookie]
        assert entry.ended == NEVER
        entry.ended = self.tick()
        entry.ok = not outcome.error
        ask = entry.ask
        entry.refused_as_slow = bool(ask.flags & FAST_ZERO) and outcome.error == Error.ENOTSUP
        over = self.unsure and (self.lost or self.ending)
        if over and outcome.error == Error.ESHUTDOWN:
            pass
        elif entry.refusals:
            assert outcome.error in entry.refusals, f"{ask}: {outcome.error}"
            assert not entry.ops, "refused, and done as well"
        elif not entry.has_effect:
            assert not outcome.error, f"{ask}: {outcome.error}"
        elif outcome.error:
            self._check_error(entry, outcome)
        else:
            self._check_success(entry, outcome)

    def check_disk(self, disk: bytes | bytearray) -> None:
        """At the end: is it what was written?"""
        self._check_data(0, disk, NEVER - 1)

    # -- whose request is that?

    def _wants(self, entry: Entry, op: Op) -> bool:
        theirs, ours, setup = entry.ask, op.ask, self._setup
        done = [one for one in entry.ops if entry.certain]
        if ours.kind == Cmd.FLUSH:
            if theirs.kind == Cmd.FLUSH:
                return not (entry.certain and entry.flushes)
            succeeded = [one for one in entry.ops if one.answered is not None and not one.error]
            return (
                setup.adds_fua
                and theirs.kind in WRITES
                and bool(theirs.flags & FUA)
                and covers(succeeded, theirs)
                and not (entry.certain and (entry.flushes or succeeded != entry.ops))
            )
        if any(one.start < op.stop and op.start < one.stop for one in done):
            return False  # nothing is asked for twice
        flags = theirs.flags & ~FUA if setup.adds_fua else theirs.flags
        whole = (ours.offset, ours.length) == (theirs.offset, theirs.length)
        within = theirs.offset <= op.start and op.stop <= theirs.stop
        if theirs.kind == Cmd.WRITE_ZEROES and setup.adds_zeroes:
            need = flags & FUA | (PAYLOAD_LEN if setup.below is Style.EXTENDED else 0)
            is_zero = ours.kind == Cmd.WRITE and not any(ours.payload)
            return within and is_zero and ours.flags == need and self._is_part(theirs, ours)
        if theirs.kind != ours.kind:
            return False
        if theirs.kind == Cmd.READ:
            if entry.planned:
                return within and not ours.flags and self._is_part(theirs, ours)
            may = 0 if setup.below is Style.SIMPLE else DF
            return whole and ours.flags == theirs.flags & may
        if theirs.kind == Cmd.WRITE:
            start = op.start - theirs.offset
            same = ours.payload == theirs.payload[start : start + ours.length]
            return within and same and ours.flags == flags and self._is_part(theirs, ours)
        if theirs.kind not in WRITES:
            flags = theirs.flags & ~FUA
        return whole and ours.flags == flags and ours.payload == theirs.payload

    def _is_part(self, theirs: Ask, ours: Ask) -> bool:
        """Cut at multiples of the upstream's maximum, and no finer."""
        piece, at = self._setup.piece, ours.offset - theirs.offset
        if not self._setup.splits and theirs.kind != Cmd.WRITE_ZEROES:
            return not at and ours.length == theirs.length
        return at % piece == 0 and ours.length == min(piece, theirs.length - at)

    # -- was that the right answer?

    def _check_error(self, entry: Entry, outcome: Outcome) -> None:
        error = outcome.error
        if entry.certain and not self.lost:
            assert all(one.answered is not None for one in entry.ops), "answered too early"
        if error == Error.ESHUTDOWN and (self.lost or (self.ending and entry.planned)):
            return
        unfragmented = min(UNFRAGMENTED, self._setup.terms.block_sizes.maximum)
        too_large = entry.ask.kind == Cmd.READ and entry.ask.length > unfragmented
        if error == Error.EOVERFLOW and entry.ask.flags & DF and too_large:
            return
        failed = [one for one in (*entry.ops, *entry.flushes) if one.error and one.said]
        assert failed, f"error {error} for {entry.ask}, out of nowhere: {entry.ops}"
        if self.lost:
            assert error in {legal_error(one.error) for one in failed}
            return
        if entry.certain:
            failed.sort(key=lambda one: one.answered or 0)
            assert error == legal_error(failed[0].error), f"not the first error: {failed}"
        else:
            assert error in {legal_error(one.error) for one in failed}

    def _check_success(self, entry: Entry, outcome: Outcome) -> None:
        ask, setup = entry.ask, self._setup
        ops = [one for one in entry.ops if one.answered is not None and not one.error]
        if entry.certain:
            bad = [one for one in (*entry.ops, *entry.flushes) if one not in ops]
            assert not [one for one in bad if one.error or one.answered is None]
        if ask.kind == Cmd.FLUSH:
            assert [one for one in entry.flushes if one.answered is not None and not one.error]
            for one in entry.answered_before:
                done = [op for op in one.ops if op.durable]
                assert covers(done, one.ask), f"{one.ask} is not durable behind {ask}"
            return
        assert covers(ops, ask), f"{ask} has only been done in part: {entry.ops}"
        if ask.kind in WRITES and ask.flags & FUA:
            assert setup.terms.flags & Tf.SEND_FUA
            assert covers([one for one in ops if one.durable], ask), f"{ask} is not durable"
        if ask.kind == Cmd.READ:
            assert outcome.data is not None
            self._check_data(ask.offset, outcome.data, entry.begun)
            if setup.above is not setup.below and not entry.planned and not ask.flags & DF:
                self._check_holes(ask, outcome)
        if ask.kind == Cmd.BLOCK_STATUS:
            for number, extents in outcome.statuses.items():
                self._check_extents(ask, number, extents)

    def _check_holes(self, ask: Ask, outcome: Outcome) -> None:
        """Out of a simple reply: every block of zeroes is a hole, wherever the stream was cut."""
        assert outcome.data is not None
        for start in range(-(-ask.offset // BLOCK) * BLOCK, ask.stop - BLOCK + 1, BLOCK):
            if not any(outcome.data[start - ask.offset : start - ask.offset + BLOCK]):
                assert any(one <= start and start + BLOCK <= stop for one, stop in outcome.holes)

    def _check_extents(self, ask: Ask, number: int, extents: list[tuple[int, int]]) -> None:
        at = ask.offset
        for length, status in extents:
            assert at + length <= self._setup.mask.size
            for one in range(at, at + length):
                assert true_status(self._setup, number, one) == status
            at += length

    # -- the disk

    def _check_data(self, offset: int, data: bytes | bytearray, begun: int) -> None:
        """May a READ that began then, and ends now, have found this?"""
        stop = offset + len(data)
        changes = [
            one
            for one in self.entries.values()
            if one.may_change and one.ask.offset < stop and offset < one.ask.stop
        ]
        places = {offset, stop}
        for one in changes:
            places |= {one.ask.offset, one.ask.stop}
        stops = sorted(one for one in places if offset <= one <= stop)
        for first, behind in pairwise(stops):
            here = [one for one in changes if one.ask.offset <= first < one.ask.stop]
            self._check_run(first, bytes(data[first - offset : behind - offset]), here, begun)

    def _check_run(self, start: int, seen: bytes, here: list[Entry], begun: int) -> None:
        settled = [one for one in here if one.ok and one.ended < begun]
        alive = [one for one in here if not any(one.ended < other.begun for other in settled)]
        stop = start + len(seen)
        values = [self._initial[start:stop]] if not settled else []
        for one in alive:
            if one.ask.kind == Cmd.TRIM:
                return
            at = start - one.ask.offset
            is_write = one.ask.kind == Cmd.WRITE
            values.append(one.ask.payload[at : at + len(seen)] if is_write else bytes(len(seen)))
        if seen in values:
            return
        assert len(values) > 1, f"other data at {start}+{len(seen)}"
        for at, byte in enumerate(seen):
            assert byte in {value[at] for value in values}, f"other data at {start + at}"


def covers(ops: list[Op], ask: Ask) -> bool:
    """Whether these, together, are all of it."""
    at = ask.offset
    for op in sorted(ops, key=lambda one: one.start):
        if op.start <= at:
            at = max(at, op.stop)
    return at >= ask.stop


def planned(setup: Setup, ask: Ask) -> bool:
    """Whether the upstream cannot do it in the client's words."""
    if ask.kind in WRITES and ask.flags & FUA and setup.adds_fua:
        return True
    if ask.kind == Cmd.WRITE_ZEROES:
        return setup.adds_zeroes
    if ask.kind == Cmd.READ and ask.flags & DF and setup.df_is_ours:
        return True
    return ask.kind in (Cmd.READ, Cmd.WRITE) and setup.splits and ask.length > setup.piece


def refusals(setup: Setup, ask: Ask) -> frozenset[int]:
    """The errors that this may get from the gateway itself; empty if it has to be done.

    By what the client was told. proto.md, "Size constraints", "Command flags", "Request types".
    """
    terms = setup.terms
    told, kind, found = terms.flags, ask.kind, set()
    chunks = setup.above is not Style.SIMPLE
    extended = setup.above is Style.EXTENDED
    may = FUA if told & Tf.SEND_FUA else 0
    match kind:
        case Cmd.READ:
            may |= DF if told & Tf.SEND_DF else 0
        case Cmd.WRITE:
            may |= PAYLOAD_LEN if extended else 0
        case Cmd.FLUSH:
            known = told & Tf.SEND_FLUSH
        case Cmd.TRIM:
            known = told & Tf.SEND_TRIM
        case Cmd.CACHE:
            known = told & Tf.SEND_CACHE
        case Cmd.WRITE_ZEROES:
            known = told & Tf.SEND_WRITE_ZEROES
            may |= NO_HOLE | (FAST_ZERO if told & Tf.SEND_FAST_ZERO else 0)
        case Cmd.BLOCK_STATUS:
            known = bool(terms.contexts)
            may |= REQ_ONE | (PAYLOAD_LEN if extended and told & Tf.BLOCK_STATUS_PAYLOAD else 0)
        case _:
            known = False
    if kind not in (Cmd.READ, Cmd.WRITE) and not known:
        found.add(Error.EINVAL)
    if ask.flags & ~may:
        found.add(Error.EINVAL)
    if kind in WRITES and terms.read_only:
        found.add(Error.EPERM)
    if kind == Cmd.FLUSH:
        return frozenset(found | {Error.EINVAL} if ask.offset or ask.length else found)
    if ask.stop > terms.size:
        found.add(Error.ENOSPC if kind in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Error.EINVAL)
    if (ask.offset | ask.effect) % terms.block_sizes.minimum and ask.effect:
        found.add(Error.EINVAL)
    if kind == Cmd.BLOCK_STATUS:
        ids = {one.id for one in terms.contexts}
        right = ask.length == 8 + 4 * len(ask.ids) and len(set(ask.ids)) == len(ask.ids) > 0
        if not ask.effect or (ask.is_filter and not (right and set(ask.ids) <= ids)):
            found.add(Error.EINVAL)
    if kind == Cmd.WRITE or (kind == Cmd.READ and not chunks):
        if ask.length > terms.block_sizes.maximum:
            found.add(Error.EINVAL)
    if kind == Cmd.READ and setup.below is Style.SIMPLE and chunks and not setup.splits:
        if ask.length > setup.max_payload:
            found |= {Error.EINVAL, Error.EOVERFLOW}
    if kind == Cmd.WRITE_ZEROES and ask.flags & FAST_ZERO and setup.adds_zeroes and ask.effect:
        found.add(Error.ENOTSUP)
    if ask.kind == Cmd.READ and ask.flags & DF and ask.length > MAX_UNADVERTISED:
        found.add(Error.EOVERFLOW)
    return frozenset(found)
