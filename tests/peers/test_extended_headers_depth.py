"""Extended headers: many requests at once, and sessions that end in the middle of some."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Front
from tests.peers.newer import GIB, KIB, PIECES, SIZE, Disks, Model, disks, noise
from tests.support.rawclient import RawClient, Rep, tls_context
from tests.support.trixie import Trixie

WRITE = 1


@pytest.fixture(scope="module")
def stage(newer: Trixie, pki: Path) -> Iterator[Disks]:
    with disks(newer, pki) as stage:
        yield stage


# ---------------------------------------------------------------- many at once

# Slots of 256 MiB, four of them in each GiB. In the first round something is written to each of
# them, four requests a slot; in the second most are read back, some zeroed or trimmed, all at once,
# while the last 5 GiB are zeroed in one request.
AT_ONCE = """
import random
h = connect()
contexts, slot, G = [], 256 << 20, 1 << 30
def data(number, length):
    return random.Random(number).randbytes(length)
jobs = [(n * slot + part * (60 << 20), data(4 * n + part, args["lengths"][part]))
        for n in range(44) for part in range(4)]
bad, done = [], []
def ended(number):
    def callback(error):
        done.append(number)
        if error.value:
            bad.append([number, errno.errorcode[error.value]])
        return 1
    return callback
def round_of(starts):
    for start in starts:
        start()
        while h.aio_in_flight() > args["depth"]:
            h.poll(-1)
    until(h, lambda: not h.aio_in_flight())
round_of(
    lambda offset=offset, content=content, number=number: h.aio_pwrite(
        nbd.Buffer.from_bytearray(bytearray(content)), offset, completion=ended(number),
        flags=nbd.CMD_FLAG_FUA if number % 7 == 0 else 0)
    for number, (offset, content) in enumerate(jobs))
buffers = {}
def read(number, offset, length):
    buffers[number] = nbd.Buffer(length)
    h.aio_pread(buffers[number], offset, completion=ended(number))
def second():
    yield lambda: h.aio_zero(5 * G, 11 * G, completion=ended(5000))
    for number, (offset, content) in enumerate(jobs):
        if number % 11 == 3:
            yield lambda o=offset: h.aio_zero(1 << 20, o, completion=ended(number))
        elif number % 11 == 7:
            yield lambda o=offset: h.aio_trim(1 << 20, o, completion=ended(number))
        else:
            yield lambda n=number, o=offset, c=content: read(n, o, len(c))
    yield lambda: h.aio_cache(1 << 20, 0, completion=ended(5001))
round_of(second())
h.flush()
report(bad=bad, done=len(done), wrong=[n for n, buffer in buffers.items()
                                       if buffer.to_bytearray() != jobs[n][1]], read=len(buffers))
h.shutdown()
"""
LENGTHS = (4 * KIB, 70_001, 1, 300 * KIB)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("depth", [8, 200])
def test_many_at_once(stage: Disks, kind: str, depth: int) -> None:
    image, model = stage.image(kind), Model.at_first()
    front = stage.front(image, kind=kind)
    found = stage.newer.nbdsh(AT_ONCE, front.client(), depth=depth, lengths=LENGTHS)
    assert found["bad"] == []
    assert found["wrong"] == []
    assert found["done"] == 2 * 44 * 4 + 2
    assert found["read"] == 44 * 4 * 9 // 11
    for number in range(44 * 4):
        slot, part = divmod(number, 4)
        offset = slot * 256 * MIB + part * 60 * MIB
        model.write(offset, noise(number, LENGTHS[part]))
        if number % 11 in (3, 7):
            model.zero(offset, MIB)
    model.zero(11 * GIB, 5 * GIB)
    front.server.kill()
    stage.check(model, image, kind)


def test_two_sessions_with_the_same_cookies(stage: Disks) -> None:
    front = stage.front(stage.image(), "-r")
    script = """
    import random
    handles, pieces = [connect(), connect()], args["pieces"]
    wanted = [random.Random(seed).randbytes(length) for seed, (_, length) in enumerate(pieces)]
    wrong, pending, cookies = [], [], [set(), set()]
    for turn in range(60):
        for n, h in enumerate(handles):
            seed = (turn + n) % len(pieces)
            offset, length = pieces[seed]
            buffer = nbd.Buffer(length)
            cookie = h.aio_pread(buffer, offset)
            cookies[n].add(cookie)
            pending.append((h, cookie, buffer, seed))
        if turn % 10 == 9:
            for h, cookie, buffer, seed in pending:
                until(h, lambda: h.aio_command_completed(cookie))
                if buffer.to_bytearray() != wanted[seed]:
                    wrong.append([turn, seed])
            pending.clear()
    report(wrong=wrong, same_cookies=cookies[0] == cookies[1])
    for h in handles:
        h.shutdown()
    """
    found = stage.newer.nbdsh(script, front.client(), pieces=PIECES)
    assert found == {"wrong": [], "same_cookies": True}


# ---------------------------------------------------------------- ends


REQUEST = struct.Struct(">IHHQQQ")  # the headers are extended: 32 bytes
CHUNK = struct.Struct(">IHHQQQ")
EXTENDED_HEADERS, REQUEST_MAGIC, CHUNK_MAGIC = 11, 0x21E41C71, 0x6E8A278C
PAYLOAD_LEN, DONE, NONE = 1 << 5, 1, 0


@contextlib.contextmanager
def session(uri: str, pki: Path) -> Iterator[RawClient]:
    """In the transmission phase."""
    with RawClient(uri) as client:
        client.greet()
        client.start_tls(tls_context(pki))
        assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
        assert client.go().size == SIZE
        yield client


def write(client: RawClient, offset: int, data: bytes) -> None:
    head = REQUEST.pack(REQUEST_MAGIC, PAYLOAD_LEN, WRITE, 77, offset, len(data))
    client.send(head + data)
    chunk = CHUNK.unpack(client.recv_exactly(CHUNK.size))
    assert chunk == (CHUNK_MAGIC, DONE, NONE, 77, offset, 0)


@dataclass
class Torn:
    """A disk that clients die on, with what should be on it."""

    front: Front
    image: Path
    model: Model


@pytest.fixture(scope="module")
def torn(stage: Disks) -> Torn:
    image = stage.image()
    return Torn(stage.front(image), image, Model.at_first())


@pytest.mark.parametrize("how", ["fin", "rst", "half-close", "cut-record"])
@pytest.mark.parametrize("sent", [0, 1, 100_000, MIB - 1])
def test_a_client_that_dies_inside_a_write(torn: Torn, pki: Path, how: str, sent: int) -> None:
    """Nothing of a torn WRITE is on the disk; what was written before it is."""
    gateway, mark = torn.front.gateway, noise(sum(how.encode()) + sent, 512)
    with session(gateway.uri, pki) as client:
        write(client, 15 * GIB - 256, mark)
        torn.model.write(15 * GIB - 256, mark)
        end, offset = len(gateway.log()), 4 * GIB - 512 * KIB
        head = REQUEST.pack(REQUEST_MAGIC, PAYLOAD_LEN, WRITE, 78, offset, MIB)
        sealed = client.seal(head + b"\xee" * sent)
        client.sock.sendall(sealed[:-1] if how == "cut-record" else sealed)
        if how == "half-close":
            client.sock.shutdown(socket.SHUT_WR)
            assert client.recv_to_end() == b""
        elif how == "rst":
            client.reset()
    gateway.wait_log(" closed: client left without a word", after=end)
    torn.model.check(torn.image)


def test_the_disk_that_clients_died_on_is_still_served(torn: Torn, pki: Path) -> None:
    with session(torn.front.gateway.uri, pki) as client:
        write(client, 4 * GIB - 512 * KIB, b"\xdd" * MIB)
    torn.model.write(4 * GIB - 512 * KIB, b"\xdd" * MIB)
    torn.model.check(torn.image)


def test_the_upstream_is_killed_with_requests_in_flight(stage: Disks) -> None:
    """Each is answered, with ESHUTDOWN, and later ones too."""
    front = stage.front(stage.image())
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.add_meta_context("base:allocation")
    h.connect_uri(args["uri"])
    report(connected=True)
    deadline = time.monotonic() + 30
    while not os.path.exists(args["stopped"]):
        assert time.monotonic() < deadline
    G, outcomes = 1 << 30, {}
    def ended(name):
        def callback(error):
            outcomes[name] = errno.errorcode.get(error.value)
            return 1
        return callback
    data = nbd.Buffer.from_bytearray(bytearray(4096))
    buffers = [nbd.Buffer(65536) for _ in range(3)]
    for n, buffer in enumerate(buffers):
        h.aio_pread(buffer, n * 5 * G, completion=ended(f"read {n}"))
    h.aio_pwrite(data, 4 * G - 2048, completion=ended("write"), flags=nbd.CMD_FLAG_FUA)
    h.aio_zero(8 * G, 4096, completion=ended("zero"))
    h.aio_trim(5 * G, 4096, completion=ended("trim"))
    h.aio_cache(1 << 20, 13 * G, completion=ended("cache"))
    h.aio_block_status_64(9 * G, 0, lambda *got: 0, completion=ended("status"))
    h.aio_block_status_filter(9 * G, 0, ["base:allocation"], lambda *got: 0,
                              completion=ended("filtered"))
    h.aio_flush(completion=ended("flush"))
    until(h, lambda: not h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE)
    report(sent=True)
    until(h, lambda: not h.aio_in_flight())
    report(outcomes=outcomes, later=failed(h.zero, 5 * G, 0))
    """
    stopped = stage.newer.directory() / "stopped"
    inside = stage.newer.inside / stopped.relative_to(stage.newer.outside)
    upstream = int(front.server.pidfile.read_text())
    with stage.newer.start_nbdsh(script, front.client(), stopped=inside) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == '{"connected": true}\n'
        os.kill(upstream, signal.SIGSTOP)
        stopped.touch()
        assert client.stdout.readline() == '{"sent": true}\n'
        front.server.kill()
        output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    found = json.loads(output)
    assert set(found["outcomes"].values()) == {"ESHUTDOWN"}
    assert len(found["outcomes"]) == 10
    assert found["later"] == "ESHUTDOWN"
    front.gateway.wait_log("closed: upstream lost")
