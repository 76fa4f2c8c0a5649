"""qcow2 images behind qemu-nbd, and what stands between them and the gateway."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.peers.bench import MIB, SIZE, Bench, Front
from tests.support.peers import QemuNbd, check, nbdsh, run


def write(image: Path, *words: str) -> None:
    check("qemu-io", "-f", "qcow2", *(part for word in words for part in ("-c", word)), image)


def quit_qemu(front: Front) -> None:
    """So that the image is closed in order, and unlocked."""
    assert isinstance(front.server, QemuNbd)
    assert front.server._process is not None
    front.gateway.stop()
    front.server._process.terminate()
    front.server._process.wait()


def raw(bench: Bench, image: Path) -> bytes:
    """What an image holds."""
    path = bench.directory() / "raw"
    check("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, path)
    return path.read_bytes()


@pytest.mark.parametrize("program", ["nbdcopy", "qemu-img"])
def test_a_copy_into_an_image_and_back(
    bench: Bench, pictures: tuple[Path, Path], tmp_path: Path, program: str
) -> None:
    """Zeroes take no room in the image, and it is in order when all is done."""
    picture, _ = pictures
    image = bench.qcow2(SIZE)
    front = bench.gateway(bench.qemu_nbd("--discard=unmap", "-f", "qcow2", image))
    client, copy = front.client(), tmp_path / "copy"
    if program == "nbdcopy":
        # qemu-nbd 7.2 may lose a write that meets zeroes in its cluster, directly as well: so no
        # two requests in one cluster.
        check(
            "nbdcopy", "--request-size=65536", "--sparse=65536", "--requests=1", picture, client.uri
        )
        check("nbdcopy", client.uri, copy)
    else:
        flags = ["-n", "-S", "64k", "-m", "1", "--target-image-opts"]
        check(
            "qemu-img",
            "convert",
            *client.qemu_object(),
            *flags,
            "-f",
            "raw",
            picture,
            client.qemu_image(),
        )
        check("qemu-img", "convert", *client.qemu(), "-O", "raw", copy)
    assert copy.read_bytes() == picture.read_bytes()
    quit_qemu(front)
    assert raw(bench, image) == picture.read_bytes()
    check("qemu-img", "check", "-f", "qcow2", image)
    mapped = json.loads(check("qemu-img", "map", "--output=json", "-f", "qcow2", image))
    assert [one for one in mapped if one["zero"]]


def test_a_chain_of_images(bench: Bench) -> None:
    """What is read comes from all of them; what is written goes to the last."""
    below, middle, top = bench.qcow2(SIZE), bench.directory() / "middle", bench.directory() / "top"
    write(below, "write -P 1 0 3M")
    for image, backing in ((middle, below), (top, middle)):
        flags = ["-f", "qcow2", "-b", str(backing), "-F", "qcow2"]
        check("qemu-img", "create", "-q", *flags, image, str(SIZE))
    write(middle, "write -P 2 1M 1M", "write -z 2M 512k")
    before = [path.read_bytes() for path in (below, middle)]
    front = bench.gateway(bench.qemu_nbd("-f", "qcow2", top))
    script = """
    h = connect()
    h.pwrite(b"\\3" * 100, (2 << 20) + (600 << 10))
    h.zero(1000, 500)
    h.trim(1 << 20, 8 << 20)
    h.flush()
    with open(args["copy"], "wb") as file:
        file.write(h.pread(h.get_size(), 0))
    h.shutdown()
    report()
    """
    copy = bench.directory() / "copy"
    nbdsh(script, front.client(), copy=copy)
    wanted = bytearray(SIZE)
    wanted[: 3 * MIB] = b"\1" * (3 * MIB)
    wanted[MIB : 2 * MIB] = b"\2" * MIB
    wanted[2 * MIB : 2 * MIB + 512 * 1024] = bytes(512 * 1024)
    wanted[2 * MIB + 600 * 1024 : 2 * MIB + 600 * 1024 + 100] = b"\3" * 100
    wanted[500:1500] = bytes(1000)
    assert copy.read_bytes() == wanted
    quit_qemu(front)
    assert raw(bench, top) == wanted
    assert [path.read_bytes() for path in (below, middle)] == before


def test_a_snapshot_inside_an_image(bench: Bench) -> None:
    image = bench.qcow2(4 * MIB)
    write(image, "write -P 1 0 1M")
    check("qemu-img", "snapshot", "-c", "then", image)
    write(image, "write -P 2 0 2M")
    script = """
    h = connect()
    report(read=[h.pread(1, at)[0] for at in (0, 1 << 20)], ro=h.is_read_only())
    """
    then = bench.gateway(bench.qemu_nbd("-r", "-l", "then", "-f", "qcow2", image))
    assert nbdsh(script, then.client()) == {"read": [1, 0], "ro": True}
    now = bench.gateway(bench.qemu_nbd("-r", "-f", "qcow2", image))
    assert nbdsh(script, now.client()) == {"read": [2, 2], "ro": True}


def test_a_compressed_image_of_an_odd_size(bench: Bench, tmp_path: Path) -> None:
    """A last block that is not whole, and clusters that have to be unpacked."""
    plain = tmp_path / "plain"
    plain.write_bytes(b"0123456789abcdef" * 100_000 + random.Random(3).randbytes(77_824))
    image = tmp_path / "packed"
    check("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", plain, image)
    front = bench.gateway(bench.qemu_nbd("-r", "-f", "qcow2", image))
    check("nbdcopy", front.client().uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == plain.read_bytes()
    done = run("qemu-img", "compare", *front.client().qemu(), f"driver=raw,file.filename={plain}")
    assert done.returncode == 0


def test_a_partition_of_an_image(bench: Bench) -> None:
    """qemu-nbd, then nbdkit with its `nbd` plugin and a filter, then the gateway."""
    parts = [bench.image(MIB), bench.image(2 * MIB)]
    for n, part in enumerate(parts, 1):
        part.write_bytes(bytes([n]) * part.stat().st_size)
    disk = bench.nbdkit("partitioning", *parts)
    image = bench.directory() / "disk.qcow2"
    check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri(), image)
    qemu = bench.qemu_nbd("-f", "qcow2", image)
    cut = bench.nbdkit("--filter=partition", "nbd", f"socket={qemu.socket}", "partition=2")
    front = bench.gateway(cut)
    script = """
    h = connect()
    size = h.get_size()
    before = set(h.pread(size, 0))
    h.pwrite(b"here", size - 4, nbd.CMD_FLAG_FUA)
    h.zero(4096, 4096)
    report(size=size, before=list(before), past=failed(h.pread, 1, size - 1))
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"size": 2 * MIB, "before": [2], "past": None}
    again = bench.nbdkit("--filter=partition", "nbd", f"socket={qemu.socket}", "partition=2")
    copy = bench.directory() / "copy"
    check("nbdcopy", again.uri(), copy)
    wanted = bytearray(b"\2" * (2 * MIB))
    wanted[-4:] = b"here"
    wanted[4096:8192] = bytes(4096)
    assert copy.read_bytes() == wanted
