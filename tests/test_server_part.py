"""gateway.server as one worker of several: whom it leaves to the others, and what is its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.listeners import Listeners
from gateway.places import Place, Places
from gateway.server import Part, Server, open_listeners, uris
from gateway.settings import ListenUnix, Settings
from gateway.trust import load_trust
from gateway.workers import Post
from tests import server_rig
from tests.server_rig import Clients, in_thread, is_waiting, messages, read_works

fake, settings, clients = server_rig.fake, server_rig.settings, server_rig.clients

PATIENCE_S = 0.010  # how long a client is left to a worker that does not take it


class Worker:
    """A server with a place beside another's, which is `other` and held by the test."""

    def __init__(self, settings: Settings, limits: tuple[int, int]) -> None:
        places = Places(limits)
        self.listeners: Listeners = open_listeners(settings)
        self.other = Place(places, 1)
        self.place = Place(places, 0)
        trust = load_trust(settings)
        self.is_newest = True
        part = Part(
            trust,
            self.listeners.shared(),
            Post(7, self.place, -1),
            is_newest=lambda _: self.is_newest,
        )
        self.server = Server(settings, part)
        self.drained: bool | None = None
        self.ended = trio.Event()
        (self.uri,) = uris(settings, self.listeners, trust)

    async def run(self, task_status: trio.TaskStatus[list[str]]) -> None:
        self.drained = await self.server.run(handle_signals=False, task_status=task_status)
        self.ended.set()

    async def take(self) -> None:
        """The other worker accepts a client, and lets it go."""
        (sock,) = self.listeners.sockets
        sock.accept()[0].close()
        await wait_all_tasks_blocked()


Start = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start(
    nursery: trio.Nursery, clients: Clients, settings: Settings
) -> AsyncIterator[Start]:
    started = []

    async def start(limits: tuple[int, int] = (9, 9), **changes: object) -> Worker:
        worker = Worker(dataclasses.replace(settings, **changes), limits)
        started.append(worker)
        assert await nursery.start(worker.run) == []
        worker.place.open()
        return worker

    yield start
    clients.close()
    for worker in started:
        worker.listeners.close()
        worker.server.cut()
        await worker.ended.wait()


async def test_a_client_is_left_to_the_one_with_fewer(
    start: Start, clients: Clients, mock_clock: MockClock
) -> None:
    """But not for long: it may be stuck."""
    worker = await start()
    worker.other.open()
    await clients.greeted(worker.uri)
    second = clients.connect(worker.uri)
    await wait_all_tasks_blocked()
    for _ in range(20):
        assert is_waiting(second)
        mock_clock.jump(0.95 * PATIENCE_S / 20)
        await wait_all_tasks_blocked()
    assert is_waiting(second)
    mock_clock.jump(PATIENCE_S)
    await in_thread(second.greet)


async def test_one_that_is_taken_is_forgotten(
    start: Start, clients: Clients, mock_clock: MockClock
) -> None:
    """Each client is left to the other for the whole time, from when it came."""
    worker = await start()
    worker.other.open()
    await clients.greeted(worker.uri)
    for _ in range(10):
        client = clients.connect(worker.uri)
        await wait_all_tasks_blocked()
        mock_clock.jump(PATIENCE_S / 2)
        await wait_all_tasks_blocked()
        assert is_waiting(client)
        await worker.take()
        mock_clock.jump(PATIENCE_S / 2)
        await wait_all_tasks_blocked()
        client.close()


async def test_nobody_is_waited_for_with_as_many(
    start: Start, clients: Clients, mock_clock: MockClock
) -> None:
    worker = await start()
    worker.other.open()
    await clients.greeted(worker.uri)
    worker.other.count(1)
    await clients.greeted(worker.uri)
    worker.other.close()
    for _ in range(4):
        await clients.greeted(worker.uri)


async def test_the_limit_is_that_of_its_place(
    start: Start, clients: Clients, mock_clock: MockClock
) -> None:
    worker = await start((2, 1))
    for _ in range(2):
        await clients.opened(worker.uri)
    third = clients.connect(worker.uri)
    for _ in range(5):
        mock_clock.jump(10.0)
        await wait_all_tasks_blocked()
    assert is_waiting(third)


async def test_nobody_is_put_out_while_another_has_room(
    start: Start, clients: Clients, mock_clock: MockClock
) -> None:
    worker = await start((1, 2))
    worker.other.open()
    worker.other.count(1)
    silent = await clients.greeted(worker.uri)
    mock_clock.jump(2.0)
    for _ in range(3):
        client = clients.connect(worker.uri)
        await wait_all_tasks_blocked()
        await worker.take()
        mock_clock.jump(2.0)
        await wait_all_tasks_blocked()
        client.close()
    assert is_waiting(silent)
    # When all are full, the oldest makes room.
    worker.other.count(2)
    good = clients.connect(worker.uri)
    assert await in_thread(silent.recv_to_end) == b""
    await in_thread(good.greet)


async def test_a_client_that_another_took_puts_nobody_out(
    start: Start, clients: Clients, mock_clock: MockClock
) -> None:
    """It came when all were full, and one of the others had room first."""
    worker = await start((1, 1))
    worker.other.open()
    worker.other.count(1)
    mock_clock.jump(5.0)
    silent = await clients.greeted(worker.uri)
    client = clients.connect(worker.uri)
    await wait_all_tasks_blocked()
    assert is_waiting(silent)  # too new to be put out
    await worker.take()
    for _ in range(5):
        mock_clock.jump(1.0)
        await wait_all_tasks_blocked()
    assert is_waiting(silent)
    client.close()


async def test_its_place_is_kept_up_to_date(
    start: Start, clients: Clients, mock_clock: MockClock
) -> None:
    worker = await start()
    worker.other.open()
    first = await clients.greeted(worker.uri)
    worker.other.count(1)
    assert not worker.other.others_first()
    worker.other.count(2)
    assert worker.other.others_first()
    first.reset()
    worker.other.count(1)
    while not worker.other.others_first():
        await wait_all_tasks_blocked()
    worker.server.drain()
    await worker.ended.wait()
    assert not worker.other.others_first()


async def test_names_of_its_sessions_and_lines(
    start: Start, clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    worker = await start()
    for _ in range(2):
        client = await clients.greeted(worker.uri)
        client.send(b"garbage, and a good deal of it")
        await in_thread(client.recv_to_end)
        client.close()
    worker.server.drain()
    await worker.ended.wait()
    said = messages(caplog, logging.INFO)
    assert [text.split()[0] for text in said] == ["[7.1]", "[7.2]", "worker"]
    assert said[-1] == "worker 7: listeners closed, 0 sessions to end"


@pytest.mark.parametrize("how", ["drain", "cut"])
async def test_its_listeners_are_copies(
    start: Start, clients: Clients, tmp_path: Path, how: str
) -> None:
    """Closed with the worker; who made them has them still, and the socket file."""
    path = tmp_path / "front"
    worker = await start(listen=(ListenUnix(str(path)),))
    client = await clients.opened(worker.uri)
    await in_thread(read_works, client)
    getattr(worker.server, how)()
    assert await in_thread(client.recv_to_end) == b""
    client.close()
    await worker.ended.wait()
    assert worker.drained is (how == "drain")
    assert path.is_socket()
    worker.listeners.close()
    assert not path.exists()


async def is_true(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110  (said by a log line)
            await trio.sleep(0.01)


@pytest.mark.expects_error_log
async def test_nobody_enters_by_one_that_has_fallen_behind(
    start: Start, clients: Clients, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others have later files, and what is there now cannot be used: who was revoked
    meanwhile would be let in here."""
    content, more = b"", {"reload_interval_s": 0.0}
    worker = await start(**more)
    tls = worker.server._settings.tls
    assert tls is not None
    assert tls.cert is not None
    content = tls.cert.read_bytes()
    worker.is_newest = False
    tls.cert.write_bytes(b"")
    try:
        worker.server.reload()
        await is_true(lambda: "other workers have gone on to later files" in caplog.text)
        assert worker.server._gate.is_shut
        client = clients.connect(worker.uri)
        await wait_all_tasks_blocked()
        assert not worker.server._sessions
    finally:
        tls.cert.write_bytes(content)
    worker.server.reload()
    await is_true(lambda: bool(worker.server._sessions))
    client.close()
