"""Replies in a style that was not negotiated, or in none at all (U5)."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Answering, Make
from tests.hostile.session import Session
from tests.support.fake_upstream import (
    DONE,
    chunk,
    data_chunk,
    error_chunk,
    none_chunk,
    pattern,
    simple,
)
from tests.support.rawclient import Cmd, Ct

STRUCTURED: dict[str, tuple[Cmd, Make]] = {
    "simple_with_data": (Cmd.READ, lambda got: simple(got.cookie, 0, pattern(0, 512))),
    "simple_without_data": (Cmd.READ, lambda got: simple(got.cookie)),
    "simple_error": (Cmd.READ, lambda got: simple(got.cookie, 5)),
    "request_magic": (Cmd.READ, lambda got: struct.pack(">I", 0x25609513) + bytes(24)),
    "garbage": (Cmd.READ, lambda got: b"\xde\xad\xbe\xef" * 10),
    "historic_magic": (Cmd.READ, lambda got: struct.pack(">I", 0x96744668) + bytes(16)),
    "data_for_flush": (Cmd.FLUSH, lambda got: data_chunk(got.cookie, 0, b"x" * 8, flags=DONE)),
    "data_for_write": (Cmd.WRITE, lambda got: data_chunk(got.cookie, 0, b"x" * 512, flags=DONE)),
    "status_for_flush": (
        Cmd.FLUSH,
        lambda got: chunk(got.cookie, Ct.BLOCK_STATUS, struct.pack(">III", 0x1001, 512, 0)),
    ),
}
SIMPLE: dict[str, tuple[Cmd, Make]] = {
    "data_chunk": (
        Cmd.READ,
        lambda got: data_chunk(got.cookie, got.offset, pattern(got.offset, 512), flags=DONE),
    ),
    "none_chunk": (Cmd.FLUSH, lambda got: none_chunk(got.cookie)),
    "error_chunk": (Cmd.READ, lambda got: error_chunk(got.cookie, 5)),
    "garbage": (Cmd.READ, lambda got: bytes(64)),
}


@pytest.mark.parametrize(("cmd", "make"), STRUCTURED.values(), ids=STRUCTURED.keys())
def test_under_structured_replies(lab: Lab, witness: Session, cmd: Cmd, make: Make) -> None:
    lab.fake.script = Answering(cmd, make)
    provoke(lab, lab.session(contexts=[b"base:allocation"]), cmd)


@pytest.mark.parametrize(("cmd", "make"), SIMPLE.values(), ids=SIMPLE.keys())
def test_under_simple_replies(lab: Lab, witness: Session, cmd: Cmd, make: Make) -> None:
    lab.fake.script = Answering(cmd, make)
    provoke(lab, lab.session(structured=False), cmd)


def provoke(lab: Lab, session: Session, cmd: Cmd) -> None:
    if cmd == Cmd.WRITE:
        session.submit(cmd, 0, payload=bytes(512))
    elif cmd == Cmd.FLUSH:
        session.submit(cmd)
    else:
        session.submit(cmd, 0, 512)
    session.lost()
    lab.fake.wait_end(1)


def test_simple_reply_to_what_carries_no_data_is_legal(lab: Lab) -> None:
    session = lab.session()
    for cmd in (Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE):
        length = 0 if cmd == Cmd.FLUSH else 512
        assert session.ask(cmd, 0, length).error == 0
    session.disc()
