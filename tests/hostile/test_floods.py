"""Floods of clients that say nothing, half of it, or a byte at a time: a good client gets in.

Real processes, one and several workers. Addresses are those of 127.0.0.0/8.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.session import Session
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import Gateway
from tests.support.peers import wait_until
from tests.support.rawclient import (
    Opt,
    PeerClosedError,
    RawClient,
    Rep,
    client_hello,
    tls_context,
)

DEADLINE_S = 10.0  # of the handshake: what a good client may have to wait at the most
CROWD = 150
HOME = "127.0.0.1"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


class Front:
    """A gateway, and clients of it from any address; they are closed at the end."""

    def __init__(self, pki: Path, fake: FakeUpstream, *flags: str) -> None:
        where = ("--socket", fake.path, "--listen", "127.0.0.1:0")
        self.gateway = Gateway("--tls-dir", pki, *where, *flags)
        self.pki = pki
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Front:
        self._stack.enter_context(self.gateway)
        return self

    def __exit__(self, *why: object) -> None:
        self._stack.__exit__(*why)  # type: ignore[arg-type]

    def raw(self, source: str = HOME) -> RawClient:
        return self._stack.enter_context(RawClient(self.gateway.uri, source))

    def inside(self, source: str = HOME) -> RawClient:
        client = self.raw(source)
        client.greet()
        client.start_tls(tls_context(self.pki))
        return client

    def session(self, source: str = HOME) -> Session:
        client = self.inside(source)
        return Session(client, client.go(), {})


def silent(client: RawClient, pki: Path) -> None:
    """Not a word."""


def half_open(client: RawClient, pki: Path) -> None:
    """All that can be sent without waiting: flags, STARTTLS; and never a ClientHello."""
    with contextlib.suppress(OSError):
        client.sock.sendall(b"\0\0\0\3" + b"IHAVEOPT\0\0\0\5\0\0\0\0")


def half_hello(client: RawClient, pki: Path) -> None:
    """As far as TLS, for those whom the gateway has listened to already."""
    client.sock.settimeout(0.02)
    with contextlib.suppress(OSError, PeerClosedError):
        client.greet()
        if client.verdict(Opt.STARTTLS) == Rep.ACK:
            client.send(client_hello(tls_context(pki))[:-1])


@pytest.mark.parametrize(
    ("kind", "workers"), [(silent, 1), (half_open, 1), (half_hello, 1), (silent, 2)]
)
def test_a_good_client_gets_in(
    pki: Path, fake: FakeUpstream, kind: Callable[[RawClient, Path], None], workers: int
) -> None:
    """Behind them all in the queue, from their address and from another; and who is in stays."""
    with Front(pki, fake, "--workers", str(workers), "--handshake-timeout", "60") as front:
        held = front.session()
        for _ in range(CROWD):
            kind(front.raw(), pki)
        begun = time.monotonic()
        good = [front.session(), front.session("127.0.0.2")]
        assert time.monotonic() - begun < DEADLINE_S
        for session in (held, *good):
            session.check()
            session.disc()
        assert "others wait for its place" in front.gateway.log()


def test_a_byte_at_a_time(pki: Path, fake: FakeUpstream) -> None:
    """Who is only slow enough is no better than who is silent, however many there are."""
    with Front(pki, fake, "--handshake-timeout", "60", "--max-connections", "20") as front:
        slow = [front.raw() for _ in range(40)]
        hello = iter(b"\0\0\0\3" + b"IHAVEOPT\0\0\0\5\0\0\0\0" + bytes(10_000))
        good = RawClient(front.gateway.uri, "127.0.0.2")
        good.sock.setblocking(False)
        begun = time.monotonic()
        while True:
            byte = bytes([next(hello)])
            for client in slow:
                with contextlib.suppress(OSError):
                    client.sock.send(byte)
            with contextlib.suppress(BlockingIOError):
                if good.sock.recv(1, socket.MSG_PEEK):
                    break
            assert time.monotonic() - begun < DEADLINE_S
            time.sleep(0.05)  # their pace, not a wait for anything
        good.sock.settimeout(15)
        good.greet()
        good.start_tls(tls_context(pki))
        good.go()
        good.close()


def test_those_who_come_again_and_again(pki: Path, fake: FakeUpstream) -> None:
    """Faster than the rate, from one address: it costs that address its rate, and nobody else."""
    flags = ("--limit", "handshake-rate=20", "--handshake-timeout", "60")
    with Front(pki, fake, *flags) as front:
        held = front.session()
        refused = 0
        for _ in range(300):
            client = front.raw()
            client.sock.settimeout(0.001)
            with contextlib.suppress(TimeoutError):
                refused += client.recv_some() == b""
        begun = time.monotonic()
        good = front.session("127.0.0.2")
        assert time.monotonic() - begun < DEADLINE_S
        assert refused > 100
        good.check()
        held.check()
    log = front.gateway.log()
    lines = log.count(": closed: client not allowed (handshake_rate: more than 20 a second")
    summed = re.findall(
        r" (\d+) more clients were closed without a word: handshake_rate (\d+)\n", log
    )
    assert lines <= 40
    assert all(total == part for total, part in summed)
    assert lines + sum(int(total) for total, _ in summed) >= refused


def test_rate_and_counts_are_of_all_workers(pki: Path, fake: FakeUpstream) -> None:
    """Three of them: none has a bucket, or a count, of its own."""
    limits = ("handshake-rate=0.1", "clients-per-address=4", "clients-per-identity=2")
    flags = [word for one in limits[1:] for word in ("--limit", one)]
    with Front(pki, fake, "--workers", "3", *flags) as front:
        sessions = [front.session() for _ in range(2)]
        for _ in range(2):
            crowded = front.inside()
            (reply,) = crowded.ask(Opt.LIST)
            assert reply.type == Rep.ERR_POLICY
            assert reply.data.startswith(b"too many connections of CN=client ")
        for _ in range(6):
            assert front.raw().recv_to_end() == b""
        front.inside("127.0.0.2")
        sessions.pop().disc()
        wait_until(lambda: front.gateway.log().count(": closed: client disconnected") == 1, "it")
        sessions.append(front.session("127.0.0.3"))
        for session in sessions:
            session.check()
    with Front(pki, fake, "--workers", "3", "--limit", limits[0]) as front:
        front.session().check()
        for _ in range(6):
            assert front.raw().recv_to_end() == b""
        front.session("127.0.0.2").check()


def test_a_dead_worker_takes_its_counts_with_it(pki: Path, fake: FakeUpstream) -> None:
    flags = ("--workers", "2", "--limit", "clients-per-identity=2")
    with Front(pki, fake, *flags, "--limit", "clients-per-address=2") as front:
        for _ in range(2):
            front.session()
        assert front.raw().recv_to_end() == b""
        for pid in re.findall(r"\(process (\d+)\) started", front.gateway.log()):
            os.kill(int(pid), signal.SIGKILL)
        front.gateway.wait_log(r"worker 4 .* started")
        for session in [front.session() for _ in range(2)]:
            session.check()
        assert front.raw().recv_to_end() == b""


def test_no_place_is_used_up_by_ten_times_every_bound(pki: Path, fake: FakeUpstream) -> None:
    """By real processes: who is killed, resets or leaves at any point has left nothing behind."""
    bound = 4
    limits = [f"{name}={bound}" for name in ("clients-per-address", "clients-per-identity")]
    limits += [f"handshakes={bound}", "handshake-rate=0"]
    flags = [word for one in limits for word in ("--limit", one)]
    with Front(pki, fake, "--workers", "2", "--max-connections", "6", *flags) as front:
        for turn in range(10 * bound):
            client = front.raw()
            if turn % 5 == 0:
                client.close()
                continue
            with contextlib.suppress(PeerClosedError, OSError):
                client.greet()
                if turn % 5 == 1:
                    client.reset()
                    continue
                client.start_tls(tls_context(pki))
                if turn % 5 == 2:
                    client.reset()
                    continue
                client.go()
                if turn % 5 == 3:
                    client.reset()
            client.close()

        def closed() -> bool:
            log = front.gateway.log()
            return len(re.findall(r" open: ", log)) <= log.count(": closed: ")

        wait_until(closed, "all of them to be gone")

        def all_again() -> bool:
            clients: list[RawClient] = []
            try:
                for _ in range(bound):
                    clients.append(front.inside())
                    clients[-1].go()
            except (PeerClosedError, OSError, AssertionError):
                for client in clients:
                    client.close()
                return False
            return True

        wait_until(all_again, "every place to be free again")
        assert front.raw().recv_to_end() == b""
