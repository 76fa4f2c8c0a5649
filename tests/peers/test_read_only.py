"""A read-only export is read-only in the gateway, whatever the upstream would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.support.peers import check, nbdsh, run, said

WRITES = """
h = connect(strict_mode=0)
report(
    read_only=h.is_read_only(),
    write=failed(h.pwrite, b"x" * 65536, 0),
    fua=failed(h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_FUA),
    large=failed(h.pwrite, b"x" * (8 << 20), 0),
    zero=failed(h.zero, 4096, 0),
    trim=failed(h.trim, 4096, 0),
    first=bytes(h.pread(4, 0)).decode(),
    can=[h.can_flush(), h.can_cache(), h.can_df()],
)
h.shutdown()
"""


def gateway_read_only(bench: Bench, image: Path) -> Front:
    return bench.gateway(bench.nbdkit("file", image), "--read-only")


def qemu_behind_a_read_only_gateway(bench: Bench, image: Path) -> Front:
    return bench.gateway(bench.qemu_nbd("-f", "raw", image), "--read-only")


def oldstyle_behind_a_read_only_gateway(bench: Bench, image: Path) -> Front:
    return bench.gateway(bench.nbdkit("-o", "split", image), "--read-only")


def upstream_read_only(bench: Bench, image: Path) -> Front:
    return bench.gateway(bench.nbdkit("-r", "file", image))


def qemu_read_only(bench: Bench, image: Path) -> Front:
    return bench.gateway(bench.qemu_nbd("-r", "-f", "raw", image))


FRONTS = (
    gateway_read_only,
    qemu_behind_a_read_only_gateway,
    oldstyle_behind_a_read_only_gateway,
    upstream_read_only,
    qemu_read_only,
)


@pytest.fixture
def image(bench: Bench) -> Path:
    path = bench.image(16 * MIB)
    with path.open("r+b") as file:
        file.write(b"data" * MIB)
    return path


@pytest.mark.parametrize("make", FRONTS)
def test_every_write_fails_and_the_session_goes_on(
    bench: Bench, image: Path, make: Callable[[Bench, Path], Front]
) -> None:
    before = image.read_bytes()
    reported = nbdsh(WRITES, make(bench, image).client())
    assert reported["read_only"] is True
    refusals = {name: reported[name] for name in ("write", "fua", "large", "zero", "trim")}
    assert refusals == dict.fromkeys(refusals, "EPERM")
    assert reported["first"] == "data"
    assert image.read_bytes() == before


def test_writes_among_reads_keep_the_stream_in_step(bench: Bench, image: Path) -> None:
    """The payload of a refused write is not taken for requests, however it is cut."""
    front = gateway_read_only(bench, image)
    script = """
    h = connect(strict_mode=0)
    results, wanted = [], []
    request = b"\\x25\\x60\\x95\\x13" * 4096  # looks like requests
    buffers = []
    for i in range(64):
        if i % 3:
            data = nbd.Buffer(4096)
            buffers.append(data)
            cookie = h.aio_pread(data, 4096 * i)
            wanted.append([cookie, None])
        else:
            data = nbd.Buffer.from_bytearray(bytearray(request * (1 + i % 5))[:7 + 4000 * i])
            buffers.append(data)
            wanted.append([h.aio_pwrite(data, 0), "EPERM"])
    for cookie, _ in wanted:
        until(h, lambda: failed_or_done(h, cookie, results))
    report(same=sorted(results) == sorted(wanted))
    h.shutdown()
    """
    helper = """
    def failed_or_done(h, cookie, results):
        try:
            done = h.aio_command_completed(cookie)
        except nbd.Error as error:
            results.append([cookie, errno.errorcode[error.errnum]])
            return True
        if done:
            results.append([cookie, None])
        return done
    """
    assert nbdsh(helper + script, front.client()) == {"same": True}


def test_what_programs_say(bench: Bench, image: Path) -> None:
    client = gateway_read_only(bench, image).client()
    assert run("nbdinfo", "--is", "read-only", client.uri).returncode == 0
    copied = run("nbdcopy", image, client.uri)
    assert copied.returncode != 0
    assert "read-only" in said(copied) or "not permitted" in said(copied), said(copied)
    converted = run(
        *("qemu-img", "convert", "-n", *client.qemu_object(), "-f", "raw", "--target-image-opts"),
        *(image, client.qemu_image()),
    )
    assert converted.returncode != 0
    assert "Permission denied" in said(converted), said(converted)
    printed = check("qemu-io", "-r", *client.qemu_object(), "-c", "read 0 4k", *client.qemu()[-2:])
    assert "read 4096/4096" in printed
