"""Tables in memory that all workers see, made before the first fork: who is here, and how fast who
came. Of fixed size, whatever clients do.

There is no lock. In a `Roll` each worker writes its own column only. In `Rates` all write the same
cells, of eight bytes each; two that write one at the same moment cost one of the two new clients
that were to be counted.

Addresses and identities stand in them as hashes, with a key that nobody outside knows: nobody can
aim for what another's hash is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final

_MARK_BYTES: Final = 16  # of a hash: two that are alike by chance will not be met
_EMPTY: Final = bytes(_MARK_BYTES)
_ROWS: Final = 2  # cells for each address, all of which have to be used up before it is refused
_CELLS: Final = 8192  # in a row; ours: 128 KiB in all


class _Marks:
    """Names to hashes."""

    def __init__(self) -> None:
        self._key = os.urandom(_MARK_BYTES)

    def of(self, name: bytes) -> bytes:
        return hashlib.blake2b(name, digest_size=_MARK_BYTES, key=self._key).digest()


class Roll:
    """The clients that are here, by name. `columns`: of how many, for each worker."""

    def __init__(self, columns: Sequence[int]) -> None:
        self._marks = _Marks()
        self.columns = tuple(columns)
        self._memory = mmap.mmap(-1, _MARK_BYTES * sum(columns))  # anonymous, and zeroes

    def clear(self, index: int) -> None:
        """For the supervisor: the worker of this column is gone, and its clients with it."""
        begin, size = self.span(index)
        self._memory[begin : begin + size] = bytes(size)

    def span(self, index: int) -> tuple[int, int]:
        """Where a column begins, and how long it is, in bytes."""
        return _MARK_BYTES * sum(self.columns[:index]), _MARK_BYTES * self.columns[index]

    def mark(self, name: bytes) -> bytes:
        return self._marks.of(name)

    def count(self, mark: bytes) -> int:
        """In all columns. One copy of the table: 1.6 KB for each hundred clients."""
        return self._memory[:].count(mark)

    def put(self, at: int, mark: bytes) -> None:
        self._memory[at : at + _MARK_BYTES] = mark


class Column:
    """One worker's own column of a roll, empty at first."""

    def __init__(self, roll: Roll, index: int) -> None:
        self._roll = roll
        begin, size = roll.span(index)
        self._free = list(range(begin, begin + size, _MARK_BYTES))

    def add(self, name: bytes, most: int) -> int | None:
        """Add a client of this name. What it gives is for `remove`; None: `most` are here already,
        with all workers, or this worker has no more cells.

        Written first and counted then: of two workers that add the last one at the same moment at
        least one finds that it was one too many, and perhaps both do. `most` is never exceeded.
        """
        mark = self._roll.mark(name)
        if not self._free or self._roll.count(mark) >= most:
            return None
        cell = self._free.pop()
        self._roll.put(cell, mark)
        if self._roll.count(mark) > most:
            self.remove(cell)
            return None
        return cell

    def remove(self, cell: int) -> None:
        """That client is gone. Once for each `add`."""
        self._roll.put(cell, _EMPTY)
        self._free.append(cell)


class Rates:
    """How fast who came: a token bucket an address, for all workers together.

    A cell is the moment when its bucket is full again, in the seconds of `time.monotonic`, which
    all processes have in common. Each address has a cell in each row, and shares it with whom its
    hash falls on; it is refused only if both are used up. So nobody's bucket is thrown away to make
    room for another's, and who has a thousand addresses gains nothing for one of them by the
    others. To use up the cells of all other clients takes 8192 times the rate of one.
    """

    def __init__(self) -> None:
        self._marks = _Marks()
        self._memory = memoryview(mmap.mmap(-1, 8 * _ROWS * _CELLS)).cast("d")

    def admits(self, name: bytes, *, rate: float, burst: float, now: float) -> bool:
        """Whether one more of this name may come now, and takes a token if so.

        `rate` is in tokens a second, `burst` how many a full bucket has.
        """
        cells = [
            row * _CELLS + part % _CELLS
            for row, part in enumerate(struct.unpack(f"{_ROWS}Q", self._marks.of(name)))
        ]
        window = burst / rate
        for cell in cells:
            if not self._memory[cell] <= now + window:  # a bit gone wrong, which would last
                self._memory[cell] = now + window
        full_at = [self._memory[cell] for cell in cells]
        next_at = max(now, min(full_at)) + 1 / rate
        if next_at - now > window + 1e-6:  # floats are not exact
            return False
        for cell, before in zip(cells, full_at, strict=True):
            self._memory[cell] = max(before, next_at)
        return True
