"""gateway.transport: bytes through plain and TLS channels, in whatever pieces they come."""

from __future__ import annotations

import contextlib
import itertools
import random
import ssl
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway.transport import RECORD, Channel, TLSChannel
from tests import transport_rig
from tests.support.rawclient import tls_context
from tests.transport_rig import (
    MIB,
    ONLY_TLS,
    PROBE,
    STALL_S,
    Connect,
    read,
)

ours, kind, connect = transport_rig.ours, transport_rig.kind, transport_rig.connect  # the fixtures


# ---------------------------------------------------------------- bytes


@PROBE
async def test_both_ways_at_once(connect: Connect, probe: bool) -> None:
    """Byte by byte the same, through buffers far smaller than what is sent."""
    pair = await connect(buffers=4096)
    rng = random.Random(1)
    there, back = rng.randbytes(2 * MIB + 1), rng.randbytes(2 * MIB + 77)
    sizes = [1, 27, 28, 4096, RECORD - 1, RECORD, RECORD + 1, 100_000, 256 << 10]

    async def write(channel: Channel, data: bytes) -> None:
        pieces = itertools.cycle([1, 16, 28, 70_000, RECORD, RECORD + 28, 300_000])
        at = 0
        while at < len(data):
            piece = next(pieces)
            await channel.send_all(memoryview(data)[at : at + piece])
            at += piece

    async def expect(channel: Channel, data: bytes, seed: int) -> None:
        rng = random.Random(seed)
        choose = iter(lambda: rng.choice(sizes), None)
        assert await read(channel, len(data), choose, probe=probe) == data

    with trio.fail_after(6 * STALL_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, pair.near, there)
            nursery.start_soon(write, pair.far, back)
            nursery.start_soon(expect, pair.near, back, 2)
            nursery.start_soon(expect, pair.far, there, 3)
    for channel, sent, got in ((pair.near, there, back), (pair.far, back, there)):
        assert channel.bytes_written == len(sent)
        assert channel.bytes_read == len(got)


@PROBE
@pytest.mark.parametrize("message", [1, 29, RECORD - 1, RECORD, RECORD + 1, 2 * RECORD, 60_000])
async def test_nothing_is_stranded(connect: Connect, message: int, probe: bool) -> None:
    """All has arrived, nothing more comes: what OpenSSL holds has to be given out unasked."""
    pair = await connect()
    data = random.Random(message).randbytes(message)
    for room in (1, 28, 4096, RECORD - 1, RECORD, RECORD + 1, 60_000, 256 << 10):
        if message > 2000 * room:
            continue
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.far.send_all, data)
            with trio.fail_after(STALL_S):
                assert await read(pair.near, message, itertools.repeat(room), probe=probe) == data


@PROBE
async def test_many_small_records(connect: Connect, probe: bool) -> None:
    """All are read, but not in one turn: that would hold up the other clients."""
    pair = await connect()
    data = random.Random(1).randbytes(1000)
    view = memoryview(bytearray(2000))
    got = 0

    async def send() -> None:
        for at in range(len(data)):
            await pair.far.send_all(data[at : at + 1])

    with trio.fail_after(STALL_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            while got < len(data):
                await pair.near.readable()
                filled = pair.near.fill(view[got:], probe=probe)
                assert filled <= 64 or not isinstance(pair.near, TLSChannel)
                got += filled
    assert view[:got] == data


@ONLY_TLS
async def test_records_that_wait_are_not_read_one_by_one(connect: Connect) -> None:
    """A peer that is answered one by one sends one by one, and that is how it would stay."""
    pair = await connect()
    view = memoryview(bytearray(2000))
    for _ in range(20):
        await pair.far.send_all(b"x" * 28)
    counts = []
    with trio.fail_after(STALL_S):
        while sum(counts) < 20 * 28:
            await pair.near.readable()
            counts.append(pair.near.fill(view, probe=False))
    assert counts[0] in (28, 20 * 28)
    assert sum(counts[:2]) == 20 * 28

    async def alone() -> int:
        await pair.far.send_all(b"y" * 28)
        await pair.near.readable()
        return pair.near.fill(view, probe=False)

    with trio.fail_after(STALL_S):
        assert [await alone() for _ in range(10)] == [28] * 10


@pytest.mark.parametrize("kind", ["TLS1.3"])
async def test_bytes_that_came_with_the_handshake(
    connect: Connect, ours: ssl.SSLContext, pki: Path
) -> None:
    """The client's last flight and its first data in one segment."""
    pair = await connect(tls=False)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls_context(pki).wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    await pair.far.send_all(outgoing.read())

    async def finish() -> None:
        while True:
            incoming.write(await pair.far.receive())
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
                break
        client.write(b"first")
        client.write(b"second")
        await pair.far.send_all(outgoing.read())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        pair.near = await pair.near.start_tls(ours)
    with trio.fail_after(STALL_S):
        assert await read(pair.near, 11, itertools.repeat(4)) == b"firstsecond"


async def test_readable_waits_for_something(connect: Connect) -> None:
    pair = await connect()
    view = memoryview(bytearray(100))
    pair.near.fill(view)  # under TLS this looks first whether the handshake has left something
    found = []

    async def wait() -> None:
        await pair.near.readable()
        found.append(pair.near.fill(view))

    for size in (1, 100, 7):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert not found
            await pair.far.send_all(bytes(size))
        assert found == [size]
        found.clear()
        pair.near.fill(view)


async def test_fill_does_not_wait(connect: Connect) -> None:
    pair = await connect()
    assert pair.near.fill(memoryview(bytearray(10))) == 0
    assert not pair.near.eof


async def test_receive_takes_no_more_than_its_limit(connect: Connect) -> None:
    pair = await connect()
    await pair.far.send_all(b"abcdef")
    with trio.fail_after(STALL_S):
        assert await pair.near.receive(4) == b"abcd"
        assert await pair.near.receive(4) == b"ef"


@pytest.mark.parametrize("size", [0, 1, 20_000])
async def test_buffers_are_let_go(connect: Connect, size: int) -> None:
    """A bytearray that somebody still looks at cannot be resized."""
    pair = await connect()
    data = bytearray(size)
    with trio.fail_after(STALL_S):
        await pair.near.send_all(data)
    data += b"more"
