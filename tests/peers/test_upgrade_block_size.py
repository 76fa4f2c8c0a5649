"""`block-size`: what is too long for the upstream is taken apart and joined again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.bench import MIB, NO_UPGRADES, Bench
from tests.peers.watched import Swap, Watched, covers, peak_memory, staged
from tests.support.peers import check, nbdsh
from tests.support.trixie import Trixie

KIB = 1 << 10
SIZE = 64 * MIB


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


@pytest.fixture(scope="module")
def swap(stage: Bench) -> Swap:
    return Swap(stage)


def limited(
    *plugin: str | Path, least: int = 1, preferred: int = 4096, most: int = 64 * KIB
) -> list[str | Path]:
    """Arguments for an nbdkit that refuses what is outside these sizes."""
    return [
        *("--filter=blocksize-policy", *plugin, "blocksize-error-policy=error"),
        *(f"blocksize-minimum={least}", f"blocksize-preferred={preferred}"),
        f"blocksize-maximum={most}",
    ]


LONG = """
import random
h = connect(request_structured_replies=args["structured"], request_block_size=args["asks"])
source = random.Random(9)
model = bytearray(h.get_size())
for offset, length in args["ranges"]:
    data = source.randbytes(length)
    h.pwrite(data, offset)
    model[offset:offset + length] = data
wrong = [one for one in args["ranges"] if h.pread(one[1], one[0]) != model[one[0]:sum(one)]]
# Many at once, which do not overlap.
cookies, at = [], 0
for n in range(40):
    length = source.choice([1 << 10, 64 << 10, (64 << 10) + 1024, 200 << 10, 1 << 20])
    data = source.randbytes(length)
    model[at:at + length] = data
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at))
    at += length
until(h, lambda: not h.aio_in_flight())
assert all(h.aio_command_completed(one) for one in cookies)
for at in range(0, len(model), 16 << 20):
    wrong += [] if h.pread(16 << 20, at) == model[at:at + (16 << 20)] else [["last", at]]
with open(args["model"], "wb") as file:
    file.write(model)
report(wrong=wrong, sizes=[h.get_block_size(i) for i in range(3)])
h.flush()
h.shutdown()
"""


@pytest.mark.parametrize("structured", [True, False], ids=["sr", "simple"])
@pytest.mark.parametrize("upstream", [[], ["--no-sr"]], ids=["sr-upstream", "simple-upstream"])
def test_long_requests(stage: Bench, structured: bool, upstream: list[str]) -> None:
    image, model = stage.image(SIZE), stage.directory() / "model"
    watched = Watched(stage, *upstream, *limited("file", image))
    front = watched.gateway()
    ranges = [(0, 32 * MIB), (12345, MIB), (SIZE - 5 * MIB - 1, 5 * MIB + 1), (65535, 65537)]
    ranges += [(7, 65536), (0, 65537), (3 * MIB, 1), (65536 * 3 + 1, 65536 * 2 - 1)]
    seen = nbdsh(
        LONG,
        front.client(),
        **{"structured": structured, "asks": True, "ranges": ranges, "model": model},
    )
    assert seen == {"wrong": [], "sizes": [1, 4096, 32 * MIB]}
    assert image.read_bytes() == model.read_bytes()
    assert max(one.count for one in watched.requests("Read", "Write")) == 64 * KIB
    # The first write arrived as parts that fit together.
    first = watched.requests("Write")[:512]
    assert covers(first, 0, 32 * MIB)


def test_a_client_that_does_not_ask_for_sizes(stage: Bench) -> None:
    """It is not told, and it is bound by nothing; the gateway finds out by itself."""
    image, model = stage.image(SIZE), stage.directory() / "model"
    watched = Watched(stage, *limited("file", image, most=MIB))
    seen = nbdsh(
        LONG,
        watched.gateway().client(),
        **{"structured": True, "asks": False, "model": model},
        ranges=[(0, 32 * MIB), (1, 2 * MIB)],
    )
    assert seen == {"wrong": [], "sizes": [0, 0, 0]}
    assert image.read_bytes() == model.read_bytes()
    assert max(one.count for one in watched.requests("Read", "Write")) == MIB


def test_the_minimum_is_kept_in_every_part(stage: Bench) -> None:
    """A maximum need not be a power of two. Parts are whole blocks."""
    image, model = stage.image(SIZE), stage.directory() / "model"
    least, most = 4 * KIB, 20 * KIB
    watched = Watched(stage, *limited("file", image, least=least, preferred=least, most=most))
    script = """
    import random
    h = connect(strict_mode=0)
    data = random.Random(1).randbytes(3 << 20)
    h.pwrite(data, 8192)
    odd = [(4097, 0), (1, 0), (3 << 20, 512), ((1 << 20) + 512, 0), (4095, 4096)]
    report(right=h.pread(3 << 20, 8192) == data, sizes=[h.get_block_size(i) for i in range(3)],
           odd=[failed(h.pread, *one) for one in odd] +
               [failed(h.pwrite, bytes(one[0]), one[1]) for one in odd])
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client(), model=model)
    assert seen == {"right": True, "sizes": [least, least, 32 * MIB], "odd": ["EINVAL"] * 10}
    for command in ("Read", "Write"):
        requests = watched.requests(command)
        assert covers(requests, 8192, 3 * MIB)
        assert (
            {one.offset % least for one in requests}
            == {0}
            == {one.count % least for one in requests}
        )
        assert max(one.count for one in requests) <= most


SIZES = {
    # The upstream's, and what a client is told.
    "small": ((512, 4096, 64 * KIB), [512, 4096, 32 * MIB]),
    "just-32-mib": ((1, 4096, 32 * MIB), [1, 4096, 32 * MIB]),
    "more": ((4096, 4096, 48 * MIB), [4096, 4096, 48 * MIB]),
    "unlimited": ((64 * KIB, MIB, 0xFFFFFFFF), [64 * KIB, MIB, 0xFFFFFFFF]),
}


@pytest.mark.parametrize("what", SIZES)
def test_sizes_that_are_told(stage: Bench, swap: Swap, what: str) -> None:
    (least, preferred, most), told = SIZES[what]
    server = stage.nbdkit(*limited("memory", "64M", least=least, preferred=preferred, most=most))
    script = """
    h = connect()
    top = min(h.get_block_size(nbd.SIZE_MAXIMUM), 40 << 20)
    h.pwrite(b"x" * top, 0)
    report(sizes=[h.get_block_size(i) for i in range(3)], right=h.pread(top, 0) == b"x" * top)
    h.shutdown()
    """
    assert nbdsh(script, swap.front(server).client()) == {"sizes": told, "right": True}


def test_reads_have_no_maximum(stage: Bench) -> None:
    """In chunks: 100 MiB in one request, of which the gateway holds next to nothing."""
    watched = Watched(stage, *limited("pattern", "1G", most=MIB))
    front = watched.gateway()
    nbdsh("h = connect(); h.pread(8 << 20, 0); h.shutdown(); report()", front.client())
    before = peak_memory(front.gateway)
    watched.forget()
    script = """
    h = connect()
    size = 60 << 20
    read = h.pread(size, 4096)
    wrong = [at for at in range(0, size, 8) if read[at:at + 8] != (at + 4096).to_bytes(8, "big")]
    report(wrong=wrong)
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"wrong": []}
    assert covers(watched.requests("Read"), 4096, 60 * MIB)
    assert peak_memory(front.gateway) - before < 8 * MIB


BROKEN = (
    *("eval", "get_size=echo 16M", "can_write=exit 0", "can_flush=exit 0"),
    "thread_model=echo parallel",
)


@pytest.mark.parametrize("structured", [True, False], ids=["sr", "simple"])
def test_an_error_in_the_middle(stage: Bench, structured: bool) -> None:
    """One part fails, and so the whole; others are not touched."""
    bad = "test $4 != 2097152 || { echo ENOSPC >&2; exit 1; }"
    watched = Watched(
        stage,
        *limited(
            *BROKEN,
            f"pwrite=cat > /dev/null; {bad}",
            f'pread={bad}; yes "$(printf %015d "$4")" | head -c "$3"',
            most=256 * KIB,
        ),
    )
    script = """
    h = connect(request_structured_replies=args["structured"])
    def content(offset, length):
        parts = range(offset, offset + length, 1 << 18)
        return b"".join(b"%015d\\n" % at * 16384 for at in parts)
    M = 1 << 20
    places = {"over": (4 * M, M), "before": (2 * M, 0), "last": (M, M + (M >> 2)),
              "first": (M, 2 * M), "behind": (4 * M, 4 * M)}
    answers = {}
    for name, (length, offset) in places.items():
        into, others = nbd.Buffer(length), [nbd.Buffer(1 << 20) for _ in range(4)]
        whole = h.aio_pread(into, offset)
        cookies = [h.aio_pread(one, (8 + n) << 20) for n, one in enumerate(others)]
        write = failed(h.pwrite, bytes(length), offset)
        until(h, lambda: not h.aio_in_flight())
        read = failed(h.aio_command_completed, whole)
        right = read or into.to_bytearray() == content(offset, length)
        fine = [h.aio_command_completed(one) and other.to_bytearray() == content((8 + n) << 20, M)
                for n, (one, other) in enumerate(zip(cookies, others))]
        answers[name] = [write, right, all(fine)]
    report(answers=answers)
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client(), structured=structured)
    bad_one, good = ["ENOSPC", "ENOSPC", True], [None, True, True]
    assert seen["answers"] == {
        **{"over": bad_one, "before": good, "last": bad_one, "first": bad_one, "behind": good}
    }


@pytest.mark.parametrize("structured", [True, False], ids=["sr", "simple"])
def test_parts_that_come_back_in_any_order(stage: Bench, structured: bool) -> None:
    """Each waits at a FIFO, and they are opened from the last to the first, as far as they are
    under way."""
    gates = stage.directory()
    offsets = range(0, MIB, 256 * KIB)
    for offset in offsets:
        os.mkfifo(gates / f"r{offset}")
    watched = Watched(
        stage,
        *limited(
            *BROKEN,
            f"pread=test $4 -ge {MIB} || : < {gates}/r$4; "
            'yes "$(printf %015d "$4")" | head -c "$3"',
            "pwrite=cat > /dev/null",
            most=256 * KIB,
        ),
    )
    script = """
    h = connect(request_structured_replies=args["structured"])
    into = nbd.Buffer(1 << 20)
    seen = []
    cookie = h.aio_pread(into, 0)
    def opened(offset):
        try:
            os.close(os.open(f"{args['gates']}/r{offset}", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True
    for offset in reversed(args["offsets"]):
        until(h, lambda: opened(offset))
        seen.append(h.aio_command_completed(cookie))
        h.pwrite(bytes(512), 8 << 20)
    until(h, lambda: h.aio_command_completed(cookie))
    right = into.to_bytearray() == b"".join(b"%015d\\n" % at * 16384 for at in args["offsets"])
    report(early=any(seen[:-1]), right=right)
    h.shutdown()
    """
    seen = nbdsh(
        script,
        watched.gateway().client(),
        **{"structured": structured, "gates": gates, "offsets": list(offsets)},
    )
    assert seen == {"early": False, "right": True}


def test_a_long_zero_or_trim_is_not_split(stage: Bench) -> None:
    """They have no payload; the maximum is not for them."""
    watched = Watched(stage, *limited("memory", "64M"))
    script = """
    h = connect()
    h.zero(64 << 20, 0)
    h.trim(33 << 20, 512)
    h.shutdown()
    report()
    """
    nbdsh(script, watched.gateway().client())
    assert [one[:3] for one in watched.requests()] == [
        ("Zero", 0, 64 * MIB),
        ("Trim", 512, 33 * MIB),
    ]


@pytest.mark.parametrize("program", ["nbdcopy", "qemu-img"])
def test_copies(stage: Bench, program: str) -> None:
    source = stage.directory() / "source"
    pieces = [random.Random(n).randbytes(MIB) if n % 4 else bytes(MIB) for n in range(24)]
    source.write_bytes(b"".join(pieces))
    image, copy = stage.image(24 * MIB), stage.directory() / "copy"
    watched = Watched(stage, *limited("file", image, least=512))
    client = watched.gateway().client()
    if program == "nbdcopy":
        big = ["--request-size=8388608", "--requests=4"]
        check("nbdcopy", *big, source, client.uri)
        check("nbdcopy", *big, client.uri, copy)
    else:
        flags = ["-n", "-f", "raw", "--target-image-opts"]
        check(
            *("qemu-img", "convert", *client.qemu_object(), *flags, source, client.qemu_image()),
        )
        check("qemu-img", "convert", *client.qemu(), "-O", "raw", copy)
    assert image.read_bytes() == copy.read_bytes() == source.read_bytes()
    assert max(one.count for one in watched.requests("Read", "Write")) == 64 * KIB


@pytest.mark.parametrize("flags", [["--no-upgrade", "block-size"], NO_UPGRADES])
def test_without_it_the_upstream_decides(stage: Bench, flags: list[str]) -> None:
    watched = Watched(stage, *limited("memory", "8M"))
    front = watched.gateway(*flags)
    script = """
    h = connect(strict_mode=0)
    report(sizes=[h.get_block_size(i) for i in range(3)], most=failed(h.pwrite, bytes(65536), 0),
           more=failed(h.pwrite, bytes(65537), 0), much=failed(h.pwrite, bytes(4 << 20), 0),
           read=failed(h.pread, 65537, 0), still=failed(h.pread, 65536, 1))
    h.shutdown()
    """
    seen = nbdsh(script, front.client())
    assert seen == nbdsh(script, front.direct())
    assert seen["sizes"] == [1, 4096, 64 * KIB]
    assert (seen["more"], seen["much"], seen["read"]) == ("EINVAL",) * 3
    assert (seen["most"], seen["still"]) == (None, None)


def test_an_upstream_that_hangs_up_on_what_is_too_long(newer: Trixie, swap: Swap) -> None:
    """It never gets the reason to."""
    with newer.nbdkit(
        *map(str, limited("memory", "64M")), "blocksize-write-disconnect=131072"
    ) as server:
        script = """
        h = connect()
        h.pwrite(b"z" * (32 << 20), 77)
        report(right=h.pread(32 << 20, 77) == b"z" * (32 << 20))
        h.shutdown()
        """
        assert nbdsh(script, swap.front(server).client()) == {"right": True}
