"""Disks of every size: none, odd, and more than 32 bits can say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Bench, Front, same
from tests.support.peers import Client, check, nbdsh

GIB = 1 << 30
SIZES = (0, 1, 511, 512, 513, 65537, 1234567)


def on_nbdkit(bench: Bench, image: Path) -> Front:
    return bench.gateway(bench.nbdkit("file", image))


def on_oldstyle_nbdkit(bench: Bench, image: Path) -> Front:
    return bench.gateway(bench.nbdkit("-o", "--filter=nozero", "split", image))


def on_qemu_nbd(bench: Bench, image: Path) -> Front:
    # qemu-nbd rounds a raw file up to whole sectors, but not what it opens with a size.
    options = f"driver=raw,size={image.stat().st_size},file.driver=file,file.filename={image}"
    return bench.gateway(bench.qemu_nbd("--image-opts", options))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("upstream", [on_nbdkit, on_oldstyle_nbdkit])
def test_a_disk_of_this_size(bench: Bench, tmp_path: Path, upstream: object, size: int) -> None:
    assert callable(upstream)
    image = bench.image(size)
    front = upstream(bench, image)
    picture = tmp_path / "picture"
    picture.write_bytes(random.Random(size).randbytes(size))

    assert check("nbdinfo", "--size", front.client().uri) == f"{size}\n"
    check("nbdcopy", picture, front.client().uri)
    assert same(picture, image)
    check("nbdcopy", front.client().uri, tmp_path / "down")
    assert same(picture, tmp_path / "down")

    script = """
    h = connect(strict_mode=0)
    size = h.get_size()
    report(
        size=size,
        past_end={
            "read": failed(h.pread, 1, size),
            "write": failed(h.pwrite, b"x", size),
            "far": failed(h.pread, 512, (1 << 63) - 512),
            "across": failed(h.pread, 2, size - 1) if size else "EINVAL",
            "write across": failed(h.pwrite, b"xx", size - 1) if size else "ENOSPC",
        },
        last=h.pread(1, size - 1).hex() if size else "",
    )
    h.shutdown()
    """
    reported = nbdsh(script, front.client())
    assert reported["size"] == size
    assert reported["last"] == picture.read_bytes()[-1:].hex()
    assert reported["past_end"] == {
        "read": "EINVAL",
        "write": "ENOSPC",
        "far": "EINVAL",
        "across": "EINVAL",
        "write across": "ENOSPC",
    }
    assert same(picture, image), "a write past the end changed the disk"


@pytest.mark.parametrize("size", [512, 1234567 // 512 * 512])
def test_qemu_sees_the_same_size(bench: Bench, size: int) -> None:
    front = on_qemu_nbd(bench, bench.image(size))
    told = json.loads(check("qemu-img", "info", "--output=json", *front.client().qemu()))
    assert told["virtual-size"] == size


def test_more_than_4_gib_in_memory(bench: Bench) -> None:
    front = bench.gateway(bench.nbdkit("memory", "6G"))
    script = """
    h = connect()
    for offset in args["offsets"]:
        h.pwrite(offset.to_bytes(8, "big") * 8192, offset)
    h.flush()
    report(back=[h.pread(65536, offset) == offset.to_bytes(8, "big") * 8192
                 for offset in args["offsets"]],
           low=bytes(h.pread(65536, args["offsets"][0] - (4 << 30))).count(0))
    h.shutdown()
    """
    offsets = [4 * GIB + 65536, 5 * GIB + 1, 6 * GIB - 65536]
    reported = nbdsh(script, front.client(), offsets=offsets)
    assert reported["back"] == [True] * 3
    assert reported["low"] == 65536, "an offset was cut to 32 bits"
    assert nbdsh(script, front.direct(), offsets=offsets)["back"] == [True] * 3


def test_more_than_4_gib_in_a_sparse_file(bench: Bench) -> None:
    image = bench.image(6 * GIB)
    front = bench.gateway(bench.nbdkit("file", image))
    client = front.client()
    words = ["-c", "write -P 0x5a 5G 1M", "-c", "write -z 2G 64M", "-c", "read -P 0x5a 5G 1M"]
    check("qemu-io", *client.qemu_object(), *words, *client.qemu()[-2:])
    with image.open("rb") as file:
        file.seek(5 * GIB)
        assert file.read(1 << 20) == b"\x5a" * (1 << 20)
    assert image.stat().st_blocks * 512 < GIB, "the file is sparse no more"


def test_totals_of_a_large_map(bench: Bench) -> None:
    front = bench.gateway(bench.nbdkit("memory", "6G"))
    with_data = "h = connect(); h.pwrite(b'x' * 65536, 5 << 30); h.shutdown()"
    nbdsh(with_data, front.client())

    def totals(client: Client) -> object:
        return json.loads(check("nbdinfo", "--json", "--map", "--totals", client.uri))

    assert totals(front.client()) == totals(front.direct())
    sizes = {row["description"]: row["size"] for row in totals(front.client())}  # type: ignore[attr-defined]
    assert sizes == {"data": 65536, "hole,zero": 6 * GIB - 65536}


LARGE_STATUS = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(args["uri"])
h.pwrite(b"x" * 65536, 5 << 30)
answers = []
for length in (0xffffffff, 0xfffff000, 0x80000000, 512):
    for offset in (0, 1, 4096, 4 << 30, (8 << 30) - length):
        got = []
        h.block_status(length, offset, lambda name, start, entries, error:
                       got.append([name, start, list(zip(entries[::2], entries[1::2]))]))
        answers.append([length, offset, got])
report(answers=answers)
h.shutdown()
"""


def in_units(extents: list[list[int]]) -> list[int]:
    """The flags of each MiB in turn."""
    return [kind for length, kind in extents for _ in range(length // MIB)]


def test_block_status_of_nearly_4_gib_at_once(bench: Bench) -> None:
    front = bench.gateway(bench.qemu_nbd("-f", "raw", bench.image(8 * GIB)))
    through = nbdsh(LARGE_STATUS, front.client())["answers"]
    direct = nbdsh(LARGE_STATUS, front.direct())["answers"]
    assert len(through) == 20
    for (length, offset, got), (_, _, wanted) in zip(through, direct, strict=True):
        assert [row[:2] for row in got] == [["base:allocation", offset]]
        # An answer may cover less than was asked, so it may be the shorter one.
        ours, theirs = in_units(got[0][2]), in_units(wanted[0][2])
        assert ours == theirs[: len(ours)]
        assert got == wanted or length > 0xF0000000


def test_block_status_of_nearly_4_gib_does_not_reach_nbdkit(bench: Bench) -> None:
    # CVE-2025-47711: older versions of nbdkit abort when asked for 2^32 - 1 bytes.
    front = bench.gateway(bench.nbdkit("memory", "8G"))
    answers = nbdsh(LARGE_STATUS, front.client())["answers"]
    assert len(answers) == 20
    check("nbdinfo", front.direct().uri)
