"""Runs of zeroes in data that is passing: they need not be sent."""

from __future__ import annotations

from typing import Final, NamedTuple

BLOCK: Final = 4096  # bytes: zeroes are looked for in blocks of this size, aligned in the export
_SMALLEST: Final = 512  # a shorter run would save next to nothing
_ZERO_BLOCK: Final = bytes(BLOCK)


class Run(NamedTuple):
    """Bytes `start` to `stop` of a buffer: all zeroes, or not."""

    start: int
    stop: int
    zeroes: bool


def whole_blocks(offset: int, count: int) -> int:
    """How many of `count` bytes at `offset` of the export end with a whole block."""
    return max(0, count - (offset + count) % BLOCK)


def runs(buffer: bytearray, at: int, end: int, offset: int) -> list[Run]:
    """What is in `buffer[at:end]`, whose first byte is at `offset` of the export."""
    found: list[Run] = []
    start = at
    zeroes = False  # in the run that begins at `start`
    while at < end:
        stop = min(end, at + BLOCK - (offset & (BLOCK - 1)))
        # Compares in place; ends at the first byte that differs.
        block = _ZERO_BLOCK if stop - at == BLOCK else _ZERO_BLOCK[: stop - at]
        is_zero = buffer.startswith(block, at, stop) and (stop - at >= _SMALLEST or zeroes)
        if is_zero != zeroes:
            if start < at:
                found.append(Run(start, at, zeroes))
            start, zeroes = at, is_zero
        offset += stop - at
        at = stop
    if start < at:
        found.append(Run(start, at, zeroes))
    return found
