"""An input as a row of small decisions. All that is missing at its end reads as zero."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads one input from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def u8(self) -> int:
        return int.from_bytes(self.take(1), "big")

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def string(self) -> bytes:
        """Up to 255 bytes behind their count."""
        return self.take(self.u8())

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.u8() % len(choices)]


def packed(layout: str, *values: int) -> bytes:
    """Big-endian, as everything in the protocol."""
    return struct.pack(">" + layout, *values)


class Broken(AssertionError):
    """A model has found that something is not as it has to be."""


def require(condition: object, what: str, *about: object) -> None:
    """Raises Broken, and only then looks what `about` is in words."""
    if not condition:
        raise Broken(": ".join([what, *map(str, about)]))
