"""A qcow2 image with a dirty bitmap and a backing file, read through the gateway as an incremental
backup does: every meta context says the same as on a direct connection."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.support.peers import Client, check, nbdsh

CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0")


@pytest.fixture
def front(bench: Bench) -> Front:
    """16 MiB: partly from a backing file; 2 MiB of it dirty since the bitmap began."""
    base, image = bench.qcow2(16 * MIB), bench.qcow2(16 * MIB)
    check("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", base)
    backing = ["-b", str(base), "-F", "qcow2"]
    check("qemu-img", "create", "-q", "-f", "qcow2", *backing, image, str(16 * MIB))
    check("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 2M", image)
    check("qemu-img", "bitmap", "--add", image, "b0")
    check("qemu-io", "-f", "qcow2", "-c", "write -P 3 8M 1M", "-c", "write -z 12M 1M", image)
    return bench.gateway(bench.qemu_nbd("-r", "-A", "-B", "b0", "-f", "qcow2", image))


def both(front: Front, ask: Callable[[Client], object]) -> tuple[object, object]:
    return ask(front.client()), ask(front.direct())


@pytest.mark.parametrize("context", CONTEXTS)
def test_nbdinfo_map(front: Front, context: str) -> None:
    through, direct = both(
        front, lambda client: json.loads(check("nbdinfo", "--json", f"--map={context}", client.uri))
    )
    assert through == direct
    assert isinstance(through, list)
    assert sum(extent["length"] for extent in through) == 16 * MIB
    assert len({extent["type"] for extent in through}) > 1, "the map says nothing"


def test_the_bitmap_itself(front: Front) -> None:
    mapped = json.loads(
        check("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", front.client().uri)
    )
    dirty = [(extent["offset"], extent["length"]) for extent in mapped if extent["type"] == 1]
    assert dirty == [(8 * MIB, MIB), (12 * MIB, MIB)]


def test_qemu_img_map_of_the_dirty_bitmap(front: Front) -> None:
    def mapped(client: Client) -> object:
        image = client.qemu(x_dirty_bitmap="qemu:dirty-bitmap:b0")
        return json.loads(check("qemu-img", "map", "--output=json", *image))

    through, direct = both(front, mapped)
    assert through == direct
    assert isinstance(through, list)
    assert [extent["start"] for extent in through if not extent["data"]] == [8 * MIB, 12 * MIB]


def test_qemu_img_map_of_allocation(front: Front) -> None:
    through, direct = both(
        front,
        lambda client: json.loads(check("qemu-img", "map", "--output=json", *client.qemu())),
    )
    assert through == direct


def test_three_contexts_in_one_request(front: Front) -> None:
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    for context in args["contexts"] + ["other:unknown", "qemu:dirty-bitmap:none"]:
        h.add_meta_context(context)
    h.connect_uri(args["uri"])
    rows = []
    def row(name, offset, entries, error):
        rows.append([name, offset, list(entries)])
    h.block_status(h.get_size(), 0, row)
    h.block_status(1 << 20, 8 << 20, row)
    h.block_status(h.get_size(), 0, row, nbd.CMD_FLAG_REQ_ONE)
    report(rows=rows, has={name: h.can_meta_context(name) for name in args["contexts"]},
           more=[h.can_meta_context("other:unknown"), h.can_meta_context("qemu:dirty-bitmap:none")])
    h.shutdown()
    """
    through, direct = both(front, lambda client: nbdsh(script, client, contexts=list(CONTEXTS)))
    assert through == direct
    assert isinstance(through, dict)
    assert through["has"] == dict.fromkeys(CONTEXTS, True)
    assert through["more"] == [False, False]
    assert len(through["rows"]) == 9


def test_lists_of_contexts(front: Front) -> None:
    script = """
    answers = {}
    for queries in ([], ["qemu:"], ["base:"], ["qemu:dirty-bitmap:"], ["none:"],
                    ["base:allocation", "qemu:allocation-depth"]):
        h = nbd.NBD()
        h.set_uri_allow_local_file(True)
        h.set_opt_mode(True)
        h.connect_uri(args["uri"])
        for query in queries:
            h.add_meta_context(query)
        names = []
        count = h.opt_list_meta_context(names.append)
        assert count == len(names)
        answers[" ".join(queries)] = names
        h.opt_abort()
    report(answers=answers)
    """
    through, direct = both(front, lambda client: nbdsh(script, client)["answers"])
    assert through == direct
    assert isinstance(through, dict)
    assert sorted(through[""]) == sorted(CONTEXTS)
    assert through["none:"] == []


def test_incremental_and_full_backup(front: Front, bench: Bench) -> None:
    """What a backup tool does: ask what is dirty, read just that."""
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.add_meta_context("qemu:dirty-bitmap:b0")
    h.connect_uri(args["uri"])
    dirty = []
    def row(name, offset, entries, error):
        for length, flags in zip(entries[0::2], entries[1::2]):
            if flags & 1:
                dirty.append([offset, length])
            offset += length
    h.block_status(h.get_size(), 0, row)
    report(bytes=[[o, n, sorted(set(h.pread(n, o)))] for o, n in dirty])
    h.shutdown()
    """
    through, direct = both(front, lambda client: nbdsh(script, client)["bytes"])
    assert through == direct == [[8 * MIB, MIB, [3]], [12 * MIB, MIB, [0]]]
    full = bench.directory() / "full.img"
    check("nbdcopy", front.client().uri, full)
    check("qemu-img", "compare", *front.client().qemu(), f"driver=raw,file.filename={full}")
