"""Upstreams that die with what is in their cache and come back, against a client's model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.nbd.constants import Cmd
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import some
from tests.nbd.masked.frames import DF, FUA, PAYLOAD_LEN, Ask, Style
from tests.nbd.masked.restarts import Restarts
from tests.nbd.masked.session import Manner, examples
from tests.nbd.masked.setups import CONTEXTS, EVERYTHING, SIZE, Mask, Setup, Tf
from tests.nbd.masked.some import Spec
from tests.nbd.masked.upstream import NO_FAULTS, Faults

departures = st.builds(
    Faults,
    odds=st.sampled_from([0.0, 0.1]),
    bad=st.just(()),
    shutdown_odds=st.sampled_from([0.05, 0.3]),
    polite=st.just(False),
)


@settings(max_examples=examples(250))
@given(some.setups, some.specs, some.seeds, some.manners)
def test_upstream_dies_and_comes_back(
    setup: Setup, specs: list[Spec], seed: int, manner: Manner
) -> None:
    """(X10): nothing that was flushed is lost, and nothing that was lost is said to be flushed."""
    rng = random.Random(seed)
    one = Restarts(setup, some.asks(setup, specs), rng, manner=manner)
    one.run(rng.randrange(60, 300))
    one.check_order()
    one.finish()


@settings(max_examples=examples(150))
@given(some.setups, some.specs, some.seeds, some.manners, departures | some.faults)
def test_upstream_refuses_fails_and_leaves(
    setup: Setup, specs: list[Spec], seed: int, manner: Manner, faults: Faults
) -> None:
    """(U6): whoever says ESHUTDOWN is left in peace, and the next one is asked."""
    rng = random.Random(seed)
    one = Restarts(setup, some.asks(setup, specs), rng, manner=manner, faults=faults)
    one.run(rng.randrange(60, 300))
    one.check_order()
    one.finish()


@settings(max_examples=examples(60))
@given(some.setups, some.seeds, some.manners)
def test_many_losses_in_a_long_session(setup: Setup, seed: int, manner: Manner) -> None:
    rng = random.Random(seed)
    asks = some.asks(setup, some.random_specs(rng, 40))
    one = Restarts(setup, asks, rng, manner=manner, faults=NO_FAULTS, deaths=9)
    one.run(600)
    one.check_order()
    one.finish()


# ---------------------------------------------------------------- at every byte

TINY = BlockSizes(1, 512, 512)
NO_FUA, NO_ZEROES = EVERYTHING & ~Tf.SEND_FUA, EVERYTHING & ~Tf.SEND_WRITE_ZEROES
DISK = bytes(range(1, 256)) * 4 + bytes(4096) + b"data" * 1000 + bytes(SIZE - 9116)


def _write(offset: int, length: int, flags: int = 0) -> Ask:
    content = some.content(1, offset, length, sparse=False)
    return Ask(Cmd.WRITE, offset, length, flags, content)


SCENES = {
    "as it is": (
        Mask(contexts=CONTEXTS),
        [_write(3, 20), Ask(Cmd.FLUSH), Ask(Cmd.READ, 0, 30), Ask(Cmd.BLOCK_STATUS, 0, 4096)],
    ),
    "durable": (Mask(), [_write(3, 20, FUA), _write(9, 20), Ask(Cmd.FLUSH), Ask(Cmd.READ, 0, 30)]),
    "flushes of ours": (Mask(flags=NO_FUA), [_write(3, 20, FUA), Ask(Cmd.READ, 0, 30)]),
    "zeroes of ours": (
        Mask(flags=NO_FUA & NO_ZEROES, block_sizes=TINY),
        [Ask(Cmd.WRITE_ZEROES, 5, 1100, FUA), Ask(Cmd.READ, 0, 20)],
    ),
    "in parts": (Mask(block_sizes=TINY), [_write(7, 1100), Ask(Cmd.FLUSH), Ask(Cmd.READ, 7, 1100)]),
    "held": (Mask(block_sizes=TINY), [Ask(Cmd.READ, 900, 800, DF), _write(1000, 30)]),
    "holes": (Mask(best=Style.SIMPLE), [Ask(Cmd.READ, 1000, 5000), Ask(Cmd.READ, 4000, 30)]),
}


def _scene(name: str, wish: Style) -> Restarts:
    mask, asks = SCENES[name]
    setup = Setup(mask, wish)
    if wish is Style.SIMPLE or setup.below is Style.SIMPLE:
        asks = [one for one in asks if one.kind != Cmd.BLOCK_STATUS]
    if wish is Style.SIMPLE:
        asks = [one._replace(flags=one.flags & ~DF) for one in asks]
    if setup.above is Style.EXTENDED:
        asks = [
            one._replace(flags=one.flags | PAYLOAD_LEN) if one.kind == Cmd.WRITE else one
            for one in asks
        ]
    return Restarts(setup, asks, random.Random(7), disk=DISK)


def _places(count: int) -> list[int]:
    """All of the first, where the headers are, and many behind."""
    return [*range(min(count, 150)), *range(150, count, 1 + count // 60), count]


@pytest.mark.parametrize("wish", Style)
@pytest.mark.parametrize("name", SCENES)
def test_loss_at_every_byte_of_the_client(name: str, wish: Style) -> None:
    for place in _places(_scene(name, wish).to_send):
        one = _scene(name, wish)
        one.send(place)
        one.die()
        one.finish()


@pytest.mark.parametrize("wish", Style)
@pytest.mark.parametrize("name", SCENES)
def test_loss_at_every_byte_of_the_upstream(name: str, wish: Style) -> None:
    """And once more of the next one, as far behind."""

    def answered(one: Restarts) -> Restarts:
        while one.answer():
            pass
        return one

    probe = _scene(name, wish)
    probe.send(1 << 20)
    for place in _places(answered(probe).on_its_way):
        one = _scene(name, wish)
        one.send(1 << 20)
        answered(one).die(place)
        one.come_back()
        one.send_again(1 + place % 5)
        answered(one).die(place // 2)
        one.finish()
