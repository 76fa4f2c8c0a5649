"""Requests off the minimum block size: EINVAL, whether the client asked for sizes or not."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Script
from tests.support.rawclient import Cmd, Err, Info, Opt, Rep, info_data, parse_export

UNALIGNED = [(1, 512), (511, 512), (0, 511), (0, 1), (512, 513), (513, 511), (1, 1)]


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def structured(request: pytest.FixtureRequest, lab: Lab) -> bool:
    lab.fake.script = Script(block_sizes=(512, 4096, MIB))
    return bool(request.param)


@pytest.mark.parametrize("cmd", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES])
def test_refused(lab: Lab, structured: bool, cmd: Cmd) -> None:
    session = lab.session(structured=structured)
    assert session.export.block_sizes is not None
    assert session.export.block_sizes[0] == 512
    for offset, length in UNALIGNED:
        payload = bytes(length) if cmd == Cmd.WRITE else b""
        assert session.ask(cmd, offset, length, payload=payload).error == Err.EINVAL
    session.check(1024, 512)
    session.disc()
    assert [request.cmd for request in lab.fake.wait_end().requests] == [Cmd.READ, Cmd.DISC]


def test_block_status(lab: Lab) -> None:
    lab.fake.script = Script(block_sizes=(512, 4096, MIB))
    session = lab.session(contexts=[b"base:allocation"])
    for offset, length in UNALIGNED:
        assert session.ask(Cmd.BLOCK_STATUS, offset, length).error == Err.EINVAL
    assert session.ask(Cmd.BLOCK_STATUS, 512, 4096).error == 0
    session.disc()


def test_client_that_did_not_ask_for_sizes(lab: Lab, structured: bool) -> None:
    """Let in and held to them, or told to ask first (with the sizes already said)."""
    client = lab.tls()
    if structured:
        client.ask_structured()
    *given, last = client.ask(Opt.GO, info_data())
    if last.type == Rep.ERR_BLOCK_SIZE_REQD:
        assert Info.BLOCK_SIZE in {int.from_bytes(reply.data[:2], "big") for reply in given}
        return
    assert last.type == Rep.ACK
    session = Session(client, parse_export(given), {})
    for offset, length in UNALIGNED:
        assert session.ask(Cmd.READ, offset, length).error == Err.EINVAL
        assert session.ask(Cmd.WRITE, offset, payload=bytes(length)).error == Err.EINVAL
    session.check(1024, 512)
    session.disc()
