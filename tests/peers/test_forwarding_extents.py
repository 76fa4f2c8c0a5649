"""Which parts of a disk are data, holes or zeroes: as the upstream says it, in every pattern."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.peers.watched import Swap, staged
from tests.support.peers import Client, Server, check, nbdsh

GIB = 1 << 30
MOST = (1 << 32) - 65536  # what the gateway asks an upstream about at a time
HOLE, ZERO = "hole", "zero"
TYPES = {"": 0, HOLE: 1, ZERO: 2, "hole,zero": 3}


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


@pytest.fixture(scope="module")
def swap(stage: Bench) -> Swap:
    return Swap(stage)


def listed(bench: Bench, size: int, extents: Sequence[tuple[int, int, str]]) -> Server:
    """A disk of zeroes with these extents, whatever they say; what is left out is a hole."""
    path = bench.directory() / "extents"
    path.write_text("".join(f"{at} {length} {kind}\n" for at, length, kind in extents))
    return bench.nbdkit(
        "-r", "--filter=extentlist", "pattern", f"size={size}", f"extentlist={path}"
    )


def _alternating(size: int, step: int, *kinds: str) -> list[tuple[int, int, str]]:
    return [
        (at, min(step, size - at), kinds[at // step % len(kinds)]) for at in range(0, size, step)
    ]


Extents = tuple[int, list[tuple[int, int, str]]]
PATTERNS: dict[str, Extents] = {
    "all-data": (4 * MIB, [(0, 4 * MIB, "")]),
    "all-hole": (4 * MIB, []),
    "zero-but-no-hole": (4 * MIB, [(0, 4 * MIB, ZERO)]),
    "hole-but-no-zero": (4 * MIB, [(0, 4 * MIB, HOLE)]),
    "data-at-both-ends": (4 * MIB, [(0, 512, ""), (4 * MIB - 512, 512, "")]),
    "data-in-the-middle": (4 * MIB, [(MIB, MIB, "")]),
    "the-last-byte": (MIB + 1, [(MIB, 1, "")]),
    "odd-pieces": (100_003, _alternating(100_003, 777, "", HOLE, ZERO, "hole,zero")),
    "every-block": (MIB, _alternating(MIB, 512, "", "hole,zero")),
    "beyond-4-GiB": (20 * GIB, [(5 * GIB, MIB, ""), (9 * GIB, 8 * GIB, ZERO)]),
    "one-short-of-4-GiB": (8 * GIB, [((1 << 32) - 1, 2, "")]),
    "longest": ((1 << 63) - 512, [(1 << 62, 4096, "")]),
}


def merged(size: int, extents: list[tuple[int, int, str]]) -> list[list[int]]:
    """(offset, length, type), with gaps filled, neighbours of one type joined."""
    rows: list[list[int]] = []
    at = 0
    for offset, length, kind in [*sorted(extents), (size, 0, "")]:
        pieces = [(at, offset - at, 3), (offset, length, TYPES[kind])]
        for start, count, flags in pieces:
            if not count:
                continue
            if rows and rows[-1][2] == flags:
                rows[-1][1] += count
            else:
                rows.append([start, count, flags])
        at = offset + length
    return rows


def both(front: Front, ask: Callable[[Client], Any]) -> Any:
    """The answer through the gateway, which is the one without."""
    through = ask(front.client())
    assert through == ask(front.direct())
    return through


def nbdinfo_map(client: Client) -> Any:
    return json.loads(check("nbdinfo", "--json", "--map", client.uri))


def qemu_img_map(client: Client) -> Any:
    return json.loads(check("qemu-img", "map", "--output=json", *client.qemu()))


STATUS = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.add_meta_context("base:allocation")
h.connect_uri(args["uri"])
size = h.get_size()
rows = []
def ask(offset, length, flags=0):
    row = [offset, length, flags]
    def seen(name, at, entries, error):
        assert (name, at) == ("base:allocation", offset)
        row.append(list(entries))
    h.block_status(length, offset, seen, flags)
    rows.append(row)
most = args["most"]
lengths = [1, 511, 4096, 65537, 1 << 20, (1 << 31) - 512, most]
offsets = [0, 1, 513, 4095, size // 2 - 1, size // 2, (1 << 32) - 1, (1 << 32) - 512, 1 << 32]
for offset in offsets:
    for length in [*lengths, min(size - offset, most)]:
        if 0 <= offset < size and 0 < length <= size - offset:
            ask(offset, length)
            ask(offset, length, nbd.CMD_FLAG_REQ_ONE)
ask(size - 1, 1)
report(rows=rows)
h.shutdown()
"""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(stage: Bench, swap: Swap, pattern: str) -> None:
    size, extents = PATTERNS[pattern]
    front = swap.front(listed(stage, size, extents))
    wanted = merged(size, extents)
    if size < 1 << 40:  # else a walk of 4 GiB at a time is a long one
        mapped = both(front, nbdinfo_map)
        assert merged_rows(mapped) == wanted
        both(front, qemu_img_map)
    rows = both(front, lambda client: nbdsh(STATUS, client, most=MOST))["rows"]
    # nbdkit 1.32 does not survive a question about 2**32 - 1 bytes. So it is asked about less.
    rows += nbdsh(STATUS, front.client(), most=(1 << 32) - 1)["rows"]
    check("nbdinfo", "--size", front.direct().uri)
    for offset, length, flags, entries in rows:
        lengths, kinds = entries[::2], entries[1::2]
        at = offset
        for count, kind in zip(lengths, kinds, strict=True):
            start, known, known_kind = next(row for row in wanted if row[0] + row[1] > at)
            assert kind == known_kind
            assert at + count <= start + known
            at += count
        assert len(lengths) == 1 or not flags
        assert at <= offset + length or not flags


def merged_rows(mapped: list[dict[str, Any]]) -> list[list[int]]:
    rows: list[list[int]] = []
    for one in mapped:
        if rows and rows[-1][2] == one["type"]:
            rows[-1][1] += one["length"]
        else:
            rows.append([one["offset"], one["length"], one["type"]])
    return rows


DATA: dict[str, tuple[str, str, str, str]] = {
    # What is on the disk, how large it is, and how large the truncate filter makes it.
    "all-sparse": ("", "1M", "65536", "truncate"),
    "all-data": ("(1 @32767 2)*4", "128K", "65536", "truncate"),
    "hole-behind-a-sector": ("1", "512", "1M", "truncate"),
    "hole-behind-an-odd-end": ("0x55*1000", "1000", "3000", "truncate"),
    "rounded-up": ("1*1000", "1000", "4096", "round-up"),
    "rounded-down": ("1*1000 @90000 1", "90001", "4096", "round-down"),
    "nothing-at-all": ("", "0", "0", "truncate"),
    "from-nothing": ("", "0", "2M", "truncate"),
}


@pytest.mark.parametrize("what", DATA)
def test_a_filter_that_cuts_and_extends(stage: Bench, swap: Swap, what: str) -> None:
    data, size, to, how = DATA[what]
    server = stage.nbdkit("--filter=truncate", "data", data, f"size={size}", f"{how}={to}")
    front = swap.front(server)
    if to != "0":  # nbdinfo does not map nothing
        both(front, nbdinfo_map)
    both(front, qemu_img_map)
    script = """
    h = connect()
    size = h.get_size()
    report(content=bytes(h.pread(size, 0)).hex() if size else "")
    h.shutdown()
    """
    both(front, lambda client: nbdsh(script, client))


EVAL = ("eval", "get_size=echo 1M", 'pread=head -c "$3" /dev/zero', "can_extents=exit 0")
SCRIPTS = {
    # An extent that begins before the request and ends behind it; nbdkit cuts what is before.
    "longer-than-asked": "echo 0 1M hole",
    "one-sector-at-a-time": 'echo "$4" 512 zero',
    "one-byte-at-a-time": 'echo "$4" 1 zero',
    "only-the-first-half": 'echo "$4" $((($3 + 1) / 2)) hole,zero',
    "kind-by-offset": "for i in 0 1 2 3; do echo $((i * 262144)) 256K $i; done",
    "an-error": "echo EIO no idea >&2; exit 1",
    "an-error-in-the-middle": 'test "$4" -lt 524288 || { echo ENOMEM >&2; exit 1; }; echo 0 512K',
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_of_a_script(stage: Bench, swap: Swap, script: str) -> None:
    front = swap.front(stage.nbdkit(*EVAL, f"extents={SCRIPTS[script]}"))
    ask = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.add_meta_context("base:allocation")
    h.connect_uri(args["uri"])
    rows = []
    for flags in (0, nbd.CMD_FLAG_REQ_ONE):
        for offset, length in ((0, 1 << 20), (0, 1), (1000, 1000), (262143, 2), (524288, 4096),
                               ((1 << 20) - 1, 1)):
            entries = []
            error = failed(h.block_status, length, offset, lambda n, o, e, x: entries.extend(e),
                           flags)
            rows.append([offset, length, flags, error, entries])
    h.pread(512, 0)  # all is as before
    h.shutdown()
    report(rows=rows)
    """
    rows = both(front, lambda client: nbdsh(ask, client))["rows"]
    errors = {row[3] for row in rows}
    assert errors == {"an-error": {"EIO"}, "an-error-in-the-middle": {None, "ENOMEM"}}.get(
        script, {None}
    )


def test_thousands_of_extents_in_one_reply(stage: Bench, swap: Swap) -> None:
    count = 40_000
    size = count * 512
    front = swap.front(listed(stage, size, _alternating(size, 512, "", HOLE, ZERO)))
    script = """
    import hashlib
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.add_meta_context("base:allocation")
    h.connect_uri(args["uri"])
    replies = []
    def seen(name, offset, entries, error):
        digest = hashlib.sha256(repr(list(entries)).encode()).hexdigest()
        replies.append([len(entries) // 2, digest])
    for n in range(4):  # four at once
        h.aio_block_status(h.get_size(), 0, seen)
    until(h, lambda: h.aio_in_flight() == 0)
    report(replies=replies)
    h.shutdown()
    """
    replies = both(front, lambda client: nbdsh(script, client))["replies"]
    assert len(replies) == 4
    assert replies[0][0] >= 10_000


def test_copies_keep_the_holes(stage: Bench, swap: Swap, tmp_path: Path) -> None:
    """What is a hole is not read: the copy of 20 GiB is a matter of the one MiB that is data."""
    size, extents = PATTERNS["beyond-4-GiB"]
    log = stage.directory() / "log"
    server = listed(stage, size, extents[:1])
    server.argv[server.argv.index("-r")] = "--filter=log"
    server.argv.append(f"logfile={log}")
    server.kill()
    server.start()
    front = swap.front(server)
    for copy, command in {
        tmp_path / "a": ("nbdcopy", front.client().uri),
        tmp_path / "b": ("qemu-img", "convert", *front.client().qemu(), "-O", "raw"),
    }.items():
        check(*command, copy)
        assert copy.stat().st_size == size
        assert copy.stat().st_blocks * 512 <= 2 * MIB
        with copy.open("rb") as file:
            file.seek(5 * GIB)
            assert file.read(8) == (5 * GIB).to_bytes(8, "big")
    reads = [line for line in log.read_text().splitlines() if "...Read" in line]
    assert len(reads) < 64
