"""gateway.session: one client from accept to close, each reason for its end, and the log."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import session as session_module
from gateway.certs import init
from gateway.errors import SessionEnd
from gateway.session import Session
from gateway.settings import Settings, TLSSettings
from gateway.tls import server_context
from tests.support.fake_upstream import FakeUpstream, Link, Script, pattern
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    Cmd,
    Err,
    Opt,
    PeerClosedError,
    RawClient,
    Rep,
    Request,
    Tf,
    info_data,
    option,
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

    def __init__(self, settings: Settings, context: ssl.SSLContext | None, pki: Path) -> None:
        self.settings = settings
        self.context = context
        self.sessions: list[Session] = []
        self.scope = trio.CancelScope()
        self._pki = pki
        self._running: list[trio.Event] = []
        self.clients: list[RawClient] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._uri = f"nbds://127.0.0.1:{self._listener.getsockname()[1]}/"

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
                peer = f"{address[0]}:{address[1]}"
                session = Session(sock, peer, number, self.settings, self.context)
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


# ---------------------------------------------------------------- good sessions


async def test_from_accept_to_disconnect(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.opened()
    await in_thread(read_works, client)
    client.send(DISC)
    assert await over(front, client) == "close_notify"
    assert log.end == "client disconnected"
    assert log.closed["detail"] is None
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_line_at_the_opening(front: Front, log: Log) -> None:
    await front.opened()
    (record,) = log.lines(": open: ")
    assert record.levelno == logging.INFO
    assert re.fullmatch(
        r"\[1\] 127\.0\.0\.1:\d+: open: export '', 1048576 bytes, read-write, "
        r"CN=client sha256:[0-9a-f]{16}, TLSv1\.3 TLS_\w+",
        record.getMessage(),
    )


async def test_bytes_are_counted_above_tls(front: Front, log: Log) -> None:
    client = await front.opened()
    for _ in range(10):
        await in_thread(read_works, client)
    client.send(DISC)
    await over(front, client)
    haggled = 16 + 6, 20 + 12 + 20
    assert int(log.closed["received"]) == haggled[0] + 11 * 28
    assert int(log.closed["sent"]) == haggled[1] + 10 * (16 + 512)


async def test_first_request_comes_with_the_last_option(front: Front) -> None:
    client = await front.inside()
    asked = Request(Cmd.READ, 0, 512, cookie=5)
    client.send(option(Opt.GO, info_data()) + asked.pack() + DISC[:10])
    replies = await in_thread(client.replies, Opt.GO)
    assert replies[-1].type == Rep.ACK
    assert (await in_thread(client.recv_exactly, 16 + 512))[16:] == pattern(0, 512)
    client.send(DISC[10:])
    await over(front, client)


async def test_socket_options(front: Front) -> None:
    await front.raw()
    sock = front.sessions[0]._channel.socket
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


async def test_read_only(front: Front, fake: FakeUpstream, log: Log) -> None:
    front.settings = dataclasses.replace(front.settings, read_only=True)
    client = await front.inside()
    export = await in_thread(client.go)
    assert export.flags & Tf.READ_ONLY
    client.send(Request(Cmd.WRITE, 0, 512, payload=bytes(512)).pack())
    _, error, _ = struct.unpack(">IIQ", await in_thread(client.recv_exactly, 16))
    assert error == Err.EPERM
    assert ", read-only, " in log.lines(": open: ")[0].getMessage()
    assert not fake.links[0].requests


async def test_without_tls(front: Front, log: Log) -> None:
    """On the same port, in the clear: for loopback, as --tls off has it."""
    front.context = None
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) in (Rep.ERR_POLICY, Rep.ERR_UNSUP)
    await in_thread(client.go)
    await in_thread(read_works, client)
    client.send(DISC)
    assert await over(front, client) == "fin"
    assert "anonymous, no TLS" in log.lines(": open: ")[0].getMessage()


async def test_export_of_another_name(front: Front, fake: FakeUpstream, log: Log) -> None:
    """Any other name than ours is unknown, and nobody is asked about it."""
    front.settings = dataclasses.replace(front.settings, export="disk")
    fake.script.names = (b"disk",)
    client = await front.inside()
    assert await in_thread(client.verdict, Opt.GO, info_data(b"other")) == Rep.ERR_UNKNOWN
    assert fake.connects == 0
    await in_thread(client.go, b"disk")
    assert fake.links[0].export == b"disk"
    client.send(DISC)
    await over(front, client)


async def test_name_of_an_export_stays_on_its_line(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    front.settings = dataclasses.replace(front.settings, export=None)
    fake.script.names = None
    client = await front.inside()
    await in_thread(client.go, b"a\nINFO [9] forged" + 200 * b"x")
    (record,) = log.lines(": open: ")
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 400
    assert fake.links[0].export == b"a\nINFO [9] forged" + 200 * b"x"


# ---------------------------------------------------------------- the upstream


async def test_upstream_is_dialled_after_tls_and_identity_only(
    front: Front, fake: FakeUpstream, pki: Path
) -> None:
    client = await front.greeted()
    for opt in (Opt.LIST, Opt.INFO, Opt.GO, Opt.STRUCTURED_REPLY):
        assert await in_thread(client.verdict, opt) == Rep.ERR_TLS_REQD
    client.close()
    client = await front.greeted()
    await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
    assert "ALERT" in await over(front, client)
    await front.inside()
    assert fake.connects == 0


async def test_upstream_that_is_not_there(front: Front, fake: FakeUpstream, log: Log) -> None:
    """Each option is refused in words, and works as soon as the upstream is there."""
    front.settings = dataclasses.replace(front.settings, socket=str(fake.path) + "-later")
    client = await front.inside()
    for _ in range(2):
        *_, last = await in_thread(client.ask, Opt.GO, info_data())
        assert last.failed
        assert b"cannot be reached" in last.data
    warnings = [one for one in log.lines("upstream unavailable") if one.levelno > logging.DEBUG]
    assert len(warnings) == 1
    assert warnings[0].getMessage().startswith("[1] 127.0.0.1:")
    os.rename(fake.path, str(fake.path) + "-later")
    await in_thread(client.go)
    await in_thread(read_works, client)


async def test_upstream_dies(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.opened()
    fake.links[0].hang_up()
    client.send(Request(Cmd.READ, 0, 512, cookie=3).pack())
    assert await in_thread(client.recv_exactly, 16) == struct.pack(
        ">IIQ", 0x67446698, Err.ESHUTDOWN, 3
    )
    client.send(DISC)
    assert await over(front, client) == "close_notify"
    assert log.end == "upstream lost"


# ---------------------------------------------------------------- other ends


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_probe(front: Front, log: Log, how: str) -> None:
    """A load balancer's health check: connects and leaves. Not worth a line for everybody.

    It leaves without having read our greeting, so its kernel sends RST.
    """
    client = await front.raw()
    if how == "FIN":
        await in_thread(client.recv_exactly, 18)
    client.close()
    await front.ended()
    assert log.end == "probe"


async def test_client_leaves_in_the_greeting(front: Front, log: Log) -> None:
    client = await front.raw()
    client.send(b"\0\0")
    client.close()
    await front.ended()
    assert log.end == "client left without a word"


async def test_client_leaves_before_tls(front: Front, log: Log) -> None:
    client = await front.greeted()
    client.close()
    await front.ended()
    assert log.end == "client left without a word"


async def test_client_leaves_in_the_handshake(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    client.close()
    await front.ended()
    assert log.end == "TLS handshake failed"
    assert log.closed["detail"].startswith("eof: ")


async def test_client_leaves_inside_tls(front: Front, log: Log) -> None:
    client = await front.inside()
    client.close()
    await front.ended()
    assert log.end == "client left without a word"


async def test_client_leaves_since_its_export_is_unknown(front: Front, log: Log) -> None:
    client = await front.inside()
    assert await in_thread(client.verdict, Opt.GO, info_data(b"other")) == Rep.ERR_UNKNOWN
    client.close()
    await front.ended()
    assert log.end == "client left without a word"
    assert "'other'" in log.closed["detail"]


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_client_leaves_in_transmission(
    front: Front, fake: FakeUpstream, log: Log, how: str
) -> None:
    client = await front.opened()
    await in_thread(read_works, client)
    client.reset() if how == "RST" else client.close()
    await front.ended()
    assert log.end == "client left without a word"
    assert (await in_thread(fake.wait_end)).end == "disc"


@pytest.mark.parametrize("inside", [False, True], ids=["plaintext", "TLS"])
async def test_client_aborts(front: Front, log: Log, inside: bool) -> None:
    client = await (front.inside() if inside else front.greeted())
    assert await in_thread(client.verdict, Opt.ABORT) == Rep.ACK
    assert await over(front, client) == ("close_notify" if inside else "fin")
    assert log.end == "client aborted the negotiation"


async def test_plaintext_client(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.GO, info_data()) == Rep.ERR_TLS_REQD
    client.close()
    await front.ended()
    assert log.end == "plaintext client"


async def test_plaintext_client_of_the_old_option(front: Front, log: Log) -> None:
    client = await front.greeted()
    client.send(option(Opt.EXPORT_NAME))
    await over(front, client)
    assert log.end == "plaintext client"


async def test_export_name_has_no_other_no(front: Front, log: Log) -> None:
    client = await front.inside()
    client.send(option(Opt.EXPORT_NAME, b"other"))
    assert await over(front, client) == "close_notify"
    assert log.end == "export refused"
    assert "'other'" in log.closed["detail"]


async def test_client_breaks_the_protocol(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.greeted()
    client.send(b"garbage, and more of it")
    await over(front, client)
    assert log.end == "client broke the protocol"
    assert "magic" in log.closed["detail"]


async def test_client_breaks_the_protocol_in_transmission(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    client = await front.opened()
    client.send(Request(Cmd.READ, 0, 512).pack(magic=0x12345678))
    assert await over(front, client) == "close_notify"
    assert log.end == "client broke the protocol"
    assert log.closed["detail"] == "request magic 0x12345678"
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_tls_fails(front: Front, pki: Path, log: Log, tmp_path: Path) -> None:
    client = await front.greeted()
    await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
    assert "ALERT" in await over(front, client)
    assert log.end == "TLS handshake failed"
    assert log.closed["detail"] == "no_client_cert: it has no client certificate"


async def test_client_of_another_ca(front: Front, log: Log, pki: Path, tmp_path: Path) -> None:
    init(tmp_path / "other")
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.load_verify_locations(pki / "ca-cert.pem")
    other = tmp_path / "other"
    theirs.load_cert_chain(other / "client-cert.pem", other / "client-key.pem")
    client = await front.greeted()
    await in_thread(client.start_tls, theirs)
    assert "ALERT" in await over(front, client)
    assert log.closed["detail"] == "unknown_ca: its certificate is of another CA"


async def test_plaintext_instead_of_tls(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    client.send(option(Opt.GO, info_data()))
    await in_thread(client.recv_to_end)  # an alert
    client.close()
    await front.ended()
    assert log.closed["detail"].startswith("not_tls: ")


@pytest.mark.expects_error_log
async def test_bug_costs_one_client_only(
    front: Front, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def receive(*_: object) -> None:
        raise RuntimeError("a bug")

    other = await front.opened()
    client = await front.inside()
    with monkeypatch.context() as patch:
        patch.setattr(session_module.Haggling, "receive", receive)
        client.send(option(Opt.LIST))
        assert await in_thread(client.recv_to_end) == b""
        client.close()
        while not log.lines(": closed: "):
            await wait_all_tasks_blocked()
    assert log.end == "bug in the gateway"
    assert log.closed["number"] == "2"
    (record,) = [one for one in log.lines("bug: dropping") if one.levelno == logging.ERROR]
    assert record.exc_info
    await in_thread(read_works, other)


# ---------------------------------------------------------------- the deadline


@pytest.mark.parametrize("phase", ["raw", "greeted", "STARTTLS", "inside", "ask"])
async def test_one_deadline_from_accept_to_go(
    front: Front, fake: FakeUpstream, log: Log, mock_clock: MockClock, phase: str
) -> None:
    """However far a client has come, and whatever it says meanwhile."""
    match phase:
        case "raw":
            client = await front.raw()
        case "inside" | "ask":
            client = await front.inside()
        case _:
            client = await front.greeted()
    if phase == "STARTTLS":
        assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    for _ in range(9):
        mock_clock.jump(1.1)
        if phase == "ask":
            assert await in_thread(client.verdict, Opt.LIST) == Rep.ACK
        else:
            await wait_all_tasks_blocked()
        assert not log.lines(": closed: ")
    mock_clock.jump(0.2)
    await in_thread(client.recv_to_end)
    client.close()
    await front.ended()
    assert log.end == "handshake timeout"
    assert fake.connects == (phase == "ask")


async def test_no_deadline_after_go(front: Front, log: Log, mock_clock: MockClock) -> None:
    """Idle disks are normal."""
    client = await front.opened()
    mock_clock.jump(1_000_000)
    await wait_all_tasks_blocked()
    await in_thread(read_works, client)
    client.send(DISC)
    await over(front, client)


async def test_client_that_trickles(front: Front, log: Log, mock_clock: MockClock) -> None:
    """A byte now and then buys no time."""
    client = await front.greeted()
    for byte in option(Opt.LIST, bytes(100))[:10]:
        mock_clock.jump(1.01)
        client.try_send(bytes([byte]))
        await wait_all_tasks_blocked()
    await in_thread(client.recv_to_end)
    client.close()
    await front.ended()
    assert log.end == "handshake timeout"


# ---------------------------------------------------------------- making room


async def test_who_has_proved_nothing_may_be_put_out(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert front.sessions[0].unproven_s > 0
    front.sessions[0].evict()
    assert front.sessions[0].unproven_s == 0
    await over(front, client)
    assert log.end == "handshake timeout"
    assert log.closed["detail"] == "others wait for its place"


async def test_who_is_inside_tls_is_safe(front: Front) -> None:
    await front.inside()
    await front.opened()
    front.context = None
    await front.greeted()
    assert [one.unproven_s for one in front.sessions] == 3 * [0]


# ---------------------------------------------------------------- shutdown and cancellation


@pytest.mark.parametrize("inside", [False, True], ids=["plaintext", "TLS"])
async def test_shutdown_of_a_negotiation(
    front: Front, log: Log, fake: FakeUpstream, inside: bool
) -> None:
    client = await (front.inside() if inside else front.greeted())
    front.sessions[0].shutdown()
    options = [Opt.LIST, Opt.GO] if inside else [Opt.STARTTLS, Opt.LIST]
    for opt in options:
        data = info_data() if opt == Opt.GO else b""
        assert await in_thread(client.verdict, opt, data) == Rep.ERR_SHUTDOWN
    assert await in_thread(client.verdict, Opt.ABORT) == Rep.ACK
    await over(front, client)
    assert fake.connects == 0


async def test_shutdown_before_the_greeting(front: Front, log: Log) -> None:
    client = await front.raw()
    front.sessions[0].shutdown()
    await in_thread(client.greet)
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ERR_SHUTDOWN


async def test_shutdown_during_the_tls_handshake(front: Front, log: Log, pki: Path) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    await wait_all_tasks_blocked()
    front.sessions[0].shutdown()
    await in_thread(client.wrap, tls_context(pki))
    assert await in_thread(client.verdict, Opt.GO, info_data()) == Rep.ERR_SHUTDOWN


async def test_shutdown_in_transmission(front: Front, log: Log, fake: FakeUpstream) -> None:
    client = await front.opened()
    front.sessions[0].shutdown()
    assert await over(front, client) == "close_notify"
    assert log.end == "gateway shut down"
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_shutdown_while_the_upstream_is_asked(
    front: Front, log: Log, fake: FakeUpstream
) -> None:
    """The answer of the upstream is still given, and then there is nothing in flight."""
    go_on = threading.Event()

    class Slow(Script):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            go_on.wait(10)
            return super().info(link, opt, data)

    fake.script = Slow()
    client = await front.inside()
    client.send(option(Opt.GO, info_data()))
    link = await in_thread(fake.wait_link)
    await in_thread(fake.wait, lambda: link.options, "the option")
    front.sessions[0].shutdown()
    go_on.set()
    replies = await in_thread(client.replies, Opt.GO)
    if replies[-1].type == Rep.ACK:
        assert await over(front, client) == "close_notify"
        assert log.end == "gateway shut down"
    else:
        assert replies[-1].type == Rep.ERR_SHUTDOWN
    await front.ended() if replies[-1].type == Rep.ACK else client.close()


async def test_cancelled_session_closes_everything(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    client = await front.opened()
    client.send(Request(Cmd.WRITE, 0, 512, payload=bytes(512)).pack()[:100])
    link = fake.links[0]
    await in_thread(fake.wait, lambda: len(link.received) >= 72, "the write")
    front.scope.cancel()
    assert await over(front, client) == "close_notify"
    assert (await in_thread(fake.wait_end)).end == "cut"
    assert log.end == "gateway shut down"


async def test_nothing_stays_open(front: Front, fake: FakeUpstream, pki: Path) -> None:
    """Of sessions that ended in many ways."""

    def sockets() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            try:
                found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
            except FileNotFoundError:
                pass
        return found

    async def round_of_clients() -> None:
        (await front.raw()).close()
        (await front.greeted()).reset()
        client = await front.greeted()
        assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
        client.reset()
        client = await front.greeted()
        await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
        with pytest.raises(PeerClosedError):
            await in_thread(client.recv_exactly, 1)
        client.close()
        (await front.inside()).reset()
        client = await front.inside()
        await in_thread(client.ask, Opt.LIST)
        client.close()
        (await front.opened()).reset()
        client = await front.opened()
        client.send(DISC)
        await in_thread(client.recv_to_end)
        client.close()
        await front.ended()
        for index in range(len(fake.links)):
            await in_thread(fake.wait_end, index)
        await in_thread(fake.reset)

    await round_of_clients()
    before = sockets()
    for _ in range(3):
        await round_of_clients()
    assert sockets() == before
