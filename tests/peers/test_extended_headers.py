"""Extended headers: negotiated when the upstream has them, and what they say of a disk of 16 GiB.

libnbd and qemu-nbd of Debian trixie on both sides. What a client learns through the gateway is what
it learns without.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.bench import MIB, Front
from tests.peers.newer import GIB, PIECES, SIZE, Disks, both, disks, requests, same
from tests.support.peers import Client, Server
from tests.support.trixie import Trixie

CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0")


def bitmaps(disks: Disks) -> Path:
    """A qcow2 image over another one. What was written after the bitmap began is dirty."""
    newer, below = disks.newer, disks.image("qcow2")
    image = newer.directory() / "top.qcow2"
    backing = ["-b", newer.inside / below.relative_to(newer.outside), "-F", "qcow2"]
    newer.check("qemu-img", "create", "-q", "-f", "qcow2", *map(str, backing), image)
    write = ("qemu-io", "-f", "qcow2")
    newer.check(*write, "-c", "write -P 1 1M 2M", "-c", f"write -P 2 {5 * GIB} 64k", image)
    newer.check("qemu-img", "bitmap", "--add", image, "b0")
    dirty = [f"write -P 3 {4 * GIB - MIB} 2M", f"write -z {13 * GIB} 512k", "discard 10G 1G"]
    newer.check(*write, *(word for one in dirty for word in ("-c", one)), image)
    return image


@pytest.fixture(scope="module")
def stage(newer: Trixie, pki: Path) -> Iterator[Disks]:
    with disks(newer, pki) as stage:
        yield stage


@pytest.fixture(scope="module")
def front(stage: Disks) -> Front:
    """A read-only disk with three contexts."""
    return stage.front(bitmaps(stage), "-r", "-A", "-B", "b0", kind="qcow2")


# ---------------------------------------------------------------- negotiation


UPSTREAMS: dict[str, tuple[bool, Callable[[Disks], Server]]] = {
    "qemu-nbd-raw": (True, lambda stage: stage.serve(stage.empty())),
    "qemu-nbd-qcow2": (True, lambda stage: stage.serve(stage.empty("qcow2"), kind="qcow2")),
    "nbdkit": (False, lambda stage: stage.start(stage.newer.nbdkit("memory", "1M"))),
    "nbd-server": (False, lambda stage: stage.start(stage.newer.nbd_server(stage.empty()))),
    "older-qemu-nbd": (False, lambda stage: stage.bench.qemu_nbd("-f", "raw", stage.empty())),
    "older-nbdkit": (False, lambda stage: stage.bench.nbdkit("memory", "1M")),
    "older-nbdkit-oldstyle": (False, lambda stage: stage.bench.nbdkit("-o", "memory", "1M")),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_they_are_negotiated_if_the_upstream_has_them(stage: Disks, upstream: str) -> None:
    has_them, start = UPSTREAMS[upstream]
    name = "disk" if upstream == "nbd-server" else ""
    front = stage.bench.gateway(start(stage), "--export", name)
    script = """
    h = connect()
    report(extended=h.get_extended_headers_negotiated(), payload=h.can_block_status_payload(),
           size=h.get_size(), data=h.pread(512, h.get_size() - 512) == bytes(512))
    h.shutdown()
    """
    through, direct = (
        stage.newer.nbdsh(script, one) for one in (front.client(name), front.direct(name))
    )
    assert through == direct
    assert through["extended"] is has_them
    assert through["data"]


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_a_client_that_does_not_want_them(front: Front, newer: Trixie, structured: bool) -> None:
    script = """
    h = connect(request_extended_headers=False, request_structured_replies=args["structured"])
    report(extended=h.get_extended_headers_negotiated(), payload=h.can_block_status_payload(),
           structured=h.get_structured_replies_negotiated(),
           data=[h.pread(4096, offset).hex() for offset in args["offsets"]])
    h.shutdown()
    """
    offsets = [0, 4 * GIB - 2048, SIZE - 4096]
    found = same(newer, front, script, structured=structured, offsets=offsets)
    assert not found["extended"]
    assert not found["payload"]
    assert found["structured"] is structured


OPTIONS = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.set_opt_mode(True)
h.set_request_structured_replies(False)
h.set_request_extended_headers(False)
h.set_request_meta_context(False)
h.add_meta_context("base:allocation")
h.connect_uri(args["uri"])
contexts = []
for step in args["steps"]:
    asked = {"E": h.opt_extended_headers, "S": h.opt_structured_reply, "I": h.opt_info,
             "L": lambda: h.opt_list_meta_context(contexts.append),
             "M": lambda: h.opt_set_meta_context(contexts.append)}[step]
    try:
        outcome = asked()
    except nbd.Error as error:
        outcome = errno.errorcode[error.errnum]
    report(**{str(len(contexts)) + step: outcome})
h.opt_go()
extents = []
report(extended=h.get_extended_headers_negotiated(), contexts=contexts,
       structured=h.get_structured_replies_negotiated(), data=h.pread(4096, 2048).hex(),
       status=failed(h.block_status_64, 1 << 20, 0, lambda *got: extents.append(got[2])),
       extents=extents)
h.shutdown()
"""


@pytest.mark.parametrize(
    "steps", ["", "S", "E", "SE", "ES", "EE", "SS", "EM", "SM", "EIM", "SEM", "ESM", "MEM", "ELM"]
)
def test_options_in_any_order(front: Front, newer: Trixie, steps: str) -> None:
    found = same(newer, front, OPTIONS, steps=steps)
    assert found["extended"] is ("E" in steps)
    assert (found["status"] is None) is ("M" in steps)


# ---------------------------------------------------------------- what is told


def told(newer: Trixie, client: Client, *flags: str) -> Any:
    """What nbdinfo says, without what must differ."""
    document = json.loads(newer.check("nbdinfo", "--json", *flags, newer.client(client).uri))
    if isinstance(document, dict):
        assert document.pop("TLS") is (client.certificates is not None)
        for export in document["exports"]:
            export.pop("uri")
    return document


@pytest.mark.parametrize("flags", [["--list", "--content"], ["--map"], []], ids=" ".join)
def test_nbdinfo(front: Front, newer: Trixie, flags: list[str]) -> None:
    direct, through = (told(newer, client, *flags) for client in both(front))
    assert through == direct
    if isinstance(through, dict):
        assert through["extended"]
        (export,) = through["exports"]
        assert export["export-size"] == SIZE
        assert export["can_block_status_payload"]
        assert export["contexts"] == list(CONTEXTS)


@pytest.mark.parametrize("context", CONTEXTS)
def test_maps(front: Front, newer: Trixie, context: str) -> None:
    direct, through = (told(newer, client, f"--map={context}") for client in both(front))
    assert through == direct
    assert sum(extent["length"] for extent in through) == SIZE
    assert len({extent["type"] for extent in through}) > 1, "the map says nothing"
    dirty = [(one["offset"], one["length"]) for one in through if one["type"] == 1]
    if "bitmap" in context:
        assert dirty == [(4 * GIB - MIB, 2 * MIB), (10 * GIB, GIB), (13 * GIB, MIB // 2)]


def test_maps_of_an_empty_disk_are_one_extent(stage: Disks) -> None:
    front = stage.front(stage.empty())
    for client in both(front):
        (extent,) = told(stage.newer, client, "--map")
        assert (extent["offset"], extent["length"]) == (0, SIZE)
        total = stage.newer.check(
            "nbdinfo", "--json", "--map", "--totals", stage.newer.client(client).uri
        )
        assert [one["size"] for one in json.loads(total)] == [SIZE]


# ---------------------------------------------------------------- block status


STATUS = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.set_strict_mode(nbd.STRICT_AUTO_FLAG)
for name in args["contexts"]:
    h.add_meta_context(name)
h.connect_uri(args["uri"])
rows = []
for length, offset, flags, only in args["asked"]:
    row = []
    def seen(name, at, entries, error):
        row.append([name, at, entries])
    if only is None:
        outcome = failed(h.block_status_64, length, offset, seen, flags)
    else:
        outcome = failed(h.block_status_filter, length, offset, only, seen, flags)
    rows.append([outcome, row])
report(rows=rows)
h.shutdown()
"""
REQ_ONE = 1 << 3


def rows(front: Front, newer: Trixie, asked: list[Any]) -> list[Any]:
    """The answers to BLOCK_STATUS of these lengths, offsets, flags, and contexts (None: all)."""
    found: list[Any] = same(newer, front, STATUS, contexts=list(CONTEXTS), asked=asked)["rows"]
    return found


def test_block_status_beyond_32_bits(front: Front, newer: Trixie) -> None:
    asked = [
        *((SIZE, 0, flags, None) for flags in (0, REQ_ONE)),
        *((9 * GIB, 4096 + 64 * offset, 0, None) for offset in (0, 1, 4 * GIB // 64)),
        *((length, 6 * GIB, flags, None) for length in (512, 1 << 32) for flags in (0, REQ_ONE)),
        ((1 << 32) - 1, 4 * GIB, 0, None),
        (SIZE - 5 * GIB, 5 * GIB, 0, None),
    ]
    found = rows(front, newer, asked)
    assert [outcome for outcome, _ in found] == [None] * len(asked)
    assert {name for name, _, _ in found[0][1]} == set(CONTEXTS)
    lengths = [length for _, got in found for _, _, extents in got for length, _ in extents]
    assert max(lengths) > 1 << 32
    (one,) = found[1][1][0][2]
    assert one[0] < SIZE


def test_block_status_filtered(front: Front, newer: Trixie) -> None:
    chosen = [list(some) for n in range(4) for some in itertools.combinations(CONTEXTS, n)]
    asked = [(SIZE - GIB, GIB, flags, some) for some in chosen for flags in (0, REQ_ONE)]
    found = rows(front, newer, [*asked, (SIZE, 0, 0, [CONTEXTS[1]] * 2), (0, 0, 0, [CONTEXTS[0]])])
    for (_, _, _, some), (outcome, got) in zip(asked, found[: len(asked)], strict=True):
        if some:
            assert outcome is None
            assert {name for name, _, _ in got} == set(some)


def test_the_filter_reaches_the_upstream(front: Front, newer: Trixie) -> None:
    before = len(requests(front.server))
    rows(front, newer, [(SIZE, 0, 0, [CONTEXTS[2]])])
    direct, through = requests(front.server)[before:]
    assert through == direct
    assert (through.command, through.offset, through.flags) == (7, 0, 1 << 5)


def test_block_status_that_must_fail(front: Front, newer: Trixie) -> None:
    asked = [
        *((length, SIZE - 4096, 0, None) for length in (8192, 1 << 33, (1 << 63) - SIZE)),
        *((length, SIZE - 4096, 0, [CONTEXTS[0]]) for length in (8192, 1 << 33)),
        (512, SIZE, 0, None),
        (1 << 40, 0, REQ_ONE, None),
    ]
    found = rows(front, newer, [*asked, (SIZE, 0, 0, None)])
    assert [outcome for outcome, _ in found] == ["EINVAL"] * len(asked) + [None]


def test_block_status_without_a_context(stage: Disks) -> None:
    # Asked for a filtered status, qemu-nbd 10 would hang up here: it must not come to that.
    front = stage.front(stage.empty())
    script = """
    h = connect(strict_mode=nbd.STRICT_AUTO_FLAG)
    report(contexts=h.can_meta_context("base:allocation"),
           plain=failed(h.block_status_64, 5 << 30, 0, lambda *got: None),
           filtered=failed(h.block_status_filter, 5 << 30, 0, [], lambda *got: None),
           still=failed(h.pread, 512, 0))
    h.shutdown()
    """
    found = stage.newer.nbdsh(script, front.client())
    assert found == {"contexts": False, "plain": "EINVAL", "filtered": "EINVAL", "still": None}


# ---------------------------------------------------------------- reading


READING = """
import hashlib, random
h = connect()
def digest(data):
    return hashlib.sha256(data).hexdigest()
def chunks(length, offset, flags=0):
    seen = []
    def chunk(data, at, kind, error):
        seen.append([at, len(data), kind])
    return [digest(h.pread_structured(length, offset, chunk, flags)), seen]
size, pieces, K64 = h.get_size(), args["pieces"], 65536
report(
    around=[chunks(length + K64, max(0, offset - K64)) for offset, length in pieces],
    df=[chunks(length, offset, nbd.CMD_FLAG_DF) for offset, length in pieces],
    simple=[digest(h.pread(length, offset)) for offset, length in pieces],
    wanted=[digest(random.Random(seed).randbytes(length))
            for seed, (_, length) in enumerate(pieces)],
    most=digest(h.pread(32 << 20, (4 << 30) - (16 << 20))),
    last=chunks(1 << 20, size - (1 << 20)),
)
h.shutdown()
"""


def test_reads_in_chunks(stage: Disks) -> None:
    front = stage.front(stage.image(), "-r")
    found = same(stage.newer, front, READING, pieces=PIECES)
    assert found["simple"] == found["wanted"]
    assert [digest for digest, _ in found["df"]] == found["wanted"]
    assert [len(seen) for _, seen in found["df"]] == [1] * len(PIECES)
    assert {kind for _, seen in found["around"] for _, _, kind in seen} == {1, 2}  # data, holes
