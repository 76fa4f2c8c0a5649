"""Error chunks whose lengths lie, and such as nobody knows."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Answering, Make
from tests.hostile.session import Session
from tests.support.fake_upstream import DONE, chunk, data_chunk, none_chunk, pattern
from tests.support.rawclient import Cmd, Ct, Err, Request

AT, LENGTH = 8192, 4096


def error(got: Request, kind: int, body: bytes, flags: int = DONE) -> bytes:
    return chunk(got.cookie, kind, body, flags=flags)


MALFORMED: dict[str, Make] = {
    "empty": lambda got: error(got, Ct.ERROR, b""),
    "no_message_length": lambda got: error(got, Ct.ERROR, struct.pack(">I", 5)),
    "message_longer_by_1": lambda got: error(got, Ct.ERROR, struct.pack(">IH", 5, 5) + b"four"),
    "message_of_65535": lambda got: error(got, Ct.ERROR, struct.pack(">IH", 5, 65535) + b"four"),
    "offset_missing": lambda got: error(got, Ct.ERROR_OFFSET, struct.pack(">IH", 5, 0)),
    "offset_cut": lambda got: error(got, Ct.ERROR_OFFSET, struct.pack(">IH", 5, 0) + bytes(7)),
    "message_over_the_offset": lambda got: error(got, Ct.ERROR_OFFSET, struct.pack(">IH8x", 5, 1)),
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(lab: Lab, witness: Session, make: Make) -> None:
    """P:1790, P:1940: a message length beyond the chunk costs the upstream its connection."""
    lab.fake.script = Answering(Cmd.READ, make)
    session = lab.session()
    session.submit(Cmd.READ, AT, LENGTH)
    session.lost()
    lab.fake.wait_end(1)


UNKNOWN: dict[str, Make] = {
    "short": lambda got: error(got, 0x8003, struct.pack(">IH", 5, 0)),
    "with_text": lambda got: error(got, 0xFFFF, struct.pack(">IH", 5, 4) + b"text"),
    "with_more": lambda got: error(got, 0x9999, struct.pack(">IH", 5, 4) + b"text" + bytes(99)),
    "then_none": lambda got: (
        error(got, 0x8003, struct.pack(">IH", 5, 0), 0) + none_chunk(got.cookie)
    ),
    "behind_data": lambda got: (
        data_chunk(got.cookie, got.offset, pattern(got.offset, 512))
        + error(got, 0x8003, struct.pack(">IH", 5, 0))
    ),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_error_types_are_just_errors(lab: Lab, make: Make) -> None:
    """P:1935: the reply failed, and on it goes."""
    lab.fake.script = Answering(Cmd.READ, make)
    session = lab.session()
    for _ in range(3):
        assert session.ask(Cmd.READ, AT, LENGTH).error == Err.EIO
    assert session.ask(Cmd.FLUSH).error == 0
    session.disc()


@pytest.mark.parametrize("offset", [AT - 1, AT + LENGTH, 0, (1 << 64) - 1])
def test_error_offset_outside(lab: Lab, witness: Session, offset: int) -> None:
    """An offset that "MUST lie within" the request is not handed on; the error may be."""
    lab.fake.script = Answering(
        Cmd.READ, lambda got: error(got, Ct.ERROR_OFFSET, struct.pack(">IHQ", 5, 0, offset))
    )
    session = lab.session()
    assert session.ask(Cmd.READ, AT, LENGTH).error in (Err.EIO, Err.ESHUTDOWN)


def test_error_zero(lab: Lab, witness: Session) -> None:
    """ "error (MUST be nonzero)": whatever is made of it, no success."""
    lab.fake.script = Answering(Cmd.READ, lambda got: error(got, Ct.ERROR, bytes(6)))
    session = lab.session()
    assert session.ask(Cmd.READ, AT, LENGTH).error


@pytest.mark.parametrize("kind", [Ct.ERROR, Ct.ERROR_OFFSET])
@pytest.mark.parametrize(
    "text",
    [b"/srv/disk.img", b"\x1b[31mred", b"\xff\xfe", b"nul\0nul", b"two\nlines", b"t" * 5000],
    ids=["path", "escape", "not_utf8", "nul", "newline", "5000"],
)
def test_text(lab: Lab, witness: Session, kind: int, text: bytes) -> None:
    """A display string of the upstream: dropped or cleaned, never a reason for a bad chunk here."""
    logged = len(lab.gateway.log())
    tail = b"" if kind == Ct.ERROR else struct.pack(">Q", AT)
    body = struct.pack(">IH", 5, len(text)) + text + tail
    lab.fake.script = Answering(Cmd.READ, lambda got: error(got, kind, body))
    session = lab.session()
    answer = session.ask(Cmd.READ, AT, LENGTH)
    assert answer.error in (Err.EIO, Err.ESHUTDOWN)  # 5000 bytes are more than a string may have
    assert "\x1b" not in lab.gateway.log()[logged:]
