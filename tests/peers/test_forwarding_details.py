"""Small things that an export says of itself, and flags that change what a command does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.peers.watched import Swap, Watched, staged
from tests.support.peers import NbdServer, nbdsh

TOLD = """
out = {}
for full in (True, False):
    h = connect(full_info=full)
    out["full" if full else "less"] = {
        "rotational": h.is_rotational(), "multi": h.can_multi_conn(), "cache": h.can_cache(),
        "read-only": h.is_read_only(), "size": h.get_size(),
        "name": failed(h.get_canonical_export_name) or h.get_canonical_export_name(),
        "text": failed(h.get_export_description) or h.get_export_description(),
    }
    h.shutdown()
report(**out)
"""


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


@pytest.fixture(scope="module")
def swap(stage: Bench) -> Swap:
    return Swap(stage, "--any-export")


def both(front: Front, script: str, export: str = "", **args: Any) -> Any:
    """What a script reports through the gateway, which is what it reports without."""
    through = nbdsh(script, front.client(export), **args)
    assert through == nbdsh(script, front.direct(export), **args)
    return through


EVAL = ("eval", "get_size=echo 1M", 'pread=head -c "$3" /dev/zero')
EXPORTS = {
    "rotational": ([*EVAL, "is_rotational=exit 0"], "rotational", True),
    "not-rotational": ([*EVAL, "is_rotational=exit 3"], "rotational", False),
    "several-connections": ([*EVAL, "can_multi_conn=exit 0"], "multi", True),
    "one-connection": ([*EVAL, "can_multi_conn=exit 3"], "multi", False),
    "cache": ([*EVAL, "can_cache=echo native"], "cache", True),
    "no-cache": ([*EVAL, "can_cache=echo none"], "cache", False),
    "described": ([*EVAL, "export_description=echo größer als 1 & <2>"], "text", None),
    "described-at-length": (
        [*EVAL, "export_description=head -c 4096 /dev/zero | tr '\\0' d"],
        "text",
        "d" * 4096,
    ),
    "described-in-lines": ([*EVAL, "export_description=printf 'a\\nb\\tc'"], "text", "a\nb\tc"),
    "not-described": (list(EVAL), "text", "ENOTSUP"),
    "default-with-a-name": ([*EVAL, "default_export=echo the/disk"], "name", "the/disk"),
}


@pytest.mark.parametrize("what", EXPORTS)
def test_what_is_told(stage: Bench, swap: Swap, what: str) -> None:
    arguments, key, value = EXPORTS[what]
    seen = both(swap.front(stage.nbdkit(*arguments)), TOLD)
    if value is not None:
        assert seen["full"][key] == value


@pytest.mark.parametrize("line", ["rotational = true", "readonly = true", "multifile = false"])
def test_nbd_server_tells(stage: Bench, swap: Swap, line: str) -> None:
    directory = stage.directory()
    server = NbdServer(directory, stage.image(MIB))
    with (directory / "nbd-server.conf").open("a") as config:
        config.write(f"{line}\n")
    with server:
        seen = both(swap.front(server), TOLD, "disk")
    assert seen["less"]["rotational"] is line.startswith("rotational")
    assert seen["less"]["read-only"] is line.startswith("readonly")


def test_cache_is_a_request_of_its_own(stage: Bench) -> None:
    """Of any length: no data comes back."""
    watched = Watched(stage, "--filter=nocache", "memory", "6G", "cachemode=nop")
    script = """
    h = connect()
    h.cache(1, 1)
    h.cache(64 << 20, 512)
    h.cache(3 << 30, 3 << 30)
    report(past=failed(connect(strict_mode=0).cache, 2, (6 << 30) - 1))
    h.shutdown()
    """
    assert nbdsh(script, watched.gateway().client()) == {"past": "EINVAL"}
    assert [tuple(one) for one in watched.requests()] == [
        ("Cache", 1, 1, False),
        ("Cache", 512, 64 * MIB, False),
        ("Cache", 3 << 30, 3 << 30, False),
    ]


def test_trim_is_a_request_of_any_length(stage: Bench) -> None:
    watched = Watched(stage, "memory", "6G")
    script = """
    h = connect()
    h.pwrite(b"x" * 4096, 4 << 30)
    h.trim((4 << 30) - 512, 1 << 30)
    h.trim(1, 0, nbd.CMD_FLAG_FUA)
    report(after=h.pread(4096, 4 << 30) == bytes(4096))
    h.shutdown()
    """
    assert nbdsh(script, watched.gateway().client()) == {"after": True}
    assert [tuple(one) for one in watched.requests("Trim")] == [
        ("Trim", 1 << 30, (4 << 30) - 512, False),
        ("Trim", 0, 1, True),
    ]


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit"])
def test_no_hole_keeps_the_room(stage: Bench, swap: Swap, server: str) -> None:
    """With NO_HOLE what is zeroed stays allocated, and without it need not."""
    image = stage.image(8 * MIB)
    if server == "nbdkit":
        front = swap.front(stage.nbdkit("file", image))
    else:
        front = swap.front(stage.qemu_nbd("--discard=unmap", "-f", "raw", image))
    script = """
    h = connect()
    h.pwrite(b"x" * (4 << 20), 0)
    h.flush()
    h.zero(1 << 20, 0, nbd.CMD_FLAG_NO_HOLE)
    h.zero(1 << 20, 2 << 20)
    h.flush()
    report(zeroes=h.pread(1 << 20, 0) == bytes(1 << 20) == h.pread(1 << 20, 2 << 20))
    h.shutdown()
    """
    rooms = []
    for client in (front.client(), front.direct()):
        assert nbdsh(script, client) == {"zeroes": True}
        rooms.append(image.stat().st_blocks * 512)
    assert rooms[0] == rooms[1] >= 3 * MIB
    assert image.read_bytes() == bytes(MIB) + b"x" * MIB + bytes(MIB) + b"x" * MIB + bytes(4 * MIB)


def test_fua_on_commands_that_change_nothing(stage: Bench) -> None:
    """It is legal on all of them. An upstream that knows FUA need not see it on those."""
    watched = Watched(stage, "memory", "1M")
    script = """
    h = connect(strict_mode=0)
    fua = nbd.CMD_FLAG_FUA
    answers = [failed(h.pread, 512, 0, fua), failed(h.cache, 512, 0, fua), failed(h.flush, fua)]
    h.shutdown()
    report(answers=answers)
    """
    assert nbdsh(script, watched.gateway().client()) == {"answers": [None] * 3}
    assert [one.command for one in watched.requests()] == ["Read", "Cache", "Flush"]
