"""A strict upstream in memory: asked only for what its mask allows, and as lazy as it may be.

It reads requests as they come, does them in any order, answers in any order and in any chunks,
fails where it is told to, and keeps what was written in a cache that is lost with the power: a
write is durable only by its own FUA, or by a FLUSH that came when the write was answered already.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from gateway.nbd.constants import Chunk, Cmd, Error
from tests.nbd.masked import frames
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
from tests.nbd.masked.setups import Setup, Tf

ERRORS = [one for one in Error if one != Error.ESHUTDOWN]
ODD_ERRORS = [30, 122, 27, 9999]  # EROFS, EDQUOT, EFBIG, nonsense
TEXTS = [b"", b"no", "nö".encode(), b"\x1b[2J\xff"]
UNKNOWN_ERROR_CHUNK = 0x8000 + 77
# What TRIM may leave behind: all is allowed.
AFTER_TRIM: list[int | None] = [None, 0, 0xEE]


class Faults(NamedTuple):
    """What goes wrong: at random, and whatever touches the ranges `bad`: (start, stop, error)."""

    odds: float = 0.0
    bad: tuple[tuple[int, int, int], ...] = ()
    shutdown_odds: float = 0.0
    polite: bool = False  # no errors and no texts but those that a client may be told


NO_FAULTS = Faults()


class Op:
    """One request as this upstream got it."""

    def __init__(self, number: int, ask: Ask) -> None:
        self.number = number  # in the order of arrival
        self.ask = ask
        self.error = 0  # the first one that it answers
        self.text = b""  # with that
        self.said: list[bytes] = []
        self.to_say: list[Callable[[], bytes]] = []
        self.applied = False
        self.answered: int | None = None  # how many were before
        self.durable = False
        self.covers: list[Op] = []  # a FLUSH: what it makes durable

    @property
    def start(self) -> int:
        return self.ask.offset

    @property
    def stop(self) -> int:
        return self.ask.stop

    def __repr__(self) -> str:
        one = self.ask
        kind = Cmd(one.kind).name
        state = "not answered" if self.answered is None else f"answered {self.error}"
        return f"<{kind} {one.offset}+{one.effect} flags {one.flags} {state}>"


class MaskedUpstream:
    """`disk` is what reads see. `heard` is called with each request when all of it is here."""

    def __init__(
        self,
        setup: Setup,
        rng: random.Random,
        faults: Faults = NO_FAULTS,
        *,
        disk: bytes | None = None,
        heard: Callable[[Op], None] = lambda op: None,
    ) -> None:
        self.setup = setup
        self.style = setup.below
        self.disk = bytearray(setup.mask.size if disk is None else disk)
        self.ops: list[Op] = []
        self.waiting: list[Op] = []
        self.closing = False  # it has decided to answer ESHUTDOWN from now on
        self.over = False  # NBD_CMD_DISC
        self._rng = rng
        self._faults = faults
        self._heard = heard
        self._inbox = bytearray()
        self._cookies: set[int] = set()
        self._answers = 0

    # -- in

    @property
    def mid_request(self) -> bool:
        return bool(self._inbox)

    def hear(self, raw: bytes | bytearray) -> None:
        """What was sent, in any cuts."""
        assert not (raw and self.over), "something behind NBD_CMD_DISC"
        self._inbox += raw
        extended = self.style is Style.EXTENDED
        while (taken := frames.take_ask(self._inbox, extended=extended)) is not None:
            ask, size = taken
            del self._inbox[:size]
            if ask.kind == Cmd.DISC:
                assert not self._inbox, "something behind NBD_CMD_DISC"
                assert ask._replace(cookie=0) == Ask(Cmd.DISC)
                self.over = True
                return
            check_legal(self.setup, ask)
            assert ask.cookie not in self._cookies, "one cookie for two requests"
            self._cookies.add(ask.cookie)
            op = Op(len(self.ops), ask)
            if ask.kind == Cmd.FLUSH:
                op.covers = [one for one in self.ops if one.answered is not None and not one.error]
            self.ops.append(op)
            self.waiting.append(op)
            self._heard(op)
            self._decide(op)

    # -- work

    def work(self) -> None:
        """Do one of the changes that are asked for, before it is answered."""
        undone = [op for op in self.waiting if op.ask.kind in WRITES and not op.applied]
        if undone:
            self._apply(self._rng.choice(undone))

    def speak(self) -> bytes:
        """One message about one of the waiting requests."""
        op = self._rng.choice(self.waiting)
        if len(op.to_say) == 1 and op.ask.kind in WRITES and not op.applied:
            self._apply(op)
        message = op.to_say.pop(0)()
        op.said.append(message)
        if not op.to_say:
            self.waiting.remove(op)
            op.answered = self._answers
            self._answers += 1
            self._make_durable(op)
        return message

    def _make_durable(self, op: Op) -> None:
        if not op.error:
            for one in op.covers:
                one.durable = True
            op.durable = op.durable or bool(op.ask.flags & FUA)

    def _apply(self, op: Op) -> None:
        op.applied = True
        if op.error == Error.ENOTSUP and op.ask.flags & FAST_ZERO:
            return
        start, stop = op.start, op.stop
        if op.error:  # any part of it may have been done
            start = self._rng.randrange(start, stop + 1)
            stop = self._rng.randrange(start, stop + 1)
        if op.ask.kind == Cmd.WRITE:
            self.disk[start:stop] = op.ask.payload[start - op.start : stop - op.start]
        elif op.ask.kind == Cmd.WRITE_ZEROES:
            self.disk[start:stop] = bytes(stop - start)
        elif (left := self._rng.choice(AFTER_TRIM)) is not None:
            self.disk[start:stop] = bytes([left]) * (stop - start)

    # -- what to answer

    def _decide(self, op: Op) -> None:
        error = self._fault(op.ask)
        if error == Error.ESHUTDOWN:
            self.closing = True
        op.error = legal_error(error) if self._faults.polite and error else error
        if self.style is Style.SIMPLE:
            op.to_say = [partial(self._simple, op)]
        elif op.ask.kind == Cmd.READ:
            op.to_say = self._chunks(op, self._content(op))
        elif op.ask.kind == Cmd.BLOCK_STATUS:
            op.to_say = self._chunks(op, self._statuses(op))
        elif self.style is Style.STRUCTURED and self._rng.random() < 0.5:
            op.to_say = [partial(self._simple, op)]
        else:
            op.to_say = self._chunks(op, [])

    def _fault(self, ask: Ask) -> int:
        rng = self._rng
        if self.closing or rng.random() < self._faults.shutdown_odds:
            return Error.ESHUTDOWN
        if self._too_large(ask):
            return Error.EOVERFLOW
        for start, stop, error in self._faults.bad:
            if ask.kind != Cmd.FLUSH and ask.offset < stop and start < ask.stop:
                return error
        if ask.flags & FAST_ZERO and rng.random() < 0.5:
            return Error.ENOTSUP
        if rng.random() < self._faults.odds:
            return rng.choice(ODD_ERRORS if rng.random() < 0.1 else ERRORS)
        return 0

    def _too_large(self, ask: Ask) -> bool:
        limit = self.setup.max_payload
        return ask.kind == Cmd.READ and bool(ask.flags & DF) and ask.length > limit

    def _simple(self, op: Op) -> bytes:
        data = b""
        if op.ask.kind == Cmd.READ and not op.error:
            data = bytes(self.disk[op.start : op.stop])
        return frames.simple(op.ask.cookie, op.error, data)

    def _chunks(self, op: Op, content: list[Callable[..., bytes]]) -> list[Callable[[], bytes]]:
        """All messages of one answer; the last of them says that it is."""
        rng = self._rng
        lines = content
        if op.error:
            lines = content[: rng.randrange(len(content) + 1)]
            if self._too_large(op.ask) or (op.error == Error.EOVERFLOW and op.ask.flags & DF):
                lines = []
            lines = [*lines, self._error_line(op)]
        if not lines or rng.random() < 0.5:
            lines = [*lines, partial(frames.chunk, self.style, op.ask, Chunk.NONE)]
        return [*(partial(one, done=False) for one in lines[:-1]), partial(lines[-1], done=True)]

    def _error_line(self, op: Op) -> Callable[..., bytes]:
        rng = self._rng
        op.text = rng.choice(TEXTS[:-1] if self._faults.polite else TEXTS)
        kind, offset = Chunk.ERROR, None
        where = rng.random()
        if where < 0.3 and op.ask.kind != Cmd.FLUSH:
            kind, offset = Chunk.ERROR_OFFSET, rng.randrange(op.start, op.stop)
        elif where < 0.4:
            kind = UNKNOWN_ERROR_CHUNK
        payload = frames.error_payload(op.error, op.text, offset)
        return partial(frames.chunk, self.style, op.ask, kind, payload)

    def _content(self, op: Op) -> list[Callable[..., bytes]]:
        rng, ask = self._rng, op.ask
        limit = self.setup.max_payload
        places: set[int] = set()
        if not ask.flags & DF:
            unit = rng.choice([1, 512, 512])
            for _ in range(rng.choice([0, 0, 1, 4])):
                places.add(rng.randrange(ask.length) // unit * unit)
            places |= set(range(0, ask.length, limit))
        stops = [*sorted(places - {0}), ask.length]
        starts = [0, *stops[:-1]]
        lines: list[Callable[..., bytes]] = [
            partial(self._piece, op, ask.offset + start, ask.offset + stop)
            for start, stop in zip(starts, stops, strict=True)
        ]
        rng.shuffle(lines)
        return lines

    def _piece(self, op: Op, start: int, stop: int, *, done: bool) -> bytes:
        data = self.disk[start:stop]
        if not any(data) and self._rng.random() < 0.7:
            kind, payload = Chunk.OFFSET_HOLE, frames.hole_payload(start, stop - start)
        else:
            kind, payload = Chunk.OFFSET_DATA, frames.data_payload(start, data)
        return frames.chunk(self.style, op.ask, kind, payload, done=done)

    def _statuses(self, op: Op) -> list[Callable[..., bytes]]:
        ask = op.ask
        ids = ask.ids if ask.is_filter else [one.id for one in self.setup.terms.contexts]
        lines: list[Callable[..., bytes]] = []
        for number in ids:
            payload = frames.status_payload(self.style, number, self._extents(ask, number))
            lines.append(
                partial(frames.chunk, self.style, ask, frames.status_kind(self.style), payload)
            )
        self._rng.shuffle(lines)
        return lines

    def _extents(self, ask: Ask, number: int) -> list[tuple[int, int]]:
        """Of the true status, less than was asked, or more."""
        rng, setup = self._rng, self.setup
        found: list[tuple[int, int]] = []
        at = ask.offset
        while at < ask.stop and (not found or rng.random() < 0.8):
            status = true_status(setup, number, at)
            stop = at
            while stop < setup.mask.size and true_status(setup, number, stop) == status:
                stop = min(setup.mask.size, (stop // status_unit(setup) + 1) * status_unit(setup))
            if ask.flags & REQ_ONE or rng.random() < 0.3:
                stop = min(stop, ask.stop)
            found.append((stop - at, status))
            at = stop
            if ask.flags & REQ_ONE:
                break
        return found


def status_unit(setup: Setup) -> int:
    """Of the map that `true_status` is."""
    return max(512, setup.mask.block_sizes.minimum)


def true_status(setup: Setup, number: int, offset: int) -> int:
    """The status of one byte in one meta context. It never changes."""
    block = offset // status_unit(setup)
    status = (block * 7 + number) // 3 % 4
    base = any(one.id == number and one.name.startswith("base:") for one in setup.mask.contexts)
    if setup.below is Style.EXTENDED and not base:
        status |= (block // 5 % 3) << 33
    return status


def legal_error(error: int) -> int:
    """What a client may be told of an upstream's error. proto.md, "Error values"."""
    if error in frames.LEGAL_ERRORS:
        return error
    return {30: Error.EPERM, 122: Error.ENOSPC, 27: Error.ENOSPC}.get(error, Error.EINVAL)


def check_legal(setup: Setup, ask: Ask) -> None:
    """The specification lets a client send this to an upstream with this mask."""
    mask, style, kind = setup.mask, setup.below, ask.kind
    features, extended = setup.flags, style is Style.EXTENDED
    may = FUA if features & Tf.SEND_FUA and kind in WRITES else 0
    effect = ask.effect
    match kind:
        case Cmd.READ:
            may |= DF if style is not Style.SIMPLE and features & Tf.SEND_DF else 0
            if style is Style.SIMPLE or setup.splits:
                assert effect <= setup.max_payload, "a read beyond the maximum payload"
        case Cmd.WRITE:
            may |= PAYLOAD_LEN if extended else 0
            assert len(ask.payload) == effect <= setup.max_payload
            assert bool(ask.flags & PAYLOAD_LEN) == extended
        case Cmd.FLUSH:
            assert features & Tf.SEND_FLUSH
            assert ask._replace(cookie=0) == Ask(Cmd.FLUSH)
            return
        case Cmd.TRIM:
            assert features & Tf.SEND_TRIM
        case Cmd.CACHE:
            assert features & Tf.SEND_CACHE
        case Cmd.WRITE_ZEROES:
            assert features & Tf.SEND_WRITE_ZEROES
            may |= NO_HOLE | (FAST_ZERO if features & Tf.SEND_FAST_ZERO else 0)
        case Cmd.BLOCK_STATUS:
            ids = [one.id for one in setup.terms.contexts]
            assert ids
            may |= REQ_ONE
            if extended and features & Tf.BLOCK_STATUS_PAYLOAD:
                may |= PAYLOAD_LEN
            if ask.is_filter:
                assert len(ask.payload) == ask.length == 8 + 4 * len(ask.ids)
                assert ask.ids
                assert len(set(ask.ids)) == len(ask.ids)
                assert set(ask.ids) <= set(ids)
        case _:
            raise AssertionError(f"request of type {kind}")
    assert not ask.flags & ~may, f"flags {ask.flags:#x} for command {kind}"
    assert not (features & Tf.READ_ONLY and kind in WRITES)
    assert 0 < effect
    assert ask.offset + effect <= mask.size
    if setup.asks_sizes:
        assert not (ask.offset | effect) % mask.block_sizes.minimum, "off the minimum block size"
