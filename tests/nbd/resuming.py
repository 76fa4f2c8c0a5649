"""A relay without channels whose upstream comes and goes, to drive a resumable `Transmission`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gateway.nbd.constants import Cmd
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import InFlightLimits, Transmission
from tests.nbd.masked import frames
from tests.nbd.masked.eyes import Eyes, Outcome
from tests.nbd.masked.frames import PAYLOAD_LEN, Ask, Style
from tests.nbd.masked.setups import Mask, Setup
from tests.nbd.support import Req, parse_requests
from tests.nbd.walker import FRONT, joined_pieces

NO_LIMITS = InFlightLimits(requests=1 << 20, payload=1 << 40)


class Line:
    """`upstream` is what the upstream of now was sent, `client` what the client was.

    What is walked is recorded, and sent at once unless there is an outage or a resending.
    """

    def __init__(self, terms: Terms, limits: InFlightLimits = NO_LIMITS) -> None:
        self.machine = Transmission(terms, limits=limits, resumable=True)
        self.upstream = bytearray()
        self.past: list[bytes] = []  # what the upstreams before were sent
        self.client = bytearray()
        self.up = True
        self._suspended = False
        self.lost: list[bool] = []  # what each `resume` has said
        self._again: Iterator[bytes] | None = None
        self._from_client = b""
        self._from_upstream = b""

    @property
    def forwarded(self) -> list[Req]:
        """The upstream's reading of what it was sent."""
        return parse_requests(bytes(self.upstream))

    def asks(self, *pieces: bytes) -> Line:
        """What the client sends."""
        for piece in pieces:
            held = self._from_client + piece
            buffer = bytearray(b"\xa5" * FRONT + held + b"\x5a" * FRONT)
            end = FRONT + len(held)
            at, sent = self.machine.requests(buffer, FRONT, end)
            self._send(joined_pieces(buffer, sent, FRONT, at), buffer, sent)
            self._from_client = bytes(buffer[at:end])
            self.client += self.machine.take_local_replies()
            self._follow_up()
        return self

    def _send(self, raw: bytes, buffer: bytearray, pieces: Iterable[object]) -> None:
        self.machine.record(buffer, pieces)  # type: ignore[arg-type]
        if self.up:
            self.upstream += raw

    def _follow_up(self) -> None:
        while self.machine.follow_ups_due and not self.machine.mid_request:
            batch = self.machine.take_follow_ups()
            self._send(b"".join(batch), bytearray(), batch)

    def says(self, *pieces: bytes) -> Line:
        """What the upstream sends, until the gateway reads no further."""
        for piece in pieces:
            if self.machine.upstream_fault:
                break
            held = self._from_upstream + piece
            wanted = self.machine.wanted
            buffer = bytearray(b"\xa5" * FRONT + held + b"\x5a" * FRONT)
            end = FRONT + len(held)
            at, sent = self.machine.replies(buffer, FRONT, end)
            assert not (at > FRONT and len(held) < wanted), "went on with less than it wanted"
            assert not self.machine.mid_reply, "a client in the middle of a message"
            self.client += joined_pieces(buffer, sent, FRONT, at)
            self._from_upstream = bytes(buffer[at:end])
            if self.machine.upstream_leaves and not self._suspended:
                self.suspends()
            self._follow_up()
            if self.machine.crowded:
                self.asks(b"")
        return self

    def loses(self) -> Line:
        """The upstream is gone, and what it was in the middle of."""
        self.suspends()
        self._from_upstream = b""
        return self

    def suspends(self) -> None:
        """Nothing more is sent to this upstream, and nothing again."""
        self.machine.suspend()
        self.up = False
        self._suspended = True

    def finds(self) -> Line:
        """There is another upstream. Nothing has been sent to it yet: that is `sends_again`."""
        self.past.append(bytes(self.upstream))
        self.upstream.clear()
        self.lost.append(self.machine.resume())
        _, pieces = self.machine.replies(bytearray(), 0, 0)
        self.client += joined_pieces(bytearray(), pieces, 0, 0)
        self._again = self.machine.again()
        self._suspended = False
        self._follow_up()
        if self.machine.crowded:
            self.asks(b"")
        return self

    def sends_again(self, count: int | None = None) -> bool:
        """So many parts of what there is to send, or all. False: there was no more."""
        while count is None or count:
            part = None if self._again is None else next(self._again, None)
            if part is None:
                self._again = None
                self.up = not self._suspended
                return False
            self.upstream += part
            count = count and count - 1
        return True

    def resumes(self) -> Line:
        """One upstream is lost, the next is there and is sent all there is."""
        self.loses().finds().sends_again()
        return self


class Scene:
    """One line in one style of replies: a strict client above, and an upstream to be played."""

    def __init__(
        self,
        style: Style = Style.STRUCTURED,
        *,
        mask: Mask | None = None,
        limits: InFlightLimits = NO_LIMITS,
    ) -> None:
        self.setup = Setup(mask or Mask(), style)
        terms = self.setup.terms
        self.line = Line(terms, limits)
        self.machine = self.line.machine
        self.told: dict[int, Outcome] = {}  # whole replies, by the client's cookie
        self._extended = self.setup.above is Style.EXTENDED
        ids = frozenset(one.id for one in terms.contexts)
        self.eyes = Eyes(self.setup.above, max_payload=terms.block_sizes.maximum, ids=ids)
        self._seen = 0

    # The client

    def ask(
        self,
        kind: int,
        offset: int = 0,
        length: int = 512,
        *,
        cookie: int,
        flags: int = 0,
        keep: int = 0,
    ) -> bytes:
        """Sends one request, less its last `keep` bytes, which are returned."""
        payload = b""
        if kind == Cmd.WRITE:
            payload = bytes((cookie * 7 + at) % 251 + 1 for at in range(length))
            flags |= PAYLOAD_LEN if self._extended else 0
        if kind == Cmd.FLUSH:
            offset = length = 0
        one = Ask(kind, offset, length, flags, payload, cookie)
        self.eyes.expect(one)
        raw = one.pack(extended=self._extended)
        sent = max(len(raw) - keep, 0)
        self.sends(raw[:sent])
        return raw[sent:]

    def sends(self, raw: bytes) -> None:
        self.line.asks(raw)
        self._look()

    def _look(self) -> None:
        fresh = self.line.client[self._seen :]
        self._seen = len(self.line.client)
        for outcome in self.eyes.feed(fresh):
            self.told[outcome.ask.cookie] = outcome
        assert not self.eyes.mid_message

    @property
    def errors(self) -> dict[int, int]:
        """What the client was told, by its cookies."""
        return {cookie: outcome.error for cookie, outcome in self.told.items()}

    # The upstream

    @property
    def heard(self) -> list[Ask]:
        """The whole requests that the upstream of now was sent."""
        found, raw = [], bytes(self.line.upstream)
        below = self.setup.below is Style.EXTENDED
        while (taken := frames.take_ask(raw, extended=below)) is not None:
            found.append(taken[0])
            raw = raw[taken[1] :]
        return found

    @property
    def cookies(self) -> list[int]:
        return [one.cookie for one in self.heard]

    def chunk(self, one: Ask, kind: int, payload: bytes = b"", *, done: bool) -> bytes:
        return frames.chunk(self.setup.below, one, kind, payload, done=done)

    def success(self, one: Ask, fill: int = 0x5A) -> bytes:
        """A whole reply. The data of a READ is all `fill`."""
        if one.kind == Cmd.READ:
            return self.data(one, bytes([fill]) * one.length)
        if self.setup.below is Style.EXTENDED:
            return self.chunk(one, 0, done=True)
        return frames.simple(one.cookie)

    def data(self, one: Ask, data: bytes, offset: int | None = None, *, done: bool = True) -> bytes:
        if self.setup.below is Style.SIMPLE:
            return frames.simple(one.cookie, 0, data)
        at = one.offset if offset is None else offset
        return self.chunk(one, 1, frames.data_payload(at, data), done=done)

    def failure(self, one: Ask, error: int, *, done: bool = True) -> bytes:
        if self.setup.below is Style.SIMPLE:
            return frames.simple(one.cookie, error)
        return self.chunk(one, (1 << 15) + 1, frames.error_payload(error), done=done)

    def says(self, *pieces: bytes) -> Scene:
        self.line.says(*pieces)
        self._look()
        return self

    def resumes(self) -> Scene:
        self.line.resumes()
        self._look()
        return self

    def finds(self) -> Scene:
        self.line.finds()
        self._look()
        return self

    @property
    def fault(self) -> str:
        found = self.machine.upstream_fault
        return found.what if found else ""
