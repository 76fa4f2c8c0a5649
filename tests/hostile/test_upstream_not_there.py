"""There is no upstream, or nobody at home: options fail in words, in time, and later ones work.

A client that was served before notices nothing.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.session import Session
from tests.support.fake_upstream import FakeUpstream, Link, Script
from tests.support.gateway import Gateway
from tests.support.rawclient import (
    Cmd,
    Err,
    Opt,
    RawClient,
    Rep,
    Request,
    info_data,
    meta_data,
    option,
    tls_context,
)

DEADLINE_S = 2.0


class Place:
    """A gateway, and the path at which an upstream may be or not."""

    def __init__(self, pki: Path, directory: Path) -> None:
        self.pki = pki
        self.path = directory / "up"
        self.stack = contextlib.ExitStack()
        where = ("--socket", self.path, "--listen", "127.0.0.1:0")
        limits = ("--handshake-timeout", str(DEADLINE_S), "--limit", "handshake-rate=0")
        self.gateway = Gateway("--tls-dir", pki, *where, *limits)

    def remove(self) -> None:
        """What is at the path, whatever it is."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
        self.path.unlink(missing_ok=True)

    def tls(self) -> RawClient:
        client = self.stack.enter_context(RawClient(self.gateway.uri))
        client.greet()
        client.start_tls(tls_context(self.pki))
        return client

    def session(self) -> Session:
        client = self.tls()
        client.ask_structured()
        return Session(client, client.go(), {})


@pytest.fixture(scope="module")
def one_gateway(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(pki, tmp_path_factory.mktemp("place"))
    with place.gateway:
        yield place


@pytest.fixture
def place(one_gateway: Place) -> Iterator[Place]:
    with one_gateway.stack:
        yield one_gateway
    one_gateway.remove()


def absent(place: Place) -> None:
    """Nothing is there."""


def stale(place: Place) -> None:
    """A socket whose server is dead."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place.path))


def a_file(place: Place) -> None:
    place.path.write_bytes(b"NBDMAGICIHAVEOPT\0\3")


def a_directory(place: Place) -> None:
    place.path.mkdir()


def a_loop(place: Place) -> None:
    place.path.symlink_to(place.path)


def datagrams(place: Place) -> None:
    sock = place.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sock.bind(str(place.path))


def full(place: Place) -> None:
    """Its backlog is full: connections are not even made."""
    sock = place.stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(str(place.path))
    sock.listen(0)
    place.stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(place.path))


class Mute(Script):
    def serve(self, link: Link) -> None:
        link.take_to_end()


class Trickling(Script):
    """A byte at a time, and never all of them."""

    def serve(self, link: Link) -> None:
        with contextlib.suppress(Exception):
            for byte in b"NBDMAGICIHAVEOPT\0":
                link.send(bytes([byte]))
                time.sleep(0.2)  # its pace
            link.take_to_end()


def silent(place: Place) -> None:
    fake = place.stack.enter_context(FakeUpstream(place.path))
    fake.script = Mute()


def trickling(place: Place) -> None:
    fake = place.stack.enter_context(FakeUpstream(place.path))
    fake.script = Trickling()


QUICK = [absent, stale, a_file, a_directory, a_loop, datagrams]
SLOW = [full, silent, trickling]


def all_fail(place: Place) -> None:
    """Every option that needs the upstream, each in its own way, all clients at the same time."""
    asks = {
        Opt.GO: info_data(),
        Opt.INFO: info_data(),
        Opt.SET_META_CONTEXT: meta_data(b"", [b"base:allocation"]),
        Opt.LIST: b"",
        Opt.EXPORT_NAME: b"",
    }
    clients = {opt: place.tls() for opt in asks}
    begun = time.monotonic()
    for opt, client in clients.items():
        client.send(option(opt, asks[opt]))
    for opt in (Opt.GO, Opt.INFO):
        (reply,) = clients[opt].replies(opt)
        assert reply.type == Rep.ERR_UNKNOWN
        assert b"cannot be reached" in reply.data
        assert str(place.path).encode() not in reply.data
    assert clients[Opt.SET_META_CONTEXT].replies(Opt.SET_META_CONTEXT)[-1].failed
    listed = clients[Opt.LIST].replies(Opt.LIST)
    assert [one.type for one in listed] == [Rep.SERVER, Rep.ACK], "its name is in the settings"
    assert clients[Opt.EXPORT_NAME].recv_to_end() == b""
    assert time.monotonic() - begun < DEADLINE_S + 1
    for client in clients.values():
        client.close()


@pytest.mark.parametrize("how", [*QUICK, *SLOW])
def test_told_in_words_and_mended(place: Place, how: Callable[[Place], None]) -> None:
    with FakeUpstream(place.path) as fake:
        good = place.session()
        good.check()
        place.remove()
        logged = len(place.gateway.log())
        how(place)
        all_fail(place)
        good.check()  # its upstream is there all the same
        assert "upstream unavailable" in place.gateway.log()[logged:]
        place.remove()
        with FakeUpstream(place.path) as mended:
            session = place.session()
            session.check()
            session.disc()
            assert not mended.errors
        good.check()
        good.disc()
        assert not fake.errors


class Stuck(Script):
    """Serves reads of its first half, and neither answers nor takes anything after another one."""

    def requested(self, link: Link, request: Request) -> None:
        if request.offset >= self.size // 2:
            link.take_to_end()
        else:
            super().requested(link, request)


def test_silent_between_requests(place: Place) -> None:
    """A server that thinks for long is no fault; the client may leave, and others are served."""
    with FakeUpstream(place.path) as fake:
        fake.script = Stuck()
        session, other = place.session(), place.session()
        session.submit(Cmd.READ, Stuck.size // 2, 512)
        for _ in range(20):
            other.check()
        session.client.reset()
        other.check()
        fake.links[0].hang_up()  # else it is waited for, for a while
        other.check()
        fake.links[1].hang_up()
        assert other.ask(Cmd.READ, 0, 512).error == Err.ESHUTDOWN
