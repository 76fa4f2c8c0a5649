"""NBD_CMD_DISC is the last word: open requests are finished, what follows is ignored (X12)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Holding
from tests.hostile.session import Session
from tests.support.rawclient import Cmd, Request

BEHIND = {
    "nothing": b"",
    "read": Request(Cmd.READ, 0, 512, cookie=9).pack(),
    "write": Request(Cmd.WRITE, 0, 512, cookie=9, payload=b"x" * 512).pack(),
    "disc": Request(Cmd.DISC).pack(),
    "garbage": b"\xff" * 5000,
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
@pytest.mark.parametrize("together", [False, True], ids=["next_record", "same_record"])
def test_ignored(lab: Lab, behind: bytes, together: bool) -> None:
    session = lab.session()
    session.check()
    disc = Request(Cmd.DISC, cookie=5).pack()
    if together:
        session.client.send(disc + behind)
    else:
        session.client.send(disc)
        session.client.try_send(behind)
    assert session.client.recv_to_end() == b""
    link = lab.fake.wait_end()
    assert link.end == "disc"
    assert [request.cmd for request in link.requests] == [Cmd.READ, Cmd.DISC]


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
def test_outstanding_requests_are_finished(lab: Lab, behind: bytes, witness: Session) -> None:
    script = lab.fake.script = Holding(9)
    session = lab.session()
    for i in range(8):
        session.submit(Cmd.READ, 4096 * i, 4096)
    write = session.submit(Cmd.WRITE, 0, payload=bytes(4096))
    session.client.send(Request(Cmd.DISC).pack() + behind)
    link = lab.fake.wait_link(1)
    lab.fake.wait(lambda: len(link.requests) == 9, "all requests forwarded")
    script.go.set()
    for _ in range(9):
        answer = session.collect()
        assert answer.error == 0
    assert write.cookie not in session.pending
    assert session.client.recv_to_end() == b""
    assert session.client.ended == "close_notify"
    assert lab.fake.wait_end(1).end == "disc"
    assert len(link.requests) == 10


def test_offset_and_length_of_disc(lab: Lab) -> None:
    """They MUST be zero; whatever the gateway thinks of that, it ends the session, quietly."""
    session = lab.session()
    session.client.send(Request(Cmd.DISC, 1, 512, 3).pack())
    session.client.try_send(bytes(512))
    session.client.recv_to_end()
    assert lab.fake.wait_end().end == "disc"
