"""Requests of length zero: answered, never forwarded (it "kills the remote tapdisk")."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Cf, Cmd, Request

COMMANDS = [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS]


@pytest.mark.parametrize("cmd", COMMANDS)
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_answered_here(lab: Lab, cmd: Cmd, structured: bool) -> None:
    contexts = [b"base:allocation"] if structured else []
    session = lab.session(structured=structured, contexts=contexts)
    offsets = [0, 512, 1 << 20, (1 << 20) + 1, 1 << 63, (1 << 64) - 1]
    for offset in offsets:
        for flags in (0, Cf.FUA):
            request = Request(cmd, offset, 0, cookie=1, flags=flags)
            session.expect(request)
            session.client.send(request.pack())
            answer = session.collect()
            if cmd == Cmd.BLOCK_STATUS:
                assert answer.error, "success needs an extent, which cannot be empty"
    session.check()
    session.disc()
    assert [request.cmd for request in lab.fake.wait_end().requests] == [Cmd.READ, Cmd.DISC]
