"""The same cookie on several requests in flight: sloppy, but each gets its own answer (X11)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Holding
from tests.support.fake_upstream import DONE, pattern
from tests.support.rawclient import CHUNK, SIMPLE, Cmd, Ct, RawClient, Request

COOKIE = 0x1122334455667788
OFFSETS = [0, 8192, 4096, 0]


def simple_read(client: RawClient, length: int) -> bytes:
    _, error, cookie = SIMPLE.unpack(client.recv_exactly(SIMPLE.size))
    assert (error, cookie) == (0, COOKIE)
    return client.recv_exactly(length)


def chunks(client: RawClient, replies: int) -> list[bytes]:
    """The data of content chunks, until so many replies are done."""
    found = []
    while replies:
        _, flags, kind, cookie, length = CHUNK.unpack(client.recv_exactly(CHUNK.size))
        payload = client.recv_exactly(length)
        assert cookie == COOKIE
        assert kind in (Ct.NONE, Ct.OFFSET_DATA)
        if kind == Ct.OFFSET_DATA:
            found.append(payload[8:])
        replies -= flags & DONE
    return found


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_all_reads_are_answered(lab: Lab, structured: bool) -> None:
    script = lab.fake.script = Holding(len(OFFSETS))
    session = lab.session(structured=structured)
    requests = [Request(Cmd.READ, offset, 512, COOKIE) for offset in OFFSETS]
    session.client.send(b"".join(request.pack() for request in requests))
    script.go.set()
    if structured:
        answers = chunks(session.client, len(OFFSETS))
    else:
        answers = [simple_read(session.client, 512) for _ in OFFSETS]
    assert sorted(answers) == sorted(pattern(offset, 512) for offset in OFFSETS)
    session.check()
    session.disc()
    upstream = lab.fake.wait_end().requests[: len(OFFSETS)]
    assert len({request.cookie for request in upstream}) == len(OFFSETS)


def test_write_and_read(lab: Lab) -> None:
    """The reply to the one must not be taken for the other's: only the READ's has a payload."""
    script = lab.fake.script = Holding(2)
    session = lab.session(structured=False)
    read, write = Request(Cmd.READ, 0, 512, 0), Request(Cmd.WRITE, 512, 512, 0, payload=bytes(512))
    session.client.send(write.pack() + read.pack())
    script.go.set()
    got = session.client.recv_exactly(2 * SIMPLE.size + 512)
    head = SIMPLE.pack(0x67446698, 0, 0)
    assert got in (head + head + pattern(0, 512), head + pattern(0, 512) + head)
    session.check()
    session.disc()
