"""What upgrades add to an upstream's flags and block sizes, over all that it may have said."""

from __future__ import annotations

from itertools import chain, combinations

import pytest

from gateway.nbd.upgrades import (
    ALL_UPGRADES,
    NO_UPGRADES,
    Capabilities,
    Upgrade,
    offered_block_sizes,
    offered_flags,
)
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, BlockSizes
from tests.nbd.support import MIB, Tf

EVERY_SET = [
    frozenset(some)
    for some in chain.from_iterable(combinations(Upgrade, n) for n in range(len(Upgrade) + 1))
]
ADDED = {
    Upgrade.WRITE_ZEROES: Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO,
    Upgrade.FUA: Tf.SEND_FUA,
    Upgrade.STRUCTURED_REPLIES: 0,
    Upgrade.BLOCK_SIZE: 0,
}
# Every combination of those that matter here, one of another feature, and one of an extension.
EVERY_FLAGS = [
    int(Tf.HAS_FLAGS) | sum(some)
    for n in range(8)
    for some in combinations((1 << 1, 1 << 2, 1 << 3, 1 << 6, 1 << 11, 1 << 7, 1 << 15), n)
]


def test_names_are_those_of_the_command_line() -> None:
    names = {"write-zeroes", "fua", "structured-replies", "block-size"}
    assert {one.value for one in Upgrade} == names
    assert (ALL_UPGRADES, NO_UPGRADES) == (set(Upgrade), set())


@pytest.mark.parametrize("upgrades", EVERY_SET, ids=lambda some: "+".join(sorted(some)) or "none")
def test_flags_are_added_and_never_taken(upgrades: frozenset[Upgrade]) -> None:
    """And adding them twice, as a gateway in front of a gateway does, adds nothing more."""
    most = 0
    for one in upgrades:
        most |= ADDED[one]
    for flags in EVERY_FLAGS:
        offered = offered_flags(flags, upgrades)
        assert offered & flags == flags
        assert not offered & ~(flags | most)
        assert offered_flags(offered, upgrades) == offered
        if flags & Tf.READ_ONLY:
            assert offered == flags


def test_each_upgrade_is_for_those_who_need_it() -> None:
    for flags in EVERY_FLAGS:
        if flags & Tf.READ_ONLY:
            continue
        zeroes = offered_flags(flags, frozenset({Upgrade.WRITE_ZEROES}))
        assert zeroes & Tf.SEND_WRITE_ZEROES
        if flags & Tf.SEND_WRITE_ZEROES:  # whether its own zeroes can be fast is for it to say
            assert zeroes == flags
        else:
            assert zeroes & Tf.SEND_FAST_ZERO
        durable = offered_flags(flags, frozenset({Upgrade.FUA}))
        assert bool(durable & Tf.SEND_FUA) == bool(flags & (Tf.SEND_FUA | Tf.SEND_FLUSH))


@pytest.mark.parametrize("minimum", [1 << n for n in range(17)])
@pytest.mark.parametrize("maximum", [65536, 96 * 1024, MIB, 32 * MIB, 33 * MIB, 2**32 - 1])
def test_block_sizes_that_are_offered_are_legal(minimum: int, maximum: int) -> None:
    """(H9): and no smaller than the upstream's; the minimum is its own, which nobody can mend."""
    below = BlockSizes(minimum, max(minimum, 512), maximum)
    for upgrades in EVERY_SET:
        offered = offered_block_sizes(below, upgrades)
        offered.check()
        assert (offered.minimum, offered.preferred) == (below.minimum, below.preferred)
        added = Upgrade.BLOCK_SIZE in upgrades
        assert offered.maximum == (max(maximum, 32 * MIB) if added else maximum)
        assert offered_block_sizes(offered, upgrades) == offered


def test_sizes_that_nobody_told_are_those_of_the_specification() -> None:
    assert DEFAULT_BLOCK_SIZES == BlockSizes(1, 4096, 32 * MIB)
    assert Capabilities(0).block_sizes == DEFAULT_BLOCK_SIZES
    assert offered_block_sizes(DEFAULT_BLOCK_SIZES, ALL_UPGRADES) == DEFAULT_BLOCK_SIZES
