"""gateway.places: who lets whom go first, and that processes see each other's numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gateway.places import Place, Places
from tests.support.gateway import ROOT


def opened(*clients: int, limits: tuple[int, ...] = (9, 9, 9)) -> list[Place]:
    """Workers that have so many clients; -1 for one that takes none."""
    places = Places(limits[: len(clients)])
    made = [Place(places, index) for index in range(len(clients))]
    for place, count in zip(made, clients, strict=True):
        if count >= 0:
            place.open()
            place.count(count)
    return made


@pytest.mark.parametrize(
    ("clients", "waits"),
    [
        ((0, 0), [False, False]),
        ((1, 0), [True, False]),
        ((1, 2), [False, True]),
        ((3, 2, 2), [True, False, False]),
        ((3, 2, 1), [True, True, False]),
        ((5, -1), [False, False]),
        ((5, -1, 4), [True, False, False]),
    ],
)
def test_the_one_with_fewest_clients_goes_first(
    clients: tuple[int, ...], waits: list[bool]
) -> None:
    """And nobody waits for one that takes no clients."""
    found = [place.others_first() for place in opened(*clients)]
    assert [one for one, count in zip(found, clients, strict=True) if count >= 0] == [
        one for one, count in zip(waits, clients, strict=True) if count >= 0
    ]


@pytest.mark.parametrize(
    ("clients", "limits", "waits"),
    [
        ((2, 1), (2, 1), [False, False]),  # all are full
        ((1, 1), (2, 1), [False, True]),  # the second is full, the first is not
        ((2, 0), (2, 1), [True, False]),
        ((0, 1), (1, 1), [False, True]),
    ],
)
def test_who_has_no_room_is_not_waited_for(
    clients: tuple[int, ...], limits: tuple[int, ...], waits: list[bool]
) -> None:
    assert [place.others_first() for place in opened(*clients, limits=limits)] == waits


def test_somebody_always_goes_first() -> None:
    """Whatever the numbers: of those with room, one at least waits for nobody."""
    limits = (3, 3, 2)
    for first in range(4):
        for second in range(4):
            for third in range(3):
                clients = (first, second, third)
                made = opened(*clients, limits=limits)
                room = [
                    place.others_first()
                    for place, count, limit in zip(made, clients, limits, strict=True)
                    if count < limit
                ]
                assert not room or not all(room), clients


def test_open_close_and_clear() -> None:
    places = Places((2, 2))
    first, second = Place(places, 0), Place(places, 1)
    first.count(1)  # before it is open: kept, and not shown
    assert not places.all_open
    second.open()
    assert not second.others_first()
    first.open()
    assert places.all_open
    assert first.others_first()
    second.close()
    second.count(0)
    assert not places.all_open
    assert not first.others_first()
    second.open()
    places.clear(1)
    assert not first.others_first()


FORKS = """
import os
from gateway.places import Place, Places
places = Places((9, 9))
ours = Place(places, 0)
ours.open()
ours.count(3)
if os.fork() == 0:
    theirs = Place(places, 1)
    theirs.open()
    theirs.count(2)
    os._exit(0)
os.wait()
print(places.all_open, ours.others_first())
places.clear(1)
print(places.all_open, ours.others_first())
"""


def test_processes_see_each_other() -> None:
    """In a process of its own: this one may have threads, and is not to be forked."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True True\nFalse False\n"
