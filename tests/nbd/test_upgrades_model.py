"""Upgrades and extended headers against a model: the same bytes on the disk, the same answers.

Random clients over upstreams with random features masked, through the gateway's machine. The tools
are in `masked`: an upstream that accepts only what its mask allows and keeps no promise that it did
not make, a client's eyes for every rule of framing, and a book of what each request is entitled to.
"""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.nbd.constants import Cmd
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import some
from tests.nbd.masked.frames import DF, FUA, PAYLOAD_LEN, Ask, Style
from tests.nbd.masked.session import Gateway, Manner, Session, examples
from tests.nbd.masked.setups import EVERYTHING, MAX_UNADVERTISED, SIZE, Mask, Setup, Tf
from tests.nbd.masked.some import Spec
from tests.nbd.masked.upstream import Faults


@settings(max_examples=examples(300))
@given(some.setups, some.specs, some.seeds, some.manners, some.faults)
def test_same_disk_and_same_answers(
    setup: Setup, specs: list[Spec], seed: int, manner: Manner, faults: Faults
) -> None:
    """Errors, orders, overlaps and cuts at random."""
    rng = random.Random(seed)
    session = Session(setup, some.asks(setup, specs), rng, manner=manner, faults=faults)
    session.run(rng.randrange(200))
    session.drain()
    session.check()


@settings(max_examples=examples(200))
@given(some.setups, some.specs, some.seeds, some.manners, some.faults)
def test_upstream_is_lost_at_any_byte(
    setup: Setup, specs: list[Spec], seed: int, manner: Manner, faults: Faults
) -> None:
    """(X13): every request has one answer, its own or ESHUTDOWN, if there is a way to tell it."""
    rng = random.Random(seed)
    session = Session(setup, some.asks(setup, specs), rng, manner=manner, faults=faults)
    session.run(rng.randrange(100))
    session.lose_upstream()
    if session.cut_short:
        session.check_cut_short()
        return
    session.run(rng.randrange(20))
    session.drain()
    session.check()


@settings(max_examples=examples(200))
@given(
    some.setups, some.specs, some.seeds, some.manners, some.closing_faults | st.none(), some.faults
)
def test_either_side_shuts_down(
    setup: Setup,
    specs: list[Spec],
    seed: int,
    manner: Manner,
    closing: Faults | None,
    faults: Faults,
) -> None:
    """(U6, X13): what is in flight comes to its end, and what comes later is refused."""
    rng = random.Random(seed)
    asks = some.asks(setup, specs)
    session = Session(setup, asks, rng, manner=manner, faults=closing or faults)
    session.run(rng.randrange(100))
    if closing is None:
        session.shutdown()
    session.run(rng.randrange(20))
    session.drain()
    session.check()


@settings(max_examples=examples(100))
@given(some.setups, some.specs, some.seeds, some.manners, some.faults)
def test_client_says_goodbye(
    setup: Setup, specs: list[Spec], seed: int, manner: Manner, faults: Faults
) -> None:
    """(X12): what it has asked for comes to its end; what is behind NBD_CMD_DISC is not read."""
    rng = random.Random(seed)
    session = Session(setup, some.asks(setup, specs), rng, manner=manner, faults=faults)
    session.run(rng.randrange(100))
    session.end_with(Ask(Cmd.DISC).pack(extended=setup.above is Style.EXTENDED))
    session.run(rng.randrange(20))
    session.drain()
    session.check()
    assert isinstance(session.line, Gateway)
    assert session.line.machine.client_done
    session.upstream.hear(session.line.machine.disconnect_request())
    assert session.upstream.over


@settings(max_examples=examples(50))
@given(some.setups, some.specs, some.seeds, some.manners, st.integers(0, 1))
def test_client_breaks_the_protocol(
    setup: Setup, specs: list[Spec], seed: int, manner: Manner, how: int
) -> None:
    """(X1, X3): it is found out, and what it asked for before comes to its end all the same."""
    rng = random.Random(seed)
    session = Session(setup, some.asks(setup, specs), rng, manner=manner)
    session.run(rng.randrange(100))
    extended = setup.above is Style.EXTENDED
    attack = Ask(Cmd.WRITE, 0, MAX_UNADVERTISED + 512, PAYLOAD_LEN if extended else 0)
    told = setup.terms.block_sizes.maximum
    attack = attack._replace(length=max(attack.length, min(told + 1, (1 << 32) - 1)))
    bad = [Ask(Cmd.READ, 0, 512), attack][how].pack(extended=extended)
    if how == 0 or told >= attack.length:
        bad = b"\0" + bad[1:]
    assert isinstance(session.line, Gateway)
    session.line.may_fail = True
    session.end_with(bad)
    assert session.line.machine.client_fault
    session.run(rng.randrange(20))
    session.drain()
    session.check()


@pytest.mark.parametrize(
    ("ids", "tail"),
    [
        ([3], b""),
        ([0, 3], b""),
        ([3, 3], b""),
        ([3, 77], b""),
        ([], b""),
        ([3], b"\0"),
        ([3] * 9, b""),
    ],
    ids=["one", "both", "twice", "unknown", "none", "odd length", "many"],
)
def test_meta_contexts_in_a_payload(ids: list[int], tail: bytes) -> None:
    """Extended headers: the filter goes up as it is, or is refused; the next request is found."""
    payload = struct.pack(f">Q{len(ids)}I", 4096, *ids) + tail
    asks = [Ask(Cmd.BLOCK_STATUS, 512, len(payload), PAYLOAD_LEN, payload), Ask(Cmd.READ, 0, 512)]
    session = Session(Setup(Mask()), asks, random.Random(1), manner=Manner(pieces=(7,)))
    session.run(100)
    session.drain()
    session.check()


# ---------------------------------------------------------------- at every cut

TINY = BlockSizes(1, 512, 512)
LARGE = BlockSizes(1, 512, 65536)
NO_FUA, NO_ZEROES = EVERYTHING & ~Tf.SEND_FUA, EVERYTHING & ~Tf.SEND_WRITE_ZEROES
NEITHER = NO_FUA & NO_ZEROES
# Data, a block of zeroes, data, zeroes up to the end.
DISK = bytes(range(1, 256)) * 16 + b"x" * 16 + bytes(4096) + b"data" * 1000 + bytes(SIZE - 12192)


def _write(offset: int, length: int, flags: int = 0) -> Ask:
    return Ask(Cmd.WRITE, offset, length, flags, some.content(1, offset, length, sparse=False))


def _zero(offset: int, length: int, flags: int = 0) -> Ask:
    return Ask(Cmd.WRITE_ZEROES, offset, length, flags)


def _read(offset: int, length: int, flags: int = 0) -> Ask:
    return Ask(Cmd.READ, offset, length, flags)


SCENES = {
    "write, flush": (Mask(flags=NO_FUA), [_write(3, 50, FUA), _zero(9, 9, FUA), _read(0, 60)]),
    "writes of zeroes": (Mask(flags=NO_ZEROES, block_sizes=TINY), [_zero(5, 1300, FUA)]),
    "zeroes, flush": (Mask(flags=NEITHER, block_sizes=TINY), [_zero(5, 1300, FUA), _read(0, 40)]),
    "split write": (Mask(block_sizes=TINY), [_write(7, 1300), _read(0, 40)]),
    "split write, flush": (Mask(flags=NO_FUA, block_sizes=TINY), [_write(7, 1024, FUA)]),
    "split read": (Mask(block_sizes=TINY), [_read(7, 1300), _read(20, 9), _read(100, 600)]),
    "unfragmented": (Mask(block_sizes=TINY), [_read(7, 1300, DF), _read(20, 520, DF)]),
    "chunks without DF": (
        Mask(flags=EVERYTHING & ~Tf.SEND_DF, block_sizes=LARGE),
        [_read(9, 700, DF)],
    ),
    "holes": (Mask(best=Style.SIMPLE, block_sizes=LARGE), [_read(4000, 4800), _read(4096, 600)]),
    "no holes": (Mask(best=Style.SIMPLE, block_sizes=LARGE), [_read(4000, 4800, DF)]),
    "hole alone": (Mask(best=Style.SIMPLE, block_sizes=LARGE), [_read(4096, 4096, DF)]),
    "holes, split": (Mask(best=Style.SIMPLE, block_sizes=TINY), [_read(4000, 1300)]),
}


def _scene(name: str, wish: Style) -> Session:
    mask, asks = SCENES[name]
    setup = Setup(mask, wish)
    asks = [one._replace(flags=one.flags & ~DF) if wish is Style.SIMPLE else one for one in asks]
    if setup.above is Style.EXTENDED:
        asks = [
            one._replace(flags=one.flags | PAYLOAD_LEN) if one.kind == Cmd.WRITE else one
            for one in asks
        ]
    return Session(setup, asks, random.Random(7), disk=DISK)


def _places(count: int) -> list[int]:
    """All at the start, where the headers are, and many behind."""
    return [*range(min(count, 120)), *range(120, count, 1 + count // 90)]


@pytest.mark.parametrize("wish", Style)
@pytest.mark.parametrize("name", SCENES)
def test_every_cut(name: str, wish: Style) -> None:
    """Of what the client sends, of what the upstream answers, and byte by byte."""
    for place in _places(_scene(name, wish).to_send):
        session = _scene(name, wish)
        session.send(place)
        session.settle()
        session.drain()
        session.check()
    session = _scene(name, wish)
    session.send(1 << 20)
    for place in _places(session.answer(1 << 20)):
        session = _scene(name, wish)
        session.send(1 << 20)
        session.answer(1 << 20)
        session.return_(place)
        session.settle()
        session.drain()
        session.check()
    session = _scene(name, wish)
    while session.to_send:
        session.send(1)
    while session.answer(1):
        session.return_(1)
    session.drain()
    session.check()
