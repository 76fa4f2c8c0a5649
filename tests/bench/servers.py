"""The servers at work, and the disk behind them.

All have the same upstream, nbdkit's memory disk filled with bytes that are no holes, and the same
certificates. There are two such stages, because fio cannot show a client certificate:

- `data`: TLS without client certificates, the upstream as nbdkit starts it;
- `clients`: TLS with client certificates that each server checks; the upstream has one thread a
  connection instead of 16, so that 1000 connections do not exhaust the kernel's process numbers.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gateway import certs
from tests.bench.kinds import START_S, Kind, Place, trixie_root
from tests.bench.processes import Failed, Process, run

MIB = 1 << 20
AREA_MIB = 256  # what fio and nbdcopy work on
ZEROES_MIB = 64  # behind it, on the stage `clients`: what is zeroed is of no more use as data

StageName = Literal["data", "clients"]


class Server:
    """One kind at one place, started. `direct` has no process, and so no figures of one."""

    def __init__(self, kind: Kind, place: Place, log: Path) -> None:
        self.kind = kind
        self.place = place
        self._process: Process | None = None
        if kind.direct:
            self.uri = f"nbd+unix:///?socket={place.upstream}"
            return
        query = f"?tls-certificates={place.tls}" if place.check_clients else ""
        self.uri = f"nbds://127.0.0.1:{place.port}/{query}"
        self._process = Process(kind.command(place), log, cwd=kind.cwd)
        try:
            self._process.wait_until(lambda: _answers(self.uri), "does not start", START_S)
        except BaseException:
            self._process.stop()
            raise

    @property
    def process(self) -> Process:
        if self._process is None:
            raise Failed("it has no process")
        return self._process

    @property
    def alive(self) -> bool:
        return self._process is None or self._process.alive

    def cpu_s(self) -> float | None:
        return None if self._process is None else self._process.cpu_s()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


def _answers(uri: str) -> bool:
    try:
        run(["nbdinfo", "--size", uri], START_S)
    except Failed:
        return False
    return True


class Stage:
    """One upstream, and the servers in front of it, each started when it is first asked for."""

    def __init__(self, name: StageName, folder: Path, tls: Path) -> None:
        self.name = name
        self.noise = folder / "noise"
        self._folder = folder
        self._tls = tls
        self._stack = contextlib.ExitStack()
        self._servers: dict[str, Server] = {}
        self._numbers = iter(range(1, 1 << 30))
        self.upstream = folder / f"{name}.sock"
        threads = ["-t", "1"] if name == "clients" else []
        size_mib = AREA_MIB + (ZEROES_MIB if name == "clients" else 0)
        argv = ["nbdkit", "-f", *threads, "-U", str(self.upstream), "memory", f"{size_mib}M"]
        self._process = Process(argv, folder / f"{name}.log")
        self._stack.callback(self._process.stop)
        try:
            uri = f"nbd+unix:///?socket={self.upstream}"
            self._process.wait_until(lambda: _answers(uri), "the upstream does not start", START_S)
            run(["nbdcopy", self.noise, uri], START_S)
        except BaseException:
            self.close()
            raise

    def server(self, kind: Kind) -> Server:
        """A running one, the same each time. Raises Failed, also if it has died meanwhile."""
        found = self._servers.get(kind.name)
        if found is not None and not found.alive:
            raise Failed(f"it ended after the case before: {found.process.last_words()}")
        if found is None:
            found = self._servers[kind.name] = self._start(kind)
            self._stack.callback(found.stop)
        return found

    def replace(self, kind: Kind) -> None:
        """Have another one started next time: this one has failed."""
        if (found := self._servers.pop(kind.name, None)) is not None:
            found.stop()

    @contextlib.contextmanager
    def fresh(self, kind: Kind, *, check_clients: bool = True) -> Iterator[Server]:
        """One that has seen no clients but the one that waited for it. Raises Failed."""
        server = self._start(kind, check_clients=check_clients)
        try:
            yield server
        finally:
            server.stop()

    def _start(self, kind: Kind, *, check_clients: bool | None = None) -> Server:
        if check_clients is None:
            check_clients = self.name == "clients"
        place = Place(_free_port(), self.upstream, self._tls, check_clients)
        log = self._folder / f"{self.name}-{kind.name}-{next(self._numbers)}.log"
        return Server(kind, place, log)

    def processes(self) -> Iterator[Process]:
        """The upstream and the servers."""
        yield self._process
        for server in self._servers.values():
            if not server.kind.direct:
                yield server.process

    def close(self) -> None:
        self._stack.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Stages:
    """Both stages, in a folder of their own that every server can see. A context manager."""

    def __init__(self, *, trixie: bool) -> None:
        parent = trixie_root() / "tmp" if trixie else None
        self.folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
        self.tls = self.folder / "tls"
        self._stages: dict[StageName, Stage] = {}

    def __enter__(self) -> Stages:
        try:
            self.folder.chmod(0o755)
            certs.init(self.tls, ("localhost",))
            with (self.folder / "noise").open("wb") as file:
                for _ in range(AREA_MIB):
                    file.write(os.urandom(MIB))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for stage in self._stages.values():
            stage.close()
        shutil.rmtree(self.folder)

    def processes(self) -> Iterator[Process]:
        for stage in self._stages.values():
            yield from stage.processes()

    def __getitem__(self, name: StageName) -> Stage:
        if name not in self._stages:
            self._stages[name] = Stage(name, self.folder, self.tls)
        return self._stages[name]


# ---------------------------------------------------------------- what was negotiated


def negotiated(server: Server) -> dict[str, str]:
    """TLS version, cipher and group, in the words of the client's own GnuTLS.

    The client is nbdinfo with GnuTLS's debug messages: the library that fio and nbdcopy have too.
    """
    if server.kind.direct:
        return {"version": "none", "cipher": "none", "group": "none"}
    done = subprocess.run(
        ["nbdinfo", "--size", server.uri],
        env={**os.environ, "GNUTLS_DEBUG_LEVEL": "4"},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    found = {
        "version": re.search(r"Negotiated version: (\S+)", done.stderr),
        "cipher": re.search(r"Selected cipher suite: (?:GNUTLS_)?(\S+)", done.stderr),
        "group": re.search(r"Selected group (\S+)", done.stderr),
    }
    words = {what: match[1] if match else "not told" for what, match in found.items()}
    words["version"] = {"3.3": "TLS 1.2", "3.4": "TLS 1.3"}.get(words["version"], words["version"])
    return words
