"""The tools of the model tests against each other, and that each of their checks can fail."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings

from gateway.nbd.constants import Chunk, Cmd, Error
from gateway.nbd.upgrades import NO_UPGRADES
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import frames, some
from tests.nbd.masked.eyes import Eyes
from tests.nbd.masked.frames import DF, FAST_ZERO, FUA, PAYLOAD_LEN, REQ_ONE, Ask, Style
from tests.nbd.masked.session import Gateway, Manner, Session, Wire, examples
from tests.nbd.masked.setups import EVERYTHING, SIZE, Mask, Setup, Tf
from tests.nbd.masked.some import Spec
from tests.nbd.masked.upstream import Faults, MaskedUpstream, Op

SIMPLE, STRUCTURED, EXTENDED = Style


@settings(max_examples=examples(100))
@given(some.direct_setups, some.legal_specs, some.seeds, some.manners, some.faults)
def test_upstream_and_client_agree_without_a_gateway(
    setup: Setup, specs: list[Spec], seed: int, manner: Manner, faults: Faults
) -> None:
    rng = random.Random(seed)
    asks = some.legal_asks(setup, specs)
    faults = faults._replace(polite=True)
    session = Session(setup, asks, rng, line=Wire(), manner=manner, faults=faults)
    session.run(rng.randrange(120))
    session.drain()
    session.check()


# ---------------------------------------------------------------- the client's eyes

READ = Ask(Cmd.READ, 512, 1024, cookie=5)
WHOLE = READ._replace(flags=DF)
STATUS = Ask(Cmd.BLOCK_STATUS, 0, 1024, cookie=5)
FLUSH = Ask(Cmd.FLUSH, cookie=5)


def _eyes(style: Style, *asks: Ask) -> Eyes:
    eyes = Eyes(style, max_payload=4096, ids=frozenset({3}))
    for one in asks:
        eyes.expect(one)
    return eyes


def _chunk(
    kind: int,
    payload: bytes = b"",
    *,
    done: bool = True,
    ask: Ask = READ,
    style: Style = STRUCTURED,
) -> bytes:
    return frames.chunk(style, ask, kind, payload, done=done)


def _data(start: int, stop: int, *, done: bool = False, ask: Ask = READ) -> bytes:
    payload = frames.data_payload(start, b"x" * (stop - start))
    return _chunk(Chunk.OFFSET_DATA, payload, done=done, ask=ask)


def _hole(start: int, stop: int, *, done: bool = False, ask: Ask = READ) -> bytes:
    return _chunk(Chunk.OFFSET_HOLE, frames.hole_payload(start, stop - start), done=done, ask=ask)


def _status(*extents: tuple[int, int], number: int = 3, ask: Ask = STATUS) -> bytes:
    payload = frames.status_payload(STRUCTURED, number, extents)
    return _chunk(Chunk.BLOCK_STATUS, payload, ask=ask)


_END = _chunk(Chunk.NONE)
_FAILED = _chunk(Chunk.ERROR, frames.error_payload(5, b"no"))

RIGHT = [
    (SIMPLE, READ, frames.simple(5, 0, bytes(1024))),
    (SIMPLE, READ, frames.simple(5, 5)),
    (STRUCTURED, READ, _data(1000, 1536) + _hole(512, 1000) + _END),
    (STRUCTURED, READ, _data(512, 1000) + _FAILED),
    (STRUCTURED, WHOLE, _data(512, 1536, done=True)),
    (STRUCTURED, FLUSH, frames.simple(5)),
    (STRUCTURED, STATUS, _status((512, 0), (4096, 1))),
    (EXTENDED, READ, _chunk(Chunk.ERROR, frames.error_payload(5, b""), style=EXTENDED)),
    (EXTENDED, FLUSH, _chunk(Chunk.NONE, ask=FLUSH, style=EXTENDED)),
]
WRONG = {
    "chunk that was not negotiated": (SIMPLE, READ, _data(512, 1536, done=True)),
    "simple reply to a read": (STRUCTURED, READ, frames.simple(5, 5)),
    "simple reply with extended headers": (EXTENDED, FLUSH, frames.simple(5)),
    "compact chunk with extended headers": (EXTENDED, FLUSH, _chunk(Chunk.NONE, ask=FLUSH)),
    "illegal error": (SIMPLE, FLUSH, frames.simple(5, 7)),
    "unknown cookie": (SIMPLE, FLUSH, frames.simple(6)),
    "two replies": (SIMPLE, FLUSH, frames.simple(5) * 2),
    "not all of it": (STRUCTURED, READ, _data(512, 1535) + _END),
    "done too early": (STRUCTURED, READ, _data(512, 1000, done=True)),
    "overlap": (STRUCTURED, READ, _data(512, 1001) + _hole(1000, 1536)),
    "before the request": (STRUCTURED, READ, _data(511, 1536)),
    "behind the request": (STRUCTURED, READ, _data(512, 1537)),
    "hole of nothing": (STRUCTURED, READ, _hole(512, 512)),
    "data of nothing": (STRUCTURED, READ, _data(512, 512)),
    "two chunks": (STRUCTURED, WHOLE, _data(512, 1000, ask=WHOLE) + _hole(1000, 1536, ask=WHOLE)),
    "chunks behind the last": (STRUCTURED, READ, _data(512, 1536, done=True) + _END),
    "end that is none": (STRUCTURED, READ, _chunk(Chunk.NONE, done=False)),
    "end with a payload": (STRUCTURED, READ, _chunk(Chunk.NONE, b"x")),
    "reply flags": (STRUCTURED, FLUSH, struct.pack(">IHHQI", 0x668E33EF, 3, 0, 5, 0)),
    "unknown chunk": (STRUCTURED, READ, _chunk(77)),
    "error without an error": (STRUCTURED, READ, _chunk(Chunk.ERROR, frames.error_payload(0))),
    "text that moves the cursor": (
        STRUCTURED,
        READ,
        _chunk(Chunk.ERROR, frames.error_payload(5, b"\x1b[2J")),
    ),
    "error outside": (
        STRUCTURED,
        READ,
        _chunk(Chunk.ERROR_OFFSET, frames.error_payload(5, b"", 1536)),
    ),
    "too large to be one": (
        STRUCTURED,
        WHOLE,
        _chunk(Chunk.ERROR, frames.error_payload(75), done=False) + _data(512, 1536),
    ),
    "more than was told": (
        STRUCTURED,
        READ._replace(length=8192),
        _data(512, 512 + 4097, ask=READ._replace(length=8192)),
    ),
    "status without the context": (STRUCTURED, STATUS, _chunk(Chunk.NONE, ask=STATUS)),
    "status of another context": (STRUCTURED, STATUS, _status((512, 0), number=4)),
    "status behind the request": (STRUCTURED, STATUS, _status((1024, 0), (512, 1))),
    "two extents for one": (
        STRUCTURED,
        STATUS._replace(flags=REQ_ONE),
        _status((512, 0), (512, 1), ask=STATUS._replace(flags=REQ_ONE)),
    ),
    "extent of nothing": (STRUCTURED, STATUS, _status((0, 0), (512, 1))),
    "compact status": (
        EXTENDED,
        STATUS,
        _chunk(Chunk.BLOCK_STATUS, bytes(16), ask=STATUS, style=EXTENDED),
    ),
    "count of extents": (
        EXTENDED,
        STATUS,
        _chunk(
            Chunk.BLOCK_STATUS_EXT, struct.pack(">IIQQ", 3, 2, 512, 0), ask=STATUS, style=EXTENDED
        ),
    ),
    "another offset": (
        EXTENDED,
        READ,
        _chunk(Chunk.ERROR, frames.error_payload(5), ask=READ._replace(offset=0), style=EXTENDED),
    ),
}


@pytest.mark.parametrize(("style", "ask", "raw"), RIGHT)
def test_eyes_take_what_is_right_in_any_cuts(style: Style, ask: Ask, raw: bytes) -> None:
    eyes = _eyes(style, ask)
    (outcome,) = [one for at in range(len(raw)) for one in eyes.feed(raw[at : at + 1])]
    assert outcome.ask == ask
    assert not eyes.mid_message
    assert not eyes.outstanding


@pytest.mark.parametrize("what", WRONG)
def test_eyes_see_what_is_wrong(what: str) -> None:
    style, ask, raw = WRONG[what]
    with pytest.raises(AssertionError):
        _eyes(style, ask).feed(raw)


# ---------------------------------------------------------------- the strict upstream

LIMITED = BlockSizes(512, 512, 1024)
MEAN = Mask(flags=int(Tf.HAS_FLAGS), best=SIMPLE, block_sizes=LIMITED)
RICH = Mask(flags=EVERYTHING, best=EXTENDED, block_sizes=LIMITED)


def _write(offset: int, length: int, flags: int = 0) -> Ask:
    return Ask(Cmd.WRITE, offset, length, flags, b"x" * length)


ILLEGAL = {
    "flush": (MEAN, FLUSH),
    "trim": (MEAN, Ask(Cmd.TRIM, 0, 512)),
    "cache": (MEAN, Ask(Cmd.CACHE, 0, 512)),
    "zeroes": (MEAN, Ask(Cmd.WRITE_ZEROES, 0, 512)),
    "status": (MEAN, STATUS),
    "FUA": (MEAN, _write(0, 512, FUA)),
    "DF": (MEAN, Ask(Cmd.READ, 0, 512, DF)),
    "long read": (MEAN, Ask(Cmd.READ, 0, 1536)),
    "long write": (MEAN, _write(0, 1536)),
    "odd offset": (MEAN, _write(8, 512)),
    "odd length": (MEAN, Ask(Cmd.READ, 0, 8)),
    "no length": (MEAN, Ask(Cmd.READ, 0, 0)),
    "beyond the end": (MEAN, _write(SIZE, 512)),
    "read-only": (Mask(flags=int(Tf.HAS_FLAGS | Tf.READ_ONLY), best=SIMPLE), _write(0, 512)),
    "unknown": (MEAN, Ask(9, 0, 512)),
    "FUA on a read": (RICH, Ask(Cmd.READ, 0, 512, FUA)),
    "FUA on a flush": (RICH, FLUSH._replace(flags=FUA)),
    "flush of something": (RICH, FLUSH._replace(length=512)),
    "write without PAYLOAD_LEN": (RICH, Ask(Cmd.WRITE, 0, 512)),
    "read with a payload": (RICH, Ask(Cmd.READ, 0, 512, PAYLOAD_LEN, bytes(512))),
    "unknown context": (
        RICH,
        Ask(Cmd.BLOCK_STATUS, 0, 12, PAYLOAD_LEN, struct.pack(">QI", 512, 77)),
    ),
    "slow": (
        Mask(flags=EVERYTHING & ~Tf.SEND_FAST_ZERO),
        Ask(Cmd.WRITE_ZEROES, 0, 512, FAST_ZERO),
    ),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_upstream_takes_nothing_that_its_mask_forbids(what: str) -> None:
    mask, ask = ILLEGAL[what]
    setup = Setup(mask, upgrades=NO_UPGRADES)
    upstream = MaskedUpstream(setup, random.Random(0))
    with pytest.raises(AssertionError):
        upstream.hear(ask.pack(extended=setup.below is EXTENDED))


def test_upstream_takes_no_cookie_twice_and_nothing_behind_disc() -> None:
    upstream = MaskedUpstream(Setup(MEAN), random.Random(0))
    raw = Ask(Cmd.READ, 0, 512).pack(extended=False)
    upstream.hear(raw)
    with pytest.raises(AssertionError, match="cookie"):
        upstream.hear(raw)
    upstream = MaskedUpstream(Setup(MEAN), random.Random(0))
    upstream.hear(Ask(Cmd.DISC).pack(extended=False))
    with pytest.raises(AssertionError, match="DISC"):
        upstream.hear(raw)


@pytest.mark.parametrize("late", [False, True])
def test_flush_covers_what_was_answered_before_it_came(late: bool) -> None:
    upstream = MaskedUpstream(Setup(RICH, wish=SIMPLE), random.Random(0))
    upstream.hear(_write(0, 512)._replace(cookie=1).pack(extended=False))
    if not late:
        upstream.speak()
    upstream.hear(Ask(Cmd.FLUSH, cookie=2).pack(extended=False))
    while upstream.waiting:
        upstream.speak()
    assert upstream.ops[0].durable is not late


# ---------------------------------------------------------------- the book


class ForgetsFlush(MaskedUpstream):
    """What it flushes is lost with the power all the same."""

    def _make_durable(self, op: Op) -> None:
        if op.ask.kind != Cmd.FLUSH:
            super()._make_durable(op)


class LosesTheEnd(MaskedUpstream):
    """Of every change."""

    def _apply(self, op: Op) -> None:
        before = bytes(self.disk)
        super()._apply(op)
        self.disk[op.stop - 1 : op.stop] = before[op.stop - 1 : op.stop]


class ReadsElsewhere(MaskedUpstream):
    def _simple(self, op: Op) -> bytes:
        message = super()._simple(op)
        return message[:16] + message[17:] + message[16:17] if len(message) > 16 else message


class SaysYes(MaskedUpstream):
    """To half of what has failed, which then looks as if it had been done."""

    def _decide(self, op: Op) -> None:
        super()._decide(op)
        if op.error and self._rng.random() < 0.5:
            op.said.append(b"")
            op.to_say = [lambda: frames.simple(op.ask.cookie)]


class LiesAboutExtents(MaskedUpstream):
    def _extents(self, ask: Ask, number: int) -> list[tuple[int, int]]:
        return [(length, status ^ 1) for length, status in super()._extents(ask, number)]


class Impatient(Gateway):
    """A relay that sends a follow-up twice."""

    def follow_up(self) -> bytes:
        batch = super().follow_up()
        another_cookie = struct.pack(">Q", 1 << 40)
        return batch and batch + batch[:8] + another_cookie + batch[16:]


_POOR = Mask(
    flags=int(Tf.HAS_FLAGS | Tf.SEND_FLUSH | Tf.SEND_TRIM), best=SIMPLE, block_sizes=LIMITED
)
_SPEC = Spec(Cmd.WRITE, 8, 3, (0, 0), 0, False, "")
_FUA = [_SPEC._replace(flags=FUA), _SPEC._replace(kind=Cmd.WRITE_ZEROES, flags=FUA)]
_ALL = [_SPEC, _SPEC._replace(kind=Cmd.READ), _SPEC._replace(kind=Cmd.WRITE_ZEROES, place=9)]
LIES = {
    ForgetsFlush: (_POOR, _FUA, "not durable"),
    LosesTheEnd: (_POOR, _ALL, "other data"),
    ReadsElsewhere: (_POOR, _ALL, "other data"),
    SaysYes: (_POOR, _ALL, ""),
    LiesAboutExtents: (RICH, [_SPEC._replace(kind=Cmd.BLOCK_STATUS)], ""),
}


def _found(setup: Setup, specs: list[Spec], seed: int, **more: object) -> str:
    rng = random.Random(seed)
    asks = some.asks(setup, specs * 3)
    faults = Faults(bad=((4096, 4608, Error.EIO),)) if more.get("upstream") is SaysYes else Faults()
    session = Session(setup, asks, rng, manner=Manner(1), faults=faults, **more)  # type: ignore[arg-type]
    try:
        session.run(50)
        session.drain()
        session.check()
    except AssertionError as error:
        return f"AssertionError {error}"
    return ""


@pytest.mark.parametrize("liar", LIES)
def test_book_finds_a_liar_out(liar: type[MaskedUpstream]) -> None:
    mask, specs, what = LIES[liar]
    setup = Setup(mask)
    findings = [_found(setup, specs, seed, upstream=liar) for seed in range(20)]
    assert any(findings)
    assert all(what in one for one in findings if one)
    assert not any(_found(setup, specs, seed) for seed in range(20))


def test_book_finds_requests_that_nobody_asked_for() -> None:
    setup = Setup(_POOR)
    findings = [_found(setup, _FUA[:1], seed, line=Impatient(setup)) for seed in range(5)]
    assert all("nobody has asked for it" in one for one in findings)
