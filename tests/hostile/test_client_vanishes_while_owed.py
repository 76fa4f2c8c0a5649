"""Clients are gone while the server owes them answers: their places are free for others at once.

The gateway has four places. The server never answers, and four others come in all the same.
"""

from __future__ import annotations

import functools
import socket
import threading

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Link, Script
from tests.support.rawclient import TIMEOUT_S, Cmd, Request

WINDOW = 8
OPTIONS = ("--max-connections", "4", "--limit", f"requests-in-flight={WINDOW}")


class Stuck(Script):
    """Takes so many requests and answers none. If that is none, it takes nothing at all."""

    def __init__(self, count: int) -> None:
        super().__init__(size=64 * MIB)
        self.count = count
        self.released = threading.Event()

    def transmit(self, link: Link) -> None:
        for _ in range(self.count):
            link.take_request()
        if not self.count:
            self.released.wait(2 * TIMEOUT_S)
        link.take_to_end()


def asked(link: Link, count: int) -> bool:
    return len(link.requests) == count


def owed(lab: Lab, requests: int) -> tuple[Session, Link]:
    """A client whose requests the server has, or as many of them as may be in flight."""
    count = min(requests, WINDOW)
    lab.fake.queue.append(Stuck(count))
    session = lab.session()
    link = lab.fake.links[-1]
    for number in range(requests):
        session.client.send(Request(Cmd.WRITE, 0, 512, number, payload=bytes(512)).pack())
    lab.fake.wait(functools.partial(asked, link, count), "requests at the server")
    return session, link


def inside_a_write(lab: Lab) -> tuple[Session, Stuck]:
    """A client in the middle of a write that the server does not take."""
    script = Stuck(0)
    lab.fake.queue.append(script)
    session = lab.session()
    session.client.sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        session.client.send(Request(Cmd.WRITE, 0, 32 * MIB, 1, payload=bytes(32 * MIB)).pack())
    return session, script


def test_their_places_are_free(lab: Lab) -> None:
    base = lab.settled_fds()
    killed, reset, full = owed(lab, 1), owed(lab, 1), owed(lab, 2 * WINDOW)
    writing, script = inside_a_write(lab)
    # As a kernel does it for a process that is killed: TCP is ended, and TLS is not.
    killed[0].client.sock.shutdown(socket.SHUT_WR)
    for session in (reset[0], full[0], writing):
        session.client.reset()
    others = [lab.session() for _ in range(4)]  # within the time that a client waits
    for other in others:
        other.check()
    for _, link in (killed, reset, full):
        lab.fake.wait(lambda link=link: link.end is not None, "the server's connection")
        goodbye = bytes(link.received[-28:])
        assert goodbye[6:8] == bytes([0, Cmd.DISC]), "the server was not told"
        assert len(link.requests) <= WINDOW
    script.released.set()
    for other in others:
        other.disc()
        other.client.close()
    lab.wait_fds(base)
