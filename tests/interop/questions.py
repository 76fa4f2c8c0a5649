"""Every command with every flag, and around every edge: the requests that tests/interop/probe.py
sends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

MIB = 1 << 20
BLOCK = 4096
STEP = 64 << 10

FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
KNOWN_FLAGS = (FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO)
UNKNOWN_FLAGS = tuple(1 << bit for bit in range(5, 16))

PAYLOAD_LEN = 32

COMMANDS = ("read", "read chunks", "write", "flush", "trim", "zero", "cache", "status")
AT_A_PLACE = tuple(command for command in COMMANDS if command != "flush")
CARRIES_DATA = ("read", "read chunks", "write")
CHANGES_DATA = ("write", "trim", "zero")


class Request(NamedTuple):
    number: int  # within its connection; also the seed of what a write writes
    command: str
    offset: int
    length: int
    flags: int = 0

    def __str__(self) -> str:
        flags = f", flags {self.flags:#x}" if self.flags else ""
        return f"{self.command} {self.length} at {self.offset}{flags} (request {self.number})"


Question = tuple[str, int, int, int]
Part = Callable[[int, int], Iterator[Question]]


def flag_combinations() -> list[int]:
    known = [
        sum(chosen)
        for count in range(len(KNOWN_FLAGS) + 1)
        for chosen in itertools.combinations(KNOWN_FLAGS, count)
    ]
    return [*known, *UNKNOWN_FLAGS]


def every_flag(size: int, minimum: int) -> Iterator[Question]:
    """Every command with every combination of flags, each in a place of its own."""
    block = max(BLOCK, minimum)
    place = 0
    for command in COMMANDS:
        for flags in flag_combinations():
            if command == "flush":
                yield command, 0, 0, flags
                continue
            place = (place + block) % max(block, size - block)
            yield command, place - place % block, min(block, size), flags


def every_place(size: int, minimum: int) -> Iterator[Question]:
    """Offsets and lengths around 0, blocks, the end, and far behind it."""
    block = max(BLOCK, minimum)
    middle = size // 2 // block * block
    offsets = [0, 1, 511, 512, block - 512, block, block + 512, middle, middle + 1]
    offsets += [size - block, size - 513, size - 512, size - 1, size, size + 1, size + block]
    offsets += [(1 << 31) - 512, 1 << 32, (1 << 63) - 512, 1 << 63, (1 << 64) - 512, (1 << 64) - 1]
    lengths = [0, 1, 511, 512, 513, block, block + 1, STEP, STEP + block + 512]
    for command in AT_A_PLACE:
        for offset in dict.fromkeys(offset for offset in offsets if offset >= 0):
            for length in lengths:
                yield command, offset, length, 0
    for command in AT_A_PLACE:
        for offset, length in ((0, size), (1, size), (0, size + 1), (block, size - block)):
            if 0 < length <= (2 * MIB if command in CARRIES_DATA else (1 << 31) - STEP):
                yield command, offset, length, 0


def edges(size: int, minimum: int) -> Iterator[Question]:
    """The same in short."""
    block = max(BLOCK, minimum)
    for command in AT_A_PLACE:
        for offset in (0, block // 2, size - block, size - 1, size, 1 << 63):
            for length in (0, 1, 512, block, 2 * block):
                if offset >= 0:
                    yield command, offset, length, 0


def large(size: int, minimum: int) -> Iterator[Question]:
    """Payloads around the limit of 32 MiB, and of upstreams with less."""
    block = max(BLOCK, minimum)
    for command in ("write", "zero", "read", "read chunks"):
        yield command, block, 4 * MIB + block, FUA
        yield command, block, 32 * MIB, 0
    for command in ("read", "read chunks"):
        yield command, 0, 32 * MIB + block, 0
    yield "read chunks", 0, 32 * MIB, DF


def pieces(size: int, minimum: int) -> Iterator[Question]:
    """Large payloads in short."""
    block = max(BLOCK, minimum)
    yield "write", block, 4 * MIB + block, FUA
    yield "write", block, 32 * MIB, 0
    yield "read", block, 32 * MIB, 0


def filtered(size: int, minimum: int) -> Iterator[Question]:
    """BLOCK_STATUS of some of the contexts only, which takes extended headers and a payload."""
    block = max(BLOCK, minimum)
    for offset, length in ((0, size), (block, size // 2 // block * block), (size, block), (0, 0)):
        for flags in (0, REQ_ONE):
            yield "status of one", offset, length, flags
    yield "status of none", 0, size, 0


def huge(size: int, minimum: int) -> Iterator[Question]:
    """Lengths on both sides of 4 GiB, which only extended headers can tell, on a larger disk."""
    block = max(BLOCK, minimum)
    for length in ((1 << 32) - block, 1 << 32, (1 << 32) + block, size - 2 * MIB):
        for command, flags in (("zero", 0), ("zero", FUA | NO_HOLE), ("trim", 0), ("status", 0)):
            if not flags or length < 1 << 32:
                yield "write", MIB, block, 0
                yield "write", MIB + length - block, block, 0
                yield command, MIB, length, flags
                yield "status", 0, size - block, 0
    yield "status", 0, size, REQ_ONE
    yield "cache", 0, 1 << 20, 0


def whole(size: int, minimum: int) -> Iterator[Question]:
    """What the disk looks like now."""
    step = max(MIB, minimum)
    for offset in (*range(0, min(size, 40 * MIB), step), max(0, size - step)):
        yield "read", offset, min(step, size - offset), 0
        yield "status", offset, min(step, size - offset), 0


PARTS: dict[str, Part] = {
    "flags": every_flag,
    "places": every_place,
    "edges": edges,
    "large": large,
    "pieces": pieces,
    "filtered": filtered,
    "huge": huge,
    "whole": whole,
}


def requests(parts: Sequence[str], size: int, minimum: int) -> list[Request]:
    """All requests of these parts, numbered."""
    asked = itertools.chain.from_iterable(PARTS[part](size, minimum) for part in parts)
    return [Request(number, *question) for number, question in enumerate(asked, 1)]
