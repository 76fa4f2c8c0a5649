"""Data goes through the gateway unchanged, with every client program and every kind of upstream."""

from __future__ import annotations

import re
from pathlib import Path

from tests.peers.bench import MIB, Bench, Front, same
from tests.support.peers import check, run, said

Pictures = tuple[Path, Path]


def on_disk(disk: Front, path: Path) -> Path:
    """What the upstream really holds, read without the gateway."""
    check("nbdcopy", disk.direct(_name(disk)).uri, path)
    return path


def _can_flush(disk: Front) -> bool:
    return run("nbdinfo", "--can", "flush", disk.direct(_name(disk)).uri).returncode == 0


def _name(disk: Front) -> str:
    args = disk.gateway.args
    return args[args.index("--export") + 1] if "--export" in args else ""


def test_nbdcopy_up_and_down(disk: Front, pictures: Pictures, tmp_path: Path) -> None:
    picture, _ = pictures
    check("nbdcopy", picture, disk.client().uri)
    assert same(picture, on_disk(disk, tmp_path / "upstream"))
    check("nbdcopy", disk.client().uri, tmp_path / "down")
    assert same(picture, tmp_path / "down")


def test_nbdcopy_one_request_at_a_time(disk: Front, pictures: Pictures, tmp_path: Path) -> None:
    _, picture = pictures
    one = ["--connections=1", "--requests=1", "--request-size=65536", "--synchronous"]
    check("nbdcopy", *one, picture, disk.client().uri)
    assert same(picture, on_disk(disk, tmp_path / "upstream"))
    check("nbdcopy", *one, disk.client().uri, tmp_path / "down")
    assert same(picture, tmp_path / "down")


def test_qemu_img_convert_and_compare(disk: Front, pictures: Pictures, tmp_path: Path) -> None:
    picture, other = pictures
    client = disk.client()
    copy = ["qemu-img", "convert", "-n", *client.qemu_object()]
    check(*copy, "-f", "raw", "--target-image-opts", picture, client.qemu_image())
    assert same(picture, on_disk(disk, tmp_path / "upstream"))
    check(*copy[:2], *client.qemu(), "-O", "raw", tmp_path / "down")
    assert same(picture, tmp_path / "down")

    compare = ["qemu-img", "compare", *client.qemu()]
    assert "identical" in check(*compare, f"driver=raw,file.driver=file,file.filename={picture}")
    differs = run(*compare, f"driver=raw,file.driver=file,file.filename={other}")
    assert differs.returncode == 1, said(differs)


def test_qemu_io_patterns(disk: Front) -> None:
    commands = [
        "write -P 0x11 0 1M",
        "aio_write -P 0x22 1M 2M",
        "aio_write -P 0x33 3M 4k",
        "aio_flush",
        "write -P 0x44 -f 512 512",
        "write -z 2M 64k",
        "flush",
        "read -P 0x11 0 512",
        "read -P 0x44 512 512",
        "read -P 0x11 1k 1023k",
        "read -P 0x22 1M 1M",
        "read -P 0 2M 64k",
        "read -P 0x22 2112k 960k",
        "aio_read -P 0x33 3M 4k",
        "aio_flush",
    ]
    words = [word for command in commands for word in ("-c", command)]
    printed = check("qemu-io", *disk.client().qemu_object(), *words, *disk.client().qemu()[-2:])
    assert "failed" not in printed.lower(), printed
    assert printed.count("wrote ") == 5, printed
    assert printed.count("read ") == 7, printed


def test_fio_verifies_what_it_wrote(disk: Front, bench: Bench, tmp_path: Path) -> None:
    # fio cannot be told where certificates are. nbdkit's nbd plugin (so libnbd) shows them for it.
    to_gateway = ["hostname=127.0.0.1", f"port={disk.gateway.port}", f"export={_name(disk)}"]
    hop = bench.nbdkit("nbd", *to_gateway, "tls=require", f"tls-certificates={disk.pki}")
    job = ["--name=verify", "--ioengine=nbd", f"--uri={hop.uri()}"]
    load = ["--rw=randrw", "--bs=4k", "--iodepth=16", f"--size={4 * MIB}", "--randseed=1"]
    verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--fsync=32"]
    if not _can_flush(disk):
        verify.pop()
    done = run("fio", *job, *load, *verify, cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert "verify:" not in done.stderr, said(done)
    issued = re.search(r"issued rwts: total=(\d+),(\d+),", done.stdout)
    assert issued is not None, said(done)
    assert min(map(int, issued.groups())) > 256, said(done)


def test_disk_to_disk_through_two_gateways(bench: Bench, pictures: Pictures) -> None:
    picture, _ = pictures
    source = bench.gateway(bench.nbdkit("-r", "file", picture))
    target = bench.image(picture.stat().st_size)
    sink = bench.gateway(bench.qemu_nbd("-f", "raw", target))
    check("nbdcopy", "--flush", source.client().uri, sink.client().uri)
    assert same(picture, target)


def test_a_gateway_on_a_unix_socket(bench: Bench, pictures: Pictures, tmp_path: Path) -> None:
    picture, _ = pictures
    image = bench.image(picture.stat().st_size)
    front = bench.gateway(bench.nbdkit("file", image), listen=f"unix:{tmp_path / 'tls.sock'}")
    assert front.gateway.uri == f"nbds+unix:///?socket={tmp_path / 'tls.sock'}"
    check("nbdcopy", "--flush", picture, front.client().uri)
    assert same(picture, image)


def test_tls_off_on_loopback(bench: Bench, pictures: Pictures) -> None:
    picture, _ = pictures
    image = bench.image(picture.stat().st_size)
    front = bench.gateway(bench.nbdkit("file", image), "--tls", "off")
    assert front.gateway.uri.startswith("nbd://")
    check("nbdcopy", "--flush", picture, front.plain_client().uri)
    assert same(picture, image)
    assert "identical" in check(
        "qemu-img",
        "compare",
        *front.plain_client().qemu(),
        f"driver=raw,file.driver=file,file.filename={picture}",
    )
