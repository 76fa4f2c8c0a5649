"""A sparse disk of 16 GiB behind Debian trixie's qemu-nbd, and what is needed to judge it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.peers.bench import Bench, Front
from tests.support.peers import Client, Server
from tests.support.trixie import Trixie

KIB, GIB = 1 << 10, 1 << 30
SIZE = 16 * GIB
_BLOCK = 64 * KIB

# Where the disk holds data at first: offset and length. Some of it straddles 4 GiB.
PIECES = (
    (0, 1 << 20),
    (4 * GIB - 96 * KIB, 192 * KIB),
    (8 * GIB + 20 * KIB, 300 * KIB),
    (13 * GIB, 1 << 20),
    (SIZE - 4 * KIB, 4 * KIB),
)


def noise(seed: int, length: int) -> bytes:
    """The same everywhere; a program for libnbd has `random` too."""
    return random.Random(seed).randbytes(length)


@dataclass
class Model:
    """What a disk should hold: blocks that are not all zero, by their offset."""

    blocks: dict[int, bytearray] = field(default_factory=dict)

    @classmethod
    def at_first(cls) -> Model:
        model = cls()
        for seed, (offset, length) in enumerate(PIECES):
            model.write(offset, noise(seed, length))
        return model

    def write(self, offset: int, data: bytes) -> None:
        for at in range(offset - offset % _BLOCK, offset + len(data), _BLOCK):
            start, stop = max(offset, at), min(offset + len(data), at + _BLOCK)
            block = self.blocks.setdefault(at, bytearray(_BLOCK))
            block[start - at : stop - at] = data[start - offset : stop - offset]

    def zero(self, offset: int, length: int) -> None:
        for at in [at for at in self.blocks if offset - _BLOCK < at < offset + length]:
            start, stop = max(offset, at), min(offset + length, at + _BLOCK)
            self.blocks[at][start - at : stop - at] = bytes(stop - start)

    def check(self, path: Path) -> None:
        """A raw image is exactly this."""
        assert path.stat().st_size == SIZE
        wanted = {at: block for at, block in self.blocks.items() if any(block)}
        found = dict(_blocks(path))
        assert sorted(found) == sorted(wanted)
        wrong = [at for at in wanted if found[at] != wanted[at]]
        assert not wrong, f"blocks with other data than expected, at {wrong}"


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Those of a raw image that are not all zero."""
    with path.open("rb", buffering=0) as file:
        at = 0
        while (at := _next_data(file.fileno(), at)) < SIZE:
            at -= at % _BLOCK
            if any(block := os.pread(file.fileno(), _BLOCK, at)):
                yield at, block
            at += _BLOCK


def _next_data(descriptor: int, at: int) -> int:
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return SIZE


class Request(NamedTuple):
    """As it arrived at qemu-nbd."""

    extended: bool
    flags: int
    command: int
    offset: int
    length: int


_TRACE = re.compile(
    r"magic = (\w+), \.flags = (\w+), \.type = (\w+), from = (\d+), len = (\d+)", re.ASCII
)


def requests(server: Server) -> list[Request]:
    """All that qemu-nbd got, in order; without NBD_CMD_DISC."""
    found = [Request(m == "0x21e41c71", *(int(x, 0) for x in rest)) for m, *rest in _traced(server)]
    return [one for one in found if one.command != 2]


def _traced(server: Server) -> list[tuple[str, ...]]:
    return _TRACE.findall(server.log())


class Disks:
    """Makes disks and servers for them; where a format is asked for, it is raw or qcow2."""

    def __init__(self, newer: Trixie, bench: Bench, stack: contextlib.ExitStack) -> None:
        self.newer = newer
        self.bench = bench
        self._stack = stack

    def empty(self, kind: str = "raw", size: int = SIZE) -> Path:
        path = self.newer.directory() / f"disk.{kind}"
        if kind == "raw":  # qemu-img would write the first block of it
            path.touch()
            os.truncate(path, size)
        else:
            self.newer.check("qemu-img", "create", "-q", "-f", kind, path, str(size))
        return path

    def image(self, kind: str = "raw") -> Path:
        """With data at PIECES."""
        raw = self.empty()
        with raw.open("r+b") as file:
            for seed, (offset, length) in enumerate(PIECES):
                file.seek(offset)
                file.write(noise(seed, length))
        return raw if kind == "raw" else self.converted(raw, "raw", kind)

    def converted(self, path: Path, kind: str, to: str) -> Path:
        result = self.newer.directory() / f"disk.{to}"
        self.newer.check("qemu-img", "convert", "-f", kind, "-O", to, path, result)
        return result

    def check(self, model: Model, path: Path, kind: str = "raw") -> None:
        model.check(path if kind == "raw" else self.converted(path, kind, "raw"))

    def same(self, one: Path, other: Path, *, kind: str = "raw", other_kind: str = "") -> None:
        """Two images hold the same, by qemu's judgement."""
        flags = ["-f", kind, "-F", other_kind or kind]
        self.newer.check("qemu-img", "compare", *flags, one, other)

    def serve(self, image: Path, *flags: str, kind: str = "raw") -> Server:
        """qemu-nbd, which gives back what is trimmed or zeroed, and traces its requests."""
        trace = ("--trace", "nbd_receive_request")
        server = self.newer.qemu_nbd(*trace, "--discard=unmap", *flags, "-f", kind, image)
        return self.start(server)

    def start(self, server: Server) -> Server:
        return self._stack.enter_context(server)

    def front(self, image: Path, *flags: str, kind: str = "raw") -> Front:
        return self.bench.gateway(self.serve(image, *flags, kind=kind))


@contextlib.contextmanager
def disks(newer: Trixie, pki: Path) -> Iterator[Disks]:
    """Disks and servers that all clients can reach, of Debian trixie and out here."""
    with contextlib.ExitStack() as stack:
        yield Disks(newer, Bench(newer.directory(), pki, stack), stack)


def both(front: Front, export: str = "") -> tuple[Client, Client]:
    """The way to the upstream without the gateway, and the one through it."""
    return front.direct(export), front.client(export)


def same(newer: Trixie, front: Front, script: str, **args: Any) -> dict[str, Any]:
    """What a program for libnbd reports through the gateway, which is what it reports without."""
    direct, through = (newer.nbdsh(script, client, **args) for client in both(front))
    assert through == direct
    return through
