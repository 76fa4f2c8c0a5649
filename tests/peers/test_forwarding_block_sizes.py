"""Block sizes of the upstream, without upgrades: told as they are, and kept at every edge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.bench import MIB, NO_UPGRADES, Bench
from tests.peers.watched import Swap, Watched, staged
from tests.support.peers import check, nbdsh

KIB = 1 << 10
SIZE = 96 * MIB
UNLIMITED = 0xFFFF_FFFF

# Minimum, preferred, maximum.
SIZES = [
    (1, 512, 64 * KIB),
    (512, 512, 512),
    (512, 4096, MIB),
    (512, 64 * KIB, 32 * MIB),
    (4096, 4096, 64 * KIB),
    (4096, MIB, UNLIMITED),
    (64 * KIB, 128 * KIB, 32 * MIB),
    (64 * KIB, 64 * KIB, 33 * MIB),
]


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


@pytest.fixture(scope="module")
def swap(stage: Bench) -> Swap:
    return Swap(stage, *NO_UPGRADES)


def policy(sizes: tuple[int, int, int]) -> list[str]:
    return [
        *("--filter=blocksize-policy", "memory", str(SIZE), "blocksize-error-policy=error"),
        f"blocksize-minimum={sizes[0]}",
        f"blocksize-preferred={sizes[1]}",
        f"blocksize-maximum={sizes[2]}",
    ]


EDGES = """
h = connect(strict_mode=0, request_block_size=args["asks"],
            request_structured_replies=args["structured"])
least, most = args["least"], min(args["most"], 32 << 20)
size = h.get_size()
calls = {
    "read": lambda n, at: h.pread(n, at), "write": lambda n, at: h.pwrite(bytes(n), at),
    "zero": lambda n, at: h.zero(n, at), "trim": lambda n, at: h.trim(n, at),
    "cache": lambda n, at: h.cache(n, at),
}
# Through the gateway a READ in chunks has no maximum, and nothing else than READ and WRITE has one.
rows = []
for name, call in calls.items():
    places = [(least, 0), (least, least), (2 * least, size - 2 * least), (most, 0),
              (most - least or least, least), (most, size - most)]
    if name in ("write", "read") and most < 32 << 20:
        places += [(most + least, 0), (2 * most, size - 2 * most)]
    if least > 1:
        places += [(least - 1, 0), (least + 1, 0), (least, 1), (least, least - 1), (1, 0),
                   (least // 2, 0), (least // 2, least // 2), (2 * least, least // 2)]
    for length, offset in places:
        rows.append([name, length, offset, failed(call, length, offset)])
report(rows=rows, sizes=[h.get_block_size(i) for i in range(3)], usable=failed(h.pread, least, 0))
h.shutdown()
"""


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_edges(stage: Bench, swap: Swap, sizes: tuple[int, int, int]) -> None:
    front = swap.front(stage.nbdkit(*policy(sizes)))
    for asks, structured in ((True, True), (False, False)):
        settings = {
            "least": sizes[0],
            "most": sizes[2],
            "asks": asks,
            "structured": structured,
        }
        through = nbdsh(EDGES, front.client(), **settings)
        direct = nbdsh(EDGES, front.direct(), **settings)
        assert through["sizes"] == direct["sizes"] == (list(sizes) if asks else [0, 0, 0])
        different = [
            pair for pair in zip(through["rows"], direct["rows"], strict=True) if pair[0] != pair[1]
        ]
        assert different == []
        assert through["usable"] is direct["usable"] is None
    front.server.kill()  # the next one may have its memory


def test_what_is_off_the_minimum_never_arrives(bench: Bench) -> None:
    """The upstream is one that does not look itself."""
    watched = Watched(bench, *policy((4096, 4096, MIB)))
    watched.server.argv[watched.server.argv.index("blocksize-error-policy=error")] = (
        "blocksize-error-policy=allow"
    )
    watched.server.kill()
    watched.server.start()
    script = """
    h = connect(strict_mode=0)
    errors = set()
    for length, offset in ((1, 0), (4095, 0), (4097, 4096), (4096, 1), (4096, 512), (8192, 2048)):
        for call in (lambda n, at: h.pread(n, at), lambda n, at: h.pwrite(bytes(n), at), h.zero,
                     h.trim, h.cache):
            errors.add(failed(call, length, offset))
    h.pwrite(bytes(4096), 4096)
    h.shutdown()
    report(errors=sorted(errors, key=str))
    """
    assert nbdsh(script, watched.gateway().client()) == {"errors": ["EINVAL"]}
    assert [one[:3] for one in watched.requests()] == [("Write", 4096, 4096)]


@pytest.mark.parametrize("how", ["echo 64K 128K 32M", "echo 1 4K 4294967295", "echo 0 0 0"])
def test_block_sizes_of_a_script(stage: Bench, swap: Swap, how: str) -> None:
    server = stage.nbdkit(
        *("eval", f"block_size={how}", "get_size=echo 1M", 'pread=head -c "$3" /dev/zero')
    )
    front = swap.front(server)
    script = """
    h = connect()
    report(sizes=[h.get_block_size(i) for i in range(3)])
    h.shutdown()
    """
    through = nbdsh(script, front.client())
    assert through == nbdsh(script, front.direct())
    assert (
        through["sizes"]
        == {
            "echo 64K 128K 32M": [64 * KIB, 128 * KIB, 32 * MIB],
            "echo 1 4K 4294967295": [1, 4096, UNLIMITED],
            "echo 0 0 0": [0, 0, 0],
        }[how]
    )


@pytest.mark.parametrize("sizes", [SIZES[3], SIZES[5]], ids=["512-1M", "4K-64K"])
def test_programs_keep_to_them(
    stage: Bench, swap: Swap, sizes: tuple[int, int, int], pictures: tuple[Path, Path]
) -> None:
    """nbdcopy and QEMU are told, and so neither ever gets an error from either side."""
    picture, _ = pictures
    arguments = policy(sizes)
    arguments[2] = "16M"
    front = swap.front(stage.nbdkit(*arguments))
    client = front.client()
    flags = ["--request-size=65536"] if sizes[2] == 64 * KIB else []
    check("nbdcopy", *flags, picture, client.uri)
    check("qemu-img", "compare", *client.qemu(), f"driver=raw,file.filename={picture}")
    words = ["-c", "write -P 7 1 1000", "-c", "read -P 7 1 1000", "-c", "write -z 77777 300k"]
    printed = check("qemu-io", *client.qemu_object(), *words, *client.qemu()[-2:])
    assert "failed" not in printed.lower()
    copy = stage.directory() / "copy"
    check("nbdcopy", *flags, client.uri, copy)
    wanted = bytearray(picture.read_bytes())
    wanted[1:1001] = b"\x07" * 1000
    wanted[77777 : 77777 + 300 * KIB] = bytes(300 * KIB)
    assert copy.read_bytes() == wanted
    # As nbdinfo prints them
    document = json.loads(check("nbdinfo", "--json", client.uri))
    (export,) = document["exports"]
    found = [export[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")]
    assert found == list(sizes)
