"""The NBD programs of Debian trixie, in the root directory that tests/peers/install-trixie makes.

They run by chroot, on both sides of a gateway outside: the network is the machine's, and a
directory in the chroot's /tmp is seen from both sides. Paths below it, given as `Path`, are
translated.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.peers import Client, NbdServer, Server, check, missing, nbdsh, run, start_nbdsh

DEFAULT_ROOT = "/var/cache/nbd-gateway/trixie"
# What the programs find around them; all else of the environment goes in as it is.
_SETTINGS = ("PATH=/usr/sbin:/usr/bin", "HOME=/tmp", "TMPDIR=/tmp")


class Trixie:
    """The root directory, and the one in its /tmp: `outside` here, `inside` for the programs."""

    def __init__(self, root: Path, outside: Path) -> None:
        self.root = root
        self.outside = outside
        self.inside = Path("/") / outside.relative_to(root)
        self._certificates: dict[Path, Path] = {}

    def command(self, *argv: str | Path) -> list[str]:
        """To be run out here."""
        return [*_chroot(), str(self.root), "env", *_SETTINGS, *map(self.seen_inside, argv)]

    def seen_inside(self, arg: str | Path) -> str:
        """What a file in `outside` is called for the programs."""
        if isinstance(arg, Path) and arg.is_relative_to(self.outside):
            return str(self.inside / arg.relative_to(self.outside))
        return str(arg)

    def directory(self) -> Path:
        """A new one, outside; its name is short, for sockets are to be in it."""
        path = Path(tempfile.mkdtemp(prefix="", dir=self.outside))
        path.chmod(0o755)
        return path

    # Clients

    def client(self, through: Client) -> Client:
        """The same client, as the programs see it."""
        certificates = through.certificates
        if certificates is not None:
            if certificates not in self._certificates:
                copy = self.directory() / "pki"
                shutil.copytree(certificates, copy)
                self._certificates[certificates] = Path(self.seen_inside(copy))
            certificates = self._certificates[certificates]
        return Client(
            through.address.replace(str(self.outside), str(self.inside)),
            certificates,
        )

    def run(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, whatever that is."""
        return run(*self.command(*argv))

    def check(self, *argv: str | Path) -> str:
        """Run a program that must succeed; what it printed."""
        return check(*self.command(*argv))

    def nbdsh(self, script: str, through: Client, **args: Any) -> dict[str, Any]:
        """Run a program for libnbd that must succeed; see `tests.support.peers.nbdsh`."""
        return nbdsh(script, self.client(through), python=self.command("python3"), **args)

    def start_nbdsh(self, script: str, through: Client, **args: Any) -> subprocess.Popen[str]:
        return start_nbdsh(script, self.client(through), python=self.command("python3"), **args)

    # Servers, to be entered

    def nbdkit(self, *args: str | Path) -> Server:
        """nbdkit with these arguments, at the least a plugin's name."""
        place = self.directory()
        sock, pid = place / "nbdkit.sock", place / "nbdkit.pid"
        argv = self.command("nbdkit", "-f", "-U", sock, "-P", pid, *args)
        return Server([*argv], sock, pid)

    def qemu_nbd(self, *args: str | Path) -> Server:
        """qemu-nbd with these arguments, at the least `-f FORMAT IMAGE`; any number of clients."""
        place = self.directory()
        sock, pid = place / "qemu.sock", place / "qemu.pid"
        pidfile = f"--pid-file={self.seen_inside(pid)}"
        argv = self.command("qemu-nbd", "-t", "-e", "0", "-k", sock, pidfile, *args)
        return Server([*argv], sock, pid)

    def nbd_server(self, image: Path, *, name: str = "disk") -> Server:
        """nbd-server with one export, `name`, over `image`."""
        return _NbdServer(self, self.directory(), image, name)


class _NbdServer(NbdServer):
    def __init__(self, trixie: Trixie, directory: Path, image: Path, name: str) -> None:
        super().__init__(directory, image, name=name)
        config = directory / "nbd-server.conf"
        config.write_text(config.read_text().replace(str(trixie.outside), str(trixie.inside)))
        self.argv = trixie.command("nbd-server", "-C", config, "-p", self.pidfile)


def _chroot() -> list[str]:
    """As root in a user namespace where we are not root."""
    return ["chroot"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "chroot"]


@functools.cache
def _why_not(root: Path) -> str | None:
    """Why the programs cannot be run, if they cannot."""
    if not (root / "usr/bin/nbdinfo").exists():
        why = f"no Debian trixie in {root} (tests/peers/install makes it)"
        with contextlib.suppress(OSError):
            why += f": {Path(f'{root}.reason').read_text().strip()}"
        return why
    done = run(*_chroot(), root, "nbdinfo", "--version")
    return f"cannot run the programs in {root}: {done.stderr.strip()}" if done.returncode else None


@contextlib.contextmanager
def trixie() -> Iterator[Trixie]:
    """The programs, with an empty directory that goes away in the end.

    Without them the test is skipped with the reason; where CI is set, it fails, unless
    install-trixie has tried and left word why it could not.
    """
    root = Path(os.environ.get("NBD_GATEWAY_TRIXIE", DEFAULT_ROOT)).resolve()
    if (why := _why_not(root)) is not None:
        if Path(f"{root}.reason").exists():
            pytest.skip(why)
        missing(why)
    outside = Path(tempfile.mkdtemp(prefix="nbd-", dir=root / "tmp"))
    outside.chmod(0o755)
    try:
        yield Trixie(root, outside)
    finally:
        shutil.rmtree(outside)
