"""`structured-replies`: in front of a server with simple replies only, a client gets chunks, holes
for zeroes, and errors in words."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.bench import MIB, NO_UPGRADES, Bench
from tests.peers.watched import Request, Swap, Watched, peak_memory, staged, traffic
from tests.support.peers import Server, check, nbdsh
from tests.support.rawclient import CHUNK, CHUNK_MAGIC, Cmd, Ct, Err, RawClient, tls_context
from tests.support.rawclient import Request as RawRequest

GIB = 1 << 30
SIZE = 64 * MIB
BLOCK = 4096

# Where there is data; all else is zeroes.
PIECES = [(0, 512), (BLOCK, BLOCK), (10 * BLOCK + 1, 1), (MIB - 1, 2), (2 * MIB, MIB + 100)]
PIECES += [(5 * MIB + BLOCK * 3, BLOCK * 2), (33 * MIB + 77, 5 * MIB), (SIZE - 1, 1)]


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


@pytest.fixture(scope="module")
def picture(stage: Bench) -> Path:
    path = stage.image(SIZE)
    with path.open("r+b") as file:
        for offset, length in PIECES:
            file.seek(offset)
            file.write(bytes(byte | 1 for byte in random.Random(offset).randbytes(length)))
    return path


@pytest.fixture(scope="module")
def swap(stage: Bench) -> Swap:
    return Swap(stage, "--export", "disk")


SIMPLE: dict[str, Callable[[Bench, Path], Server]] = {
    "no-sr": lambda stage, image: stage.nbdkit("--no-sr", "file", image),
    "oldstyle": lambda stage, image: stage.nbdkit("-o", "--filter=nozero", "split", image),
    "no-options": lambda stage, image: stage.nbdkit("--mask-handshake=2", "file", image),
    "nbd-server": lambda stage, image: stage.nbd_server(image),
}

READS = """
h = connect()
with open(args["picture"], "rb") as file:
    disk = file.read()
faults, summary = [], []
def holes(offset, length):
    # Whole blocks of zeroes.
    found, at = [], offset
    while at < offset + length:
        stop = min(offset + length, at - at % 4096 + 4096)
        if stop - at == 4096 and not any(disk[at:stop]):
            found.append((at, stop))
        at = stop
    return found
for offset, length in args["reads"]:
    for flags in (0, nbd.CMD_FLAG_DF):
        chunks = []
        h.pread_structured(length, offset, lambda data, at, kind, error:
                           chunks.append((at, bytes(data), kind)), flags)
        at = offset
        for start, data, kind in sorted(chunks, key=lambda chunk: chunk[0]):
            if start != at or data != disk[at:at + len(data)] or not data:
                faults.append([offset, length, flags, "other data", start])
            at += len(data)
        if at != offset + length:
            faults.append([offset, length, flags, "not all"])
        if flags and len(chunks) != 1:
            faults.append([offset, length, flags, "more than one chunk"])
        if not flags:
            told = [(at, at + len(data)) for at, data, kind in chunks if kind == nbd.READ_HOLE]
            for start, stop in holes(offset, length):
                if not any(a <= start and stop <= b for a, b in told):
                    faults.append([offset, length, "zeroes sent as data", start])
            summary.append([len(told), len(chunks) - len(told)])
report(faults=faults[:10], summary=summary, df=h.can_df(), sr=h.get_structured_replies_negotiated())
h.shutdown()
"""


@pytest.mark.parametrize("upstream", SIMPLE)
def test_chunks_and_holes(stage: Bench, swap: Swap, picture: Path, upstream: str) -> None:
    front = swap.front(SIMPLE[upstream](stage, picture))
    source = random.Random(4)
    edges = [(at + d, n) for at, _ in PIECES[:6] for d in (0, 1) for n in (1, 511, 4096, 9000)]
    reads = [*edges, (0, 32 * MIB), (MIB, 4 * MIB), (SIZE - 9000, 9000), (7 * MIB + 3, 5 * MIB)]
    reads += [(source.randrange(SIZE - MIB), source.randrange(1, MIB)) for _ in range(20)]
    seen = nbdsh(READS, front.client(), reads=reads, picture=picture)
    assert seen["faults"] == []
    assert (seen["df"], seen["sr"]) == (True, True)
    holes, data = seen["summary"][reads.index((0, 32 * MIB))]
    assert holes >= 5
    assert data >= 5


def test_reads_longer_than_32_mib(stage: Bench, picture: Path) -> None:
    """In chunks there is no maximum for the client; the upstream is asked for 32 MiB at a time."""
    watched = Watched(stage, "--no-sr", "file", picture)
    front = watched.gateway()
    nbdsh("h = connect(); h.pread(32 << 20, 0); h.shutdown(); report()", front.client())
    before = peak_memory(front.gateway)
    script = """
    h = connect()
    with open(args["picture"], "rb") as file:
        disk = file.read()
    read = bytearray(len(disk))
    def chunk(data, at, kind, error):
        read[at:at + len(data)] = data
    h.pread_structured(len(disk), 0, chunk)
    # With DF it would have to be in one chunk.
    report(right=read == disk, df=failed(h.pread_structured, 33 << 20, 0, chunk, nbd.CMD_FLAG_DF))
    h.shutdown()
    """
    seen = nbdsh(script, front.client(), picture=picture)
    assert seen == {"right": True, "df": "EOVERFLOW"}
    assert max(one.count for one in watched.requests("Read")) <= 32 * MIB
    assert peak_memory(front.gateway) - before < 8 * MIB


@pytest.mark.parametrize("upstream", ["no-sr", "oldstyle"])
def test_zeroes_cost_little_on_the_wire(stage: Bench, upstream: str) -> None:
    size = GIB if upstream == "no-sr" else 256 * MIB
    flags = ["--no-sr"] if upstream == "no-sr" else ["-o", "--filter=nozero"]
    front = stage.gateway(stage.nbdkit(*flags, "null", str(size)))
    script = """
    h = connect()
    size, length = h.get_size(), 32 << 20
    for at in range(0, size, length):
        h.pread(length, at)
    h.shutdown()
    report()
    """
    nbdsh(script, front.client())
    incoming, outgoing = traffic(front.gateway, 1)
    assert incoming < 10_000
    assert outgoing < size // 1000  # 32 bytes for what came at a time: how much that is, varies


@pytest.mark.parametrize("program", ["nbdcopy", "qemu-img"])
@pytest.mark.parametrize("upstream", SIMPLE)
def test_copies(
    stage: Bench, swap: Swap, picture: Path, tmp_path: Path, program: str, upstream: str
) -> None:
    front = swap.front(SIMPLE[upstream](stage, picture))
    client, copy = front.client(), tmp_path / "copy"
    if program == "nbdcopy":
        check("nbdcopy", client.uri, copy)
    else:
        check("qemu-img", "convert", *client.qemu(), "-O", "raw", copy)
    check("cmp", copy, picture)


def test_errors_have_a_text(stage: Bench, swap: Swap, pki: Path) -> None:
    """In an error chunk, in answer to the upstream's number; and the session goes on."""
    server = stage.nbdkit(
        *("--no-sr", "eval", "get_size=echo 1M", "can_write=exit 0"),
        'pread=test $4 != 4096 || { echo EIO >&2; exit 1; }; head -c "$3" /dev/zero',
        "pwrite=cat > /dev/null; echo ENOSPC >&2; exit 1",
    )
    front = swap.front(server)
    script = """
    h = connect(strict_mode=0)
    bad = []
    call = failed(h.pread_structured, 512, 4096, lambda data, at, kind, error: bad.append(kind))
    report(read=call, bad=bad, write=failed(h.pwrite, bytes(512), 0),
           past=failed(h.pread, 512, 1 << 20), good=failed(h.pread, 512, 0),
           status=failed(h.block_status, 512, 0, lambda *row: None))
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {
        **{"read": "EIO", "bad": [], "write": "ENOSPC", "past": "EINVAL", "good": None},
        "status": "EINVAL",
    }
    with RawClient(front.gateway.uri) as client:
        client.greet()
        client.start_tls(tls_context(pki))
        client.ask_structured()
        client.go()
        for offset, error in ((4096, Err.EIO), (MIB, Err.EINVAL)):
            client.send(RawRequest(Cmd.READ, offset, 512, cookie=offset).pack())
            magic, flags, kind, cookie, length = CHUNK.unpack(client.recv_exactly(CHUNK.size))
            assert (magic, flags, kind, cookie) == (CHUNK_MAGIC, 1, Ct.ERROR, offset)
            data = client.recv_exactly(length)
            assert int.from_bytes(data[:4], "big") == error
            assert data[6:].decode().isprintable()
            assert int.from_bytes(data[4:6], "big") == length - 6 > 5


def test_no_meta_contexts_are_made_up(stage: Bench, swap: Swap) -> None:
    front = swap.front(stage.nbdkit("--no-sr", "memory", "1M"))
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.add_meta_context("base:allocation")
    h.add_meta_context("qemu:allocation-depth")
    h.connect_uri(args["uri"])
    report(has=[h.can_meta_context(one) for one in ("base:allocation", "qemu:allocation-depth")])
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"has": [False, False]}


def test_requests_arrive_as_they_were_asked(stage: Bench, picture: Path) -> None:
    """No read is cut for the sake of the holes in it, and DF is for us alone."""
    watched = Watched(stage, "--no-sr", "file", picture)
    script = """
    h = connect()
    h.pread(32 << 20, 4097)
    h.pread_structured(100_000, 7, lambda *part: None, nbd.CMD_FLAG_DF)
    h.shutdown()
    report()
    """
    nbdsh(script, watched.gateway().client())
    assert watched.requests() == [
        Request("Read", 4097, 32 * MIB),
        Request("Read", 7, 100_000),
    ]


def test_many_reads_at_once(stage: Bench, swap: Swap, picture: Path) -> None:
    """Holes and data of different replies never meet."""
    front = swap.front(stage.nbdkit("--no-sr", "file", picture))
    script = """
    import random
    h = connect()
    with open(args["picture"], "rb") as file:
        disk = file.read()
    source = random.Random(6)
    reads = []
    for n in range(500):
        length = source.choice([1, 512, 4096, 5000, 65536, 300_000])
        offset = source.randrange(6 << 20)
        flags = nbd.CMD_FLAG_DF if n % 3 == 0 else 0
        into = nbd.Buffer(length)
        cookie = h.aio_pread_structured(into, offset, lambda *part: None, flags=flags)
        reads.append((cookie, into, offset, length))
    until(h, lambda: not h.aio_in_flight())
    wrong = [[offset, length] for cookie, into, offset, length in reads
             if not h.aio_command_completed(cookie)
             or into.to_bytearray() != disk[offset:offset + length]]
    report(wrong=wrong)
    h.shutdown()
    """
    assert nbdsh(script, front.client(), picture=picture) == {"wrong": []}


@pytest.mark.parametrize("flags", [["--no-upgrade", "structured-replies"], NO_UPGRADES])
def test_without_it_all_is_as_without_the_gateway(
    stage: Bench, picture: Path, flags: list[str]
) -> None:
    front = stage.gateway(stage.nbdkit("--no-sr", "file", picture), *flags)
    script = """
    h = connect(strict_mode=0)
    chunks = []
    h.pread_structured(4 << 20, 0, lambda data, at, kind, error:
                       chunks.append([at, len(data), kind]))
    report(sr=h.get_structured_replies_negotiated(), df=h.can_df(), chunks=chunks,
           flag=failed(h.pread, 512, 0, nbd.CMD_FLAG_DF), still=failed(h.pread, 512, 0))
    h.shutdown()
    """
    seen = nbdsh(script, front.client())
    assert seen == nbdsh(script, front.direct())
    assert (seen["sr"], seen["df"], len(seen["chunks"])) == (False, False, 1)


def test_a_client_that_does_not_ask_for_them_gets_none(
    stage: Bench, swap: Swap, picture: Path
) -> None:
    front = swap.front(stage.nbdkit("--no-sr", "file", picture))
    script = """
    h = connect(request_structured_replies=False)
    with open(args["picture"], "rb") as file:
        disk = file.read(32 << 20)
    report(sr=h.get_structured_replies_negotiated(), df=h.can_df(),
           right=h.pread(32 << 20, 0) == disk)
    h.shutdown()
    """
    seen = nbdsh(script, front.client(), picture=picture)
    assert seen == {"sr": False, "df": False, "right": True}
