"""A request that does not begin with NBD_REQUEST_MAGIC: the stream is lost, so disconnect (X1)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import CHUNK_MAGIC, REQUEST_MAGIC, SIMPLE_MAGIC, Cmd, Request

WRONG = {
    "zero": 0,
    "one_bit_off": REQUEST_MAGIC ^ 1,
    "little_endian": 0x13956025,
    "historic": 0x12560953,
    "log": 0x25609514,
    "extended": 0x21E41C71,
    "simple_reply": SIMPLE_MAGIC,
    "structured_reply": CHUNK_MAGIC,
    "option": 0x49484156,
}


@pytest.mark.parametrize("magic", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_disconnect(lab: Lab, witness: Session, magic: int, structured: bool) -> None:
    session = lab.session(structured=structured)
    session.check()
    session.client.send(Request(Cmd.WRITE, 0, 512, payload=bytes(512)).pack(magic))
    assert session.client.recv_to_end() == b""
    link = lab.fake.wait_end(1)
    assert [request.cmd for request in link.requests] == [Cmd.READ, Cmd.DISC]
    assert link.end == "disc"


def test_behind_a_good_request(lab: Lab) -> None:
    """In the same record: the good one may be answered, the bad one is never forwarded."""
    session = lab.session()
    good = Request(Cmd.READ, 0, 512, cookie=1).pack()
    bad = Request(Cmd.WRITE, 0, 512, cookie=2, payload=bytes(512)).pack(0)
    session.client.send(good + bad)
    session.client.recv_to_end()
    assert not any(request.cmd == Cmd.WRITE for request in lab.fake.wait_end().requests)
