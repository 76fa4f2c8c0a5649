"""`write-zeroes`: an upstream that cannot zero gets writes of zeroes, and the client sees no
difference but ENOTSUP for FAST_ZERO."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.bench import MIB, NO_UPGRADES, Bench
from tests.peers.watched import Request, Watched, covers, peak_memory, staged
from tests.support.peers import Client, check, nbdsh, run

GIB = 1 << 30
SIZE = 48 * MIB
NOZERO = ("--filter=nozero",)
DEFAULT_PAYLOAD = 32 * MIB


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


def test_any_offset_and_length(stage: Bench) -> None:
    """The disk is as after real zeroes, and the upstream has seen writes of just these bytes."""
    image = stage.image(SIZE)
    content = random.Random(1).randbytes(SIZE)
    image.write_bytes(content)
    watched = Watched(stage, *NOZERO, "file", image)
    front = watched.gateway()
    source = random.Random(2)
    ranges = [(0, 1), (SIZE - 1, 1), (1, 4095), (4095, 2), (65537, 262_143), (MIB, 256 << 10)]
    ranges += [(source.randrange(SIZE - 300_000), source.randrange(1, 300_000)) for _ in range(20)]
    ranges += [(5 * MIB + 7, 33 * MIB + 5)]
    script = """
    h = connect()
    report(zero=h.can_zero(), fast=h.can_fast_zero())
    for n, (offset, length) in enumerate(args["ranges"]):
        h.zero(length, offset, nbd.CMD_FLAG_NO_HOLE if n % 2 else 0)
    h.flush()
    h.shutdown()
    """
    assert nbdsh(script, front.client(), ranges=ranges) == {"zero": True, "fast": True}
    model = bytearray(content)
    for offset, length in ranges:
        model[offset : offset + length] = bytes(length)
    assert image.read_bytes() == model
    assert {one.command for one in watched.requests()} == {"Write", "Flush"}
    left = watched.requests("Write")
    for offset, length in ranges:
        count = -(-length // DEFAULT_PAYLOAD)
        mine, left = left[:count], left[count:]
        assert covers(mine, offset, length), mine
        assert max(one.count for one in mine) <= DEFAULT_PAYLOAD
    assert left == []


def test_no_larger_than_the_upstream_takes(stage: Bench) -> None:
    watched = Watched(
        stage,
        *("--filter=blocksize-policy", *NOZERO, "memory", "64M", "blocksize-error-policy=error"),
        *("blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=1M"),
    )
    script = """
    h = connect(strict_mode=0)
    h.pwrite(b"x" * (32 << 20), 0)
    h.zero(20 << 20, 4096)
    wrong = [failed(h.zero, 4097, 0), failed(h.zero, 4096, 512), failed(h.zero, 1, 0),
             failed(h.zero, 8192, (64 << 20) - 4096)]
    data = h.pread(32 << 20, 0)
    report(wrong=wrong, right=data == b"x" * 4096 + bytes(20 << 20) + b"x" * ((12 << 20) - 4096))
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client())
    assert seen == {"wrong": ["EINVAL"] * 3 + ["ENOSPC"], "right": True}
    writes = watched.requests("Write")[32:]  # behind the 32 that brought the data
    assert covers(writes, 4096, 20 * MIB)
    assert max(one.count for one in writes) == MIB


def test_fast_zero_fails_at_once(stage: Bench) -> None:
    """Nothing is sent. What is no legal request is refused as such."""
    watched = Watched(stage, *NOZERO, "memory", "1M")
    script = """
    h = connect(strict_mode=0)
    FAST, FUA, NO_HOLE = nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE
    report(fast=[failed(h.zero, n, 0, FAST | more) for n in (1, 4096, 1 << 20)
                 for more in (0, FUA, NO_HOLE, FUA | NO_HOLE)],
           past=failed(h.zero, 2, (1 << 20) - 1, FAST), slow=failed(h.zero, 10, 10))
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client())
    assert seen == {"fast": ["ENOTSUP"] * 12, "past": "ENOSPC", "slow": None}
    assert watched.requests() == [Request("Write", 10, 10)]


@pytest.mark.parametrize("fua", ["native", "none"])
def test_fua_covers_all_of_it(stage: Bench, fua: str) -> None:
    """Every part has the flag; or where the upstream has none, a flush comes behind the last."""
    filters = ("--filter=fua",) if fua == "none" else ()
    watched = Watched(stage, *filters, *NOZERO, "file", stage.image(100 * MIB))
    script = """
    h = connect()
    h.zero(80 << 20, 12345, nbd.CMD_FLAG_FUA)
    h.shutdown()
    report()
    """
    nbdsh(script, watched.gateway().client())
    events = watched.events()
    writes = watched.requests("Write")
    assert covers(writes, 12345, 80 * MIB)
    assert len(writes) == 3
    assert {one.fua for one in writes} == {fua == "native"}
    flushes = [n for n, event in enumerate(events) if event.request.command == "Flush"]
    assert len(flushes) == (2 if fua == "none" else 0)
    if flushes:
        assert flushes[0] == 6, "before all writes were done"


def test_a_write_in_the_middle_that_fails(stage: Bench) -> None:
    """The first error is the answer, no more is begun, and the session goes on."""
    watched = Watched(
        stage,
        *("--filter=blocksize-policy", *NOZERO, "eval"),
        *("get_size=echo 16M", "can_write=exit 0", "thread_model=echo parallel"),
        'pwrite=cat > /dev/null; test "$4" != 2097152 || { echo ENOSPC >&2; exit 1; }',
        'pread=head -c "$3" /dev/zero',
        *("blocksize-error-policy=error", "blocksize-maximum=64K", "blocksize-preferred=4K"),
    )
    script = """
    h = connect()
    report(whole=failed(h.zero, 16 << 20, 0), before=failed(h.zero, 2 << 20, 0),
           behind=failed(h.zero, 1 << 20, 3 << 20), read=failed(h.pread, 512, 0))
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client())
    assert seen == {"whole": "ENOSPC", "before": None, "behind": None, "read": None}
    # Of 256 writes to zero the whole, 32 succeed, one fails, and a few were under way with it.
    assert len(watched.requests("Write")) - 32 - 16 < 64


def test_gigabytes_in_one_request(stage: Bench) -> None:
    """Two at a time, beside reads that do not wait; and the gateway's memory stays what it was."""
    watched = Watched(stage, *NOZERO, "null", "3G")
    front = watched.gateway()
    first = """
    h = connect()
    h.zero(33 << 20, 100 << 20)
    h.pread(8 << 20, 0)
    h.shutdown()
    report()
    """
    nbdsh(first, front.client())
    before = peak_memory(front.gateway)
    watched.forget()
    script = """
    h = connect()
    zeroes = [h.aio_zero(2 << 30, 512), h.aio_zero((1 << 30) - 1024, (2 << 30) + 512)]
    while h.aio_in_flight():
        h.pread(4096, 0)  # also looks for the other replies
    report(answers=[h.aio_command_completed(one) for one in zeroes])
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"answers": [True, True]}
    writes = watched.requests("Write")
    assert covers(writes, 512, 3 * GIB - 1024)
    assert max(one.count for one in writes) <= DEFAULT_PAYLOAD
    assert peak_memory(front.gateway) - before < 8 * MIB


COPIES: dict[str, Callable[[Path, Client], list[str | Path]]] = {
    "nbdcopy": lambda picture, client: ["nbdcopy", "--sparse=4096", picture, client.uri],
    "nbdcopy-zero-first": lambda picture, client: [
        *("nbdcopy", "--allocated", "--request-size=262144", picture, client.uri),
    ],
    "qemu-img": lambda picture, client: [
        *("qemu-img", "convert", *client.qemu_object(), "-n", "--target-image-opts"),
        *("-f", "raw", picture, client.qemu_image()),
    ],
}


@pytest.mark.parametrize("upstream", ["nbdkit", "nbd-server"])
@pytest.mark.parametrize("program", COPIES)
def test_copies_with_zeroes(
    stage: Bench, pictures: tuple[Path, Path], program: str, upstream: str
) -> None:
    """Over other data, so that each zero has to be written."""
    picture, other = pictures
    image = stage.directory() / "disk"
    image.write_bytes(other.read_bytes())
    server = (
        stage.nbdkit(*NOZERO, "file", image) if upstream == "nbdkit" else stage.nbd_server(image)
    )
    name = "" if upstream == "nbdkit" else "disk"
    front = stage.gateway(server, "--export", name)
    check(*COPIES[program](picture, front.client()))
    assert image.read_bytes() == picture.read_bytes()


def test_qemu_io_zeroes(stage: Bench) -> None:
    image = stage.image(4 * MIB)
    image.write_bytes(b"\5" * (4 * MIB))
    client = stage.gateway(stage.nbdkit(*NOZERO, "file", image)).client()
    words = ["-c", "write -z 1000 100000", "-c", "write -z -u 1M 1M", "-c", "write -z -f 3M 64k"]
    printed = check("qemu-io", *client.qemu_object(), *words, *client.qemu()[-2:])
    assert "failed" not in printed.lower()
    # -n is FAST_ZERO
    done = run("qemu-io", *client.qemu_object(), "-c", "write -z -n 0 4k", *client.qemu()[-2:])
    assert "not supported" in done.stdout + done.stderr
    wanted = bytearray(b"\5" * (4 * MIB))
    for offset, length in ((1000, 100_000), (MIB, MIB), (3 * MIB, 64 << 10)):
        wanted[offset : offset + length] = bytes(length)
    assert image.read_bytes() == wanted


@pytest.mark.parametrize("flags", [["--no-upgrade", "write-zeroes"], NO_UPGRADES, ["--read-only"]])
def test_without_it_the_client_is_told_the_truth(stage: Bench, flags: list[str]) -> None:
    watched = Watched(stage, *NOZERO, "memory", "1M")
    front = watched.gateway(*flags)
    script = """
    h = connect(strict_mode=0)
    report(zero=h.can_zero(), fast=h.can_fast_zero(), answer=failed(h.zero, 4096, 0),
           still=failed(h.pread, 512, 0))
    h.shutdown()
    """
    seen = nbdsh(script, front.client())
    if flags == ["--read-only"]:
        assert seen.pop("answer") == "EPERM"
        assert seen == {"zero": False, "fast": False, "still": None}
    else:
        assert seen == nbdsh(script, front.direct())
        assert seen == {"zero": False, "fast": False, "answer": "EINVAL", "still": None}
    assert watched.requests("Write", "Zero") == []


def test_a_read_only_upstream_is_left_alone(stage: Bench) -> None:
    front = stage.gateway(stage.nbdkit("-r", *NOZERO, "memory", "1M"))
    script = """
    h = connect(strict_mode=0)
    report(zero=h.can_zero(), fast=h.can_fast_zero(), answer=failed(h.zero, 4096, 0))
    h.shutdown()
    """
    through = nbdsh(script, front.client())
    assert through == {"zero": False, "fast": False, "answer": "EPERM"}
