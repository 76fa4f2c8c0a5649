"""Both directions full with real servers, and extents of a disk beyond what 32 bits can count."""

from __future__ import annotations

import random

import pytest

from tests.hostile.duplex import Duplex, narrow
from tests.hostile.session import Session
from tests.peers.bench import MIB, Bench, Front
from tests.support.peers import Server, check, nbdsh
from tests.support.rawclient import Cmd, Info, RawClient, Request, tls_context

EACH = 32  # MiB in either direction
GIB = 1 << 30


def entered(front: Front, *, only_1_2: bool = False, room: int = 0) -> RawClient:
    client = RawClient(front.gateway.uri)
    if room:
        narrow(client.sock, room)
    client.greet()
    client.start_tls(tls_context(front.pki, only_1_2=only_1_2))
    return client


@pytest.mark.parametrize(
    ("kind", "only_1_2"),
    [("nbdkit", False), ("nbdkit", True), ("qemu-nbd", False)],
    ids=["nbdkit-1.3", "nbdkit-1.2", "qemu-nbd-1.3"],
)
def test_large_writes_and_reads_cross(bench: Bench, kind: str, only_1_2: bool) -> None:
    """64 at a time, of 1 MiB each, in turns, by a client with little room in its sockets."""
    size = 2 * EACH * MIB
    if kind == "nbdkit":
        server: Server = bench.nbdkit("memory", str(size))
    else:
        server = bench.qemu_nbd("-f", "raw", bench.image(size))
    front = bench.gateway(server)
    source = random.Random(kind)
    old, new = (source.randbytes(EACH * MIB) for _ in range(2))
    with entered(front, only_1_2=only_1_2, room=1 << 16) as client:
        client.go()
        duplex = Duplex(client)

        def parts(cmd: int, at: int, data: bytes = b"") -> list[Request]:
            found = []
            for number in range(EACH):
                payload = data[number * MIB :][:MIB]
                place = at + number * MIB
                cookie = cmd << 32 | place
                found.append(Request(cmd, place, MIB, cookie, payload=payload))
            return found

        def is_right(request: Request, data: bytes) -> bool:
            if request.cmd == Cmd.WRITE:
                return True
            disk, at = (old, request.offset - EACH * MIB)
            if at < 0:
                disk, at = new, request.offset
            return data == disk[at : at + MIB]

        duplex.exchange(parts(Cmd.WRITE, EACH * MIB, old), 64)
        writes, reads = parts(Cmd.WRITE, 0, new), parts(Cmd.READ, EACH * MIB)
        turns = [one for pair in zip(writes, reads, strict=True) for one in pair]
        duplex.exchange(turns, 64, is_right)
        duplex.exchange(parts(Cmd.READ, 0), 64, is_right)
        client.send(Request(Cmd.DISC).pack())
        assert client.recv_to_end() == b""


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd", "nbdkit-blocksize"])
def test_extents_of_8_gib(bench: Bench, kind: str) -> None:
    """CVE-2025-47711 and CVE-2025-47712, nbdkit's own: lengths near 2^32 on a sparse disk.

    The last is the filter that had one of them. Whatever the server says or does, what it tells of
    is within the disk and in step, or it is lost; another client's data are right.
    """
    if kind == "qemu-nbd":
        server: Server = bench.qemu_nbd("-f", "raw", bench.image(8 * GIB))
    else:
        flags = ("--filter=blocksize",) if kind == "nbdkit-blocksize" else ()
        server = bench.nbdkit(*flags, "memory", "8G")
    front = bench.gateway(server)
    nbdsh("h = connect(); h.pwrite(b'here' * 1024, (6 << 30) + 4096); h.flush()", front.client())
    names = [b"base:allocation"]
    with entered(front) as client:
        client.ask_structured()
        contexts = client.set_contexts(names)
        session = Session(client, client.go(infos=[Info.BLOCK_SIZE]), contexts)
        assert session.export.size == 8 * GIB
        for offset in (0, 4096, 4 * GIB, 6 * GIB, 8 * GIB - 0xFFFFF000):
            for length in (0xFFFFFFFF, 0xFFFFF000, 0x80000000, 0x7FFFFFFF):
                length = min(length, 8 * GIB - offset)
                answer = session.ask(Cmd.BLOCK_STATUS, offset, length)
                if kind == "nbdkit-blocksize" and answer.error:
                    continue
                assert answer.error == 0
                (extents,) = answer.extents.values()
                assert sum(size for size, _ in extents) > 0
        answer = session.ask(Cmd.READ, (6 << 30) + 4096, 4096)
        assert answer.data == b"here" * 1024
        session.disc()
    if kind != "nbdkit-blocksize":
        told = check("nbdinfo", "--map", front.client().uri).splitlines()
        assert sum(int(line.split()[1]) for line in told) == 8 * GIB
        assert len(told) > 1
