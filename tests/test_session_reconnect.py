"""gateway.session with `reconnect_s`: whole sessions whose upstream is restarted."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway.errors import SessionEnd
from gateway.limits import Limits
from gateway.settings import Settings
from tests import session_rig
from tests.session_rig import DISC, Front, Log, in_thread, over, read_works
from tests.support.fake_upstream import ALL_FEATURES, MIB, FakeUpstream, Link, Script, simple
from tests.support.rawclient import Cmd, Err, RawClient, Request, Tf

fake, context, log = session_rig.fake, session_rig.context, session_rig.log
front = session_rig.front  # the fixtures
FLUSH = Request(Cmd.FLUSH, cookie=70)


@pytest.fixture
def settings(fake: FakeUpstream) -> Settings:
    return Settings(str(fake.path), None, reconnect_s=5.0)


class Disk(Script):
    """Keeps what it is sent; `dies_after` requests it goes without a word."""

    def __init__(self, disk: bytearray, dies_after: int | None = None, **changes: object) -> None:
        super().__init__(**changes)
        self.disk, self.dies_after = disk, dies_after

    def requested(self, link: Link, request: Request) -> None:
        if self.dies_after is not None and len(link.requests) > self.dies_after:
            link.hang_up()
            return
        super().requested(link, request)

    def read(self, link: Link, request: Request) -> None:
        data = bytes(self.disk[request.offset : request.offset + request.length])
        link.send(simple(request.cookie, 0, data))

    def done(self, link: Link, request: Request, error: int = Err.OK) -> None:
        if request.cmd == Cmd.WRITE:
            self.disk[request.offset : request.offset + request.length] = request.payload
        super().done(link, request, error)


def asks(client: RawClient, request: Request) -> tuple[int, int]:
    """Cookie and error of a simple reply without data."""
    client.send(request.pack())
    reply = client.recv_exactly(16)
    return int.from_bytes(reply[8:], "big"), int.from_bytes(reply[4:8], "big")


def write(cookie: int, offset: int, payload: bytes) -> Request:
    return Request(Cmd.WRITE, offset, len(payload), cookie, payload=payload)


async def test_restart_goes_unnoticed(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.opened()
    await in_thread(read_works, client)
    fake.links[0].hang_up()
    await in_thread(read_works, client)
    second = await in_thread(fake.wait_link, 1)
    await in_thread(client.send, DISC)
    await over(front, client)
    assert log.end == SessionEnd.DISCONNECTED
    await in_thread(fake.wait_end, 1)
    assert second.end == "disc"
    assert log.lines("upstream lost: dialling it anew, for 5 s")
    assert log.lines("upstream is back after")
    assert not log.lines("bug")


async def test_without_the_setting_it_is_the_end(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    front.settings = dataclasses.replace(front.settings, reconnect_s=0.0)
    client = await front.opened()
    fake.links[0].hang_up()
    assert await in_thread(asks, client, FLUSH) == (70, Err.ESHUTDOWN)
    await in_thread(client.send, DISC)
    await over(front, client)
    assert log.end == SessionEnd.UPSTREAM_LOST
    assert fake.connects == 1


@pytest.mark.parametrize("reconnect_s", [0.0, 5.0])
async def test_several_connections_are_not_promised(
    front: Front, fake: FakeUpstream, reconnect_s: float
) -> None:
    fake.script = Script(flags=ALL_FEATURES | Tf.CAN_MULTI_CONN)
    front.settings = dataclasses.replace(front.settings, reconnect_s=reconnect_s)
    client = await front.inside()
    export = await in_thread(client.go)
    assert bool(export.flags & Tf.CAN_MULTI_CONN) == (not reconnect_s)


async def test_unflushed_writes_are_told_of(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.opened()
    assert await in_thread(asks, client, write(1, 0, b"lost")) == (1, 0)
    fake.links[0].hang_up()
    await in_thread(fake.wait_link, 1)
    assert await in_thread(asks, client, FLUSH) == (70, Err.EIO)
    assert await in_thread(asks, client, FLUSH) == (70, 0)
    assert log.lines("writes before that had not been flushed: the next flush fails")


async def test_back_with_another_size(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.opened()
    fake.script = Script(size=2 * MIB)
    fake.links[0].hang_up()
    assert await in_thread(asks, client, FLUSH) == (70, Err.ESHUTDOWN)
    await in_thread(client.send, DISC)
    await over(front, client)
    assert log.end == SessionEnd.UPSTREAM_LOST
    assert log.lines(f"upstream is back, but it has {2 * MIB} bytes where it had {MIB}")
    await in_thread(fake.wait_end, 1)


async def test_never_back(front: Front, fake: FakeUpstream, log: Log, tmp_path: Path) -> None:
    front.settings = dataclasses.replace(front.settings, reconnect_s=0.3)
    client = await front.opened()
    os.rename(fake.path, tmp_path / "elsewhere")
    fake.links[0].hang_up()
    assert await in_thread(asks, client, FLUSH) == (70, Err.ESHUTDOWN)
    os.rename(tmp_path / "elsewhere", fake.path)
    await in_thread(client.send, DISC)
    await over(front, client)
    assert log.lines("upstream did not come back within 0.3 s: giving it up")


async def test_answers_that_it_is_going(front: Front, fake: FakeUpstream, log: Log) -> None:
    class Going(Script):
        def done(self, link: Link, request: Request, error: int = Err.OK) -> None:
            super().done(link, request, Err.ESHUTDOWN)

    fake.queue = [Going(), Going()]
    client = await front.opened()
    assert await in_thread(asks, client, write(1, 0, b"data")) == (1, 0)
    for index in (0, 1):
        assert (await in_thread(fake.wait_end, index)).end == "disc"
    assert fake.connects == 3


async def test_two_clients_across_many_restarts(front: Front, fake: FakeUpstream) -> None:
    """Byte for byte, each on its half of the disk."""
    disk = bytearray(MIB)
    rng = random.Random(3)
    fake.script = Disk(disk, structured=False)
    fake.queue = [Disk(disk, rng.randrange(1, 20), structured=False) for _ in range(12)]
    clients = [await front.opened() for _ in range(2)]
    mirror = bytearray(MIB)

    def use(index: int) -> None:
        mine = random.Random(index)
        for cookie in range(120):
            offset = index * MIB // 2 + mine.randrange(MIB // 2 - 8192)
            payload = mine.randbytes(mine.randrange(1, 8192))
            if mine.random() < 0.6:
                mirror[offset : offset + len(payload)] = payload
                assert asks(clients[index], write(cookie, offset, payload)) == (cookie, 0)
            else:
                length = len(payload)
                clients[index].send(Request(Cmd.READ, offset, length, cookie).pack())
                got = clients[index].recv_exactly(16 + length)[16:]
                assert got == mirror[offset : offset + length]

    async with trio.open_nursery() as nursery:
        for index in (0, 1):
            nursery.start_soon(in_thread, use, index)
    assert disk == mirror
    assert fake.connects > 5
    for client in clients:
        await in_thread(client.send, DISC)
        await in_thread(client.recv_to_end)


async def test_nothing_is_left_open(front: Front, fake: FakeUpstream, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for end in ("goodbye", "in the outage", "never back"):
        client = await front.opened()
        await in_thread(read_works, client)
        if end == "goodbye":
            fake.links[-1].hang_up()
            await in_thread(read_works, client)
            await in_thread(client.send, DISC)
        else:
            os.rename(fake.path, tmp_path / "elsewhere")
            fake.links[-1].hang_up()
            await wait_all_tasks_blocked(0.01)
        client.close()
        await front.ended()
        if end != "goodbye":
            os.rename(tmp_path / "elsewhere", fake.path)
    for index in range(len(fake.links)):
        await in_thread(fake.wait_end, index)
    with trio.fail_after(5):
        while descriptors() > before:  # noqa: ASYNC110  (threads of the fake close theirs)
            await trio.sleep(0.01)


async def test_bounds_of_the_settings_hold(front: Front, fake: FakeUpstream) -> None:
    class Slow(Script):
        def requested(self, link: Link, request: Request) -> None:
            pass

    fake.script = Slow()
    front.settings = dataclasses.replace(front.settings, limits=Limits(requests_in_flight=3))
    client = await front.opened()
    await in_thread(client.send, b"".join(write(n, 0, b"x").pack() for n in range(9)))
    link = fake.links[0]
    await in_thread(fake.wait, lambda: len(link.requests) == 3, "three requests")
    await wait_all_tasks_blocked(0.05)
    assert len(link.requests) == 3
    fake.script = Script()
    link.hang_up()
    replies = await in_thread(client.recv_exactly, 9 * 16)
    assert replies == b"".join(simple(n) for n in range(9))


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = trio.lowlevel.current_statistics().tasks_living
    yield
    assert trio.lowlevel.current_statistics().tasks_living <= before + 1
