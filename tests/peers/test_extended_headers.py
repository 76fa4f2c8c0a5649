"""Extended headers with real programs on both sides: libnbd and qemu-nbd of Debian trixie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.peers.bench import Bench, Front
from tests.support.peers import Client, Server
from tests.support.trixie import Trixie, trixie

GIB = 1 << 30
SIZE = 16 * GIB
BITMAP = "qemu:dirty-bitmap:b0"


@pytest.fixture
def newer() -> Iterator[Trixie]:
    with trixie() as found:
        yield found


def disk(newer: Trixie, stack: ExitStack, *, written: bool = True) -> Server:
    """A sparse qcow2 of 16 GiB with a bitmap, and with data on both sides of 4 GiB."""
    image = newer.inside / "disk.qcow2"
    (newer.outside / "disk.qcow2").unlink(missing_ok=True)
    newer.check("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    newer.check("qemu-img", "bitmap", "--add", image, "b0")
    if written:
        writes = [
            ("write -P 65 0 1M"),
            (f"write -P 66 {4 * GIB - 65536} 128k"),
            ("write -P 67 13G 1M"),
        ]
        newer.check("qemu-io", "-f", "qcow2", *(w for one in writes for w in ("-c", one)), image)
    flags = ["-f", "qcow2", "--discard=unmap", "-A", "-B", "b0"]
    return stack.enter_context(newer.qemu_nbd(*flags, image))


def both(front: Front) -> list[Client]:
    return [front.direct(), front.client()]


def same(newer: Trixie, front: Front, script: str) -> dict[str, Any]:
    """What a program reports directly, and through the gateway: the same."""
    direct, through = (newer.nbdsh(script, one) for one in both(front))
    assert through == direct
    return through


def test_extended_headers_are_negotiated_when_the_server_has_them(
    bench: Bench, newer: Trixie
) -> None:
    script = """
    h = connect()
    reported["extended"] = h.get_extended_headers_negotiated()
    """
    with ExitStack() as stack:
        assert same(newer, bench.gateway(disk(newer, stack)), script) == {"extended": True}
        poor = stack.enter_context(newer.nbdkit("memory", "1M"))
        assert same(newer, bench.gateway(poor), script) == {"extended": False}
    older = bench.gateway(bench.qemu_nbd("-f", "raw", bench.image(1 << 20)))
    assert newer.nbdsh(script, older.client()) == {"extended": False}


def test_maps_and_descriptions_are_the_same(bench: Bench, newer: Trixie) -> None:
    with ExitStack() as stack:
        front = bench.gateway(disk(newer, stack))
        for context in ("base:allocation", "qemu:allocation-depth", BITMAP):
            direct, through = (
                newer.check("nbdinfo", "--json", f"--map={context}", newer.client(one).uri)
                for one in both(front)
            )
            assert json.loads(through) == json.loads(direct)
            assert sum(one["length"] for one in json.loads(through)) == SIZE
        infos = []
        for one in both(front):
            info = json.loads(newer.check("nbdinfo", "--json", "--list", newer.client(one).uri))
            (export,) = info["exports"]
            del export["uri"]
            infos.append((info["structured"], info.get("extended"), export))
        assert infos[0] == infos[1]
        assert infos[0][1] is True


def test_block_status_of_64_bits_and_its_filter(bench: Bench, newer: Trixie) -> None:
    script = f"""
    h = connect("base:allocation", "qemu:allocation-depth", "{BITMAP}")
    seen = []
    def extents(context, offset, entries, error):
        seen.append([context, offset, entries])
    h.block_status_64({SIZE}, 0, extents)
    h.block_status_64({9 * GIB}, 4096, extents, nbd.CMD_FLAG_REQ_ONE)
    reported["can"] = h.can_block_status_payload()
    h.block_status_filter({SIZE}, 0, ["{BITMAP}"], extents)
    h.block_status_filter({SIZE - GIB}, {GIB}, ["base:allocation", "{BITMAP}"], extents)
    reported["seen"] = sorted(seen)
    reported["past"] = failed(h.block_status_64, {SIZE}, 512, extents)
    """
    with ExitStack() as stack:
        found = same(newer, bench.gateway(disk(newer, stack)), script)
    assert found["can"]
    assert len(found["seen"]) == 9
    assert any(length > 1 << 32 for _, _, entries in found["seen"] for length, _ in entries)


COMMANDS = f"""
h = connect(strict_mode=nbd.STRICT_AUTO_FLAG)
G = {GIB}
h.zero(8 * G, 2 * G)                        # one request, more than 32 bits
K64 = 1 << 16
reported["zeroed"] = [h.pread(K64, at) == bytes(K64) for at in (2 * G, 4 * G - 32768, 10 * G - K64)]
reported["spared"] = [h.pread(4, at).hex() for at in (0, 13 * G)]
reported["no hole"] = failed(h.zero, 1 << 20, 12 * G, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
reported["fast"] = failed(h.zero, 5 * G, 5 * G, nbd.CMD_FLAG_FAST_ZERO)
reported["trim"] = failed(h.trim, 5 * G, 5 * G, nbd.CMD_FLAG_FUA)
reported["cache"] = failed(h.cache, 1 << 20, 13 * G)
reported["write"] = failed(h.pwrite, b"w" * 100000, 4 * G - 50000, nbd.CMD_FLAG_FUA)
reported["read"] = h.pread(100000, 4 * G - 50000) == b"w" * 100000
seen = []
def part(data, offset, kind, error):
    seen.append([offset, len(data), kind])
h.pread_structured(1 << 20, 13 * G + (1 << 19), part)
h.pread_structured(1 << 18, 13 * G + (7 << 17), part, nbd.CMD_FLAG_DF)
reported["chunks"] = seen
reported["past"] = [failed(h.pwrite, b"w" * 512, 16 * G), failed(h.pread, 512, 16 * G),
                    failed(h.zero, 16 * G, 512), failed(h.trim, 17 * G, 0)]
blocks = [bytearray([n]) * 4096 for n in range(64)]
cookies = [(n, h.aio_pwrite(nbd.Buffer.from_bytearray(block), 14 * G + n * 4096))
           for n, block in enumerate(blocks)]
while h.aio_in_flight():
    h.poll(-1)
reported["parallel"] = all(h.aio_command_completed(c) for _, c in cookies) and all(
    h.pread(4096, 14 * G + n * 4096) == block for n, block in enumerate(blocks))
h.flush()
h.shutdown()
"""


def test_every_command_does_the_same(bench: Bench, newer: Trixie) -> None:
    with ExitStack() as first, ExitStack() as second:
        direct = newer.nbdsh(COMMANDS, Client(disk(newer, first).uri()))
        first.close()
        (newer.outside / "disk.qcow2").rename(newer.outside / "direct.qcow2")
        through = newer.nbdsh(COMMANDS, bench.gateway(disk(newer, second)).client())
    # What is beyond the end, the gateway refuses itself: ENOSPC for writes, as the rules have it.
    assert through.pop("past") == ["ENOSPC", "EINVAL", "ENOSPC", "EINVAL"]
    assert direct.pop("past")
    assert through == direct
    assert through["zeroed"] == [True] * 3
    assert through["spared"] == ["41414141", "43434343"]
    assert through["read"]
    assert through["parallel"]
    images = [newer.inside / name for name in ("direct.qcow2", "disk.qcow2")]
    newer.check("qemu-img", "compare", *images)


def test_nbdcopy_both_ways(bench: Bench, newer: Trixie, tmp_path: Path) -> None:
    with ExitStack() as stack:
        full = bench.gateway(disk(newer, stack))
        raw = newer.inside / "copy.raw"
        newer.check("nbdcopy", newer.client(full.client()).uri, raw)
        newer.check("qemu-img", "create", "-q", "-f", "qcow2", newer.inside / "b.qcow2", str(SIZE))
        target = stack.enter_context(newer.qemu_nbd("-f", "qcow2", newer.inside / "b.qcow2"))
        empty = bench.gateway(target)
        newer.check("nbdcopy", "--flush", raw, newer.client(empty.client()).uri)
        assert newer.check("nbdinfo", "--size", newer.client(empty.client()).uri).strip() == str(
            SIZE
        )
    images = [newer.inside / name for name in ("disk.qcow2", "b.qcow2")]
    newer.check("qemu-img", "compare", *images)
    newer.check("qemu-img", "compare", "-f", "qcow2", "-F", "raw", images[0], raw)


def test_newer_qemu_reads_bitmaps_through_the_gateway(bench: Bench, newer: Trixie) -> None:
    with ExitStack() as stack:
        front = bench.gateway(disk(newer, stack))
        maps = []
        for one in both(front):
            client = newer.client(one)
            image = client.qemu(x_dirty_bitmap=BITMAP)
            maps.append(json.loads(newer.check("qemu-img", "map", "--output=json", *image)))
        assert maps[0] == maps[1]
        assert {one["data"] for one in maps[0]} == {True, False}


def test_newer_nbdkit_behind(bench: Bench, newer: Trixie) -> None:
    """Structured replies, a disk beyond 4 GiB, and no extended headers."""
    script = f"""
    h = connect("base:allocation")
    h.pwrite(b"x" * 100000, 4 * {GIB} - 50000)
    h.zero(1 << 20, 5 * {GIB})
    reported["read"] = h.pread(100000, 4 * {GIB} - 50000) == b"x" * 100000
    seen = []
    offset = 0
    while offset < 8 * {GIB}:
        got = []
        h.block_status_64(min(8 * {GIB} - offset, (1 << 32) - (1 << 16)), offset,
                          lambda context, at, entries, error: got.extend(entries))
        offset += sum(length for length, _ in got)
        if seen and seen[-1][1] == got[0][1]:
            seen[-1][0] += got[0][0]; got = got[1:]
        seen += [list(one) for one in got]
    reported["map"] = seen
    """
    with ExitStack() as stack:
        front = bench.gateway(stack.enter_context(newer.nbdkit("memory", "8G")))
        assert same(newer, front, script)["read"]
