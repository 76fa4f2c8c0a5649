"""A client dies in the middle of a WRITE's payload: not a byte of ours may fill the gap.

NBD_CMD_DISC sent now would be written to the disk as data. The upstream connection is closed, or
the write never began there.
"""

from __future__ import annotations

import socket

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Link
from tests.support.rawclient import REQUEST, Cmd, Request

PAYLOAD = bytes(range(1, 256)) * 4300  # about a MiB, without a zero byte


def only_payload(link: Link, payload: bytes) -> None:
    """What the upstream got behind the handshake is a part of the request, or a lone DISC."""
    if link.requests:
        (disc,) = link.requests
        assert disc.cmd == Cmd.DISC
        return
    assert link.end in ("cut", "reset")
    head = bytes(link.received).rfind(REQUEST.pack(0x25609513, 0, 1, 0, 0, 0)[:8])
    assert head >= 0
    got = bytes(link.received[head + REQUEST.size :])
    assert got == payload[: len(got)]
    assert len(got) < len(payload)


@pytest.mark.parametrize("how", ["rst", "fin", "half_close", "cut_record"])
@pytest.mark.parametrize("sent", [0, 1, 100, 16384, 300_000, len(PAYLOAD) - 1])
def test_nothing_is_made_up(lab: Lab, witness: Session, how: str, sent: int) -> None:
    base = lab.fds()
    session = lab.session()
    head = Request(Cmd.WRITE, 0, len(PAYLOAD), cookie=3).pack()
    sealed = session.client.seal(head + PAYLOAD[:sent])
    session.client.sock.sendall(sealed[:-1] if how == "cut_record" else sealed)
    if how == "half_close":
        session.client.sock.shutdown(socket.SHUT_WR)
        assert session.client.recv_to_end() == b""
    session.client.reset() if how == "rst" else session.client.close()
    only_payload(lab.fake.wait_end(1), PAYLOAD)
    lab.wait_fds(base)


def test_behind_good_writes(lab: Lab, witness: Session) -> None:
    """Complete requests before the torn one are carried out."""
    session = lab.session()
    for i in range(3):
        assert session.ask(Cmd.WRITE, 512 * i, payload=PAYLOAD[:512]).error == 0
    torn = Request(Cmd.WRITE, MIB // 2, 4096, cookie=3).pack() + PAYLOAD[:1000]
    session.client.send(torn)
    session.client.reset()
    link = lab.fake.wait_end(1)
    writes = [request for request in link.requests if request.cmd == Cmd.WRITE]
    assert [request.payload for request in writes] == [PAYLOAD[:512]] * 3
    assert not bytes(link.received).endswith(Request(Cmd.DISC).pack()[:8] + b"\0" * 4) or (
        link.end == "disc"
    )


def test_bad_magic_behind_an_open_payload_is_payload(lab: Lab, witness: Session) -> None:
    """Within a payload every byte is data, a request's header too."""
    payload = Request(Cmd.DISC).pack() * 100
    session = lab.session()
    assert session.ask(Cmd.WRITE, 0, payload=payload).error == 0
    session.check()
    session.disc()
    assert lab.fake.wait_end(1).requests[0].payload == payload
