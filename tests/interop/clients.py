"""The clients of the matrix, each with a real job: its data is compared with what the server
holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.peers.bench import MIB, Bench, Front, same
from tests.support.peers import Client, NbdServer, check, nbdsh, run, said
from tests.support.trixie import Trixie

SIZE = 8 * MIB


@dataclass(frozen=True)
class Cell:
    """One client in front of one upstream."""

    bench: Bench
    front: Front
    work: Path  # an empty directory, which the newer programs see as well
    picture: Path  # what is to be written: SIZE bytes, other ones than before
    newer: Trixie | None  # for programs of Debian trixie

    @property
    def name(self) -> str:
        """The upstream's export."""
        return "disk" if isinstance(self.front.server, NbdServer) else ""

    @property
    def client(self) -> Client:
        through = self.front.client(self.name)
        return through if self.newer is None else self.newer.client(through)

    def check(self, *argv: str | Path) -> str:
        """Run the client, which must succeed."""
        return check(*argv) if self.newer is None else self.newer.check(*argv)

    def seen(self, path: Path) -> Path:
        """A path as the client sees it."""
        if self.newer is None:
            return path
        return self.newer.inside / path.relative_to(self.newer.outside)

    def on_disk(self) -> Path:
        """What the upstream really holds, read without the gateway."""
        path = self.work / "on-disk"
        # In pieces that every upstream takes.
        check("nbdcopy", "--request-size=65536", self.front.direct(self.name).uri, path)
        return path


def nbdinfo(cell: Cell) -> None:
    """What it tells is what it tells directly, and its maps cover the whole disk."""
    told = json.loads(cell.check("nbdinfo", "--json", cell.client.uri))
    (export,) = told["exports"]
    (direct,) = json.loads(check("nbdinfo", "--json", cell.front.direct(cell.name).uri))["exports"]
    for fact in ("export-name", "export-size", "is_read_only", "is_rotational", "can_trim"):
        assert export[fact] == direct[fact], f"{fact}: {export[fact]} instead of {direct[fact]}"
    for context in export.get("contexts", ()):
        extents = json.loads(cell.check("nbdinfo", "--json", f"--map={context}", cell.client.uri))
        covered = sum(extent["length"] for extent in extents)
        assert covered == SIZE, f"--map={context} covers {covered} bytes"
    assert cell.check("nbdinfo", "--list", cell.client.uri)


def nbdcopy(cell: Cell) -> None:
    """Up and down again: reads, writes, zeroes or trims, and a flush."""
    down = cell.work / "down"
    can_flush = run("nbdinfo", "--can", "flush", cell.front.client(cell.name).uri).returncode == 0
    flush = ["--flush"] if can_flush else []
    cell.check("nbdcopy", *flush, cell.seen(cell.picture), cell.client.uri)
    assert same(cell.picture, cell.on_disk()), "the server holds other data"
    cell.check("nbdcopy", cell.client.uri, cell.seen(down))
    assert same(cell.picture, down), "other data came back"


_NBDSH = """
import hashlib
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.add_meta_context("base:allocation")
h.connect_uri(args["uri"])
size, kib = h.get_size(), 1024
model = bytearray(h.pread(size, 0))
flags = [0] + ([nbd.CMD_FLAG_FUA] if h.can_fua() else [])
for i, flag in enumerate(2 * flags):
    data = bytes((args["seed"] + i + j) % 251 for j in range(100 * kib))
    at = (1 + 2 * i) * 512 * kib
    h.pwrite(data, at, flag)
    model[at:at + len(data)] = data
    if h.can_zero():
        h.zero(40 * kib, at + 8 * kib, flag)
        model[at + 8 * kib:at + 48 * kib] = bytes(40 * kib)
    if h.can_cache():
        h.cache(kib, at)
    if h.can_trim():
        h.trim(16 * kib, at + 64 * kib, flag)
        model[at + 64 * kib:at + 80 * kib] = h.pread(16 * kib, at + 64 * kib)
    if h.can_flush():
        h.flush()
if h.can_meta_context("base:allocation"):
    covered = []
    h.block_status(size, 0, lambda name, at, extents, error: covered.extend(extents))
    assert covered
past = connect(strict_mode=64 if hasattr(h, "set_request_extended_headers") else 0)
assert failed(past.pread, 512, size) == "EINVAL"
past.shutdown()
assert h.pread(size, 0) == model, "other data came back"
h.shutdown()
report(digest=hashlib.sha256(model).hexdigest())
"""


def nbdsh_script(cell: Cell) -> None:
    """Every command that libnbd has, with FUA and without; an error, and life after it."""
    seed = cell.picture.read_bytes()[0]
    through = cell.front.client(cell.name)
    run_it = nbdsh if cell.newer is None else cell.newer.nbdsh
    wanted = run_it(_NBDSH, through, seed=seed)["digest"]
    held = hashlib.sha256(cell.on_disk().read_bytes()).hexdigest()
    assert held == wanted, "the server holds other data"


def qemu_img(cell: Cell) -> None:
    """Convert up and down, and compare."""
    down, client = cell.work / "down", cell.client
    convert = ["qemu-img", "convert", "-n", *client.qemu_object()]
    source = cell.seen(cell.picture)
    cell.check(*convert, "-f", "raw", "--target-image-opts", source, client.qemu_image())
    assert same(cell.picture, cell.on_disk()), "the server holds other data"
    cell.check("qemu-img", "convert", *client.qemu(), "-O", "raw", cell.seen(down))
    assert same(cell.picture, down), "other data came back"
    image = f"driver=raw,file.driver=file,file.filename={source}"
    assert "identical" in cell.check("qemu-img", "compare", *client.qemu(), image)


def qemu_io(cell: Cell) -> None:
    """Writes with and without FUA, zeroes, trims, flushes, and reads them again."""
    seed = cell.picture.read_bytes()[0] % 100 + 1
    words = [f"write -P {seed} 64k 100k", f"write -f -P {seed + 1} 512k 8k", "write -z 1M 512k"]
    words += ["write -z -u 2M 64k", "discard 3M 256k", "flush", f"read -P {seed} 64k 100k"]
    words += [f"read -P {seed + 1} 512k 8k", "read -P 0 1M 512k", "read -P 0 2M 64k"]
    client = cell.client
    script = [argument for word in words for argument in ("-c", word)]
    printed = cell.check("qemu-io", *client.qemu_object(), *script, *client.qemu()[-2:])
    assert "failed" not in printed.lower(), printed
    held = cell.on_disk().read_bytes()
    assert held[64 << 10 : 164 << 10] == bytes([seed]) * (100 << 10), "the server holds other data"
    assert held[MIB : MIB + MIB // 2] == bytes(MIB // 2), "the server does not hold the zeroes"


def nbd_client(cell: Cell) -> None:
    """Lists, and opens the export; there its way ends where no kernel has a device for it."""
    listed = check(*cell.client.nbd_client("-l")).splitlines()[-1]
    assert listed == cell.name, f"it lists {listed!r}"
    opened = said(run(*cell.client.nbd_client("-N", cell.name), "-nonetlink", "/dev/null"))
    assert f"size = {SIZE // MIB}MB" in opened, opened


def fio(cell: Cell) -> None:
    """Reads and writes at random with 16 under way, verified; nbdkit shows certificates for it."""
    port = cell.front.gateway.port
    hop = cell.bench.nbdkit(
        *("nbd", "hostname=127.0.0.1", f"port={port}", f"export={cell.name}"),
        *("tls=require", f"tls-certificates={cell.front.pki}"),
    )
    try:
        seed = cell.picture.read_bytes()[0]
        job = ["--name=verify", "--ioengine=nbd", f"--uri={hop.uri()}", f"--randseed={seed}"]
        load = ["--rw=randrw", "--bs=4k", "--iodepth=16", f"--size={MIB}"]
        verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]
        done = run("fio", *job, *load, *verify, f"--aux-path={cell.work}", cwd=cell.work)
        assert done.returncode == 0, said(done)
        assert "verify:" not in done.stderr, said(done)
    finally:
        hop.kill()


# ---------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Program:
    """A client, and its job. In the table the version stands behind its name."""

    program: str
    job: Callable[[Cell], None]
    kind: str = ""
    version: str = "--version"
    newer: bool = False  # of Debian trixie
    note: str = ""  # how far it goes, where that is not all the way


_BOTH: list[tuple[str, Callable[[Cell], None]]] = [
    ("nbdinfo", nbdinfo),
    ("nbdcopy", nbdcopy),
    ("nbdsh", nbdsh_script),
    ("qemu-img", qemu_img),
    ("qemu-io", qemu_io),
]

PROGRAMS = [
    *(Program(name, job) for name, job in _BOTH),
    Program("nbd-client", nbd_client, version="-V", note="list and open"),
    Program("fio", fio),
    *(Program(name, job, newer=True) for name, job in _BOTH),
]
