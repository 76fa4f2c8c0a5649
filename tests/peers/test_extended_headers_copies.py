"""Extended headers: whole disks of 16 GiB copied, mapped and compared through the gateway.

nbdcopy and the qemu programs of Debian trixie, with qemu-nbd of the same behind the gateway. The
disks are sparse, with data on both sides of 4 GiB.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Front, same
from tests.peers.newer import (
    GIB,
    KIB,
    PIECES,
    SIZE,
    Disks,
    Model,
    Request,
    both,
    disks,
    noise,
    requests,
)
from tests.support.peers import Client
from tests.support.trixie import Trixie

READ, WRITE, ZERO, STATUS = 0, 1, 6, 7
FUA, FAST, PAYLOAD = 1 << 0, 1 << 4, 1 << 5
KINDS = ("raw", "qcow2")
Copy = Callable[[Trixie, Client, Path], None]


@pytest.fixture(scope="module")
def stage(newer: Trixie, pki: Path) -> Iterator[Disks]:
    with disks(newer, pki) as stage:
        yield stage


def nbdcopy_down(newer: Trixie, client: Client, path: Path) -> None:
    newer.check("nbdcopy", newer.client(client).uri, path)


def nbdcopy_up(newer: Trixie, client: Client, path: Path) -> None:
    newer.check("nbdcopy", "--flush", path, newer.client(client).uri)


def qemu_img_down(newer: Trixie, client: Client, path: Path) -> None:
    newer.check("qemu-img", "convert", *newer.client(client).qemu(), "-O", "raw", path)


def qemu_img_up(newer: Trixie, client: Client, path: Path) -> None:
    seen = newer.client(client)
    to = ["--target-image-opts", seen.qemu_image()]
    newer.check("qemu-img", "convert", *seen.qemu_object(), "-n", "-f", "raw", path, *to)


DOWN: dict[str, Copy] = {"nbdcopy": nbdcopy_down, "qemu-img": qemu_img_down}
UP: dict[str, Copy] = {"nbdcopy": nbdcopy_up, "qemu-img": qemu_img_up}


def only_extended(front: Front) -> list[int]:
    """The commands that the upstream got."""
    got = requests(front.server)
    assert all(one.extended for one in got)
    return [one.command for one in got]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", DOWN)
def test_copies_from_the_gateway(stage: Disks, program: str, kind: str) -> None:
    front = stage.front(stage.image(kind), "-r", kind=kind)
    path = stage.newer.directory() / "copy.raw"
    DOWN[program](stage.newer, front.client(), path)
    Model.at_first().check(path)
    assert {READ, STATUS} <= set(only_extended(front))
    # The holes were seen: nowhere near 16 GiB has been read.
    assert sum(one.length for one in requests(front.server) if one.command == READ) < 64 * MIB


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", UP)
def test_copies_to_the_gateway(stage: Disks, program: str, kind: str) -> None:
    """What has been on the disk before is gone afterwards, also where the copy has holes."""
    source, model = stage.empty(), Model()
    with source.open("r+b") as file:
        for seed, offset in enumerate((3 * MIB, 4 * GIB - 64 * KIB, 10 * GIB, SIZE - 512)):
            data = noise(100 + seed, min(200 * KIB + seed, SIZE - offset))
            file.seek(offset)
            file.write(data)
            model.write(offset, data)
    image = stage.image(kind)
    front = stage.front(image, kind=kind)
    UP[program](stage.newer, front.client(), source)
    assert WRITE in only_extended(front)
    front.server.kill()
    stage.check(model, image, kind)


def test_copies_from_one_gateway_to_another(stage: Disks) -> None:
    image = stage.empty("qcow2")
    here, there = stage.front(stage.image(), "-r"), stage.front(image, kind="qcow2")
    seen = [stage.newer.client(front.client()).uri for front in (here, there)]
    stage.newer.check("nbdcopy", "--destination-is-zero", "--flush", *seen)
    there.server.kill()
    stage.check(Model.at_first(), image, "qcow2")


def test_copies_over_many_connections(stage: Disks) -> None:
    image = stage.image()
    front = stage.front(image, "-r", "-e", "4")
    path = stage.newer.directory() / "copy.raw"
    uri = stage.newer.client(front.client()).uri
    stage.newer.check("nbdcopy", "--connections=4", "--threads=4", uri, path)
    stage.same(image, path)
    assert front.gateway.log().count(" open: ") == 4


@pytest.mark.parametrize("flag", ["--synchronous", "--no-extents"])
def test_copies_of_all_that_there_is(stage: Disks, flag: str) -> None:
    image = stage.empty(size=64 * MIB)  # it takes a request for every 256 KiB
    with image.open("r+b") as file:
        file.write(noise(7, 5 * MIB))
    front = stage.front(image, "-r")
    path = stage.newer.directory() / "copy.raw"
    stage.newer.check("nbdcopy", flag, stage.newer.client(front.client()).uri, path)
    assert same(image, path)


# ---------------------------------------------------------------- qemu


def qemu_io(newer: Trixie, client: Client, *words: str) -> str:
    seen = newer.client(client)
    commands = [word for one in words for word in ("-c", one)]
    return newer.check("qemu-io", *seen.qemu_object(), *commands, *seen.qemu()[-2:])


@pytest.fixture(scope="module")
def mapped(stage: Disks) -> Front:
    """A read-only disk with a dirty bitmap."""
    image = stage.image("qcow2")
    stage.newer.check("qemu-img", "bitmap", "--add", image, "b0")
    writes = ["-c", f"write -P 9 {4 * GIB - MIB} 2M", "-c", "write -z 9G 64k"]
    stage.newer.check("qemu-io", "-f", "qcow2", *writes, image)
    return stage.front(image, "-r", "-A", "-B", "b0", kind="qcow2")


@pytest.mark.parametrize("context", [None, "qemu:allocation-depth", "qemu:dirty-bitmap:b0"])
def test_qemu_img_map(stage: Disks, mapped: Front, context: str | None) -> None:
    options = {} if context is None else {"x_dirty_bitmap": context}
    maps = []
    for client in both(mapped):
        image = stage.newer.client(client).qemu(**options)
        maps.append(json.loads(stage.newer.check("qemu-img", "map", "--output=json", *image)))
    assert maps[0] == maps[1]
    assert sum(one["length"] for one in maps[1]) == SIZE
    if context is not None and "bitmap" in context:
        dirty = [(one["start"], one["length"]) for one in maps[1] if not one["data"]]
        assert dirty == [(4 * GIB - MIB, 2 * MIB), (9 * GIB, 64 * KIB)]


def test_qemu_img_info_and_measure(stage: Disks, mapped: Front) -> None:
    newer = stage.newer
    seen = [newer.client(client) for client in both(mapped)]
    info = [
        json.loads(newer.check("qemu-img", "info", "--output=json", *one.qemu())) for one in seen
    ]
    assert info[1]["virtual-size"] == info[0]["virtual-size"] == SIZE
    measured = [newer.check("qemu-img", "measure", "-O", "qcow2", *one.qemu()) for one in seen]
    assert measured[0] == measured[1]


def test_qemu_img_compare(stage: Disks) -> None:
    newer, image = stage.newer, stage.image()
    front = stage.front(image, "-r")
    seen = newer.client(front.client())

    def compare(other: Path) -> int:
        local = f"driver=raw,file.driver=file,file.filename={_inside(newer, other)}"
        return newer.run("qemu-img", "compare", *seen.qemu(), local).returncode

    assert compare(image) == 0
    other = stage.image()
    with other.open("r+b") as file:
        file.seek(PIECES[3][0] + 777)
        file.write(b"?")
    assert compare(other) == 1


def _inside(newer: Trixie, path: Path) -> Path:
    return newer.inside / path.relative_to(newer.outside)


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_io(stage: Disks, kind: str) -> None:
    image, model = stage.image(kind), Model.at_first()
    front = stage.front(image, kind=kind)
    words = [
        f"write -P 0x5a {4 * GIB - 70_000} 140k",
        "write -f -P 0x5b 8G 512",
        f"read -P 0x5a {4 * GIB - 70_000} 140k",
        "write -z -n -u 9G 5G",  # -n is NBD_CMD_FLAG_FAST_ZERO
        "write -z 0 4k",
        f"discard {8 * GIB + 64 * KIB} 64k",
        "aio_write -P 0x5c 15G 1M",
        "aio_write -P 0x5d 11G 512k",
        "aio_flush",
        "read -P 0x5c 15G 1M",
        "flush",
    ]
    printed = qemu_io(stage.newer, front.client(), *words)
    assert "failed" not in printed.lower(), printed
    assert "rror" not in printed, printed
    only_extended(front)
    arrived = requests(front.server)
    assert Request(True, FAST | FUA, ZERO, 9 * GIB, 5 * GIB) in arrived
    # qemu 10 leaves the flag off its writes; upstream it has to be there.
    assert {one.flags & PAYLOAD for one in arrived if one.command == WRITE} == {PAYLOAD}
    front.server.kill()
    model.zero(9 * GIB, 5 * GIB)
    for letter, offset, length in (
        (b"\x5a", 4 * GIB - 70_000, 140 * KIB),
        (b"\x5b", 8 * GIB, 512),
        (b"\x5c", 15 * GIB, MIB),
        (b"\x5d", 11 * GIB, 512 * KIB),
    ):
        model.write(offset, letter * length)
    for offset, length in ((0, 4 * KIB), (8 * GIB + 64 * KIB, 64 * KIB)):
        model.zero(offset, length)
    stage.check(model, image, kind)
