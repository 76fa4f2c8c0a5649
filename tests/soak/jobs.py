"""The real clients of a soak: each does a job on a disk of its own, and looks at the outcome."""

from __future__ import annotations

import contextlib
import filecmp
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.sectors import SECTOR
from tests.soak.upstreams import Lease
from tests.support.gateway import Output, environment
from tests.support.peers import SYSTEM_PYTHON, Client, find

CLIENT_S = 90.0  # longer than all outages that a job may meet


class JobFailed(Exception):
    """A client has failed, or has not ended."""


class WrongData(Exception):
    """A client has succeeded, and what it has written or read is not what it should be."""


@dataclass(eq=False)
class Job:
    """One client at work. `run` it in a thread of its own; `kill` ends its program from outside."""

    kind: str
    client: Client
    lease: Lease
    folder: Path  # of its own
    pictures: list[Path]  # files of the size of a lease
    random: random.Random
    verified: int = 0  # bytes that were compared
    killed: bool = False
    command: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Raises JobFailed, WrongData."""
        self.folder.mkdir()
        KINDS[self.kind](self)

    def kill(self) -> bool:
        """SIGKILL. False: nothing of it runs just now."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return False
            self.killed = True
            _kill(self._process)
            return True

    def program(self, *argv: str | Path) -> str:
        """Run it to its end; what it printed. Raises JobFailed."""
        command = [find(argv[0]), *map(str, argv[1:])]
        said = Output()  # no pipe: nobody is waited for who has it from a program that was killed
        with self._lock:
            if self.killed:
                raise JobFailed("killed")
            self.command = " ".join(command)
            self._process = process = subprocess.Popen(
                command,
                env=environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said.file,
                stderr=said.file,
                start_new_session=True,
            )
        try:
            process.wait(CLIENT_S)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
            raise JobFailed(f"not done after {CLIENT_S:g} s: {self.command}") from None
        finally:
            said.close()
        output = said.text()
        if process.returncode:
            raise JobFailed(f"exit code {process.returncode}: {self.command}: {output.strip()}")
        return output

    @property
    def size(self) -> int:
        return self.lease.count * SECTOR

    @property
    def offset(self) -> int:
        return self.lease.first * SECTOR


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def nbdinfo(job: Job) -> None:
    # Not from --json: nbd-server 3.24 says there that each of its exports has 0 bytes.
    size = int(job.program("nbdinfo", "--size", job.client.uri))
    if size < job.offset + job.size:
        raise WrongData(f"nbdinfo: {size} bytes")
    job.program("nbdinfo", "--json", job.client.uri)
    job.program("nbdinfo", "--list", job.client.uri)


def nbd_client(job: Job) -> None:
    listed = job.program(*job.client.nbd_client("-l")).split()
    if job.lease.export and job.lease.export not in listed:
        raise WrongData(f"nbd-client lists {listed}")


def nbdcopy(job: Job) -> None:
    picture = job.random.choice(job.pictures)
    flags = ["--flush"] if job.random.random() < 0.5 else []
    flags += [f"--requests={job.random.choice((1, 8, 64))}"]
    flags += [f"--request-size={job.random.choice((4096, 65536, 1 << 20))}"]
    job.program("nbdcopy", *flags, picture, job.client.uri)
    down = job.folder / "down"
    job.program("nbdcopy", job.client.uri, down)
    if not filecmp.cmp(picture, down, shallow=False):
        raise WrongData("nbdcopy: other data came back")
    job.verified += 2 * job.size


def qemu_img(job: Job) -> None:
    picture = job.random.choice(job.pictures)
    image = job.client.qemu_image()
    if not job.lease.whole:
        inner = ",".join(f"file.{option}" for option in image.split(","))
        image = f"driver=raw,offset={job.offset},size={job.size},{inner}"
    qemu_object = job.client.qemu_object()
    convert = ["qemu-img", "convert", "-n", "-W", "-m", str(job.random.choice((1, 8, 16)))]
    job.program(*convert, *qemu_object, "-f", "raw", "--target-image-opts", picture, image)
    same = f"driver=raw,file.driver=file,file.filename={picture}"
    job.program("qemu-img", "compare", *qemu_object, "--image-opts", image, same)
    job.verified += 2 * job.size


def qemu_io(job: Job) -> None:
    words, checks = [], []
    for number in range(job.random.randint(4, 16)):
        at = job.offset + number * (job.size // 16)
        length = 512 * job.random.randint(1, 256)
        kind = job.random.choice(("write", "write -f", "write -z", "write -z -u"))
        value = 0 if "-z" in kind else job.random.randint(1, 255)
        pattern = "" if "-z" in kind else f"-P {value} "
        words += [f"{kind} {pattern}{at} {length}"]
        words += ["flush"] if job.random.random() < 0.2 else []
        checks += [f"read -P {value} {at} {length}"]
        job.verified += length
    script = [part for word in words + checks for part in ("-c", word)]
    client = job.client
    printed = job.program("qemu-io", *client.qemu_object(), *script, *client.qemu()[-2:])
    if "verification failed" in printed:
        raise WrongData(f"qemu-io: {printed}")
    if "failed" in printed or "error" in printed:
        raise JobFailed(printed)


_NBDSH = """
import os, random, sys
import nbd
uri, first, size, seed = sys.argv[1], *map(int, sys.argv[2:5])
source = random.Random(seed)
h = nbd.NBD()
h.set_uri_allow_local_file(True)
if source.random() < 0.5:
    h.add_meta_context("base:allocation")
h.connect_uri(uri)
model = bytearray(h.pread(size, first))
for _ in range(60):
    length = 512 * source.randint(1, 200)
    at = 512 * source.randrange((size - length) // 512)
    kind = source.choice(["write", "write", "write", "zero", "read", "flush", "status", "cache"])
    fua = nbd.CMD_FLAG_FUA if h.can_fua() and source.random() < 0.2 else 0
    if kind == "write":
        data = source.randbytes(length)
        h.pwrite(data, first + at, fua)
        model[at:at + length] = data
    elif kind == "zero" and h.can_zero():
        h.zero(length, first + at, fua)
        model[at:at + length] = bytes(length)
    elif kind == "flush" and h.can_flush():
        h.flush()
    elif kind == "cache" and h.can_cache():
        h.cache(length, first + at)
    elif kind == "status" and h.can_meta_context("base:allocation"):
        seen = []
        h.block_status(length, first + at, lambda name, at, extents, error: seen.extend(extents))
        assert seen
    elif h.pread(length, first + at) != model[at:at + length]:
        sys.exit(77)
if h.pread(size, first) != model:
    sys.exit(77)
h.shutdown()
print("verified")
"""


def nbdsh(job: Job) -> None:
    size = min(job.size, 4 << 20)
    place = (str(job.offset), str(size), str(job.random.randrange(1 << 30)))
    try:
        job.program(SYSTEM_PYTHON, "-c", _NBDSH, job.client.uri, *place)
    except JobFailed as failed:
        if str(failed).startswith("exit code 77"):
            raise WrongData("nbdsh: other data came back") from None
        raise
    job.verified += size


def fio(job: Job) -> None:
    """nbdkit shows certificates for it, and is its child: it goes when fio does."""
    hop = (
        f"nbdkit -U - nbd hostname=127.0.0.1 port={_port(job.client)} export='{job.lease.export}' "
        f"tls=require tls-certificates='{job.client.certificates}' --run '$FIO --uri=\"$uri\"'"
    )
    seed = job.random.randrange(1 << 30)
    load = "--name=crc --ioengine=nbd --rw=randrw --bs=4k --verify=crc32c --verify_fatal=1 --thread"
    load += f" --offset={job.offset} --size={job.size // 2} --iodepth=16 --randseed={seed}"
    load += f" --verify_backlog=256 --fsync={job.random.choice((0, 100))} --aux-path=."
    printed = job.program("bash", "-c", f"FIO='fio {load}'; export FIO; {hop}")
    if "verify:" in printed:
        raise WrongData(f"fio: {printed}")
    job.verified += job.size // 2


def _port(client: Client) -> str:
    return client.address.rpartition(":")[2].partition("/")[0]


KINDS: dict[str, Callable[[Job], None]] = {
    "nbdinfo": nbdinfo,
    "nbd-client": nbd_client,
    "nbdcopy": nbdcopy,
    "qemu-img": qemu_img,
    "qemu-io": qemu_io,
    "nbdsh": nbdsh,
    "fio": fio,
}
WHOLE = frozenset({"nbdcopy"})  # that cannot do with a part of a disk
