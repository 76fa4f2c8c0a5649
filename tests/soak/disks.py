"""Servers for soaks and proofs, and what their disks hold."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.soak.line import Line
from tests.soak.sectors import SECTOR
from tests.support.gateway import ROOT
from tests.support.peers import Server, wait_until
from tests.support.rawclient import SIMPLE, SIMPLE_MAGIC, Cmd, Request

_PIECE = 1 << 20


class VolatileServer(Server):
    """tests/soak/volatile_server.py with the files of `disks` as exports. SIGKILL loses data."""

    def __init__(self, directory: Path, disks: Path, *flags: str) -> None:
        sock, pid = directory / "volatile.sock", directory / "volatile.pid"
        argv: list[str | Path] = [sys.executable, "-m", "tests.soak.volatile_server"]
        argv += ["--socket", sock, "--pidfile", pid, "--directory", disks]
        super().__init__(["env", f"PYTHONPATH={ROOT}", *argv, *flags], sock, pid)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None


def image(path: Path, sectors: int) -> Path:
    """A sparse file of zeroes."""
    with path.open("wb") as file:
        file.truncate(sectors * SECTOR)
    return path


def in_file(path: Path, first: int, count: int) -> bytes:
    """Sectors of an image, as they are there now."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, count * SECTOR, first * SECTOR)
    finally:
        os.close(file)


def in_server(server: Server, export: str, first: int, count: int) -> bytes:
    """Sectors as the server gives them, past any gateway."""
    with Line(server.uri(export)) as line:
        line.open(None, export.encode(), structured=False)
        data = bytearray()
        end = (first + count) * SECTOR
        for offset in range(first * SECTOR, end, _PIECE):
            length = min(_PIECE, end - offset)
            line.queue(Request(Cmd.READ, offset, length, cookie=offset).pack())
            while len(inbox := line.flow(10)) < SIMPLE.size + length:
                pass
            head = SIMPLE.unpack(inbox[: SIMPLE.size])
            assert head == (SIMPLE_MAGIC, 0, offset), head
            data += inbox[SIMPLE.size :]
            inbox.clear()
        line.queue(Request(Cmd.DISC, cookie=0).pack())
        line.flow(10)
    return bytes(data)


def connections(socket: Path) -> int:
    """How many connections the server at this Unix socket has; proc(5), "/proc/net/unix"."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return sum(len(row) > 7 and row[7] == str(socket) and row[5] == "03" for row in rows)


def wait_idle(socket: Path, timeout_s: float = 30.0) -> None:
    """Until the server has done with all who were there: what it has not done by then, it never
    will do."""
    wait_until(lambda: not connections(socket), f"{socket} to be left by all", timeout_s)
