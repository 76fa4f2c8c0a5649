"""What the scenarios are made of: servers, gateways in front of them, and clients for both."""

from __future__ import annotations

import contextlib
import filecmp
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.nbd.upgrades import Upgrade
from tests.support.gateway import Gateway
from tests.support.peers import Client, Nbdkit, NbdServer, QemuNbd, Server, check

MIB = 1 << 20
SIZE = 16 * MIB  # of the disk that most scenarios use


NO_UPGRADES = [word for one in Upgrade for word in ("--no-upgrade", one.value)]


@dataclass(frozen=True)
class Front:
    """A gateway with its upstream, and how to get to it."""

    gateway: Gateway
    server: Server
    pki: Path

    def client(self, export: str = "", *, certificates: Path | None = None) -> Client:
        """With the right certificates unless others are named."""
        return Client(self.gateway.uri, certificates or self.pki).with_export(export)

    def plain_client(self) -> Client:
        """One that does not want TLS."""
        return Client(self.gateway.uri.replace("nbds", "nbd", 1))

    def direct(self, export: str = "") -> Client:
        """To the upstream itself, past the gateway."""
        return Client(self.server.uri(export))


class Bench:
    """Starts servers and gateways, each in its own directory, and stops them in the end."""

    def __init__(self, root: Path, pki: Path, stack: contextlib.ExitStack) -> None:
        self.root = root
        self.pki = pki
        self._stack = stack
        self._count = 0

    def directory(self) -> Path:
        self._count += 1
        path = self.root / str(self._count)
        path.mkdir(mode=0o755)
        return path

    def nbdkit(self, *args: str | Path) -> Nbdkit:
        return self._stack.enter_context(Nbdkit(self.directory(), *args))

    def qemu_nbd(self, *args: str | Path) -> QemuNbd:
        return self._stack.enter_context(QemuNbd(self.directory(), *args))

    def nbd_server(self, image: Path, *, name: str = "disk") -> NbdServer:
        return self._stack.enter_context(NbdServer(self.directory(), image, name=name))

    def gateway(self, server: Server, *args: str | Path, listen: str = "127.0.0.1:0") -> Front:
        """A gateway in front of `server` that wants certificates of the session's CA."""
        arguments = ["--socket", server.socket, "--listen", listen, *args]
        if "--tls" not in args and "--cert" not in args:
            arguments = ["--tls-dir", self.pki, *arguments]
        gateway = self._stack.enter_context(Gateway(*arguments))
        self._stack.callback(lambda: print(f"{gateway.args}:\n{gateway.log()}"))  # if a test fails
        return Front(gateway, server, self.pki)

    def plain_gateway(self, server: Server, *args: str | Path) -> Front:
        """One that adds nothing to what the server can do."""
        return self.gateway(server, *NO_UPGRADES, *args)

    def image(self, size: int) -> Path:
        """A sparse file of zeroes."""
        path = self.directory() / "disk.img"
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def qcow2(self, size: int) -> Path:
        path = self.directory() / "disk.qcow2"
        check("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
        return path


Upstream = Callable[[Bench], Server]


def _nbdkit(*flags: str, plugin: str = "file") -> Upstream:
    return lambda bench: bench.nbdkit(*flags, plugin, bench.image(SIZE))


UPSTREAMS: dict[str, Upstream] = {
    "nbdkit": _nbdkit(),
    # nbdkit 1.32 refuses in oldstyle what it advertises there: FUA, flushes, zeroes. So here is a
    # disk that can do none of these.
    "nbdkit-oldstyle": _nbdkit("-o", "--filter=nozero", plugin="split"),
    "nbdkit-mask-handshake-0": _nbdkit("--mask-handshake=0"),
    "nbdkit-mask-handshake-1": _nbdkit("--mask-handshake=1"),
    "nbdkit-mask-handshake-2": _nbdkit("--mask-handshake=2"),
    "nbdkit-no-sr": _nbdkit("--no-sr"),
    "qemu-nbd-raw": lambda bench: bench.qemu_nbd("-f", "raw", bench.image(SIZE)),
    "qemu-nbd-qcow2": lambda bench: bench.qemu_nbd("-f", "qcow2", bench.qcow2(SIZE)),
    "nbd-server": lambda bench: bench.nbd_server(bench.image(SIZE)),
}


def same(one: Path, other: Path) -> bool:
    """Whether two files are the same, byte for byte."""
    return filecmp.cmp(one, other, shallow=False)
