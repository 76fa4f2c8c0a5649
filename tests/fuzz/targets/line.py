"""A relay without channels: a `Transmission`, driven as a relay has to, a model at each end."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.nbd.transmission import Piece, Transmission
from tests.fuzz.model.book import Book
from tests.fuzz.model.ear import Ear, Mind
from tests.fuzz.model.entries import Sent
from tests.fuzz.model.eyes import Eyes
from tests.fuzz.model.frames import READ, WRITE
from tests.fuzz.model.mouth import Mouth
from tests.fuzz.source import require
from tests.fuzz.targets.setups import Setup

BUDGET = 4 << 20  # bytes that are made up in one session; more shows nothing more
_DATA = (READ, WRITE)
_ROUNDS = 3000
_PLANNED = 64 * 8  # requests of the gateway's own, beside those of the client: its own bound


class Line:
    """One session. `over` once it has come to an end that nobody can say any more in."""

    def __init__(self, setup: Setup) -> None:
        terms = setup.terms
        self.machine = Transmission(terms, limits=setup.limits, resumable=setup.resumable)
        self.book = Book(terms, resumable=setup.resumable)
        self.mind = Mind(self.book)
        self.eyes = Eyes(self.book)
        self.mouth = Mouth(self.book)
        self.over = False
        self.sloppy = False  # the budget is used up: what is owed will not be paid
        self.forwarded = bytearray()  # all that was, for comparison
        self._limits = setup.limits
        self._pen = Ear(self.book)
        self._ear = Ear(self.book, repeats=True) if setup.resumable else self._pen
        self._up = True  # there is an upstream, which is sent what is recorded
        self._held = b""  # of the client, not consumed
        self._at = 0  # where that begins in its stream
        self._said = b""  # of the upstream, not consumed
        self._local = b""  # for the client, when no message of it is under way
        self._budget = BUDGET

    # -- the client

    def ask(self, data: bytes) -> None:
        self._ask(self.mind.say(data))

    def _ask(self, data: bytes) -> None:
        machine = self.machine
        self._held += data
        for _ in range(_ROUNDS):
            if self.over or machine.client_fault or machine.client_done:
                break
            buffer = bytearray(self._held)
            consumed, pieces = machine.requests(buffer, 0, len(buffer))
            require(0 <= consumed <= len(buffer), "consumed what there is not")
            self._at += consumed
            self._held = bytes(buffer[consumed:])
            self.mind.consumed(self._at)
            self._forward(buffer, pieces, own=False)
            self._local += machine.take_local_replies()
            self._follow_up()
            self._speak()
            if not machine.crowded or machine.full:
                break
        self._check_client()

    def _check_client(self) -> None:
        machine, mind = self.machine, self.mind
        if self.over:
            return
        if machine.client_fault or machine.client_done:
            stop = mind.broken_at if machine.client_fault else mind.done_at
            require(self._at == stop, f"stopped at {self._at} of the client, not at {stop}")
        elif not machine.crowded:
            require(len(self._held) < 32 + 8 + 4 * len(self.book.ids), "leaves what is whole")
            require(not mind.over or self._held, "did not see the client's end")
        require(machine.in_flight <= self._limits.requests + _PLANNED, "too many in flight")
        owed = [
            one.length
            for one in self.book.sent.values()
            if one.kind in _DATA and not (one.answered or one.forgotten)
        ]
        if owed and not self.book.lost:
            # One is always let through, and a WRITE is let through whole, part by part.
            longest = max((one.length for one in self.book.live.values()), default=0)
            most = self._limits.payload + max(longest, *owed)
            require(sum(owed) <= most, "too many bytes in flight", sum(owed))

    def _forward(self, buffer: bytearray, pieces: Sequence[Piece], *, own: bool) -> None:
        if not pieces:
            return
        if self.book.resumable:
            self.machine.record(buffer, pieces)
        sent = [buffer[o[0] : o[1]] if isinstance(o, tuple) else o for o in pieces]
        require(not self.book.lost or not sent, "something for an upstream that is gone")
        self._pen.hear(sent, own=own)
        self._pen.check_whole()
        self._budget -= sum(len(one) for one in sent)
        if own:
            self.forwarded += b"".join(bytes(one[:64]) for one in sent)
        else:
            self.forwarded += b"".join(sent)
        if self._up and self._ear is not self._pen:
            self._ear.hear(sent)
        mid = self._pen.current is not None
        require(own or mid == self.machine.mid_request, "wrong about the middle of a request")

    def _follow_up(self) -> None:
        machine = self.machine
        while machine.follow_ups_due and not (machine.mid_request or self.book.lost):
            if self._budget < 0:
                self.sloppy = True
                break
            self._forward(bytearray(), machine.take_follow_ups(), own=True)

    def _speak(self) -> None:
        if not self.machine.mid_reply and self._local:
            local, self._local = self._local, b""
            self._tell([local])

    def _tell(self, said: Sequence[bytes | bytearray | memoryview]) -> None:
        for one in said:
            self.eyes.see(one)

    # -- the upstream

    @property
    def outstanding(self) -> list[Sent]:
        """What the upstream of now has got whole and not answered."""
        if not self._up or self.book.lost:
            return []
        return [
            one
            for one in self.book.sent.values()
            if not one.answered and not one.payload_left and one.cookie in self._ear.seen
        ]

    def say(self, data: bytes) -> None:
        machine = self.machine
        if self.over or self.book.lost or not self._up:
            return
        self.mouth.say(data)
        buffer = bytearray(self._said + data)
        wanted = machine.wanted
        consumed, pieces = machine.replies(buffer, 0, len(buffer))
        require(0 <= consumed <= len(buffer), "consumed what there is not")
        require(not consumed or len(buffer) >= wanted, "went on with less than it wanted")
        self._said = bytes(buffer[consumed:])
        self._tell([buffer[o[0] : o[1]] if isinstance(o, tuple) else o for o in pieces])
        require(machine.mid_reply or not self.eyes.mid_message, "left in the middle of a message")
        self._check_upstream()
        self._speak()
        self._follow_up()
        if machine.crowded and not machine.full:
            self._ask(b"")
        if machine.upstream_fault:
            self.lose()
        elif self.book.resumable and machine.upstream_leaves:
            self.suspend()
        elif machine.upstream_ends and machine.idle and not machine.mid_request:
            self._ear.hear([machine.disconnect_request()])
            self.lose()

    def _check_upstream(self) -> None:
        """Both have to find the same fault, but not at the same byte of a message."""
        if self.machine.upstream_fault:
            found = self.mouth.broken or self.mouth.mid_message
            require(found, f"found a fault where there is none: {self.machine.upstream_fault}")
        elif self.mouth.broken:
            require(self._said, f"did not find a fault: {self.mouth.broken}")

    def suspend(self) -> None:
        """A resumable one only: the upstream is gone, or is not to be sent anything more."""
        if self.book.lost or not self._up:
            return
        self.machine.suspend()
        self._up = False

    def resume(self) -> None:
        """There is another upstream."""
        machine = self.machine
        if self.over or self.book.lost or self._up:
            return
        self._said = b""
        for one in self.book.sent.values():
            if not one.answered or one.refused:
                one.start_anew()
        self.mouth = Mouth(self.book)
        self._ear = Ear(self.book, repeats=True)
        self.book.losses += machine.resume()
        _, pieces = machine.replies(bytearray(), 0, 0)
        self._tell([o for o in pieces if not isinstance(o, tuple)])
        for part in machine.again():
            self._ear.hear([part])
        self._ear.check_whole()
        for one in self.book.sent.values():
            one.forgotten |= not one.answered and one.cookie not in self._ear.seen
        self._up = True
        self._speak()
        self._follow_up()
        if machine.crowded and not machine.full:
            self._ask(b"")

    def lose(self) -> None:
        """There is no upstream any more."""
        if self.book.lost or self.over:
            return
        self.book.lost = self.book.refusing = True
        self._said = b""
        was_open = self.eyes.mid_message
        words = self.machine.lose_upstream()
        if words is None:
            require(was_open and not self.book.chunks_above, "a client that could have been told")
            self.over = True
            return
        if self.eyes.left > BUDGET:
            self.over = True  # a gibibyte of padding
            return
        for one in words:
            self.eyes.see(one)
        require(not self.eyes.mid_message, "left in the middle of a message")
        self._speak()
        self._ask(b"")

    def shutdown(self) -> None:
        self.machine.shutdown()
        self.book.refusing = True

    # -- the end

    @property
    def settled(self) -> bool:
        """Whether all that was asked is answered, so that it can be compared."""
        return not self.book.live

    def check_end(self) -> None:
        """After a `finish`: nobody waits for anything."""
        if self.over or self.sloppy or self.mind.mid_payload:
            return
        require(not self.book.live, f"never answered: {list(self.book.live.values())[:3]}")
        require(self.machine.idle, "not idle, with nothing to do")
        require(not self.machine.crowded, "a request was left lying")
        require(not self.machine.in_flight, "something in flight for ever")
