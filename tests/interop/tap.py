"""Stands between the gateway and an upstream, and reads along what they negotiate."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.support.rawclient import (
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    Opt,
    Rep,
)

EXTENDED_HEADERS = 11
KEPT = 1 << 16  # bytes each way: more than any negotiation


@dataclass
class Session:
    """One connection of the gateway to the upstream: its first bytes, each way."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)

    def asked(self) -> set[int]:
        """The numbers of the options that were sent."""
        if self.down[:16] != struct.pack(">QQ", NBDMAGIC, IHAVEOPT):
            return set()  # oldstyle: no options
        found: set[int] = set()
        at = 4  # behind the client flags
        while at + OPTION.size <= len(self.up):
            magic, option, length = OPTION.unpack_from(self.up, at)
            if magic != IHAVEOPT:
                break
            found.add(option)
            at += OPTION.size + length
            if option == Opt.EXPORT_NAME:
                break
        return found

    def granted(self) -> set[int]:
        """The numbers of the options that were answered with NBD_REP_ACK."""
        found: set[int] = set()
        at = GREETING.size
        while at + OPTION_REPLY.size <= len(self.down):
            magic, option, kind, length = OPTION_REPLY.unpack_from(self.down, at)
            if magic != REP_MAGIC:
                break
            if kind == Rep.ACK:
                found.add(option)
            at += OPTION_REPLY.size + length
        return found


class Tap:
    """Listens on `path` and passes everything on to `target`; a context manager."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.target = target
        self.sessions: list[Session] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                gateway, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.socket(socket.AF_UNIX)
            upstream.connect(str(self.target))
            session = Session()
            self.sessions.append(session)
            for source, sink, kept in (
                (gateway, upstream, session.up),
                (upstream, gateway, session.down),
            ):
                threading.Thread(target=_pump, args=(source, sink, kept), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
    """Both threads of a connection end when either side does; the later one closes."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            if len(kept) < KEPT:
                kept += data[: KEPT - len(kept)]
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
