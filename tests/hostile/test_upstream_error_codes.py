"""Error values that the specification does not know: mapped, never passed on (E1)."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import Link, Script, error_chunk, simple
from tests.support.rawclient import Cmd, Err, Request

EROFS, EDQUOT, EFBIG = 30, 122, 27
EXPECTED = {
    EROFS: {Err.EPERM},
    EDQUOT: {Err.ENOSPC},
    EFBIG: {Err.ENOSPC},
    Err.EPERM: {Err.EPERM},
    Err.EIO: {Err.EIO},
    Err.EINVAL: {Err.EINVAL},
    Err.ENOSPC: {Err.ENOSPC},
    Err.ENOMEM: {Err.ENOMEM, Err.EIO, Err.EINVAL},  # "SHOULD NOT return NBD_ENOMEM if possible"
    Err.EOVERFLOW: {Err.EOVERFLOW, Err.EINVAL},  # only where it was documented
    Err.ENOTSUP: {Err.ENOTSUP, Err.EINVAL},
}
OTHERS = [2, 3, 13, 21, 23, 38, 104, 110, 111, 127, 999, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


class Failing(Script):
    """The error to answer with is what the request's offset says."""

    def __init__(self) -> None:
        super().__init__(size=1 << 40)

    def requested(self, link: Link, request: Request) -> None:
        error = request.offset >> 4
        if request.cmd == Cmd.READ and link.structured:
            link.send(error_chunk(request.cookie, error, b"text"))
        else:
            link.send(simple(request.cookie, error))


def ask(session: Session, cmd: Cmd, error: int) -> int:
    payload = bytes(512) if cmd == Cmd.WRITE else b""
    return session.ask(cmd, error << 4, 512, payload=payload).error


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("cmd", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES])
def test_mapped(lab: Lab, cmd: Cmd, structured: bool) -> None:
    lab.fake.script = Failing()
    session = lab.session(structured=structured)
    for error, allowed in EXPECTED.items():
        assert ask(session, cmd, error) in allowed, f"upstream's error {error}"
    for error in OTHERS:
        assert ask(session, cmd, error) == Err.EINVAL, f"upstream's error {error}"
    session.disc()


def test_every_small_number(lab: Lab) -> None:
    """`session` refuses whatever is not in the specification's list."""
    lab.fake.script = Failing()
    session = lab.session()
    for error in set(range(1, 200)) - {Err.ESHUTDOWN}:
        assert ask(session, Cmd.READ, error)
        assert ask(session, Cmd.CACHE, error)
    session.disc()


def test_error_offset(lab: Lab) -> None:
    class Offset(Failing):
        def requested(self, link: Link, request: Request) -> None:
            body = struct.pack(">IHQ", 999, 0, request.offset)
            head = struct.pack(">IHHQI", 0x668E33EF, 1, 0x8002, request.cookie, len(body))
            link.send(head + body)

    lab.fake.script = Offset()
    session = lab.session()
    for cmd in (Cmd.READ, Cmd.CACHE, Cmd.TRIM):
        assert ask(session, cmd, 999) == Err.EINVAL
    session.disc()
