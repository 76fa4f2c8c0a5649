"""When a session may wait in the kernel by itself: with a clock in our hands."""

from __future__ import annotations

import pytest

from gateway import turns
from gateway.turns import Attention, Luck


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    return clock


def test_attention_is_undivided_once_nobody_else_was_busy_for_a_while(clock: Clock) -> None:
    attention, one, other = Attention(), object(), object()
    assert not attention.undivided(one)
    clock.now += 0.049
    assert not attention.undivided(one)
    clock.now += 0.002
    assert attention.undivided(one)
    assert not attention.undivided(other)
    assert not attention.undivided(one)
    clock.now += 0.051
    assert attention.undivided(one)


def test_two_busy_sessions_never_have_it(clock: Clock) -> None:
    attention, one, other = Attention(), object(), object()
    for _ in range(100):
        clock.now += 0.01
        assert not attention.undivided(one)
        assert not attention.undivided(one)
        clock.now += 0.03
        assert not attention.undivided(other)


def test_a_session_that_is_over_is_not_remembered(clock: Clock) -> None:
    attention, one = Attention(), object()
    attention.undivided(one)
    attention.forget(object())
    clock.now += 1
    assert attention.undivided(one)
    attention.forget(one)
    assert not attention.undivided(one)


def test_luck_leaves_looks_out_after_misses_in_a_row() -> None:
    luck, pauses = Luck(), []
    for _ in range(8):
        pauses.append(0)
        while not luck.worth_it():
            pauses[-1] += 1
        luck.found(False)
    assert pauses == [0, 0, 0, 8, 16, 32, 64, 64]


def test_one_hit_makes_up_for_all_misses() -> None:
    luck = Luck()
    for _ in range(10):
        luck.found(False)
    while not luck.worth_it():
        pass
    luck.found(True)
    for _ in range(2):
        assert luck.worth_it()
        luck.found(False)
    assert luck.worth_it()
