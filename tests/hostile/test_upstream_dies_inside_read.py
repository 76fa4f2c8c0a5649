"""The upstream dies in the middle of a READ's payload.

A simple reply cannot be taken back: disconnect, and not a byte more (P:1972). A chunk that was
begun is completed with padding, and an error chunk follows (P:2014).
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Dying
from tests.hostile.session import GONE, Session
from tests.support.fake_upstream import DONE, data_chunk, hole_chunk, pattern, simple
from tests.support.rawclient import SIMPLE, SIMPLE_MAGIC, Cmd, Request

LENGTH = 600_000


@pytest.mark.parametrize("sent", [1, 512, 65536, 300_000, LENGTH - 1])
def test_simple(lab: Lab, witness: Session, sent: int) -> None:
    lab.fake.script = Dying(lambda got: simple(got.cookie, 0, pattern(0, sent)))
    session = lab.session(structured=False)
    request = Request(Cmd.READ, 0, LENGTH, cookie=5)
    behind = Request(Cmd.READ, 0, 512, cookie=6)
    session.client.send(request.pack() + behind.pack())
    got = session.client.recv_to_end()
    ok, failed = SIMPLE.pack(SIMPLE_MAGIC, 0, 5), [SIMPLE.pack(SIMPLE_MAGIC, e, 5) for e in GONE]
    if got[: SIMPLE.size] in failed:
        return  # the gateway waited for the whole payload and so could still say no
    assert got.startswith(ok) or got == b""
    payload = got[SIMPLE.size :]
    assert payload == pattern(0, sent)[: len(payload)], "bytes that the upstream never sent"


@pytest.mark.parametrize("sent", [0, 7, 15])
def test_simple_header_cut(lab: Lab, witness: Session, sent: int) -> None:
    """Before the header was whole nothing is promised: a proper error is possible."""
    lab.fake.script = Dying(lambda got: simple(got.cookie)[:sent])
    session = lab.session(structured=False)
    session.submit(Cmd.READ, 0, LENGTH)
    session.submit(Cmd.READ, 0, 512)
    session.lost()


@pytest.mark.parametrize("sent", [1, 512, 65536, 300_000, LENGTH - 1])
def test_structured(lab: Lab, witness: Session, sent: int) -> None:
    def make(got: Request) -> bytes:
        return data_chunk(got.cookie, 0, pattern(0, LENGTH), flags=DONE)[: 28 + sent]

    lab.fake.script = Dying(make)
    session = lab.session()
    request = session.submit(Cmd.READ, 0, LENGTH)
    session.submit(Cmd.READ, 0, 512)
    answers = {answer.request.cookie: answer for answer in (session.collect(), session.collect())}
    assert all(answer.error in GONE for answer in answers.values())
    answer = answers[request.cookie]
    received = bytes(answer.data)
    end = len(received.rstrip(b"\0"))
    assert received[:end] == pattern(0, end), "bytes that the upstream never sent"
    session.lost()


@pytest.mark.parametrize("sent", [0, 5, 19, 20, 27])
def test_structured_header_cut(lab: Lab, witness: Session, sent: int) -> None:
    lab.fake.script = Dying(lambda got: data_chunk(got.cookie, 0, pattern(0, LENGTH))[:sent])
    session = lab.session()
    session.submit(Cmd.READ, 0, LENGTH)
    session.submit(Cmd.READ, 0, 512)
    session.lost()


def test_between_chunks(lab: Lab, witness: Session) -> None:
    lab.fake.script = Dying(
        lambda got: data_chunk(got.cookie, 0, pattern(0, 1000)) + hole_chunk(got.cookie, 1000, 24)
    )
    session = lab.session()
    session.submit(Cmd.READ, 0, LENGTH)
    session.lost()


@pytest.mark.parametrize("sent", [0, 100, 300_000, LENGTH - 1])
@pytest.mark.parametrize("style", ["fixed", "oldstyle"])
def test_converted(lab: Lab, witness: Session, sent: int, style: str) -> None:
    """Simple replies upstream, and structured ones for the client where the gateway converts."""
    lab.fake.script = Dying(
        lambda got: simple(got.cookie, 0, pattern(0, sent)), structured=False, style=style
    )
    session = lab.session()
    if not session.client.structured:
        return  # no conversion: that is `test_simple`
    session.submit(Cmd.READ, 0, LENGTH)
    session.lost()
