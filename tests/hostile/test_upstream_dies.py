"""The upstream goes away: outstanding and later requests get ESHUTDOWN, then an orderly end."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Holding
from tests.hostile.session import Session
from tests.support.fake_upstream import Link, Script, simple
from tests.support.rawclient import Cmd, Err, Request


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def structured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_requests_outstanding(lab: Lab, witness: Session, structured: bool) -> None:
    lab.fake.script = Holding(40)
    session = lab.session(structured=structured)
    for i in range(10):
        session.submit(Cmd.READ, 4096 * i, 4096)
        session.submit(Cmd.WRITE, 4096 * i, payload=bytes(4096))
        session.submit(Cmd.TRIM, 4096 * i, 4096)
    link = lab.fake.wait_link(1)
    lab.fake.wait(lambda: len(link.requests) == 30, "all requests forwarded")
    link.hang_up()
    for _ in range(30):
        assert session.collect().error == Err.ESHUTDOWN
    for cmd in (Cmd.READ, Cmd.TRIM):
        assert session.ask(cmd, 0, 512).error == Err.ESHUTDOWN
    assert session.ask(Cmd.WRITE, 0, payload=bytes(100_000)).error == Err.ESHUTDOWN
    session.disc()


def test_while_idle(lab: Lab, witness: Session, structured: bool) -> None:
    session = lab.session(structured=structured)
    session.check()
    lab.fake.links[1].hang_up()
    assert session.ask(Cmd.READ, 0, 512).error == Err.ESHUTDOWN
    assert session.ask(Cmd.WRITE, 0, payload=bytes(100_000)).error == Err.ESHUTDOWN
    session.disc()


def test_inside_a_writes_payload(lab: Lab, witness: Session, structured: bool) -> None:
    """The rest of the payload is drained, then the request fails; the stream stays in step."""
    lab.fake.script = Holding(1000)
    session = lab.session(structured=structured)
    request = Request(Cmd.WRITE, 0, 900_000, cookie=5, payload=b"\1" * 900_000)
    session.expect(request)
    raw = request.pack()
    session.client.send(raw[:100_000])
    link = lab.fake.wait_link(1)
    lab.fake.wait(lambda: b"\1" * 4096 in link.received, "a part of the payload forwarded")
    link.hang_up()
    session.client.send(raw[100_000:])
    assert session.collect().error == Err.ESHUTDOWN
    session.lost()


def test_a_client_that_does_not_leave(lab: Lab, witness: Session) -> None:
    """It gets its errors, and it may not keep the gateway from ending the session some time."""
    session = lab.session()
    lab.fake.links[1].hang_up()
    for _ in range(100):
        assert session.ask(Cmd.READ, 0, 512).error == Err.ESHUTDOWN
    session.client.close()
    lab.assert_idle()


class ShuttingDown(Script):
    """Says that it is shutting down, and waits for the client to leave."""

    def read(self, link: Link, request: Request) -> None:
        if link.structured:
            body = b"\0\0\0\x6c\0\0"
            head = b"\x66\x8e\x33\xef\0\1\x80\1" + request.cookie.to_bytes(8, "big")
            link.send(head + len(body).to_bytes(4, "big") + body)
        else:
            link.send(simple(request.cookie, Err.ESHUTDOWN))


def test_upstream_says_eshutdown(lab: Lab, witness: Session, structured: bool) -> None:
    """U6: a soft disconnect is due, and the client is told the same."""
    lab.fake.script = ShuttingDown()
    session = lab.session(structured=structured)
    assert session.ask(Cmd.READ, 0, 512).error == Err.ESHUTDOWN
    assert lab.fake.wait_end(1).end == "disc"
    assert session.ask(Cmd.FLUSH).error == Err.ESHUTDOWN
    session.disc()


def test_a_new_client_is_served(lab: Lab, structured: bool) -> None:
    session = lab.session(structured=structured)
    lab.fake.links[0].hang_up()
    assert session.ask(Cmd.READ, 0, 512).error == Err.ESHUTDOWN
    fresh = lab.session(structured=structured)
    fresh.check()
    fresh.disc()
    session.disc()
