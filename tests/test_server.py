"""gateway.server: starting, accepting in bad times, and slots."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import accepting
from gateway import server as server_module
from gateway.errors import ListenError, SettingsError
from gateway.server import Server
from gateway.settings import ListenTCP, ListenUnix, Settings
from tests import server_rig
from tests.server_rig import (
    Clients,
    Start,
    in_thread,
    is_waiting,
    leave,
    messages,
    read_works,
)
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import ROOT, Output, environment
from tests.support.peers import wait_until
from tests.support.rawclient import (
    Opt,
    RawClient,
    Rep,
    tls_context,
)

fake, settings, clients, start = (
    server_rig.fake,
    server_rig.settings,
    server_rig.clients,
    server_rig.start,
)


# ---------------------------------------------------------------- starting


async def test_uris_are_there_when_it_listens(
    start: Start, settings: Settings, clients: Clients, tmp_path: Path
) -> None:
    listen = (ListenTCP("127.0.0.1", 0), ListenTCP("::1", 0), ListenUnix(str(tmp_path / "front")))
    running = await start(dataclasses.replace(settings, listen=listen, export="d k"))
    assert [uri.partition("://")[0] for uri in running.uris] == ["nbds", "nbds", "nbds+unix"]
    assert all("/d%20k" in uri for uri in running.uris)
    for uri in running.uris:
        await clients.greeted(uri)


async def test_address_in_the_log(
    start: Start,
    settings: Settings,
    clients: Clients,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    listen = (ListenTCP("127.0.0.1", 0), ListenTCP("::1", 0), ListenUnix(str(tmp_path / "front")))
    running = await start(dataclasses.replace(settings, listen=listen))
    for uri in running.uris:
        client = await clients.greeted(uri)
        client.send(b"garbage, and a good deal of it")
        await in_thread(client.recv_to_end)
        client.close()

    def closed() -> list[str]:
        return [text for text in messages(caplog, logging.INFO) if ": closed: " in text]

    while len(closed()) < 3:
        await wait_all_tasks_blocked()
    v4, v6, unix = (text.partition(": closed")[0] for text in closed())
    assert v4.startswith("[1] 127.0.0.1:")
    assert v6.startswith("[2] [::1]:")
    assert unix == "[3] unix"


async def test_cannot_listen(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "front"
    path.touch()
    server = Server(dataclasses.replace(settings, listen=(ListenUnix(str(path)),)))
    with pytest.raises(ListenError, match="the file exists"):
        await server.run()


async def test_without_tls_only_here(settings: Settings) -> None:
    server = Server(dataclasses.replace(settings, tls=None, listen=(ListenTCP(None, 0),)))
    with pytest.raises(SettingsError, match="--tls off"):
        await server.run()


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, 1024),
        (100, 4096, 264),
        (100, resource.RLIM_INFINITY, 264),
        (100, 200, 200),
        (200, 200, 200),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_descriptors_for_all_clients(
    settings: Settings,
    soft: int,
    hard: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two a client: the soft limit is raised as far as it has to be, or it is said."""
    now = [soft, hard]

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        now[:] = limits

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    server_module.allow_descriptors(settings)
    assert now == [expected, hard]
    warnings = messages(caplog, logging.WARNING)
    assert len(warnings) == (expected == 200)
    assert all("100 clients need 264 descriptors, and 200 are" in text for text in warnings)


# ---------------------------------------------------------------- accepting


class FailingAccept:
    """Lets `accept` of TCP listeners fail, so many times, or as long as `stop` was not called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1 << 30) -> None:
        self.left, self.calls = times, 0
        really = socket.socket.accept

        def accept(sock: socket.socket) -> tuple[socket.socket, object]:
            if sock.family == socket.AF_UNIX:  # the fake upstream's
                return really(sock)
            self.calls += 1
            if self.left:
                self.left -= 1
                raise OSError(number, os.strerror(number))
            return really(sock)

        monkeypatch.setattr(socket.socket, "accept", accept)

    def stop(self) -> None:
        self.left = 0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_running_out_is_waited_out(
    start: Start,
    settings: Settings,
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mock_clock: MockClock,
    number: int,
) -> None:
    """With longer and longer waits, up to a second: the loop must not spin meanwhile."""
    running = await start(settings)
    accept = FailingAccept(monkeypatch, number)
    client = clients.connect(running.uri)
    await wait_all_tasks_blocked()
    expected = [0.005 * 2**i for i in range(8)] + [1.0, 1.0, 1.0]
    for calls, wait_s in enumerate(expected, 1):
        assert accept.calls == calls
        mock_clock.jump(wait_s * 0.99)
        await wait_all_tasks_blocked()
        assert accept.calls == calls
        mock_clock.jump(wait_s * 0.011)
        await wait_all_tasks_blocked()
    warnings = messages(caplog, logging.WARNING)
    assert set(warnings) == {f"cannot accept, trying again: {os.strerror(number)}"}
    accept.stop()
    mock_clock.jump(1.0)
    await in_thread(client.greet)
    # Once it goes well, the next failure begins with a short wait again.
    accept.left, before = 2, accept.calls
    other = clients.connect(running.uri)
    for _ in range(2):
        await wait_all_tasks_blocked()
        mock_clock.jump(0.011)
    await in_thread(other.greet)
    assert accept.calls == before + 3


@pytest.mark.parametrize("number", sorted(accepting.GONE))
async def test_connections_that_are_gone_already(
    start: Start,
    settings: Settings,
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mock_clock: MockClock,
    number: int,
) -> None:
    """accept(2) has the errors of a connection in it; the next one is served at once."""
    running = await start(dataclasses.replace(settings, max_connections=1))
    FailingAccept(monkeypatch, number, times=5)
    await clients.greeted(running.uri)
    assert not messages(caplog, logging.WARNING)


async def test_error_of_the_listener_itself_is_not_hidden(
    nursery: trio.Nursery,
    settings: Settings,
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "front"
    both = (*settings.listen, ListenUnix(str(path)))
    failed = pytest.RaisesExc(OSError, match=r"Invalid argument")
    with pytest.RaisesGroup(failed, flatten_subgroups=True):
        async with trio.open_nursery() as inner:
            server = Server(dataclasses.replace(settings, listen=both))
            uris = await inner.start(functools.partial(server.run, handle_signals=False))
            FailingAccept(monkeypatch, errno.EINVAL)
            clients.connect(uris[0])
            await trio.sleep_forever()
    assert not path.exists()


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
os.execv(sys.executable, [sys.executable, "-m", "gateway", *sys.argv[1:]])
"""


def test_really_out_of_descriptors(pki: Path, fake: FakeUpstream) -> None:
    """Some clients wait in the queue; those that are in are served; nothing is an ERROR."""
    out, err = Output(), Output()
    arguments = ["--tls-dir", str(pki), "--socket", str(fake.path), "--listen", "127.0.0.1:0"]
    with contextlib.ExitStack() as stack:
        stack.callback(out.close)
        stack.callback(err.close)
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", LIMITED, *arguments],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=out.file,
                stderr=err.file,
            )
        )
        stack.callback(process.kill)
        wait_until(lambda: out.text().endswith("\n"), "the gateway to start")
        uri = out.text().strip()
        assert "descriptors, and 24 are allowed" in err.text()
        crowd = [stack.enter_context(RawClient(uri)) for _ in range(30)]
        crowd[0].greet()
        wait_until(lambda: "cannot accept, trying again" in err.text(), "descriptors to run out")
        for client in crowd[:20]:
            client.close()
        for client in crowd[20:24]:
            client.greet()
        for client in crowd:
            client.close()
        with RawClient(uri) as client:
            client.greet()
            client.start_tls(tls_context(pki))
            client.go()
            read_works(client)
            leave(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        log = err.text()
    assert "Traceback" not in log
    assert " ERROR " not in log


# ---------------------------------------------------------------- slots


async def test_who_finds_no_slot_waits_in_the_queue(
    start: Start, settings: Settings, clients: Clients, mock_clock: MockClock
) -> None:
    running = await start(dataclasses.replace(settings, max_connections=2))
    first, second = [await clients.opened(running.uri) for _ in range(2)]
    third = clients.connect(running.uri)
    for _ in range(10):
        mock_clock.jump(10.0)
        await wait_all_tasks_blocked()
        assert is_waiting(third), "greeted beyond the limit"
    await in_thread(read_works, second)
    await in_thread(leave, first)
    await in_thread(third.greet)
    await in_thread(read_works, second)


async def test_slots_are_not_used_up(
    start: Start, settings: Settings, clients: Clients, pki: Path
) -> None:
    running = await start(dataclasses.replace(settings, max_connections=1))
    for _ in range(3):
        clients.connect(running.uri).close()
        (await clients.greeted(running.uri)).reset()
        client = await clients.greeted(running.uri)
        client.send(b"garbage, and a good deal of it")
        await in_thread(client.recv_to_end)
        client.close()
        client = await clients.greeted(running.uri)
        await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
        await in_thread(client.recv_to_end)
        client.close()
        await in_thread(leave, await clients.opened(running.uri))


async def test_silent_clients_keep_nobody_out(
    start: Start, settings: Settings, clients: Clients, mock_clock: MockClock
) -> None:
    """Whose TLS is not up makes room, the oldest first, but not before it had its chance."""
    running = await start(dataclasses.replace(settings, max_connections=3))
    proven = await clients.opened(running.uri)
    oldest = await clients.greeted(running.uri)
    mock_clock.jump(1.0)
    younger = await clients.greeted(running.uri)
    late = clients.connect(running.uri)
    await wait_all_tasks_blocked()
    assert is_waiting(late)
    for _ in range(4):
        mock_clock.jump(0.4)
        await wait_all_tasks_blocked()
    await in_thread(late.greet)
    assert await in_thread(oldest.recv_to_end) == b""
    assert await in_thread(younger.verdict, Opt.LIST) == Rep.ERR_TLS_REQD
    await in_thread(read_works, proven)


@pytest.mark.expects_error_log
async def test_bug_in_one_session_costs_no_other(
    start: Start, settings: Settings, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start(dataclasses.replace(settings, max_connections=2))
    witness = await clients.opened(running.uri)

    async def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("gateway.client_handshake.ClientHandshake.run", fail)
        for _ in range(3):
            client = clients.connect(running.uri)
            await in_thread(client.recv_to_end)
            client.close()
    await in_thread(read_works, witness)
    await clients.opened(running.uri)
