"""The programs that stand in front of the disk, each a way to start one: gateway, nbdkit, qemu-nbd.

They run with their defaults, but for what the task asks of all of them: where to listen, the
upstream's socket, certificates, and any number of clients.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.processes import Failed, run

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0
MAX_CLIENTS = 2000


@dataclass(frozen=True)
class Place:
    """Where one server is to stand."""

    port: int
    upstream: Path  # Unix socket
    tls: Path  # folder of certificates
    check_clients: bool


@dataclass(frozen=True)
class Kind:
    """A program, or one way to start it. `title` has the version in it."""

    name: str
    title: str
    command: Callable[[Place], list[str | Path]]
    cwd: Path | None = None
    direct: bool = False  # no program: the upstream itself, without TLS
    workers: int = 1


def direct() -> Kind:
    return Kind("direct", "direct, no TLS", lambda place: [], direct=True)


def gateway(workers: int = 1, root: Path = ROOT, name: str = "gateway") -> Kind:
    """With its defaults, but for the number of clients, in all and of one address and certificate.

    Raises Failed without `--workers`.
    """
    argv = [sys.executable, "-m", "gateway"]
    known = run([*argv, "--help"], START_S, cwd=root)
    more: list[str] = []
    if "--limit" in known:  # it may be an older one
        more += ["--limit", "clients-per-identity=0", "--limit", "handshake-rate=0"]
    if workers > 1:
        if "--workers" not in known:
            raise Failed("this gateway has no --workers")
        more += ["--workers", str(workers)]

    def command(place: Place) -> list[str | Path]:
        tls: list[str | Path] = ["--tls-dir", place.tls]
        if not place.check_clients:
            tls += ["--allow-anonymous"]
        where = ["--socket", str(place.upstream), "--listen", f"127.0.0.1:{place.port}"]
        return [*argv, *tls, *where, "--max-connections", str(MAX_CLIENTS), *more]

    title = name if workers == 1 else f"{name}, {workers} workers"
    return Kind(
        name if workers == 1 else f"{name}-{workers}w", title, command, root, False, workers
    )


def nbdkit(name: str = "nbdkit", within: Path | None = None) -> Kind:
    """Its nbd plugin. `within`: the root directory of another Debian."""
    prefix = in_root(within) if within else []

    def seen(path: Path) -> Path:
        return Path("/") / path.relative_to(within) if within else path

    def command(place: Place) -> list[str | Path]:
        listen = ["-f", "-i", "127.0.0.1", "-p", str(place.port)]
        tls = ["--tls=require", f"--tls-certificates={seen(place.tls)}"]
        if place.check_clients:
            tls += ["--tls-verify-peer"]
        plugin = ["nbd", f"socket={seen(place.upstream)}"]
        return [*prefix, "nbdkit", *listen, *tls, *plugin]

    return Kind(name, f"nbdkit {version([*prefix, 'nbdkit', '--version'])}", command)


def qemu_nbd() -> Kind:
    def command(place: Place) -> list[str | Path]:
        listen = ["-t", "-e", "0", "-b", "127.0.0.1", "-p", str(place.port)]
        creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={place.tls},verify-peer="
        tls = ["--object", creds + ("yes" if place.check_clients else "no"), "--tls-creds", "tls0"]
        image = f"driver=nbd,server.type=unix,server.path={place.upstream}"
        return ["qemu-nbd", *listen, *tls, "--image-opts", image]

    return Kind("qemu-nbd", f"qemu-nbd {version(['qemu-nbd', '--version'])}", command)


def version(argv: list[str]) -> str:
    """Raises Failed."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", run(argv, START_S))
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}") from None
    if found is None:
        raise Failed(f"{argv[0]} tells no version")
    return found[0]


def in_root(root: Path) -> list[str]:
    """How to run a program in another root directory; as root in a user namespace if we are not."""
    chroot = ["chroot"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "chroot"]
    return [*chroot, str(root), "env", "PATH=/usr/sbin:/usr/bin", "HOME=/tmp", "TMPDIR=/tmp"]


def trixie_root() -> Path:
    """Debian trixie, where tests/peers/install has put it. Raises Failed."""
    place = os.environ.get("NBD_GATEWAY_TRIXIE", "/var/cache/nbd-gateway/trixie")
    root = Path(place).resolve()
    if not (root / "usr/sbin/nbdkit").exists() and not (root / "usr/bin/nbdkit").exists():
        raise Failed(f"no nbdkit of Debian trixie in {place} (tests/peers/install makes it)")
    if not os.access(root / "tmp", os.W_OK):
        raise Failed(f"{root}/tmp cannot be written to")
    return root


KINDS: dict[str, Callable[[], Kind]] = {
    "gateway": gateway,
    "gateway-2w": functools.partial(gateway, 2),
    "nbdkit": nbdkit,
    "nbdkit-trixie": lambda: nbdkit("nbdkit-trixie", trixie_root()),
    "qemu-nbd": qemu_nbd,
    "direct": direct,
}
