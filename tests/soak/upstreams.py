"""The servers of a soak, one at a time behind the same name, with disks for many clients."""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.soak.disks import VolatileServer, image, in_file, in_server
from tests.soak.sectors import SECTOR
from tests.support.peers import Nbdkit, NbdServer, QemuNbd, Server, check

DISKS: Final = 48
DISK_SECTORS: Final = 16384  # 8 MiB


@dataclass(frozen=True)
class Lease:
    """A part of a disk that belongs to one client. `whole`: it is all of the export."""

    export: str
    first: int  # sectors, as `count`
    count: int
    whole: bool


class Upstream:
    """A server, started. `end` it."""

    def __init__(self, name: str, directory: Path, start: Start, *, lossy: bool) -> None:
        self.name = name
        self.lossy = lossy  # killed, it loses what was not flushed
        self.directory = directory
        self._disks = directory / "disks"
        self._disks.mkdir(parents=True)
        self.server, self._leases, self._raw = start(directory, self._disks)
        self.start()

    def lease(self) -> Lease | None:
        """One that nobody had before; None: they are all gone."""
        return next(self._leases, None)

    def read(self, lease: Lease, first: int, count: int) -> bytes:
        """What the server holds, past the gateway."""
        if self._raw and not self.lossy:
            path = self._disks / (lease.export or "disk")
            return in_file(path, lease.first + first, count)
        return in_server(self.server, lease.export, lease.first + first, count)

    # -- its life

    def start(self) -> None:
        """Also again. The gateway may be another user, and nbdkit has a umask of its own."""
        self.server.start()
        self.server.socket.chmod(0o666)

    @property
    def alive(self) -> bool:
        try:
            stat = Path(f"/proc/{self._pid()}/stat").read_text()
        except (OSError, ValueError):
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"

    def signal(self, number: int) -> None:
        """To all of its processes."""
        with contextlib.suppress(OSError, ValueError):
            os.killpg(self._pid(), number)

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        self.server.kill()
        self.server.__exit__()

    def _pid(self) -> int:
        return int(self.server.pidfile.read_text())


Start = Callable[[Path, Path], tuple[Server, Iterator[Lease], bool]]


def _many(disks: Path) -> Iterator[Lease]:
    names = [f"d{number}" for number in range(DISKS)]
    for name in names:
        image(disks / name, DISK_SECTORS)
    return iter([Lease(name, 0, DISK_SECTORS, True) for name in names])


def _parts() -> Iterator[Lease]:
    return iter([Lease("", DISK_SECTORS * n, DISK_SECTORS, False) for n in range(DISKS)])


class _ManyNbdServer(NbdServer):
    """nbd-server with all the files of a directory."""

    def __init__(self, directory: Path, disks: Path) -> None:
        super().__init__(directory, disks / "d0")
        options = "flush = true\nfua = true\ntrim = true\n"
        text = textwrap.dedent(f"""\
            [generic]
            unixsock = {self.socket}
            allowlist = true
            """)
        for path in sorted(disks.iterdir()):
            text += f"[{path.name}]\nexportname = {path}\n{options}"
        (directory / "nbd-server.conf").write_text(text)


def _nbdkit(directory: Path, disks: Path) -> tuple[Server, Iterator[Lease], bool]:
    return Nbdkit(directory, "file", f"dir={disks}"), _many(disks), True


def _nbd_server(directory: Path, disks: Path) -> tuple[Server, Iterator[Lease], bool]:
    leases = _many(disks)
    return _ManyNbdServer(directory, disks), leases, True


def _qemu_raw(directory: Path, disks: Path) -> tuple[Server, Iterator[Lease], bool]:
    path = image(disks / "disk", DISKS * DISK_SECTORS)
    return QemuNbd(directory, "-f", "raw", path), _parts(), True


def _qemu_qcow2(directory: Path, disks: Path) -> tuple[Server, Iterator[Lease], bool]:
    path = disks / "disk"
    check("qemu-img", "create", "-q", "-f", "qcow2", path, str(DISKS * DISK_SECTORS * SECTOR))
    return QemuNbd(directory, "-f", "qcow2", path), _parts(), False


def _volatile(*flags: str) -> Start:
    def start(directory: Path, disks: Path) -> tuple[Server, Iterator[Lease], bool]:
        return VolatileServer(directory, disks, *flags), _many(disks), True

    return start


KINDS: Final[dict[str, tuple[Start, bool]]] = {
    "nbdkit": (_nbdkit, False),
    "qemu-nbd": (_qemu_raw, False),
    "volatile": (_volatile("--shuffle"), True),
    "nbd-server": (_nbd_server, False),
    "qemu-nbd qcow2": (_qemu_qcow2, True),
    "volatile, poor": (_volatile("--no-fua", "--no-structured-replies", "--delay-ms=0.5"), True),
}


def start(kind: str, directory: Path) -> Upstream:
    """One of KINDS, with new disks, in a new directory."""
    how, lossy = KINDS[kind]
    return Upstream(kind, directory, how, lossy=lossy)
