"""Replies to requests that nobody made, or that were answered: an upstream not to be trusted.

It is dropped; outstanding and later requests get ESHUTDOWN (or EIO), other clients notice nothing.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Answering, Make
from tests.hostile.session import GONE, Session
from tests.support.fake_upstream import (
    DONE,
    Link,
    Script,
    data_chunk,
    error_chunk,
    none_chunk,
    pattern,
    simple,
)
from tests.support.rawclient import Cmd, Opt, Request, info_data, parse_export

STRUCTURED: dict[str, Make] = {
    "simple": lambda got: simple(got.cookie ^ 1 << 40),
    "simple_error": lambda got: simple(got.cookie ^ 1 << 40, 5),
    "data": lambda got: data_chunk(got.cookie ^ 1 << 40, 0, pattern(0, 512), flags=DONE),
    "none": lambda got: none_chunk(got.cookie ^ 1 << 40),
    "error": lambda got: error_chunk(got.cookie ^ 1 << 40, 5),
    "cookie_0": lambda got: none_chunk(0),
    "cookie_2^64-1": lambda got: none_chunk((1 << 64) - 1),
}
SIMPLE: dict[str, Make] = {
    "with_data": lambda got: simple(got.cookie ^ 1 << 40, 0, pattern(0, 512)),
    "error": lambda got: simple(got.cookie ^ 1 << 40, 5),
    "cookie_0": lambda got: simple(0),
    "cookie_2^64-1": lambda got: simple((1 << 64) - 1),
}


@pytest.mark.parametrize("make", STRUCTURED.values(), ids=STRUCTURED.keys())
def test_structured(lab: Lab, witness: Session, make: Make) -> None:
    lab.fake.script = Answering(Cmd.READ, make)
    session = lab.session()
    session.submit(Cmd.READ, 0, 512)
    session.lost()
    lab.fake.wait_end(1)


@pytest.mark.parametrize("make", SIMPLE.values(), ids=SIMPLE.keys())
def test_simple(lab: Lab, witness: Session, make: Make) -> None:
    lab.fake.script = Answering(Cmd.READ, make)
    session = lab.session(structured=False)
    session.submit(Cmd.READ, 0, 512)
    session.lost()
    lab.fake.wait_end(1)


class Unasked(Script):
    """Speaks before it was asked anything."""

    def transmit(self, link: Link) -> None:
        link.send(simple(1) if not link.structured else none_chunk(1))
        super().transmit(link)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_before_any_request(lab: Lab, witness: Session, structured: bool) -> None:
    """The gateway may see it in time to refuse GO, or after."""
    lab.fake.script = Unasked()
    client = lab.tls()
    if structured:
        client.ask_structured()
    *given, last = client.ask(Opt.GO, info_data())
    if last.failed:
        return
    session = Session(client, parse_export(given), {})
    assert session.ask(Cmd.READ, 0, 512).error in GONE
    session.lost()
    lab.fake.wait_end(1)


class Twice(Script):
    """Answers every request, and then again."""

    def requested(self, link: Link, request: Request) -> None:
        super().requested(link, request)
        super().requested(link, request)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("cmd", [Cmd.READ, Cmd.FLUSH])
def test_answered_twice(lab: Lab, witness: Session, structured: bool, cmd: Cmd) -> None:
    lab.fake.script = Twice()
    session = lab.session(structured=structured)
    answer = session.ask(cmd, 0, 512) if cmd == Cmd.READ else session.ask(cmd)
    assert answer.error == 0
    session.lost()
    lab.fake.wait_end(1)
