"""Hypothesis strategies: masked upstreams, clients, and what these ask for."""

from __future__ import annotations

import random
import struct
from functools import lru_cache
from typing import NamedTuple

from hypothesis import strategies as st

from gateway.nbd.constants import Cmd, Error
from gateway.nbd.upgrades import NO_UPGRADES, Upgrade
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, BlockSizes
from tests.nbd.masked.book import refusals
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
from tests.nbd.masked.session import Manner
from tests.nbd.masked.setups import CONTEXTS, EVERYTHING, MASKABLE, SIZE, Mask, Setup, Tf
from tests.nbd.masked.upstream import NO_FAULTS, Faults

seeds = st.integers(0, 2**32)
_BLOCK_SIZES = [
    BlockSizes(1, 512, 512),
    BlockSizes(1, 512, 600),
    BlockSizes(1, 4096, 4096),
    BlockSizes(512, 512, 1300),
    BlockSizes(512, 4096, 0xFFFFFFFF),
    BlockSizes(4096, 4096, 4096),
    BlockSizes(8, 512, 65536),
    DEFAULT_BLOCK_SIZES,
]
# What is missing: nothing, one thing, nearly everything, or anything.
_FEATURES = [
    *[EVERYTHING] * 2,
    *[EVERYTHING & ~Tf.SEND_FUA] * 3,
    *[EVERYTHING & ~Tf.SEND_WRITE_ZEROES] * 3,
    EVERYTHING & ~Tf.SEND_DF,
    EVERYTHING & ~Tf.SEND_FAST_ZERO,
    EVERYTHING | Tf.READ_ONLY,
    *[int(Tf.HAS_FLAGS | Tf.SEND_FLUSH)] * 2,
    int(Tf.HAS_FLAGS | Tf.SEND_FLUSH | Tf.SEND_TRIM | Tf.SEND_WRITE_ZEROES),
    int(Tf.HAS_FLAGS | Tf.SEND_FUA),
    int(Tf.HAS_FLAGS),
    *[None] * 4,
]


def _mask(rng: random.Random) -> Mask:
    flags = rng.choice(_FEATURES)
    if flags is None:
        flags = int(Tf.HAS_FLAGS) | sum(one for one in MASKABLE if rng.random() < 0.5)
    return Mask(
        flags=flags,
        best=rng.choice(list(Style)),
        block_sizes=rng.choice(_BLOCK_SIZES),
        contexts=rng.choice([CONTEXTS, CONTEXTS[:1], ()]),
    )


def _upgrades(rng: random.Random) -> frozenset[Upgrade]:
    odds = rng.choice([0.0, 0.0, 0.0, 0.2, 0.5])
    return frozenset(one for one in Upgrade if rng.random() >= odds)


def setup(seed: int) -> Setup:
    rng = random.Random(seed)
    return Setup(
        mask=_mask(rng),
        wish=rng.choice([*Style, Style.EXTENDED]),
        upgrades=_upgrades(rng),
        read_only=rng.random() < 0.05,
        asks_sizes=rng.random() < 0.8,
    )


def _direct_setup(seed: int) -> Setup:
    rng = random.Random(seed)
    mask, wish = _mask(rng), rng.choice(list(Style))
    return Setup(mask, wish, NO_UPGRADES)


# Drawn by a seed, for an even spread: hypothesis would come back to the simple ones.
setups = seeds.map(setup)
direct_setups = seeds.map(_direct_setup)
manners = st.builds(
    Manner,
    window=st.sampled_from([1, 3, 8, 8]),
    careful=st.booleans(),
    pieces=st.sampled_from(
        [(1, 10, 28, 40, 300, 600, 5000), (20000,), (1, 2, 32, 33), (512, 544, 540, 512)]
    ),
)
bad_places = st.tuples(
    st.integers(0, 127), st.integers(1, 8), st.sampled_from([Error.EIO, Error.ENOSPC, 122])
).map(lambda one: (one[0] * 512, (one[0] + one[1]) * 512, int(one[2])))
faults = st.one_of(
    st.just(NO_FAULTS),
    st.just(Faults(0.1)),
    st.lists(bad_places, min_size=1, max_size=3).map(lambda bad: Faults(bad=tuple(bad))),
)
closing_faults = st.builds(
    Faults,
    odds=st.sampled_from([0.0, 0.1]),
    bad=st.just(()),
    shutdown_odds=st.sampled_from([0.05, 0.2]),
    polite=st.just(False),
)


class Spec(NamedTuple):
    """A request before it is known what the client was told. Places and sizes are in blocks."""

    kind: int
    place: int
    blocks: int
    nudges: tuple[int, int]  # in bytes
    flags: int
    sparse: bool
    odd: str


_KINDS = [Cmd.READ, Cmd.READ, Cmd.WRITE, Cmd.WRITE, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE]
_KINDS += [Cmd.WRITE_ZEROES, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS]
_ODD = ["", "empty", "beyond", "far beyond", "unaligned", "flags", "kind", "payload", "ids"]
_FLAGS = {
    Cmd.READ: (0, 0, FUA, DF, DF),
    Cmd.WRITE: (0, FUA),
    Cmd.FLUSH: (0, 0, FUA),
    Cmd.TRIM: (0, FUA),
    Cmd.CACHE: (0, 0, FUA),
    Cmd.WRITE_ZEROES: (0, FUA, NO_HOLE, FUA | NO_HOLE, FAST_ZERO),
    Cmd.BLOCK_STATUS: (0, REQ_ONE, PAYLOAD_LEN, PAYLOAD_LEN | REQ_ONE),
}
_NEEDS = {
    Cmd.FLUSH: Tf.SEND_FLUSH,
    Cmd.TRIM: Tf.SEND_TRIM,
    Cmd.CACHE: Tf.SEND_CACHE,
    Cmd.WRITE_ZEROES: Tf.SEND_WRITE_ZEROES,
}
_kinds = st.sampled_from(_KINDS)
_nudges = st.tuples(st.sampled_from([0, 0, 1, 8, 511]), st.sampled_from([0, 0, 1, 8, 505]))


def _specs(odd: st.SearchStrategy[str]) -> st.SearchStrategy[list[Spec]]:
    one = _kinds.flatmap(
        lambda kind: st.builds(
            Spec,
            kind=st.just(int(kind)),
            # Few places, so that much overlaps.
            place=st.sampled_from([0, 1, 2, 3, 8, 8, 16, 17, 100, 120]) | st.integers(0, 127),
            blocks=st.sampled_from([1, 1, 2, 3, 8, 9, 17, 40]),
            nudges=_nudges,
            flags=st.sampled_from(_FLAGS[kind]),
            sparse=st.booleans(),
            odd=odd,
        )
    )
    return st.lists(one, min_size=1, max_size=14)


def random_specs(rng: random.Random, count: int) -> list[Spec]:
    """The same without hypothesis, for tests that take too long for many examples."""
    kinds = [rng.choice(_KINDS) for _ in range(count)]
    return [
        Spec(
            kind=int(kind),
            place=rng.choice([0, 1, 2, 8, 8, 16, 17, rng.randrange(128)]),
            blocks=rng.choice([1, 1, 2, 3, 8, 9, 17, 40]),
            nudges=(rng.choice([0, 0, 1, 8, 511]), rng.choice([0, 0, 1, 8, 505])),
            flags=rng.choice(_FLAGS[kind]),
            sparse=rng.random() < 0.5,
            odd=rng.choice(_ODD) if rng.random() < 0.05 else "",
        )
        for kind in kinds
    ]


legal_specs = _specs(st.just(""))
specs = _specs(st.sampled_from([""] * 24 + _ODD))


@lru_cache(maxsize=1000)
def content(number: int, offset: int, length: int, *, sparse: bool) -> bytes:
    """What one write writes: it tells the write, and the place. Sparse: zeroes in between."""
    return bytes(
        0
        if sparse and (at // 1024 + number) % 3
        else 1 + (at * 7 + at // 256 * 3 + number * 11) % 255
        for at in range(offset, offset + length)
    )


def asks(setup: Setup, specs: list[Spec]) -> list[Ask]:
    """Requests of a client that knows what it was told, but for the odd ones."""
    return [_ask(setup, number, one) for number, one in enumerate(specs)]


def legal_asks(setup: Setup, specs: list[Spec]) -> list[Ask]:
    """Only such as the upstream itself may be asked."""
    found = []
    for one in asks(setup, specs):
        if one.kind not in WRITES:
            one = one._replace(flags=one.flags & ~FUA)
        if not refusals(setup, one):
            found.append(one)
    return found


def _ask(setup: Setup, number: int, spec: Spec) -> Ask:
    terms = setup.terms
    minimum = terms.block_sizes.minimum
    extended = setup.above is Style.EXTENDED
    kind, flags, odd = spec.kind, spec.flags, spec.odd
    offset = spec.place * 512 + spec.nudges[0]
    offset -= offset % minimum
    length = max(spec.blocks * 512 - spec.nudges[1], minimum)
    length = min(length - length % minimum, SIZE - offset)
    told = terms.flags
    if not odd and kind in _NEEDS and not told & _NEEDS[kind]:
        kind = (Cmd.READ, Cmd.WRITE)[number % 2]
        flags &= FUA
    if not odd and kind == Cmd.BLOCK_STATUS and not terms.contexts:
        kind, flags = Cmd.READ, 0
    if odd != "flags":
        flags &= ~(0 if told & Tf.SEND_FUA else FUA)
        flags &= ~(0 if told & Tf.SEND_DF else DF)
        flags &= ~(0 if told & Tf.SEND_FAST_ZERO else FAST_ZERO)
        flags &= ~(0 if told & Tf.BLOCK_STATUS_PAYLOAD else PAYLOAD_LEN)
    else:
        flags ^= (FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, 0x8000)[number % 6]
    if odd == "empty":
        length = 0
    elif odd == "beyond":
        offset = SIZE - length + minimum
    elif odd == "far beyond":
        offset = (1 << 64) - minimum
    elif odd == "unaligned":
        offset += 1
    elif odd == "kind":
        kind = (8, 9, 0x7FFF)[number % 3]
    if kind == Cmd.FLUSH and odd != "unaligned":
        offset = length = 0
    if not extended:
        flags &= ~PAYLOAD_LEN
    payload = b""
    if kind != Cmd.BLOCK_STATUS:
        flags &= ~PAYLOAD_LEN
    if kind == Cmd.WRITE:
        payload = content(number, min(offset, SIZE), length, sparse=spec.sparse)
        if extended:
            flags |= PAYLOAD_LEN
    elif kind == Cmd.BLOCK_STATUS and flags & PAYLOAD_LEN:
        payload = _filter(setup, number, length, odd)
        length = len(payload)
    elif odd == "payload" and extended:
        flags |= PAYLOAD_LEN
        payload = content(number, 0, length, sparse=False)
    return Ask(kind, offset, length, flags, payload)


def _filter(setup: Setup, number: int, length: int, odd: str) -> bytes:
    ids = [one.id for one in setup.terms.contexts]
    some = [ids[:1], ids[1:2] or ids, ids, ids[::-1]][number % 4]
    tail = b""
    if odd == "ids":
        some, tail = [([*ids, 77], b""), (some + some[:1], b""), ([], b""), (some, b"\0")][
            number % 4
        ]
    return struct.pack(f">Q{len(some)}I", length, *some) + tail
