"""Clients of `--oldstyle`, where nothing can be refused in words, and what may be behind it.

Each of them gets the whole greeting or none of it; the gateway lets go of all of them.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.hostile.test_upstream_closes_during_handshake import Counting
from tests.support.fake_upstream import MIB, Link, Script
from tests.support.rawclient import (
    CLISERV,
    IHAVEOPT,
    NBDMAGIC,
    Cmd,
    Err,
    Export,
    Opt,
    PeerClosedError,
    RawClient,
    Rep,
    Request,
    info_data,
    option,
)

OPTIONS = ("--tls", "off", "--oldstyle", "--handshake-timeout", "4", "--drain-timeout", "8")
STYLES = ["fixed", "newstyle", "oldstyle"]
BOUND_S = 8.0


def greeted(client: RawClient) -> Session:
    """In transmission."""
    magic, version, size, flags, zeroes = struct.unpack(">QQQI124s", client.recv_exactly(152))
    assert (magic, version, zeroes) == (NBDMAGIC, CLISERV, bytes(124))
    return Session(client, Export(size, flags, {}), {})


@pytest.fixture
def other(lab: Lab) -> Iterator[Session]:
    """Another client, on a correct upstream: whatever the test does, it notices nothing."""
    session = greeted(lab.raw())
    session.check()
    yield session
    session.check()
    session.disc()


GARBAGE = {
    "newstyle client": struct.pack(">I", 3) + option(Opt.GO, info_data(b"disk")),
    "option": option(Opt.STARTTLS) + bytes(16),
    "starttls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "extended request": struct.pack(">IHHQQQ", 0x21E41C71, 0, 0, 1, 0, 512),
    "zeroes": bytes(1000),
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("early", [False, True], ids=["greeted", "at_once"])
def test_garbage(lab: Lab, other: Session, said: bytes, early: bool) -> None:
    client = lab.raw()
    if early:
        client.send(said)
    greeted(client)
    if not early:
        client.send(said)
    assert client.recv_to_end() == b""
    link = lab.fake.wait_end(1)
    assert [request.cmd for request in link.requests] == [Cmd.DISC]


def test_requests_at_once(lab: Lab, other: Session) -> None:
    """They wait their turn, and are held to the same rules as later ones."""
    client = lab.raw()
    requests = [
        Request(Cmd.READ, 0, 512, cookie=1),
        Request(Cmd.READ, MIB, 1, cookie=2),
        Request(Cmd.BLOCK_STATUS, 0, 512, cookie=3),
        Request(99, 0, 512, cookie=4),
        Request(Cmd.READ, 0, 512, cookie=5, flags=1 << 2),  # DF
    ]
    client.send(b"".join(one.pack() for one in requests))
    session = greeted(client)
    for one in requests:
        session.expect(one)
    answers = [session.collect() for _ in requests]
    errors = {answer.request.cookie: answer.error for answer in answers}
    assert errors == {1: 0, 2: Err.EINVAL, 3: Err.EINVAL, 4: Err.EINVAL, 5: Err.EINVAL}
    session.check()
    session.disc()


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_leaves_after_any_byte(lab: Lab, how: str) -> None:
    base = lab.settled_fds()
    said = Request(Cmd.WRITE, 0, 16, payload=bytes(16)).pack()
    for cut in range(len(said) + 1):
        for read in (0, 1, 151, 152):
            client = lab.raw()
            client.recv_exactly(read)
            client.try_send(said[:cut])
            client.reset() if how == "rst" else client.close()
    lab.wait_fds(base)
    lab.assert_idle()
    greeted(lab.raw()).disc()


def test_silent_clients(lab: Lab, other: Session) -> None:
    """Once greeted they are idle disks, for as long as they like; they hold up nobody."""
    crowd = [lab.raw() for _ in range(20)]
    for client in reversed(crowd):
        greeted(client).check()


# ---------------------------------------------------------------- behind it


@pytest.mark.parametrize("style", STYLES)
def test_upstream_closes_after_each_byte(lab: Lab, other: Session, style: str) -> None:
    """All of the greeting, or nothing."""
    lab.fake.script = script = Counting(style=style)
    greeted(lab.raw()).disc()
    lab.fake.wait_end(1)
    assert script.handshake_bytes > 26
    for cut in range(script.handshake_bytes + 1):
        lab.fake.script = Script(style=style, cut_after=cut)
        client = lab.raw()
        try:
            session = greeted(client)
        except PeerClosedError:
            assert client.recv_to_end() == b""
        else:
            session.lost()
            assert cut == script.handshake_bytes, f"greeted after {cut} bytes"
        client.close()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_absurd_size(lab: Lab, other: Session, style: str, size: int) -> None:
    """CVE-2023-5215."""
    lab.fake.script = Script(size=size, style=style)
    assert lab.raw().recv_to_end() == b""


class Refuses(Script):
    def option(self, link: Link, opt: int, data: bytes) -> bool:
        self.reply(link, opt, Rep.ERR_POLICY, b"\x1b[2J evil")
        return False


class Chats(Script):
    """Talks on behind its greeting."""

    def serve(self, link: Link) -> None:
        link.send(struct.pack(">QQQI124x", NBDMAGIC, CLISERV, MIB, 1) + b"!")
        link.take_to_end()


class NoServer(Script):
    def serve(self, link: Link) -> None:
        link.send(b"SSH-2.0-OpenSSH_9.2\r\n")
        link.take_to_end()


class TooNew(Script):
    def serve(self, link: Link) -> None:
        link.send(struct.pack(">QQH", NBDMAGIC, IHAVEOPT + 1, 3))
        link.take_to_end()


@pytest.mark.parametrize(
    "script", [Refuses(), Chats(), NoServer(), TooNew()], ids=lambda one: type(one).__name__
)
def test_no_export(lab: Lab, other: Session, script: Script) -> None:
    """The reason is for the log, in a form that is fit for it."""
    lab.fake.script = script
    logged = len(lab.gateway.log())
    assert lab.raw().recv_to_end() == b""
    line = lab.gateway.wait_log(r"closed: export refused \(.*\);", after=logged)[0]
    assert line.isprintable()
    assert "evil" not in line


class Mute(Script):
    def serve(self, link: Link) -> None:
        link.take_to_end()


def test_mute_upstream(lab: Lab, other: Session) -> None:
    lab.fake.script = Mute()
    begun = time.monotonic()
    assert lab.raw().recv_to_end() == b""
    assert time.monotonic() - begun < BOUND_S


def test_sigterm_before_a_mute_upstream(lab: Lab) -> None:
    """There is nothing to wait for: the clients have been told nothing yet."""
    lab.mortal = True
    lab.fake.script = Mute()
    clients = [lab.raw() for _ in range(5)]
    lab.fake.wait(lambda: lab.fake.connects == len(clients), "the connections upstream")
    lab.gateway.terminate()
    for client in clients:
        assert client.recv_to_end() == b""
    assert lab.gateway.wait(BOUND_S) == 0
    assert lab.gateway.log().count("closed: gateway shut down;") >= len(clients)
