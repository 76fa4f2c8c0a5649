"""Every command with its flags: it reaches the upstream as it was asked, and does to the disk what
it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.support.peers import nbdsh

LOG_LINE = re.compile(r" connection=(\d+) ([A-Z][a-zA-Z]+) id=\d+(.*?) \.\.\.")


class Logged:
    """A disk on nbdkit's memory plugin with the log filter, behind a gateway."""

    def __init__(self, bench: Bench, *args: str) -> None:
        self.path = bench.directory() / "nbdkit.log"
        server = bench.nbdkit("--filter=log", *(args or ("memory", "4M")), f"logfile={self.path}")
        self.front: Front = bench.gateway(server)

    def requests(self) -> list[str]:
        """Like "Write offset=0x0 count=0x200 fua=1", as they arrived."""
        found = LOG_LINE.findall(self.path.read_text())
        return [f"{command}{arguments}" for _, command, arguments in found]


@pytest.fixture
def logged(bench: Bench) -> Logged:
    return Logged(bench)


def test_every_command_arrives_with_its_flags(logged: Logged) -> None:
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.add_meta_context("base:allocation")
    h.connect_uri(args["uri"])
    FUA, NO_HOLE, FAST = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO
    h.pwrite(b"a" * 4096, 0)
    h.pwrite(b"b" * 512, 4096, FUA)
    h.zero(1024, 8192)
    h.zero(1024, 9216, FUA | NO_HOLE)
    h.zero(1024, 10240, FAST)
    h.zero(1024, 11264, FAST | FUA)
    h.trim(4096, 16384)
    h.trim(4096, 20480, FUA)
    h.cache(65536, 65536)
    h.flush()
    h.pread(1000, 1)
    h.pread_structured(65536, 0, lambda *row: None, nbd.CMD_FLAG_DF)
    h.block_status(8192, 512, lambda *row: None)
    h.block_status(8192, 512, lambda *row: None, nbd.CMD_FLAG_REQ_ONE)
    h.shutdown()
    """
    nbdsh(script, logged.front.client())
    through = logged.requests()
    logged.path.write_text("")
    nbdsh(script, logged.front.direct())
    assert through == logged.requests()
    assert [line.split()[0] for line in through] == [
        *(["Write"] * 2 + ["Zero"] * 4 + ["Trim"] * 2 + ["Cache", "Flush"]),
        *(["Read"] * 2 + ["Extents"] * 2),
    ]
    assert "Write offset=0x1000 count=0x200 fua=1" in through
    assert "Zero offset=0x2400 count=0x400 trim=0 fua=1 fast=0" in through
    assert "Zero offset=0x2800 count=0x400 trim=1 fua=0 fast=1" in through
    assert "Extents offset=0x200 count=0x2000 req_one=1" in through


def test_what_commands_do_to_the_disk(bench: Bench) -> None:
    image = bench.image(4 * MIB)
    front = bench.gateway(bench.nbdkit("file", image))
    script = """
    h = connect()
    h.pwrite(b"\\x11" * (1 << 20), 0)
    h.pwrite(b"\\x22" * 65536, 1 << 20, nbd.CMD_FLAG_FUA)
    h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
    h.zero(65536, 131072)
    h.trim(65536, 262144)
    h.cache(65536, 0)
    h.flush()
    report(fast=failed(h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO))
    h.shutdown()
    """
    reported = nbdsh(script, front.client())
    content = bytearray(image.read_bytes())
    if reported["fast"] is None:  # it depends on the file system
        assert content[:4096] == bytes(4096)
        content[:4096] = b"\x11" * 4096
    wanted = bytearray(b"\x11" * MIB + b"\x22" * 65536 + bytes(4 * MIB - MIB - 65536))
    wanted[8192:12288] = bytes(4096)
    wanted[131072 : 131072 + 65536] = bytes(65536)
    wanted[262144 : 262144 + 65536] = bytes(65536)
    assert content == wanted


def test_fast_zero_that_is_not_fast(bench: Bench) -> None:
    # ENOTSUP is the one answer that NBD_CMD_FLAG_FAST_ZERO adds: it must come through as itself.
    logged = Logged(
        bench, "--filter=nozero", "memory", "4M", "zeromode=emulate", "fastzeromode=slow"
    )
    script = """
    h = connect()
    report(fast=failed(h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO), slow=failed(h.zero, 4096, 0))
    h.shutdown()
    """
    assert nbdsh(script, logged.front.client()) == {"fast": "ENOTSUP", "slow": None}


def test_large_payloads_in_one_request(bench: Bench) -> None:
    logged = Logged(bench, "memory", "64M")
    script = """
    h = connect()
    size = 32 << 20
    h.pwrite(b"0123456789abcdef" * (size // 16), 1 << 20)
    back = h.pread(size, 1 << 20)
    report(same=back == b"0123456789abcdef" * (size // 16))
    h.shutdown()
    """
    assert nbdsh(script, logged.front.client()) == {"same": True}
    assert logged.requests() == [
        "Write offset=0x100000 count=0x2000000 fua=0",
        "Read offset=0x100000 count=0x2000000",
    ]


def test_requests_of_every_small_size(logged: Logged) -> None:
    script = """
    h = connect()
    wrong = []
    for size in [*range(1, 40), 511, 513, 4095, 4097, 16383, 16384, 16385, 65535, 65537, 262143]:
        data = bytes((size + i) % 251 for i in range(size))
        h.pwrite(data, size)
        if h.pread(size, size) != data:
            wrong.append(size)
    report(wrong=wrong)
    h.shutdown()
    """
    assert nbdsh(script, logged.front.client()) == {"wrong": []}


@pytest.mark.parametrize("upstream", [[], ["--no-sr"]], ids=["sr-upstream", "no-sr-upstream"])
@pytest.mark.parametrize("structured", [True, False], ids=["sr-client", "no-sr-client"])
def test_holes_and_data_with_both_reply_styles(
    bench: Bench, structured: bool, upstream: list[str]
) -> None:
    logged = Logged(bench, *upstream, "memory", "4M")
    script = """
    h = connect(request_structured_replies=args["structured"])
    h.pwrite(b"x" * 65536, 65536)
    h.pwrite(b"y" * 512, 1 << 20)
    data = h.pread(2 << 20, 0)
    wanted = bytearray(2 << 20)
    wanted[65536:131072] = b"x" * 65536
    wanted[1 << 20:(1 << 20) + 512] = b"y" * 512
    report(same=data == wanted, structured=h.get_structured_replies_negotiated(),
           past=failed(connect(request_structured_replies=args["structured"],
                               strict_mode=0).pread, 512, 4 << 20))
    h.shutdown()
    """
    reported = nbdsh(script, logged.front.client(), structured=structured)
    assert reported == {"same": True, "structured": structured, "past": "EINVAL"}


def test_sparse_reads_come_as_holes(bench: Bench, tmp_path: Path) -> None:
    """qemu-nbd sends NBD_REPLY_TYPE_OFFSET_HOLE; the chunks are those of a direct connection."""
    image = bench.image(4 * MIB)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(b"x" * MIB)
    front = bench.gateway(bench.qemu_nbd("-f", "raw", image))
    script = """
    h = connect()
    chunks = []
    h.pread_structured(4 << 20, 0, lambda data, offset, status, error:
                       chunks.append([offset, len(data), status]))
    report(chunks=chunks, kinds=[nbd.READ_DATA, nbd.READ_HOLE])
    h.shutdown()
    """
    through = nbdsh(script, front.client())
    assert through == nbdsh(script, front.direct())
    assert {chunk[2] for chunk in through["chunks"]} == set(through["kinds"])


def test_unknown_flags_and_wrong_requests_leave_the_session_usable(logged: Logged) -> None:
    script = """
    h = connect(strict_mode=0)
    report(
        zero_length=failed(h.pread, 0, 0),
        past_end=failed(h.trim, 512, 4 << 20),
        zero_past_end=failed(h.zero, 512, 4 << 20),
        status_without_context=failed(h.block_status, 512, 0, lambda *row: None),
        df_on_write=failed(h.pwrite, b"x", 0, nbd.CMD_FLAG_DF),
        still=failed(h.pread, 512, 0),
    )
    h.shutdown()
    """
    reported = nbdsh(script, logged.front.client())
    assert reported.pop("still") is None
    reported.pop("zero_length")  # unspecified
    assert reported == {
        "past_end": "EINVAL",
        "zero_past_end": "ENOSPC",
        "status_without_context": "EINVAL",
        "df_on_write": "EINVAL",
    }
    assert [line for line in logged.requests() if not line.startswith("Read")] == []
