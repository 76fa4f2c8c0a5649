"""Newer servers behind the gateway, and newer and older programs in front of them.

nbdkit 1.42 and nbd-server 3.26 of Debian trixie have structured replies and no extended headers.
The programs do the jobs of the matrix in README.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.clients import PROGRAMS, SIZE, Cell, Program
from tests.peers.bench import MIB, Front
from tests.peers.newer import GIB, Disks, both, disks, noise, same
from tests.support.peers import Client, NbdServer, said
from tests.support.trixie import Trixie

SERVERS = ("nbdkit", "nbd-server")


@pytest.fixture(scope="module")
def stage(newer: Trixie, pki: Path) -> Iterator[Disks]:
    with disks(newer, pki) as stage:
        yield stage


@pytest.fixture(scope="module", params=SERVERS)
def front(stage: Disks, request: pytest.FixtureRequest) -> Front:
    """A writable disk behind a gateway that may do all its upgrades."""
    image = stage.empty(size=SIZE)
    if request.param == "nbdkit":
        server = stage.start(stage.newer.nbdkit("file", image))
    else:
        server = stage.start(stage.newer.nbd_server(image))
    return stage.bench.gateway(server, "--export", name(server))


def name(server: object) -> str:
    return "disk" if isinstance(server, NbdServer) else ""


def _id(program: Program) -> str:
    return f"{'newer-' if program.newer else ''}{program.program}"


@pytest.mark.parametrize("program", PROGRAMS, ids=_id)
def test_programs_do_their_jobs(stage: Disks, front: Front, program: Program) -> None:
    work = stage.newer.directory()
    picture = work / "picture"
    seed = 10 + PROGRAMS.index(program)
    picture.write_bytes(noise(seed, SIZE // 2) + bytes(SIZE // 4) + noise(-seed, SIZE // 4))
    newer = stage.newer if program.newer else None
    program.job(Cell(stage.bench, front, work, picture, newer))


def test_newer_nbd_client(stage: Disks, front: Front) -> None:
    client = stage.newer.client(front.client(name(front.server)))
    listed = stage.newer.check(*client.nbd_client("-l")).splitlines()
    assert listed[-1] == name(front.server)
    opening = ("-N", name(front.server), "-nonetlink", "/dev/null")
    opened = said(stage.newer.run(*client.nbd_client(), *opening))
    assert f"size = {SIZE // MIB}MB" in opened


FACTS = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.set_full_info(True)
h.set_request_structured_replies(args["structured"])
h.add_meta_context("base:allocation")
h.connect_uri(args["uri"])
chunks = []
h.pread_structured(1 << 20, 0, lambda data, at, kind, error: chunks.append([at, len(data), kind]))
report(size=h.get_size(), blocks=[h.get_block_size(n) for n in range(3)], chunks=chunks,
       structured=h.get_structured_replies_negotiated(), read_only=h.is_read_only(),
       context=h.can_meta_context("base:allocation"), rotational=h.is_rotational(),
       **{"can_" + word: getattr(h, "can_" + word)() for word in (
           "cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")})
h.shutdown()
"""


def test_nbdinfo_lists_the_same(stage: Disks, front: Front) -> None:
    told = []
    for client in both(front, name(front.server)):
        uri = stage.newer.client(client).uri
        told.append(json.loads(stage.newer.check("nbdinfo", "--json", "--list", uri)))
        del told[-1]["TLS"]
        for export in told[-1]["exports"]:
            del export["uri"]
            # nbd-server knows no meta contexts; the gateway knows that there are none.
            export.setdefault("contexts", [])
    assert told[0] == told[1]


def test_what_they_have_is_passed_on_by_default(stage: Disks, front: Front) -> None:
    """With all upgrades allowed, for nothing here is in want of one."""
    clients = both(front, name(front.server))
    direct, through = (stage.newer.nbdsh(FACTS, one, structured=True) for one in clients)
    assert through == direct
    assert through["structured"]
    assert through["can_df"]


SPARSE = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.add_meta_context("base:allocation")
h.connect_uri(args["uri"])
G, K64 = 1 << 30, 1 << 16
h.pwrite(b"x" * 100_000, 4 * G - 50_000)
h.pwrite(b"y" * K64, 8 * G, nbd.CMD_FLAG_FUA)
h.zero(1 << 20, 5 * G)
extents, chunks = [], []
for length, offset in ((4 * G - K64, 0), (4 * G - K64, 4 * G - 50_000), (2 * G, 7 * G)):
    h.block_status(length, offset, lambda name, at, entries, error: extents.append([at, entries]))
for length, offset in ((32 << 20, 4 * G - (1 << 20)), (1 << 20, 8 * G - 4096)):
    h.pread_structured(length, offset,
                       lambda data, at, kind, error: chunks.append([at, len(data), kind]))
report(extents=extents, chunks=chunks, data=h.pread(100_000, 4 * G - 50_000) == b"x" * 100_000,
       zeroes=h.pread(1 << 20, 5 * G) == bytes(1 << 20))
h.shutdown()
"""


def test_structured_replies_of_a_sparse_disk(stage: Disks) -> None:
    """Beyond 4 GiB; the extents and the chunks are nbdkit's own."""
    front = stage.bench.gateway(stage.start(stage.newer.nbdkit("memory", "9G")))
    found = same(stage.newer, front, SPARSE)
    assert found["data"]
    assert found["zeroes"]
    assert len(found["extents"]) == 3


# ---------------------------------------------------------------- nbdkit in between


def test_nbdkit_in_front_of_the_gateway(stage: Disks) -> None:
    image = stage.image()
    front = stage.front(image)
    address = ("hostname=127.0.0.1", f"port={front.gateway.port}")
    keys = stage.newer.client(front.client()).certificates
    tls = ("tls=require", f"tls-certificates={keys}")
    hop = stage.start(stage.newer.nbdkit("nbd", *address, *tls))
    script = """
    h = connect()
    h.pwrite(b"hop" * 1000, args["at"])
    h.zero(1 << 20, 13 << 30)
    h.flush()
    report(data=h.pread(3000, args["at"]) == b"hop" * 1000, size=h.get_size())
    h.shutdown()
    """
    found = stage.newer.nbdsh(script, Client(hop.uri()), at=4 * GIB - 1500)
    assert found == {"data": True, "size": 16 * GIB}
    path = stage.newer.directory() / "copy"
    stage.newer.check("nbdcopy", stage.newer.client(Client(hop.uri())).uri, path)
    stage.same(image, path)


def test_nbdkit_behind_the_gateway_in_front_of_qemu_nbd(stage: Disks) -> None:
    """A forwarder is an upstream like any other."""
    image = stage.image()
    server = stage.serve(image)
    uri = stage.newer.client(Client(server.uri())).uri
    front = stage.bench.gateway(stage.start(stage.newer.nbdkit("nbd", f"uri={uri}")))
    path = stage.newer.directory() / "copy"
    stage.newer.check("nbdcopy", stage.newer.client(front.client()).uri, path)
    stage.same(image, path)
    facts: Any = [stage.newer.nbdsh(FACTS, one, structured=True) for one in both(front)]
    assert facts[0] == facts[1]


PLUGIN = """
import errno
import nbdkit

API_VERSION = 2
disk = bytearray(1 << 20)
CODES = [errno.EPERM, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.EINVAL]

def thread_model(): return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS
def open(readonly): return nbdkit.export_name()
def get_size(h): return len(disk)
def export_description(h): return "the export of " + (h or "nobody")
def can_write(h): return True
def can_flush(h): return True
def can_fua(h): return nbdkit.FUA_NATIVE
def can_extents(h): return True
def flush(h, flags): pass
def pread(h, buf, offset, flags): buf[:] = disk[offset:offset + len(buf)]

def pwrite(h, buf, offset, flags):
    if offset < 512 * len(CODES):
        nbdkit.set_error(CODES[offset // 512])
        raise RuntimeError("no writing here")
    if flags & nbdkit.FLAG_FUA:
        disk[-1] += 1
    disk[offset:offset + len(buf)] = buf

def extents(h, count, offset, flags):
    return [(at, 65536, nbdkit.EXTENT_HOLE * (at % 131072 // 65536))
            for at in range(offset - offset % 65536, offset + count, 65536)]
"""


def test_a_disk_made_of_python(stage: Disks) -> None:
    """Its errors, extents, description and FUA come through as they are."""
    plugin = stage.newer.directory() / "disk.py"
    plugin.write_text(PLUGIN)
    server = stage.start(stage.newer.nbdkit("python", plugin))
    front = stage.bench.gateway(server, "--any-export")
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.set_full_info(True)
    h.add_meta_context("base:allocation")
    h.connect_uri(args["uri"])
    extents = []
    h.block_status(1 << 20, 0, lambda name, at, entries, error: extents.extend(entries))
    before = h.pread(1, (1 << 20) - 1)[0]
    h.pwrite(b"f" * 512, 8192, nbd.CMD_FLAG_FUA)
    h.pwrite(b"n" * 512, 8704)
    report(extents=extents, fua=h.pread(1, (1 << 20) - 1)[0] - before,
           data=h.pread(1024, 8192).decode(), description=h.get_export_description(),
           errors=[failed(h.pwrite, b"x" * 512, 512 * n) for n in range(5)])
    h.shutdown()
    """
    direct, through = (stage.newer.nbdsh(script, one) for one in both(front, "Größe"))
    assert through == direct
    assert through["errors"] == ["EPERM", "EIO", "ENOMEM", "ENOSPC", "EINVAL"]
    assert through["description"] == "the export of Größe"
    assert through["fua"] == 1
    assert len(through["extents"]) == 32  # lengths and states in turn
