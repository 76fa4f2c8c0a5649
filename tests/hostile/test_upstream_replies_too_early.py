"""The upstream answers a WRITE whose payload it has not got yet.

Whatever it says, the client's payload must still be taken off the stream to its last byte, and a
success must not be told for data that was never written.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import GONE, Session
from tests.support.fake_upstream import Link, Script, error_chunk, none_chunk, simple
from tests.support.rawclient import Cmd, Err, Request

SIZE = 900_000
FIRST = 300_000  # what the client sends before it waits for the upstream's early reply


class Early(Script):
    """Replies when a write's header has come, then takes the payload or hangs up."""

    def __init__(self, style: str, error: int, take: bool) -> None:
        super().__init__()
        self.reply_style, self.error, self.take = style, error, take

    def transmit(self, link: Link) -> None:
        while True:
            request = link.take_header()
            link.requests.append(request)
            if request.cmd == Cmd.DISC:
                link.end = "disc"
                return
            if request.cmd != Cmd.WRITE:
                self.requested(link, request)
                continue
            if self.reply_style == "simple":
                link.send(simple(request.cookie, self.error))
            elif self.error:
                link.send(error_chunk(request.cookie, self.error))
            else:
                link.send(none_chunk(request.cookie))
            if not self.take:
                return
            got = link.take(request.length)
            assert got == bytes([1]) * request.length, "foreign bytes inside the payload"


def torn_write(lab: Lab, session: Session) -> None:
    request = Request(Cmd.WRITE, 0, SIZE, cookie=7, payload=b"\1" * SIZE)
    session.expect(request)
    raw = request.pack()
    session.client.send(raw[:FIRST])
    link = lab.fake.wait_link(1)
    lab.fake.wait(lambda: link.requests or link.end, "the write's header")
    session.client.send(raw[FIRST:])


@pytest.mark.parametrize("style", ["simple", "chunk"])
@pytest.mark.parametrize("error", [0, Err.EIO])
def test_takes_the_rest(lab: Lab, witness: Session, style: str, error: int) -> None:
    """An upstream may refuse early and still read on; a success so early is a lie."""
    lab.fake.script = Early(style, error, take=True)
    session = lab.session()
    torn_write(lab, session)
    answer = session.collect()
    if error:
        assert answer.error in (Err.EIO, Err.ESHUTDOWN)
    else:
        assert answer.error in GONE, "success for a write that had not arrived"
    after = session.ask(Cmd.READ, 0, 512)
    assert after.error in (0, *GONE)


@pytest.mark.parametrize("style", ["simple", "chunk"])
@pytest.mark.parametrize("error", [0, Err.EIO])
def test_hangs_up(lab: Lab, witness: Session, style: str, error: int) -> None:
    lab.fake.script = Early(style, error, take=False)
    session = lab.session()
    torn_write(lab, session)
    assert session.collect().error
    session.lost()
