"""gateway.server: signals, the drain and its limit, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.server import Server
from gateway.settings import ListenTCP, ListenUnix, Settings
from tests import server_rig
from tests.server_rig import (
    Clients,
    Running,
    Start,
    in_thread,
    messages,
)
from tests.support.fake_upstream import FakeUpstream, Link, Script, pattern
from tests.support.rawclient import (
    GREETING,
    Cmd,
    Opt,
    RawClient,
    Rep,
    Request,
    dial,
)

fake, settings, clients, start = (
    server_rig.fake,
    server_rig.settings,
    server_rig.clients,
    server_rig.start,
)


# ---------------------------------------------------------------- the end


class Slow(Script):
    """Keeps its answers back until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def requested(self, link: Link, request: Request) -> None:
        self.go_on.wait()
        super().requested(link, request)


@pytest.fixture
def slow(fake: FakeUpstream) -> Iterator[Slow]:
    fake.script = slow = Slow()
    yield slow
    slow.go_on.set()


async def request_in_flight(uri: str, clients: Clients, fake: FakeUpstream) -> RawClient:
    client = await clients.opened(uri)
    link = fake.links[-1]
    client.send(Request(Cmd.READ, 0, 512, cookie=3).pack())
    await in_thread(fake.wait, lambda: link.requests, "the request upstream")
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_drain(
    start: Start,
    settings: Settings,
    clients: Clients,
    fake: FakeUpstream,
    slow: Slow,
    mock_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    """Time stands still here: nothing of this end is a matter of a time-out."""
    caplog.set_level(logging.INFO)
    running = await start(settings)
    busy = await request_in_flight(running.uri, clients, fake)
    idle = await clients.opened(running.uri)
    haggling = await clients.greeted(running.uri)
    signal.raise_signal(number)
    # Idle sessions end, listeners are closed, negotiations are refused.
    assert await in_thread(idle.recv_to_end) == b""
    assert idle.ended == "close_notify"
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        dial(running.uri)
    assert await in_thread(haggling.verdict, Opt.STARTTLS) == Rep.ERR_SHUTDOWN
    haggling.close()
    await wait_all_tasks_blocked()
    assert running.drained is None
    # What is in flight is finished.
    slow.go_on.set()
    assert (await in_thread(busy.recv_exactly, 16 + 512))[16:] == pattern(0, 512)
    assert await in_thread(busy.recv_to_end) == b""
    assert busy.ended == "close_notify"
    busy.close()
    await running.ended.wait()
    assert running.drained is True
    assert {(await in_thread(fake.wait_end, i)).end for i in range(2)} == {"disc"}
    said = messages(caplog, logging.INFO)
    assert f"{number.name}: ending" in said
    assert "listeners closed, 3 sessions to end" in said


async def test_drain_of_nobody(start: Start, settings: Settings, mock_clock: MockClock) -> None:
    running = await start(settings)
    signal.raise_signal(signal.SIGTERM)
    await running.ended.wait()
    assert running.drained is True


async def test_drain_has_a_limit(
    start: Start,
    settings: Settings,
    clients: Clients,
    fake: FakeUpstream,
    slow: Slow,
    mock_clock: MockClock,
) -> None:
    running = await start(settings)
    busy = await request_in_flight(running.uri, clients, fake)
    signal.raise_signal(signal.SIGTERM)
    await wait_all_tasks_blocked()
    mock_clock.jump(settings.drain_timeout_s - 0.1)
    await wait_all_tasks_blocked()
    assert not running.ended.is_set()
    mock_clock.jump(0.2)
    assert await in_thread(busy.recv_to_end) == b""
    busy.close()
    await wait_all_tasks_blocked()
    mock_clock.jump(10.0)  # for the upstream's last words
    await running.ended.wait()
    assert running.drained is False


async def test_second_signal_cuts(
    start: Start,
    settings: Settings,
    clients: Clients,
    fake: FakeUpstream,
    slow: Slow,
    mock_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = await start(settings)
    busy = await request_in_flight(running.uri, clients, fake)
    signal.raise_signal(signal.SIGTERM)
    await wait_all_tasks_blocked()
    signal.raise_signal(signal.SIGINT)
    assert await in_thread(busy.recv_to_end) == b""
    busy.close()
    await wait_all_tasks_blocked()
    mock_clock.jump(10.0)
    await running.ended.wait()
    assert running.drained is False
    assert "second signal: ending now" in messages(caplog, logging.WARNING)


async def test_later_signals_are_taken_too(
    start: Start, settings: Settings, clients: Clients, fake: FakeUpstream, slow: Slow
) -> None:
    """To cut takes a moment, and its default would be to kill meanwhile."""
    stray: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: stray.append(number))
    try:
        running = await start(settings)
        client = await request_in_flight(running.uri, clients, fake)
        for _ in range(4):
            signal.raise_signal(signal.SIGTERM)
            await wait_all_tasks_blocked()
        assert not running.ended.is_set(), "it waits for the client to close"
        assert not stray
        client.close()
        slow.go_on.set()
        await running.ended.wait()
        assert running.drained is False
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("with_a_client", [True, False])
async def test_cut_tells_whether_there_was_something_to_cut(
    start: Start, settings: Settings, clients: Clients, with_a_client: bool
) -> None:
    running = await start(settings)
    if with_a_client:
        await clients.opened(running.uri)
    running.server.drain()
    running.server.cut()
    await running.ended.wait()
    assert running.drained is not with_a_client


async def test_clients_in_the_queue_at_the_end(
    start: Start, settings: Settings, clients: Clients, mock_clock: MockClock
) -> None:
    """They were never served, and are not now: their connection just closes."""
    running = await start(dataclasses.replace(settings, max_connections=1))
    client = await clients.opened(running.uri)
    waiting = clients.connect(running.uri)
    await wait_all_tasks_blocked()
    signal.raise_signal(signal.SIGTERM)
    assert await in_thread(client.recv_to_end) == b""
    client.close()
    await running.ended.wait()
    assert running.drained is True
    with contextlib.suppress(ConnectionResetError):
        assert waiting.sock.recv(GREETING.size) == b""


async def test_signals_are_left_alone_if_not_wanted(settings: Settings) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with trio.open_nursery() as nursery:
        server = Server(settings)
        await nursery.start(functools.partial(server.run, handle_signals=False))
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        nursery.cancel_scope.cancel()


def sockets() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return found


@pytest.mark.parametrize("how", ["signal", "cancel"])
async def test_nothing_is_left(
    nursery: trio.Nursery,
    settings: Settings,
    clients: Clients,
    fake: FakeUpstream,
    tmp_path: Path,
    how: str,
) -> None:
    """No task, no descriptor, no socket file, no connection to the upstream."""
    path = tmp_path / "front"
    listen = (ListenTCP(None, 0), ListenUnix(str(path)))
    before = sockets(), len(nursery.child_tasks)
    running = Running(dataclasses.replace(settings, listen=listen))
    running.uris = await nursery.start(running.run)
    tcp, unix = running.uris
    tcp = tcp.replace(str(tcp.split("/")[2].rpartition(":")[0]), "127.0.0.1")
    open_ones = [await clients.opened(uri) for uri in (tcp, unix, tcp)]
    open_ones += [await clients.greeted(uri) for uri in (tcp, unix)]
    if how == "signal":
        signal.raise_signal(signal.SIGTERM)
        await wait_all_tasks_blocked()
        for client in open_ones[3:]:
            client.close()
    else:
        running.scope.cancel()
    for client in open_ones[:3]:
        assert await in_thread(client.recv_to_end) == b""
    for client in open_ones:
        client.close()
    await running.ended.wait()
    assert running.drained is (True if how == "signal" else None)
    assert not path.exists()
    for index in range(3):
        assert (await in_thread(fake.wait_end, index)).end == "disc"
    await wait_all_tasks_blocked()
    assert (sockets(), len(nursery.child_tasks)) == before
