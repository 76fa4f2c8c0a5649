"""Sessions on real sockets, one for each client that connects, and what they log."""

from __future__ import annotations

import dataclasses
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway.access import Rule, Rules
from gateway.errors import SessionEnd
from gateway.session import Session
from gateway.settings import Settings, TLSSettings
from gateway.tls import server_context
from gateway.trust import Keeper, Trust
from tests.support.fake_upstream import FakeUpstream, pattern
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    Cmd,
    RawClient,
    Request,
    tls_context,
)

T = TypeVar("T")
DISC = Request(Cmd.DISC, cookie=0).pack()
CLOSED = re.compile(
    r"\[(?P<number>\d+)\] (?P<peer>\S+): closed: (?P<end>.*?)(?: \((?P<detail>.*)\))?; "
    r"(?P<received>\d+) bytes in, (?P<sent>\d+) out, (?P<seconds>[\d.]+) s"
)


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Clients and fakes are blocking programs; the gateway runs meanwhile."""
    return await trio.to_thread.run_sync(function, *args)


def rules(*texts: str) -> tuple[Rule, ...]:
    return tuple(Rule.parse("--allow", text) for text in texts)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


@pytest.fixture(scope="module")
def context(pki: Path) -> ssl.SSLContext:
    files = TLSSettings(pki / "server-cert.pem", pki / "server-key.pem", pki / "ca-cert.pem")
    return server_context(files)


class Front:
    """Accepts, and gives each client a session. What a server does, without its slots."""

    def __init__(
        self,
        settings: Settings,
        context: ssl.SSLContext | None,
        pki: Path,
        unix: Path | None = None,
    ) -> None:
        self.settings = settings
        self.keeper = Keeper(Trust(context, Rules()))
        self.sessions: list[Session] = []
        self.scope = trio.CancelScope()
        self._pki = pki
        self._running: list[trio.Event] = []
        self.clients: list[RawClient] = []
        if unix is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self._uri = f"nbds://127.0.0.1:{self._listener.getsockname()[1]}/"
        else:
            self._listener = socket.create_server(str(unix), family=socket.AF_UNIX)
            self._uri = f"nbds+unix:///?socket={unix}"
        self._listener.setblocking(False)

    async def serve(self) -> None:
        with self.scope:
            await self._accept()

    async def _accept(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._listener)
                sock, address = self._listener.accept()
                ended = trio.Event()
                number = len(self.sessions) + 1
                peer = f"{address[0]}:{address[1]}" if address else "unix"
                session = Session(sock, peer, str(number), self.settings, self.keeper)
                self.sessions.append(session)
                self._running.append(ended)
                nursery.start_soon(self._run, session, ended)

    async def _run(self, session: Session, ended: trio.Event) -> None:
        try:
            await session.run()
        finally:
            ended.set()

    def close(self) -> None:
        self._listener.close()

    # Whom it trusts, from the next client on

    def switch_tls_off(self) -> None:
        self.keeper.replace(dataclasses.replace(self.keeper.trust, context=None))

    def rules(self, **rules: object) -> Trust:
        """Only these rules from now on; of clients that are there already nobody asks."""
        trust = dataclasses.replace(self.keeper.trust, rules=Rules(**rules))  # type: ignore[arg-type]
        self.keeper.replace(trust)
        return trust

    def reload(self, *, keep: bool = False, **rules: object) -> Trust:
        """As after a reload: each session is asked."""
        trust = self.rules(**rules)
        for session in self.sessions:
            session.recheck(trust, keep=keep)
        return trust

    async def ended(self) -> None:
        """All sessions so far have come to their end."""
        for one in list(self._running):
            await one.wait()

    # Clients, further and further

    def connect(self) -> RawClient:
        client = RawClient(self._uri)
        self.clients.append(client)
        return client

    async def raw(self) -> RawClient:
        """Connected, and its session is there."""
        client = self.connect()
        while len(self.sessions) < len(self.clients):
            await wait_all_tasks_blocked()
        return client

    async def greeted(self, flags: int = C_FIXED | C_NO_ZEROES) -> RawClient:
        client = await self.raw()
        await in_thread(client.greet, flags)
        return client

    async def inside(self) -> RawClient:
        """Inside TLS, nothing asked."""
        client = await self.greeted()
        await in_thread(client.start_tls, tls_context(self._pki))
        return client

    async def opened(self) -> RawClient:
        """In transmission."""
        client = await self.inside()
        await in_thread(client.go)
        return client


@pytest.fixture
def settings(fake: FakeUpstream) -> Settings:
    return Settings(str(fake.path), None)


@pytest.fixture
async def front(
    settings: Settings, context: ssl.SSLContext, pki: Path, nursery: trio.Nursery
) -> AsyncIterator[Front]:
    front = Front(settings, context, pki)
    nursery.start_soon(front.serve)
    yield front
    for client in front.clients:
        client.close()
    await front.ended()
    front.scope.cancel()
    await wait_all_tasks_blocked()
    front.close()


class Log:
    """What the sessions say."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        self._caplog = caplog

    def lines(self, word: str) -> list[logging.LogRecord]:
        return [one for one in self._caplog.records if word in one.getMessage()]

    @property
    def closed(self) -> re.Match[str]:
        """The one line at the close."""
        (record,) = self.lines(": closed: ")
        match = CLOSED.fullmatch(record.getMessage())
        assert match, record.getMessage()
        quiet = match["end"] == SessionEnd.PROBE
        assert record.levelno == (logging.DEBUG if quiet else logging.INFO)
        assert record.getMessage().isprintable()
        return match

    @property
    def end(self) -> str:
        return self.closed["end"]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


def read_works(client: RawClient) -> None:
    client.send(Request(Cmd.READ, 512, 512, cookie=7).pack())
    assert client.recv_exactly(16 + 512)[16:] == pattern(512, 512)


async def over(front: Front, client: RawClient, *, said: bytes = b"") -> str:
    """The gateway hangs up, having said no more than this. How it did."""
    assert await in_thread(client.recv_to_end) == said
    client.close()
    await front.ended()
    assert client.ended is not None
    return client.ended
