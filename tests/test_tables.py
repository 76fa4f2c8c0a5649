"""gateway.tables: counts that hold over all workers, and token buckets that nobody can empty."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from gateway import tables
from gateway.tables import Column, Rates, Roll
from tests.support.gateway import ROOT

# ---------------------------------------------------------------- who is here


def test_the_bound_is_of_all_columns_together() -> None:
    roll = Roll((4, 4))
    first, second = Column(roll, 0), Column(roll, 1)
    assert [first.add(b"a", 3), second.add(b"a", 3)] != [None, None]
    last = second.add(b"a", 3)
    assert last is not None
    assert (first.add(b"a", 3), second.add(b"a", 3)) == (None, None)
    assert first.add(b"b", 1) is not None  # another is not counted with it
    second.remove(last)
    assert first.add(b"a", 3) is not None
    assert second.add(b"a", 3) is None


def test_a_cleared_column_is_nobodys() -> None:
    """The other columns stay as they are."""
    roll = Roll((2, 3, 2))
    columns = [Column(roll, index) for index in range(3)]
    for column in columns:
        for _ in range(2):
            assert column.add(b"a", 6) is not None
    roll.clear(1)
    assert roll.count(roll.mark(b"a")) == 4
    again = Column(roll, 1)
    assert [again.add(b"a", 7) is None for _ in range(4)] == [False, False, False, True]


def test_there_are_no_more_cells_than_there_are() -> None:
    column = Column(Roll((2, 2)), 0)
    cells = [column.add(b"%d" % number, 9) for number in range(3)]
    assert cells[2] is None
    assert None not in cells[:2]


def test_nothing_is_used_up() -> None:
    """Against a dict that counts, over thousands of comings and goings."""
    roll, rng, most = Roll((8, 8)), random.Random(5), 3
    columns = [Column(roll, index) for index in range(2)]
    here: list[tuple[int, bytes, int]] = []
    for _ in range(5000):
        index, name = rng.randrange(2), b"%d" % rng.randrange(6)
        if rng.random() < 0.5 and here:
            at, _, cell = here.pop(rng.randrange(len(here)))
            columns[at].remove(cell)
            continue
        got = columns[index].add(name, most)
        room = sum(at == index for at, _, _ in here) < 8
        assert (got is not None) is (room and sum(one == name for _, one, _ in here) < most)
        if got is not None:
            here.append((index, name, got))
    for at, _, cell in here:
        columns[at].remove(cell)
    assert not any(roll._memory[:])


RACE = """
import os
from gateway.tables import Column, Roll
WORKERS, MOST, ROUNDS = 4, 7, 40
roll = Roll([MOST] * WORKERS)
for number in range(ROUNDS):
    go, start = os.pipe()
    children = []
    for index in range(WORKERS):
        pid = os.fork()
        if not pid:
            os.close(start)
            column = Column(roll, index)
            os.read(go, 1)  # all begin at once
            os._exit(sum(column.add(b"one", MOST) is not None for _ in range(MOST)))
        children.append(pid)
    os.close(go)
    os.close(start)
    got = sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    assert 0 < got <= MOST, got
    assert roll.count(roll.mark(b"one")) == got  # who was refused has left nothing
    for index in range(WORKERS):
        roll.clear(index)
print("held")
"""


def test_the_bound_holds_among_processes() -> None:
    done = subprocess.run([sys.executable, "-c", RACE], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("held\n", "")


# ---------------------------------------------------------------- how fast they came


def admitted(rates: Rates, name: bytes, times: int, now: float, rate: float = 10.0) -> int:
    return sum(rates.admits(name, rate=rate, burst=2 * rate, now=now) for _ in range(times))


def test_first_a_burst_and_then_the_rate() -> None:
    rates = Rates()
    assert admitted(rates, b"a", 100, now=1000.0) == 20
    assert admitted(rates, b"a", 100, now=1000.05) == 0
    assert admitted(rates, b"a", 100, now=1000.1) == 1
    assert admitted(rates, b"a", 100, now=1001.1) == 10
    assert admitted(rates, b"b", 100, now=1001.1) == 20
    assert admitted(rates, b"a", 100, now=2000.0) == 20  # and no more, however long it was away


def test_who_is_refused_pays_nothing() -> None:
    rates = Rates()
    admitted(rates, b"a", 100_000, now=0.0)
    assert admitted(rates, b"a", 100, now=1.0) == 10


@pytest.mark.parametrize("rate", [0.1, 0.3, 1, 7, 100, 1e9])
def test_any_rate(rate: float) -> None:
    """Over a long time it is what comes in, steadily asked for."""
    rates, came, seconds = Rates(), 0, 2000 / min(rate, 100)
    burst = max(1.0, 2 * rate)
    for step in range(4000):
        came += rates.admits(b"a", rate=rate, burst=burst, now=5e5 + step / 4000 * seconds)
    assert came == pytest.approx(min(4000, rate * seconds + burst), abs=2)


def test_a_flood_from_everywhere_empties_nobodys_bucket_and_fills_none() -> None:
    """As from a whole /32 of IPv6: a fixed table, in which they hardly meet anybody."""
    rates = Rates()
    assert admitted(rates, b"mine", 20, now=0.0) == 20
    for number in range(20_000):
        rates.admits(b"%d" % number, rate=10.0, burst=20.0, now=0.0)
    assert admitted(rates, b"mine", 20, now=0.0) == 0  # nothing of it was forgotten
    served = sum(admitted(rates, b"good %d" % number, 1, now=0.0) for number in range(200))
    assert served == 200
    assert rates._memory.nbytes == 8 * tables._ROWS * tables._CELLS


def test_who_meets_others_in_one_cell_only_pays_for_none_of_them() -> None:
    rates = Rates()
    for cell in range(tables._CELLS):  # all of one row are used up
        rates._memory[cell] = 2.0
    assert admitted(rates, b"a", 99, now=0.0) == 20
    for cell in range(len(rates._memory)):
        rates._memory[cell] = 2.0
    assert admitted(rates, b"b", 99, now=0.0) == 0


def test_a_cell_gone_wrong_locks_nobody_out() -> None:
    rates = Rates()
    for cell in range(len(rates._memory)):
        rates._memory[cell] = 1e300
    rates._memory[0] = float("nan")
    assert admitted(rates, b"a", 9, now=5.0) == 0
    assert admitted(rates, b"a", 99, now=7.0) == 20
