"""Transmission phases whose upstream dies, with all that is in its cache, and comes back.

What a client may rely on: a write that it was told is done, and that a later FLUSH has covered,
stays, if no request for durability failed in between; so does a write with FUA. Any other one may
be gone with the upstream it was told by. Nothing that was answered is done once more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from gateway.nbd.constants import Cmd, Error
from tests.nbd.masked.book import NEVER, planned, refusals
from tests.nbd.masked.eyes import Eyes, Outcome
from tests.nbd.masked.frames import DF, FAST_ZERO, FUA, WRITES, Ask, Style
from tests.nbd.masked.session import FIRST_COOKIE, Manner, first_disk
from tests.nbd.masked.setups import Setup
from tests.nbd.masked.upstream import NO_FAULTS, Faults, MaskedUpstream, Op, true_status
from tests.nbd.resuming import Line

USUAL = Manner()


class MortalUpstream(MaskedUpstream):
    """Remembers what it has changed, in order: what is not durable may be lost."""

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self._first = bytes(self.disk)
        self._log: list[tuple[Op, int, bytes]] = []

    def _apply(self, op: Op) -> None:
        super()._apply(op)  # an error may leave a part of it: the log is of what there is now
        self._log.append((op, op.start, bytes(self.disk[op.start : op.stop])))

    def crash(self) -> bytes:
        """What is there when the power is back: each change that is not durable is there or not."""
        disk = bytearray(self._first)
        odds = self._rng.choice([0.0, 0.5, 1.0])
        for op, start, data in self._log:
            if op.durable or self._rng.random() < odds:
                disk[start : start + len(data)] = data
        return bytes(disk)


@dataclass(eq=False)
class Record:
    """One request of the client, in the client's time."""

    ask: Ask
    begun: int
    ended: int = NEVER
    error: int = 0

    @property
    def ok(self) -> bool:
        return self.ended != NEVER and not self.error

    @property
    def wants_durability(self) -> bool:
        ask = self.ask
        return ask.kind == Cmd.FLUSH or (ask.kind in WRITES and bool(ask.flags & FUA))

    def covers(self, start: int) -> bool:
        return self.ask.kind in WRITES and self.ask.offset <= start < self.ask.stop


class Restarts:
    """`run`, and then `finish`, which checks everything."""

    def __init__(
        self,
        setup: Setup,
        asks: list[Ask],
        rng: random.Random,
        *,
        manner: Manner = USUAL,
        faults: Faults = NO_FAULTS,
        deaths: int = 3,
        disk: bytes | None = None,
    ) -> None:
        self.setup, self.rng = setup, rng
        self.line = Line(setup.terms)
        self.deaths: list[int] = []  # in the client's time
        self._most_deaths = deaths
        self._extended = setup.above is Style.EXTENDED
        self._manner, self._faults = manner, faults
        self._initial = first_disk(setup.mask.size, rng) if disk is None else disk
        self._now = 0
        self._records: dict[int, Record] = {}
        self._asks = [one._replace(cookie=FIRST_COOKIE + n) for n, one in enumerate(asks)][::-1]
        self._sending = b""
        terms = setup.terms
        self._eyes = Eyes(
            setup.above,
            max_payload=terms.block_sizes.maximum,
            ids=frozenset(one.id for one in terms.contexts),
        )
        self._seen = 0  # of what the client was sent
        self._down = False
        self._resending = False
        self._refuses = False  # it has said ESHUTDOWN, and gets no more
        self._order: list[int] = []  # the cookies that the last upstream had, as they came
        self._live(self._initial)

    def _live(self, disk: bytes) -> None:
        faults = NO_FAULTS if len(self.deaths) > self._most_deaths else self._faults
        self.upstream = MortalUpstream(self.setup, self.rng, faults, disk=disk)
        self._on_its_way = b""
        self._heard = 0  # bytes of what it was sent

    # -- events

    def run(self, steps: int) -> None:
        rng = self.rng
        for _ in range(steps):
            match rng.randrange(10):
                case 0 | 1 | 2:
                    self.send(rng.choice(self._manner.pieces))
                case 3 | 4:
                    self.return_(rng.choice(self._manner.pieces))
                case 5 | 6:
                    self.answer()
                case 7:
                    if not self._down:
                        self.upstream.work()
                case 8:
                    if self._down:
                        self.come_back()
                    elif self._resending:
                        self.send_again(rng.choice([1, 1, 3]))
                case 9:
                    if rng.random() < 0.3 and len(self.deaths) < self._most_deaths:
                        self.die()

    def die(self, arrives: int | None = None) -> None:
        """Some of what it has said may arrive still: so many bytes, or any."""
        if self._down:
            return
        if arrives is None:
            arrives = self.rng.choice([0, len(self._on_its_way), self.rng.randrange(60)])
        self.return_(arrives)
        if self._down:
            return  # it had said that it leaves, and now it has
        self._fall()

    def _fall(self) -> None:
        self.deaths.append(self._tick())
        self.line.loses()
        self._down, self._resending, self._refuses = True, False, False
        self._order = [op.ask.cookie for op in self.upstream.ops]

    def come_back(self) -> None:
        self._live(self.upstream.crash())
        self.line.finds()
        self._down, self._resending = False, True
        self._look()

    def send_again(self, parts: int | None) -> None:
        """So many parts of what is to be sent again, or all."""
        if self._refuses:
            return
        self._resending = self.line.sends_again(parts)
        self._feed()

    def send(self, count: int) -> None:
        piece = b""
        while count > 0 and self._next():
            taken = self._sending[:count]
            self._sending = self._sending[len(taken) :]
            piece += taken
            count -= len(taken)
        if piece:
            self.line.asks(piece)
            self._look()

    def _next(self) -> bool:
        if self._sending:
            return True
        open_ = [one for one in self._records.values() if one.ended == NEVER]
        if not self._asks or len(open_) >= self._manner.window:
            return False
        ask = self._asks.pop()
        self._records[ask.cookie] = Record(ask, self._tick())
        self._eyes.expect(ask)
        self._sending = ask.pack(extended=self._extended)
        return True

    def answer(self) -> bool:
        if self._down or not self.upstream.waiting:
            return False
        self._on_its_way += self.upstream.speak()
        return True

    def return_(self, count: int) -> None:
        piece, self._on_its_way = self._on_its_way[:count], self._on_its_way[count:]
        if not piece or self._down:
            return
        machine = self.line.machine
        self.line.says(piece)
        assert machine.upstream_fault is None, machine.upstream_fault.what
        self._refuses = machine.upstream_leaves
        self._look()
        if not self._refuses:
            return
        over = not (self._on_its_way or self.upstream.waiting)
        if machine.upstream_has_left:
            assert all(op.error == Error.ESHUTDOWN for op in self.upstream.waiting)
            if over or self.rng.random() < 0.5:
                self._fall()
        else:
            assert not over, "there is nothing to wait for"

    def _look(self) -> None:
        self._feed()
        fresh = self.line.client[self._seen :]
        self._seen = len(self.line.client)
        for outcome in self._eyes.feed(fresh):
            self._finished(outcome)

    def _feed(self) -> None:
        if self._down:
            return
        raw = self.line.upstream[self._heard :]
        assert not (raw and self._refuses), "more for an upstream that leaves"
        self._heard += len(raw)
        self.upstream.hear(raw)

    def _tick(self) -> int:
        self._now += 1
        return self._now

    @property
    def on_its_way(self) -> int:
        """Bytes of the upstream that have not arrived."""
        return len(self._on_its_way)

    @property
    def to_send(self) -> int:
        """Bytes of the client that have not arrived."""
        return len(self._sending) + sum(
            len(one.pack(extended=self._extended)) for one in self._asks
        )

    # -- the end

    def finish(self) -> None:
        """Everything that can happen happens; at last the power fails once more."""
        self._most_deaths = len(self.deaths)
        while True:
            before = self._state()
            if self._down:
                self.come_back()
            if self._resending and not self._refuses:
                self.send_again(None)
            self.send(1 << 20)
            while self.answer():
                pass
            self.return_(len(self._on_its_way))
            if before == self._state():
                break
        self._check_end()
        self.deaths.append(self._tick())
        self._check_bytes(0, self.upstream.crash(), NEVER - 1)

    def _state(self) -> tuple[object, ...]:
        ended = sum(one.ended != NEVER for one in self._records.values())
        ops = self.upstream.ops
        return (
            len(self.deaths), ended, len(self._asks), len(self._sending), len(ops),
            sum(len(one.said) for one in ops), self._down, self._resending, self._heard,
        )  # fmt: skip

    def _check_end(self) -> None:
        machine = self.line.machine
        assert not self._eyes.mid_message
        assert not self._eyes.outstanding
        assert not self._asks
        assert not self._sending
        assert all(one.ended != NEVER for one in self._records.values())
        assert machine.idle
        assert not machine.in_flight
        assert not machine.follow_ups_due
        assert not machine.mid_request
        assert not self.upstream.mid_request
        self._check_bytes(0, bytes(self.upstream.disk), NEVER - 1)

    # -- what the client is told

    def _finished(self, outcome: Outcome) -> None:
        one = self._records[outcome.ask.cookie]
        assert one.ended == NEVER
        one.ended, one.error = self._tick(), outcome.error
        expected = refusals(self.setup, one.ask)
        if expected:
            assert outcome.error in expected or one.ask.kind == Cmd.READ
        elif outcome.error == Error.EIO and self.deaths and self._may_be_lost(one):
            pass
        elif outcome.error:
            slow = one.ask.flags & FAST_ZERO and outcome.error == Error.ENOTSUP
            large = one.ask.flags & DF and outcome.error == Error.EOVERFLOW
            assert slow or large or self._faults != NO_FAULTS, f"{one.ask}: {outcome.error}"
            assert outcome.error != Error.ESHUTDOWN, "there will be another one"
        elif one.ask.kind == Cmd.READ and one.ask.length:
            assert outcome.data is not None
            self._check_bytes(one.ask.offset, bytes(outcome.data), one.begun)
        elif one.ask.kind == Cmd.BLOCK_STATUS:
            for number, extents in outcome.statuses.items():
                at = one.ask.offset
                for length, status in extents:
                    assert status == true_status(self.setup, number, at)
                    at += length

    def _may_be_lost(self, one: Record) -> bool:
        """Whether it may fail because writes that were answered are gone: it asks for durability,
        or it is done in parts, and some of them were answered."""
        return one.wants_durability or (one.ask.kind in WRITES and planned(self.setup, one.ask))

    def check_order(self) -> None:
        """What was sent before is sent again in its order, and what is new behind it."""
        mine = [op.ask.cookie for op in self.upstream.ops]
        known = set(self._order)
        again = [one for one in mine if one in known]
        assert again == [one for one in self._order if one in set(again)]

    def _stays(self, one: Record) -> bool:
        """Whether the client may rely on it whatever happens to the upstream."""
        if not one.ok:
            return False
        if one.ask.flags & FUA:
            return True
        later = [other for other in self._records.values() if other.wants_durability]
        for flush in later:
            if flush.ask.kind == Cmd.FLUSH and flush.ok and flush.begun > one.ended:
                failed = [bad for bad in later if bad.error and one.ended < bad.ended < flush.ended]
                if not failed:
                    return True
        return False

    def _check_bytes(self, offset: int, data: bytes, begun: int) -> None:
        """May a READ that began then, and ends now, have found this?"""
        stop = offset + len(data)
        changes = [
            one
            for one in self._records.values()
            if one.ask.kind in WRITES
            and one.ask.offset < stop
            and offset < one.ask.stop
            and not refusals(self.setup, one.ask)
        ]
        places = {offset, stop}
        for one in changes:
            places |= {one.ask.offset, one.ask.stop}
        stops = sorted(one for one in places if offset <= one <= stop)
        for first, behind in pairwise(stops):
            here = [one for one in changes if one.covers(first)]
            self._check_run(first, data[first - offset : behind - offset], here, begun)

    def _check_run(self, start: int, seen: bytes, here: list[Record], begun: int) -> None:
        last = max(self.deaths, default=0)
        settled = [
            one
            for one in here
            if one.ok and one.ended < begun and (one.ended > last or self._stays(one))
        ]
        alive = [one for one in here if not any(one.ended < other.begun for other in settled)]
        values = [] if settled else [self._initial[start : start + len(seen)]]
        for one in alive:
            if one.ask.kind == Cmd.TRIM:
                return
            at = start - one.ask.offset
            is_write = one.ask.kind == Cmd.WRITE
            values.append(one.ask.payload[at : at + len(seen)] if is_write else bytes(len(seen)))
        if seen in values:
            return
        for at, byte in enumerate(seen):
            assert byte in {value[at] for value in values}, f"other data at {start + at}"
