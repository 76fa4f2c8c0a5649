"""What the workers know of each other's clients, in memory that all of them see.

How many each has, so that they share alike: all workers wait on the same listening sockets. A
client wakes every one of them, and the quickest would end up with all clients. So a worker asks
here before it accepts (`Place.others_first`). These numbers are advice, and there is no lock: each
worker writes its own only. One that is read a moment too early or too late costs a few
milliseconds, or an imbalance of one client.

And who they are, by address and identity, and how fast they came: see `tables`.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

from gateway.tables import Column, Rates, Roll

_ENTRY_BYTES: Final = 4  # 0 for a worker that takes no clients, else their number plus one


class Places:
    """One place a worker, made before the first fork. `limits`: how many clients each may have."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits = tuple(limits)
        shared = mmap.mmap(-1, _ENTRY_BYTES * len(limits))  # anonymous, and zeroes
        self.entries = memoryview(shared).cast("I")
        self.addresses, self.identities = Roll(self.limits), Roll(self.limits)
        self.rates = Rates()

    def __len__(self) -> int:
        return len(self.limits)

    def clear(self, index: int) -> None:
        """For the supervisor, when the worker in this place is gone: nobody waits for it, and its
        clients are not here any more."""
        self.entries[index] = 0
        self.addresses.clear(index)
        self.identities.clear(index)

    @property
    def all_open(self) -> bool:
        """Whether every worker takes clients."""
        return all(self.entries)


class Place:
    """A worker's own place. Closed until `open`, and for good after `close`."""

    def __init__(self, places: Places, index: int) -> None:
        self.limit = places.limits[index]
        self.workers = len(places)
        self.addresses = Column(places.addresses, index)
        self.identities = Column(places.identities, index)
        self.rates = places.rates
        self._places = places
        self._index = index
        self._is_open = False
        self._clients = 0

    def open(self) -> None:
        """From now on this worker takes clients."""
        self._is_open = True
        self.count(self._clients)

    def close(self) -> None:
        """From now on it takes none, and the others need not wait for it. Those it has stay."""
        self._is_open = False
        self._places.entries[self._index] = 0

    def count(self, clients: int) -> None:
        """Say how many clients this worker has now; its limit if it has no room for another."""
        self._clients = clients
        if self._is_open:
            self._places.entries[self._index] = clients + 1

    def others_first(self) -> bool:
        """Whether another worker has room, and fewer clients than this one or this one has none.

        Room: its own limit. Limits differ by one at most, so no worker is passed over for good.
        """
        mine, full = self._clients, self._clients >= self.limit
        for index, (entry, limit) in enumerate(
            zip(self._places.entries, self._places.limits, strict=True)
        ):
            clients = entry - 1
            if index != self._index and 0 <= clients < limit and (full or clients < mine):
                return True
        return False
