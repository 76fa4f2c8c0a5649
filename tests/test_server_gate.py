"""gateway.server and its gate: who is refused, how, what is logged, and that counts come back."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import socket
from pathlib import Path

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import accepting
from gateway.access import Rules, parse_network
from gateway.few_lines import WINDOW_S
from gateway.limits import Limits
from gateway.settings import ListenTCP, ListenUnix, Settings
from tests import server_rig
from tests.server_rig import (
    Clients,
    Running,
    Start,
    in_thread,
    is_waiting,
    leave,
    messages,
    read_works,
)
from tests.support.fake_upstream import FakeUpstream
from tests.support.rawclient import Opt, RawClient, Rep, info_data, option, tls_context

fake, settings, clients, start = (
    server_rig.fake,
    server_rig.settings,
    server_rig.clients,
    server_rig.start,
)


def bounded(settings: Settings, **limits: float) -> Settings:
    return dataclasses.replace(settings, limits=Limits(**limits))  # type: ignore[arg-type]


async def closed_without_a_word(client: RawClient) -> bool:
    return await in_thread(client.recv_to_end) == b""


def refusals(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    found = messages(caplog, logging.INFO)
    return [one for one in found if f": closed: client not allowed ({word}: " in one]


# ---------------------------------------------------------------- by address


async def test_too_many_of_one_address(
    start: Start, settings: Settings, clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = await start(bounded(settings, clients_per_address=2))
    first, second = [await clients.opened(running.uri) for _ in range(2)]
    for _ in range(3):
        assert await closed_without_a_word(clients.connect(running.uri))
    lines = refusals(caplog, "too_many_clients")
    assert len(lines) == 3
    assert all("2 of its address are here); 0 bytes in, 0 out, 0.0 s" in one for one in lines)
    await in_thread(read_works, second)
    other = RawClient(running.uri, "127.0.0.2")
    await in_thread(other.greet)
    other.close()
    await in_thread(leave, first)
    await clients.opened(running.uri)


async def test_too_fast_from_one_address(
    start: Start, settings: Settings, clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = await start(bounded(settings, handshake_rate=0.1))  # the next in ten seconds
    client = await clients.opened(running.uri)
    assert await closed_without_a_word(clients.connect(running.uri))
    (line,) = refusals(caplog, "handshake_rate")
    assert "more than 0.1 a second of its address" in line
    await in_thread(read_works, client)
    other = RawClient(running.uri, "127.0.0.2")
    await in_thread(other.greet)
    other.close()


async def test_unix_sockets_have_no_address(
    start: Start, settings: Settings, clients: Clients, tmp_path: Path
) -> None:
    settings = bounded(settings, clients_per_address=1, handshake_rate=0.1)
    running = await start(
        dataclasses.replace(settings, listen=(ListenUnix(str(tmp_path / "front")),))
    )
    for _ in range(4):
        await clients.opened(running.uri)


@pytest.mark.parametrize("how", ["denied", "rate"])
async def test_nobody_is_put_out_for_who_is_refused(
    start: Start, settings: Settings, clients: Clients, mock_clock: MockClock, how: str
) -> None:
    """All slots are taken, and those who have them could be put out for a good client."""
    settings = dataclasses.replace(settings, max_connections=3, handshake_timeout_s=600)
    if how == "denied":
        deny = Rules(deny_from=(parse_network("", "127.0.0.9/32"),))
        settings = dataclasses.replace(settings, rules=deny)
    else:
        settings = bounded(settings, handshake_rate=0.1)
    running = await start(settings)

    def connect(source: str) -> RawClient:
        client = RawClient(running.uri, source)
        clients._all.append(client)
        return client

    held = [connect(source) for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3")]
    for client in held:
        await in_thread(client.greet)
    bad = "127.0.0.9" if how == "denied" else "127.0.0.3"
    early = connect(bad)
    await wait_all_tasks_blocked()
    assert is_waiting(early)  # there is no room, and nobody to be put out
    mock_clock.jump(5.0)
    for client in (early, *(connect(bad) for _ in range(5))):
        assert await closed_without_a_word(client)
    assert all(is_waiting(client) for client in held)
    good = connect("127.0.0.4")
    await in_thread(good.greet)
    assert await closed_without_a_word(held[0])
    assert all(is_waiting(client) for client in held[1:])


# ---------------------------------------------------------------- by identity


async def test_too_many_of_one_identity(
    start: Start,
    settings: Settings,
    clients: Clients,
    fake: FakeUpstream,
    caplog: pytest.LogCaptureFixture,
    pki: Path,
) -> None:
    """It is told, as often as it asks; nobody is dialled for it."""
    caplog.set_level(logging.INFO)
    running = await start(bounded(settings, clients_per_identity=2))
    first, second = [await clients.opened(running.uri) for _ in range(2)]
    third = await clients.greeted(running.uri)
    await in_thread(third.start_tls, tls_context(pki))
    for opt, data in ((Opt.LIST, b""), (Opt.GO, info_data()), (Opt.INFO, info_data())):
        (reply,) = await in_thread(third.ask, opt, data)
        assert reply.type == Rep.ERR_POLICY
        assert reply.data.startswith(b"too many connections of CN=client sha256:")
        assert reply.data.endswith(b": 2 at a time are allowed")
    third.send(option(Opt.EXPORT_NAME))
    assert await in_thread(third.recv_to_end) == b""
    third.close()
    assert fake.connects == 2
    while not (lines := refusals(caplog, "too_many_clients")):
        await wait_all_tasks_blocked()
    assert "too many connections of CN=client" in lines[0]
    await in_thread(read_works, second)
    await in_thread(leave, first)
    fourth = await clients.opened(running.uri)
    await in_thread(read_works, fourth)


async def test_users_of_this_machine_are_identities(
    start: Start, settings: Settings, clients: Clients, tmp_path: Path
) -> None:
    settings = bounded(settings, clients_per_identity=1)
    listen = (ListenUnix(str(tmp_path / "front")), ListenTCP("127.0.0.1", 0))
    running = await start(dataclasses.replace(settings, tls=None, listen=listen))
    client = await clients.greeted(running.uris[0])
    await in_thread(client.go)
    other = await clients.greeted(running.uris[0])
    (reply,) = await in_thread(other.ask, Opt.LIST)
    assert (
        reply.data == f"too many connections of uid:{os.getuid()}: 1 at a time are allowed".encode()
    )
    for _ in range(3):  # of whom nothing is known
        client = await clients.greeted(running.uris[1])
        await in_thread(client.go)


# ---------------------------------------------------------------- counts


async def test_counts_come_back_however_clients_end(
    start: Start, settings: Settings, clients: Clients, pki: Path, mock_clock: MockClock
) -> None:
    """Ten times each bound; then the whole of it is there again."""
    bound = 3
    settings = bounded(
        settings,
        clients_per_address=bound,
        clients_per_identity=bound,
        handshakes=bound,
        handshake_rate=0,
    )
    running = await start(dataclasses.replace(settings, max_connections=bound))
    gate = running.server._gate

    async def all_gone() -> None:
        while gate._clients:
            await wait_all_tasks_blocked()

    async def inside() -> RawClient:
        client = await clients.greeted(running.uri)
        await in_thread(client.start_tls, tls_context(pki))
        return client

    for turn in range(10 * bound):
        clients.connect(running.uri).close()
        clients.connect(running.uri).reset()
        await all_gone()
        client = await clients.greeted(running.uri)
        match turn % 6:
            case 0:
                client.send(b"garbage, and a good deal of it")
            case 1:
                client.reset()
            case 2:
                client.send(option(Opt.STARTTLS) + b"garbage")
            case 3:
                await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
            case 4:
                mock_clock.jump(11)  # the deadline
                assert await closed_without_a_word(client)
            case _:
                client.send(option(Opt.ABORT))
        client.close()
        await all_gone()
        client = await inside()
        match turn % 4:
            case 0:
                client.send(b"garbage, and a good deal of it")
            case 1:
                await in_thread(client.go)
                client.reset()
            case 2:
                await in_thread(client.go)
                await in_thread(leave, client)
            case _:
                mock_clock.jump(11)
                assert await in_thread(client.recv_to_end) == b""
        client.close()
        await all_gone()
        if turn % 5 == 0:  # refused by identity: in the table of addresses it has been
            gate._limits = dataclasses.replace(gate._limits, clients_per_identity=1)
            first, second = await clients.opened(running.uri), await inside()
            assert await in_thread(second.verdict, Opt.LIST) == Rep.ERR_POLICY
            second.close()
            await in_thread(leave, first)
            gate._limits = settings.limits
            await all_gone()
    together = [await clients.opened(running.uri) for _ in range(bound)]
    for client in together:
        await in_thread(read_works, client)
        client.close()
    await all_gone()
    places = gate._place._places
    assert not any(places.addresses._memory[:])
    assert not any(places.identities._memory[:])
    assert not gate._unproven


# ---------------------------------------------------------------- what is logged


async def test_a_flood_is_some_lines_and_a_sum(
    start: Start,
    settings: Settings,
    clients: Clients,
    caplog: pytest.LogCaptureFixture,
    mock_clock: MockClock,
) -> None:
    caplog.set_level(logging.INFO)
    running = await start(bounded(settings, handshake_rate=1))

    async def flood(count: int) -> None:
        for _ in range(count):
            client = RawClient(running.uri)
            assert await closed_without_a_word(client)
            client.close()

    running.server._gate._clock = lambda: 5e5
    for _ in range(2):
        await clients.greeted(running.uri)
    await flood(150)
    assert len(refusals(caplog, "handshake_rate")) == 20
    mock_clock.jump(WINDOW_S)
    await wait_all_tasks_blocked()
    said = "130 more clients were closed without a word: handshake_rate 130"
    assert messages(caplog, logging.INFO).count(said) == 1
    await flood(3)
    assert len(refusals(caplog, "handshake_rate")) == 23  # each again
    await flood(20)
    running.server.cut()
    await running.ended.wait()
    assert messages(caplog, logging.INFO)[-1].startswith("3 more clients were closed")


# ---------------------------------------------------------------- bad times


class AcceptFails:
    """At one listener, as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int, number: int) -> None:
        self.on, self.calls = True, 0
        really = socket.socket.accept

        def accept(sock: socket.socket) -> tuple[socket.socket, object]:
            if self.on and sock.family == socket.AF_INET and sock.getsockname()[1] == port:
                self.calls += 1
                raise OSError(number, os.strerror(number))
            return really(sock)

        monkeypatch.setattr(socket.socket, "accept", accept)


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS], ids=os.strerror
)
async def test_other_listeners_go_on(
    start: Start,
    settings: Settings,
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mock_clock: MockClock,
    number: int,
) -> None:
    caplog.set_level(logging.INFO)
    listen = (ListenTCP("127.0.0.1", 0), ListenTCP("127.0.0.1", 0))
    running = await start(dataclasses.replace(settings, listen=listen))
    bad, good = running.uris
    fails = AcceptFails(monkeypatch, int(bad.rpartition(":")[2].strip("/")), number)
    waiting = clients.connect(bad)
    for _ in range(200):
        mock_clock.jump(1.0)
        await wait_all_tasks_blocked()
    assert 150 < fails.calls < 250
    warnings = messages(caplog, logging.WARNING)
    assert warnings == [f"cannot accept, trying again: {os.strerror(number)}"] * len(warnings)
    assert 3 <= len(warnings) <= 5, "more than one a minute"
    await clients.opened(good)
    fails.on = False
    mock_clock.jump(1.0)
    await in_thread(waiting.greet)
    said = [one for one in messages(caplog, logging.INFO) if "can accept again" in one]
    assert len(said) == 1
    assert accepting._BACK_OFF_S == (0.005, 1.0)


async def test_a_socket_that_cannot_be_tuned_costs_nobody_else(
    start: Start,
    settings: Settings,
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    running: Running = await start(dataclasses.replace(settings, max_connections=1))
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

        patch.setattr("gateway.session._tune", fail)
        for _ in range(3):
            assert await closed_without_a_word(clients.connect(running.uri))
            assert running.server._gate._clients == 0
    assert "No buffer space" in messages(caplog, logging.WARNING)[0]
    await clients.opened(running.uri)
    assert running.server._gate._clients == 1
