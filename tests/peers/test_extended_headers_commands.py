"""Extended headers: every command, on a disk of 16 GiB, in requests longer than 32 bits can say.

Each program for libnbd runs twice, on equal disks: directly at qemu-nbd, and through the gateway.
What it reports, what arrives at qemu-nbd, and the disk afterwards are the same, and right.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.peers.newer import GIB, KIB, SIZE, Disks, Model, Request, disks, noise, requests, same
from tests.support.peers import Client
from tests.support.trixie import Trixie

READ, WRITE, FLUSH, TRIM, CACHE, ZERO = 0, 1, 3, 4, 5, 6
FUA, NO_HOLE, DF, FAST, PAYLOAD = 1, 2, 4, 16, 32  # flags
MIB = 1 << 20


@pytest.fixture(scope="module")
def stage(newer: Trixie, pki: Path) -> Iterator[Disks]:
    with disks(newer, pki) as stage:
        yield stage


@dataclass
class Outcome:
    reported: dict[str, Any]
    arrived: list[Request]


@dataclass
class Pair:
    """Two equal disks of one format, the second behind a gateway."""

    stage: Disks
    kind: str

    def run(self, script: str, model: Model, **args: Any) -> Outcome:
        """The program, which flushes, does the same to both; then both are as the model says."""
        images = [self.stage.image(self.kind) for _ in range(2)]
        servers = [self.stage.serve(image, kind=self.kind) for image in images]
        front = self.stage.bench.gateway(servers[1])
        clients = [Client(servers[0].uri()), front.client()]
        direct, through = (self.stage.newer.nbdsh(script, one, **args) for one in clients)
        assert through == direct
        arrived = [requests(server) for server in servers]
        assert arrived[1] == arrived[0]
        for server in servers:
            server.kill()  # it keeps qcow2 images locked
        self.stage.same(*images, kind=self.kind)
        self.stage.check(model, images[1], self.kind)
        return Outcome(through, arrived[1])


@pytest.fixture(params=["raw", "qcow2"])
def pair(stage: Disks, request: pytest.FixtureRequest) -> Pair:
    return Pair(stage, request.param)


# ---------------------------------------------------------------- one request


@pytest.mark.parametrize(
    ("flags", "start"),
    [(0, 170 * KIB), (FUA, 170 * KIB), (FAST, 170 * KIB), (FAST | FUA, 192 * KIB)],
    ids=["plain", "fua", "fast-zero", "fast-zero-fua-whole-clusters"],
)
def test_one_write_zeroes_of_8_gib(pair: Pair, flags: int, start: int) -> None:
    length = 8 * GIB  # both ends within data
    script = """
    h = connect()
    start, length = args["start"], args["length"]
    report(outcome=failed(h.zero, length, start, args["flags"]),
           inside=[h.pread(4096, at) == bytes(4096) for at in (start, start + length - 4096)],
           outside=[h.pread(512, at) == bytes(512) for at in (start - 512, start + length)])
    h.flush()
    h.shutdown()
    """
    fast_enough = not flags & FAST or pair.kind == "raw" or start % (64 * KIB) == 0
    model = Model.at_first()
    if fast_enough:
        model.zero(start, length)
    outcome = pair.run(script, model, start=start, length=length, flags=flags)
    assert outcome.reported == {
        "outcome": None if fast_enough else "ENOTSUP",
        "inside": [fast_enough] * 2,
        "outside": [False] * 2,
    }
    assert outcome.arrived[0] == Request(True, flags, ZERO, start, length)
    assert [one.command for one in outcome.arrived] == [ZERO] + [READ] * 4 + [FLUSH]


@pytest.mark.parametrize("flags", [0, FUA])
def test_one_trim_of_more_than_4_gib(pair: Pair, flags: int) -> None:
    start, length = 4 * GIB - 64 * KIB, (1 << 32) + 512 * KIB  # whole clusters
    script = """
    h = connect()
    h.trim(args["length"], args["start"], args["flags"])
    h.flush()
    h.shutdown()
    """
    model = Model.at_first()
    model.zero(start, length)  # trimmed blocks of these two formats read as zeroes
    outcome = pair.run(script, model, start=start, length=length, flags=flags)
    assert outcome.arrived == [
        Request(True, flags, TRIM, start, length),
        Request(True, 0, FLUSH, 0, 0),
    ]


def test_the_whole_disk_in_one_request(pair: Pair) -> None:
    script = """
    h = connect()
    h.zero(h.get_size(), 0)
    h.trim(h.get_size(), 0)
    h.flush()
    h.shutdown()
    """
    outcome = pair.run(script, Model())
    assert outcome.arrived[:-1] == [Request(True, 0, kind, 0, SIZE) for kind in (ZERO, TRIM)]


def test_every_command_and_flag(pair: Pair) -> None:
    script = """
    h = connect(strict_mode=nbd.STRICT_AUTO_FLAG)
    FUA, NO_HOLE, FAST = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO
    G, K = 1 << 30, 1 << 10
    outcomes = [failed(call, *rest) for call, *rest in (
        (h.pwrite, b"w" * 100_000, 4 * G - 50_000),
        (h.pwrite, b"v" * 512, 9 * G, FUA),
        (h.pwrite, b"u" * 65536, h.get_size() - 65536),
        (h.zero, 64 * K, 13 * G, NO_HOLE),
        (h.zero, 64 * K, 13 * G + 128 * K, NO_HOLE | FUA),
        (h.zero, 64 * K, 13 * G + 256 * K, NO_HOLE | FAST),
        (h.zero, 512, 13 * G + 700 * K, 0),
        (h.trim, 64 * K, 64 * K, FUA),
        (h.cache, 1 << 20, 13 * G),
        (h.cache, 33 << 20, 4 * G),
        (h.flush,),
    )]
    report(outcomes=outcomes, data=h.pread(200_000, 4 * G - 100_000).hex())
    h.pread_structured(100_000, 4 * G - 50_000, lambda *chunk: None, nbd.CMD_FLAG_DF)
    h.flush()
    h.shutdown()
    """
    model = Model.at_first()
    for letter, length, offset in ((b"w", 100_000, 4 * GIB - 50_000), (b"v", 512, 9 * GIB)):
        model.write(offset, letter * length)
    model.write(SIZE - 65536, b"u" * 65536)
    for length, offset in ((64, 0), (64, 128), (64, 256), (0.5, 700)):
        model.zero(13 * GIB + offset * KIB, int(length * KIB))
    model.zero(64 * KIB, 64 * KIB)
    outcome = pair.run(script, model)
    assert outcome.reported["outcomes"][:4] == [None] * 4
    assert all(one.extended for one in outcome.arrived)
    flags = {WRITE: {PAYLOAD, PAYLOAD | FUA}, TRIM: {FUA}, READ: {0, DF}, CACHE: {0}, FLUSH: {0}}
    flags[ZERO] = {0, NO_HOLE, NO_HOLE | FUA, NO_HOLE | FAST}
    for command, wanted in flags.items():
        assert {one.flags for one in outcome.arrived if one.command == command} == wanted


# ---------------------------------------------------------------- many requests


OPERATIONS = """
import random
h = connect()
wrong = []
for at, (kind, offset, length, seed) in enumerate(args["operations"]):
    if kind == "write":
        h.pwrite(random.Random(seed).randbytes(length), offset)
    elif kind == "read":
        if h.pread(length, offset) != random.Random(seed).randbytes(length):
            wrong.append(at)
    else:
        {"zero": h.zero, "trim": h.trim, "cache": h.cache}[kind](length, offset)
h.flush()
report(wrong=wrong)
h.shutdown()
"""


def test_operations_at_random(pair: Pair) -> None:
    source, model = random.Random(1), Model.at_first()
    operations: list[tuple[str, int, int, int]] = []
    for seed in range(1000, 1150):
        place = source.choice([0, 4 * GIB, 8 * GIB, 12 * GIB]) + source.randrange(-MIB, MIB)
        offset = max(0, place)
        kind = source.choice(["write", "write", "zero", "huge zero", "trim", "cache"])
        if kind == "write":
            length = source.choice([1, 511, 4096, 70_000, source.randrange(1, MIB)])
            model.write(offset, noise(seed, length))
            operations += [(kind, offset, length, seed), ("read", offset, length, seed)]
        elif kind == "cache":
            operations.append((kind, offset, source.randrange(1, MIB), 0))
        elif kind == "trim":  # whole clusters, for nothing is said of the rest of one
            offset -= offset % (64 * KIB)
            length = 64 * KIB * source.choice([1, 7, 65536])
            model.zero(offset, min(length, SIZE - offset))
            operations.append((kind, offset, min(length, SIZE - offset), 0))
        else:
            length = source.randrange(1, 2 * MIB)
            length += 4 * GIB if kind == "huge zero" and source.random() < 0.3 else 0
            length = min(length, SIZE - offset)
            model.zero(offset, length)
            operations.append(("zero", offset, length, 0))
    outcome = pair.run(OPERATIONS, model, operations=operations)
    assert outcome.reported["wrong"] == []


# ---------------------------------------------------------------- refusals


REFUSED = """
h = connect(strict_mode=nbd.STRICT_AUTO_FLAG)
calls = {"read": h.pread, "zero": h.zero, "trim": h.trim, "cache": h.cache,
         "write": lambda length, offset, flags=0: h.pwrite(b"x" * length, offset, flags)}
report(outcomes=[failed(calls[name], *rest) for name, *rest in args["calls"]],
       still=failed(h.pread, 4096, 0))
h.shutdown()
"""


def test_past_the_end(stage: Disks) -> None:
    """The gateway answers these itself, as the specification has it; qemu-nbd differs there."""
    front = stage.front(stage.empty())
    spans = [(512, SIZE), (1024, SIZE - 512), (4096, (1 << 63) - 8192), (4096, 1 << 62)]
    long = [(SIZE, 512), (SIZE + 1, 0), (1 << 62, 0), ((1 << 63) - 1, 512)]
    calls = [
        *((name, *span) for name in ("write", "read", "zero", "trim", "cache") for span in spans),
        *((name, *span) for name in ("zero", "trim", "cache") for span in long),
    ]
    found = stage.newer.nbdsh(REFUSED, front.client(), calls=calls)
    assert found["outcomes"] == [
        "ENOSPC" if name in ("write", "zero") else "EINVAL" for name, *_ in calls
    ]
    assert found["still"] is None
    assert requests(front.server) == [Request(True, 0, READ, 0, 4096)]


@pytest.mark.parametrize("by", ["upstream", "gateway"])
def test_read_only(stage: Disks, by: str) -> None:
    """Refused by the gateway itself; qemu-nbd 10 would say EINVAL."""
    server = stage.serve(stage.image(), *(["-r"] if by == "upstream" else []))
    front = stage.bench.gateway(server, *(["--read-only"] if by == "gateway" else []))
    calls = [
        *((name, 4096, 0, flags) for name in ("write", "zero", "trim") for flags in (0, FUA)),
        *((name, 9 * GIB, 0) for name in ("zero", "trim")),
        *((name, 512, SIZE) for name in ("write", "zero", "trim")),
    ]
    found = stage.newer.nbdsh(REFUSED, front.client(), calls=calls)
    assert found == {"outcomes": ["EPERM"] * len(calls), "still": None}
    assert requests(server) == [Request(True, 0, READ, 0, 4096)]


def test_blocks_of_4_kib(stage: Disks) -> None:
    image = stage.image()
    server = stage.start(
        stage.newer.qemu_nbd(
            *("--trace", "nbd_receive_request", "--discard=unmap", "--image-opts"),
            "driver=blkdebug,align=4096,image.driver=raw,image.file.driver=file,"
            f"image.file.filename={stage.newer.inside / image.relative_to(stage.newer.outside)}",
        )
    )
    front = stage.bench.gateway(server)
    off = [(512, 0), (4096, 512), (4097, 4096), (5 * GIB + 512, 0), (5 * GIB, 512)]
    calls = [
        *((name, *span) for name in ("zero", "trim", "cache") for span in off),
        *((name, *span) for name in ("write", "read") for span in off[:3]),
        ("write", 4096, 4 * GIB - 4096),
        ("read", 8192, 4 * GIB - 4096),
        ("zero", 5 * GIB, 3 * GIB + 4096),
    ]
    found = stage.newer.nbdsh(REFUSED, front.client(), calls=calls)
    assert found["outcomes"] == ["EINVAL"] * (len(calls) - 3) + [None] * 3
    assert [one.command for one in requests(server)] == [WRITE, READ, ZERO, READ]
    script = """
    h = connect()
    report(extended=h.get_extended_headers_negotiated(),
           sizes=[h.get_block_size(n) for n in range(4)])
    h.shutdown()
    """
    found = same(stage.newer, front, script)
    assert found["extended"]
    assert found["sizes"][0] == 4096


def test_requests_of_no_length(stage: Disks) -> None:
    """Unspecified, and harmless: nothing of them gets to the upstream."""
    front = stage.front(stage.image())
    names, places = ("read", "zero", "trim", "cache", "write"), (0, 4 * GIB, SIZE)
    calls = [(name, 0, offset) for name, offset in itertools.product(names, places)]
    found = stage.newer.nbdsh(REFUSED, front.client(), calls=calls)
    assert found["still"] is None
    assert requests(front.server) == [Request(True, 0, READ, 0, 4096)]
