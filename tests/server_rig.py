"""A server in this process, and raw clients."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from gateway.server import Server
from gateway.settings import ListenTCP, Settings, TLSSettings
from tests.support.fake_upstream import FakeUpstream, pattern
from tests.support.rawclient import (
    Cmd,
    RawClient,
    Request,
    tls_context,
)

T = TypeVar("T")
DISC = Request(Cmd.DISC, cookie=0).pack()


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Clients and fakes are blocking programs; the gateway runs meanwhile."""
    return await trio.to_thread.run_sync(function, *args)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


@pytest.fixture
def settings(fake: FakeUpstream, pki: Path) -> Settings:
    files = TLSSettings(pki / "server-cert.pem", pki / "server-key.pem", pki / "ca-cert.pem")
    # No timer: a clock that jumps would have nothing to wait for but that one.
    return Settings(str(fake.path), files, (ListenTCP("127.0.0.1", 0),), reload_interval_s=0)


class Running:
    """A server in this process. `drained` is what `run` returned."""

    def __init__(self, settings: Settings) -> None:
        self.server = Server(settings)
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.drained: bool | None = None
        self.uris: list[str] = []

    async def run(self, task_status: trio.TaskStatus[list[str]]) -> None:
        try:
            with self.scope:
                self.drained = await self.server.run(task_status=task_status)
        finally:
            self.ended.set()

    @property
    def uri(self) -> str:
        return self.uris[0]


Start = Callable[[Settings], Awaitable[Running]]


class Clients:
    """Raw clients, that are closed at the end of the test."""

    def __init__(self, pki: Path) -> None:
        self._pki = pki
        self._all: list[RawClient] = []

    def close(self) -> None:
        for client in self._all:
            client.close()

    def connect(self, uri: str) -> RawClient:
        """In the listen queue at least."""
        client = RawClient(uri)
        self._all.append(client)
        return client

    async def greeted(self, uri: str) -> RawClient:
        client = self.connect(uri)
        await in_thread(client.greet)
        return client

    async def opened(self, uri: str) -> RawClient:
        client = await self.greeted(uri)
        await in_thread(client.start_tls, tls_context(self._pki))
        await in_thread(client.go)
        return client


@pytest.fixture
def clients(pki: Path) -> Iterator[Clients]:
    clients = Clients(pki)
    yield clients
    clients.close()


@pytest.fixture
async def start(nursery: trio.Nursery, clients: Clients) -> AsyncIterator[Start]:
    running = []

    async def start(settings: Settings) -> Running:
        one = Running(settings)
        running.append(one)
        one.uris = await nursery.start(one.run)
        return one

    yield start
    clients.close()  # first: else the server would wait for them, while a clock stands still
    for one in running:
        one.scope.cancel()
        await one.ended.wait()


def read_works(client: RawClient) -> None:
    client.send(Request(Cmd.READ, 512, 512, cookie=7).pack())
    assert client.recv_exactly(16 + 512)[16:] == pattern(512, 512)


def leave(client: RawClient) -> None:
    client.send(DISC)
    assert client.recv_to_end() == b""
    client.close()


def is_waiting(client: RawClient) -> bool:
    """Nothing has come for it: it is in the listen queue."""
    client.sock.setblocking(False)
    try:
        client.sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        client.sock.settimeout(15)
    return False


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == level]
