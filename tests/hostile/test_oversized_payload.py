"""Payloads above the advertised maximum: refused up to 32 MiB, beyond that the end (X3)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Script, pattern
from tests.support.rawclient import Cmd, Err, Request

SMALL_MAX = 65536


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def session(request: pytest.FixtureRequest, lab: Lab) -> Session:
    """On a disk that is larger than any request, with a small maximum payload."""
    lab.fake.script = Script(size=128 * MIB, block_sizes=(1, 4096, SMALL_MAX))
    session = lab.session(structured=request.param)
    assert session.export.block_sizes is not None
    assert session.export.block_sizes[2] >= SMALL_MAX, "smaller than need be"
    return session


@pytest.mark.parametrize("size", [SMALL_MAX + 1, 2 * SMALL_MAX, 3 * MIB, 32 * MIB])
def test_write_up_to_32_mib(lab: Lab, session: Session, size: int) -> None:
    """A gateway that splits for the upstream may advertise more, and then has to serve it."""
    assert session.export.block_sizes is not None
    lab.forget_peak()
    before = lab.peak_kib()
    answer = session.ask(Cmd.WRITE, 0, payload=bytes(size))
    assert answer.error == (0 if size <= session.export.block_sizes[2] else Err.EINVAL)
    assert lab.peak_kib() - before < 8 << 10
    session.check()
    session.disc()


@pytest.mark.parametrize("size", [32 * MIB + 1, 1 << 31, (1 << 32) - 1])
def test_write_beyond_32_mib(lab: Lab, session: Session, size: int) -> None:
    session.client.send(Request(Cmd.WRITE, 0, size).pack())
    session.client.try_send(bytes(SMALL_MAX))
    assert session.client.recv_to_end() == b""
    link = lab.fake.wait_end()
    assert [request.cmd for request in link.requests] == [Cmd.DISC]


def test_read(lab: Lab, session: Session) -> None:
    """Refused, or served in pieces; never passed on to a server that would have to disconnect."""
    assert session.export.block_sizes is not None
    for size in (SMALL_MAX + 1, MIB):
        answer = session.ask(Cmd.READ, 0, size)
        if size <= session.export.block_sizes[2]:
            assert answer.error == 0
        assert answer.error in (0, Err.EINVAL, Err.EOVERFLOW)
        assert session.client.structured or answer.error in (0, Err.EINVAL)
        assert answer.error or answer.data == pattern(0, size)
    session.check()
    session.disc()


@pytest.mark.parametrize("cmd", [Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE])
def test_without_payload(lab: Lab, session: Session, cmd: Cmd) -> None:
    """X4: no disconnect, the length is not a payload."""
    for size in (SMALL_MAX + 1, 64 * MIB):
        assert session.ask(cmd, 0, size).error in (0, Err.EINVAL, Err.EOVERFLOW)
    session.check()
    session.disc()


def test_default_maximum_is_served(lab: Lab) -> None:
    """No sizes advertised: 32 MiB must do, and not through memory."""
    lab.fake.script = Script(size=64 * MIB)
    session = lab.session()
    payload = pattern(0, 32 * MIB)
    lab.forget_peak()
    before = lab.peak_kib()
    assert session.ask(Cmd.WRITE, MIB, payload=payload).error == 0
    assert session.ask(Cmd.READ, MIB, 32 * MIB).data == pattern(MIB, 32 * MIB)
    assert lab.peak_kib() - before < 12 << 10, "moved, not assembled"
    session.disc()
    assert lab.fake.wait_end().requests[0].payload == payload
