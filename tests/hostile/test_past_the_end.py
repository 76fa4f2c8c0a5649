"""Requests that reach beyond the export: ENOSPC for writes, EINVAL else, and no overflow (X5)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Script
from tests.support.rawclient import Cf, Cmd, Err

RANGES = [
    (MIB, 1),
    (MIB - 1, 2),
    (MIB + 1, 1),
    (MIB + 512, 512),
    (0, MIB + 1),
    (1, MIB),
    (1 << 32, 512),
    (1 << 63, 512),
    ((1 << 63) - 1, 512),
    ((1 << 64) - 1, 1),
    ((1 << 64) - 512, 512),
    ((1 << 64) - 512, 1024),  # wraps to 512
    ((1 << 64) - MIB, 2 * MIB),  # wraps to the end of the disk
]
HUGE = [(0, 0xFFFFFFFF), (512, 0xFFFFFE00), ((1 << 64) - 1, 0xFFFFFFFF)]
TOO_LARGE = {Err.EINVAL, Err.EOVERFLOW}


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def session(request: pytest.FixtureRequest, lab: Lab) -> Session:
    if request.param:
        return lab.session(contexts=[b"base:allocation"])
    return lab.session(structured=False)


def nothing_came_through(lab: Lab, session: Session) -> None:
    session.check()
    session.disc()
    assert [request.cmd for request in lab.fake.wait_end().requests] == [Cmd.READ, Cmd.DISC]


@pytest.mark.parametrize("cmd", [Cmd.READ, Cmd.TRIM, Cmd.CACHE])
def test_invalid(lab: Lab, session: Session, cmd: Cmd) -> None:
    for offset, length in RANGES:
        assert session.ask(cmd, offset, length).error == Err.EINVAL
    for offset, length in HUGE:
        assert session.ask(cmd, offset, length).error in TOO_LARGE
    nothing_came_through(lab, session)


def test_write(lab: Lab, session: Session) -> None:
    for offset, length in RANGES:
        assert session.ask(Cmd.WRITE, offset, payload=bytes(length)).error == Err.ENOSPC
    nothing_came_through(lab, session)


def test_write_zeroes(lab: Lab, session: Session) -> None:
    for offset, length in RANGES:
        assert session.ask(Cmd.WRITE_ZEROES, offset, length).error == Err.ENOSPC
    for offset, length in HUGE:
        answer = session.ask(Cmd.WRITE_ZEROES, offset, length, flags=Cf.NO_HOLE)
        assert answer.error in TOO_LARGE | {Err.ENOSPC}
    nothing_came_through(lab, session)


def test_block_status(lab: Lab) -> None:
    session = lab.session(contexts=[b"base:allocation"])
    for offset, length in RANGES + HUGE:
        assert session.ask(Cmd.BLOCK_STATUS, offset, length).error in TOO_LARGE
    nothing_came_through(lab, session)


def test_up_to_the_end_is_fine(lab: Lab, session: Session) -> None:
    session.check(MIB - 1, 1)
    session.check(0, MIB)
    session.check(MIB - 512, 512)
    assert session.ask(Cmd.WRITE, MIB - 1, payload=b"x").error == 0
    session.disc()


@pytest.mark.parametrize("size", [0, 1, 511])
def test_tiny_disks(lab: Lab, size: int) -> None:
    lab.fake.script = Script(size=size)
    session = lab.session()
    assert session.export.size == size
    assert session.ask(Cmd.READ, size, 1).error == Err.EINVAL
    assert session.ask(Cmd.READ, 0, size + 1).error == Err.EINVAL
    assert session.ask(Cmd.WRITE, 0, payload=bytes(size + 1)).error == Err.ENOSPC
    if size:
        session.check(0, size)
        session.check(size - 1, 1)
    session.disc()
