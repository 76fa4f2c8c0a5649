"""Peers that do not take their bytes: each costs a bounded buffer, and goes on where it was.

What is bounded is the memory that is resident, and how many bytes are taken from the one side while
the other takes none: buffers of sockets (a few MiB), and one of the gateway's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.duplex import Duplex, narrow, push
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Link, Script, pattern
from tests.support.rawclient import TIMEOUT_S, Cmd, Err, Request, tls_context

ROOM_KIB = 8 << 10  # for a buffer of 512 KiB each way, and what the allocator makes of it
IN_SOCKETS = 16 * MIB  # the kernel's own buffers on loopback, at their largest


class Waiting(Script):
    """Takes nothing in transmission until it is told to."""

    def __init__(self, **changes: object) -> None:
        super().__init__(**changes)
        self.go = threading.Event()

    def transmit(self, link: Link) -> None:
        assert self.go.wait(4 * TIMEOUT_S)
        super().transmit(link)


def measured(lab: Lab) -> Callable[[], int]:
    """How many KiB more were resident at the most since now."""
    lab.forget_peak()
    before = lab.peak_kib()
    return lambda: lab.peak_kib() - before


def test_upstream_takes_nothing(lab: Lab, witness: Session) -> None:
    """A client writes 24 MiB at it. What fits in sockets and a buffer is taken, and no more."""
    script = lab.fake.script = Waiting(size=128 * MIB)
    session = lab.session(structured=False)
    writes = [
        Request(Cmd.WRITE, MIB * i, MIB, i + 1, payload=pattern(MIB * i, MIB)) for i in range(24)
    ]
    said = b"".join(one.pack() for one in writes)
    grown = measured(lab)
    left = push(session.client, said)
    assert len(said) - len(left) < IN_SOCKETS
    for _ in range(20):
        witness.check()
    assert grown() < ROOM_KIB
    lab.assert_idle()
    for one in writes:
        session.expect(one)
    script.go.set()
    session.client.sock.sendall(left)
    for _ in writes:
        assert session.collect().error == 0
    session.disc()
    link = lab.fake.wait_end(1)
    assert [one.payload == pattern(one.offset, MIB) for one in link.requests[:-1]] == [True] * 24


def test_upstream_gives_nothing(lab: Lab, witness: Session) -> None:
    """Reads wait at no cost, and are answered in the end."""
    script = lab.fake.script = Waiting(size=128 * MIB)
    session = lab.session()
    grown = measured(lab)
    for number in range(24):
        session.submit(Cmd.READ, MIB * number, MIB)
    for _ in range(20):
        witness.check()
    assert grown() < ROOM_KIB
    lab.assert_idle()
    script.go.set()
    for _ in range(24):
        answer = session.collect()
        assert answer.error == 0
        assert answer.data == pattern(answer.request.offset, MIB)
    session.disc()


def test_client_takes_nothing(lab: Lab, witness: Session) -> None:
    """It asks for 32 MiB, then for nothing, then reads them: all there, in order, whole."""
    lab.fake.script = Script(size=32 * MIB)
    session = lab.session()
    grown = measured(lab)
    for number in range(32):
        session.submit(Cmd.READ, MIB * number, MIB)
    for _ in range(20):
        witness.check()
    assert grown() < ROOM_KIB
    assert lab.fake.links[1].sent < 32 * MIB, "all of it was taken: nothing was full"
    lab.assert_idle()
    for number in range(32):
        answer = session.collect()
        assert answer.error == 0
        assert answer.request.offset == MIB * number
        assert answer.data == pattern(MIB * number, MIB)
    session.disc()


def test_client_is_refused_and_takes_no_answer(lab: Lab, witness: Session) -> None:
    """Answers in words, three times as long as the requests. Once nothing takes them, nothing more
    is read, of the writes that follow least of all; and then all go on."""
    script = lab.fake.script = Script(size=32 * MIB)
    session = lab.session()
    narrow(session.client.sock, 1 << 16)
    asked = [Request(Cmd.READ, script.size, 512, cookie) for cookie in range(200_000)]
    asked += [
        Request(Cmd.WRITE, MIB * i, MIB, 200_000 + i, payload=pattern(MIB * i, MIB))
        for i in range(16)
    ]
    grown = measured(lab)
    left = push(session.client, b"".join(one.pack() for one in asked))
    assert left, "all of it was taken: nothing was full"
    for _ in range(20):
        witness.check()
    assert grown() < ROOM_KIB
    assert not any(one.cmd == Cmd.WRITE for one in lab.fake.links[1].requests)
    lab.assert_idle()
    sender = threading.Thread(target=session.client.sock.sendall, args=(left,), daemon=True)
    sender.start()  # these are sealed already: the reader has TLS to itself
    for one in asked:
        session.expect(one)
        assert session.collect().error == (Err.EINVAL if one.cmd == Cmd.READ else 0)
    sender.join(TIMEOUT_S)
    assert not sender.is_alive()
    session.check()
    session.disc()


class Narrow(Script):
    """Little room in its sockets; and it takes no request while an answer is not gone."""

    def __init__(self, **changes: object) -> None:
        super().__init__(**changes)
        self.disk: dict[int, bytes] = {}

    def transmit(self, link: Link) -> None:
        narrow(link._sock, 4096)
        super().transmit(link)

    def requested(self, link: Link, request: Request) -> None:
        if request.cmd == Cmd.WRITE:
            self.disk[request.offset] = request.payload
        super().requested(link, request)


@pytest.mark.parametrize("only_1_2", [False, True], ids=["1.3", "1.2"])
def test_both_directions_are_full(lab: Lab, witness: Session, only_1_2: bool) -> None:
    """16 MiB each way, writes and reads of 1 MiB in turns, with small buffers everywhere."""
    script = lab.fake.script = Narrow(size=32 * MIB)
    client = lab.plain()
    narrow(client.sock, 1 << 16)
    client.start_tls(tls_context(lab.pki, only_1_2=only_1_2))
    client.go()
    requests = []
    for number in range(16):
        at, cookie = MIB * number, 2 * number
        requests.append(Request(Cmd.WRITE, at, MIB, cookie, payload=pattern(at + 5, MIB)))
        requests.append(Request(Cmd.READ, 16 * MIB + at, MIB, cookie + 1))
    grown = measured(lab)

    def holds(request: Request, data: bytes) -> bool:
        return request.cmd == Cmd.WRITE or data == pattern(request.offset, MIB)

    Duplex(client).exchange(requests, 32, holds)
    assert grown() < ROOM_KIB
    assert script.disk == {MIB * i: pattern(MIB * i + 5, MIB) for i in range(16)}
    client.send(Request(Cmd.DISC).pack())
    assert client.recv_to_end() == b""
