"""The upstream hangs up after any byte of its replies to a row of requests, of every kind.

What it had answered in full is answered; the others, and all later ones, are told that it is gone.
Other clients notice nothing, and nothing is left behind.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import GONE, Session
from tests.support.fake_upstream import (
    Link,
    LinkEndedError,
    Script,
    data_chunk,
    hole_chunk,
    none_chunk,
    pattern,
)
from tests.support.rawclient import Cmd, PeerClosedError, Request

CONTEXTS = [b"base:allocation", b"qemu:dirty-bitmap:b0"]
AT, LENGTH, HOLE = 8192, 48, slice(16, 24)
DATA = bytearray(pattern(AT, LENGTH))
DATA[HOLE] = bytes(8)


class Mortal(Script):
    """Takes a row of requests, says so many bytes of its answers, and is gone."""

    def __init__(self, row: int, last: int = 1 << 30, **changes: object) -> None:
        super().__init__(**changes)
        self.row, self.last = row, last
        self.ends: list[int] = []  # of the answers, in bytes

    def transmit(self, link: Link) -> None:
        asked = [link.take_request() for _ in range(self.row)]
        before = link.sent
        link._cut_after = before + self.last
        for request in asked:
            self.requested(link, request)
            self.ends.append(link.sent - before)

    def read(self, link: Link, request: Request) -> None:
        at, cookie = request.offset, request.cookie
        if not link.structured:
            super().read(link, request)
            return
        link.send(data_chunk(cookie, at, pattern(at, 16)))
        link.send(hole_chunk(cookie, at + 16, 8))
        link.send(data_chunk(cookie, at + 24, pattern(at + 24, LENGTH - 24)))
        link.send(none_chunk(cookie))


def ask(session: Session, structured: bool) -> list[int]:
    """A row of requests of all kinds; their cookies, in the same order."""
    asked = [
        session.submit(Cmd.READ, AT, LENGTH),
        session.submit(Cmd.WRITE, 0, payload=b"\1" * 100),
        session.submit(Cmd.FLUSH),
        session.submit(Cmd.TRIM, 512, 512),
        session.submit(Cmd.CACHE, 512, 512),
        session.submit(Cmd.WRITE_ZEROES, 512, 512),
        session.submit(Cmd.READ, AT, LENGTH),
    ]
    if structured:
        asked.append(session.submit(Cmd.BLOCK_STATUS, 0, 4096))
    return [one.cookie for one in asked]


def opened(lab: Lab, structured: bool) -> Session:
    return lab.session(structured=structured, contexts=CONTEXTS if structured else ())


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_every_byte(lab: Lab, witness: Session, structured: bool) -> None:
    base = lab.fds()
    row = 8 if structured else 7
    lab.fake.script = whole = Mortal(row, structured=structured)
    session = opened(lab, structured)
    ask(session, structured)
    for _ in range(row):
        assert session.collect().error == 0
    session.client.close()
    lab.forget_peak()
    before = lab.peak_kib()
    size = whole.ends[-1]
    assert size > 200
    for last in [*range(150), *range(150, size, 2)]:
        lab.fake.script = Mortal(row, last, structured=structured)
        session = opened(lab, structured)
        cookies = ask(session, structured)
        errors: dict[int, int] = {}
        try:
            for _ in cookies:
                answer = session.collect()
                errors[answer.request.cookie] = answer.error
                if answer.request.cmd == Cmd.READ and not answer.error:
                    assert answer.data == (DATA if structured else pattern(AT, LENGTH))
            assert session.ask(Cmd.READ, 0, 512).error in GONE
            assert session.ask(Cmd.WRITE, 0, payload=bytes(512)).error in GONE
            session.disc()
        except PeerClosedError:
            assert not structured, "a chunk can be filled up, and the reply fail"
            inside = [last, last - (size - LENGTH - 16)]
            assert any(16 <= one < 16 + LENGTH for one in inside), "it could have been told"
        session.client.close()
        lab.fake.wait_end(-1)
        good = [cookie for cookie, end in zip(cookies, whole.ends, strict=True) if end <= last]
        for cookie, error in errors.items():
            assert error == 0 if cookie in good else error in GONE, f"after {last} bytes"
        if last % 50 == 0:
            witness.check()
    assert lab.peak_kib() - before < 8 << 10
    lab.wait_fds(base)


class Leaving(Script):
    """Is gone once so many bytes of a request have come."""

    def __init__(self, count: int, unread: bool) -> None:
        super().__init__()
        self.count, self.unread = count, unread

    def transmit(self, link: Link) -> None:
        link.take(self.count)
        if self.unread:  # what is not read makes the other end see ECONNRESET, and not an end
            while link.idle():
                pass
        raise LinkEndedError


WRITE = Request(Cmd.WRITE, 0, 300_000, 5, payload=b"\1" * 300_000)


@pytest.mark.parametrize("unread", [False, True], ids=["eof", "reset"])
@pytest.mark.parametrize("count", [1, 27, 28, 29, 5000, 200_000, 300_027])
def test_while_it_is_asked(lab: Lab, witness: Session, count: int, unread: bool) -> None:
    """Before a request is whole, inside its header and inside its payload."""
    lab.fake.script = Leaving(count, unread)
    session = lab.session()
    session.expect(WRITE)
    session.client.send(WRITE.pack())
    assert session.collect().error in GONE
    session.lost()
    session.disc()
