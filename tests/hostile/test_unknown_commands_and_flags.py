"""Commands and flags that nobody knows, or that were not offered: EINVAL, and on it goes (X1)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.fake_upstream import ALL_FEATURES, Script
from tests.support.rawclient import Cf, Cmd, Err, Tf

COMMANDS = [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS, Cmd.FLUSH]
VALID = {
    Cmd.READ: Cf.FUA | Cf.DF,
    Cmd.WRITE: Cf.FUA,
    Cmd.TRIM: Cf.FUA,
    Cmd.CACHE: Cf.FUA,
    Cmd.FLUSH: Cf.FUA,
    Cmd.WRITE_ZEROES: Cf.FUA | Cf.NO_HOLE | Cf.FAST_ZERO,
    Cmd.BLOCK_STATUS: Cf.FUA | Cf.REQ_ONE,
}


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_unknown_command(lab: Lab, structured: bool) -> None:
    session = lab.session(structured=structured)
    for cmd in (8, 9, 77, 0x8000, 0xFFFF):
        assert session.ask(cmd, 0, 512).error == Err.EINVAL
        assert session.ask(cmd, 1 << 63, 0xFFFFFFFF).error == Err.EINVAL
        session.check()
    session.disc()
    assert {request.cmd for request in lab.fake.wait_end().requests} == {Cmd.READ, Cmd.DISC}


@pytest.mark.parametrize("cmd", COMMANDS)
def test_flags_of_no_or_another_command(lab: Lab, cmd: Cmd) -> None:
    session = lab.session(contexts=[b"base:allocation"])
    for bit in range(16):
        if not VALID[cmd] & 1 << bit:
            assert session.ask_plainly(cmd, 1 << bit).error == Err.EINVAL
            assert session.ask_plainly(cmd, 1 << bit | Cf.FUA).error == (Err.EINVAL)
    session.check()
    session.disc()
    assert [request.cmd for request in lab.fake.wait_end().requests] == [Cmd.READ, Cmd.DISC]


@pytest.mark.parametrize("cmd", COMMANDS)
def test_valid_flags(lab: Lab, cmd: Cmd) -> None:
    session = lab.session(contexts=[b"base:allocation"])
    assert session.ask_plainly(cmd, VALID[cmd]).error == 0
    session.disc()


@pytest.mark.parametrize(
    ("missing", "cmd", "flags"),
    [
        (Tf.SEND_FLUSH, Cmd.FLUSH, 0),
        (Tf.SEND_TRIM, Cmd.TRIM, 0),
        (Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO, Cmd.WRITE_ZEROES, 0),
        (Tf.SEND_FAST_ZERO, Cmd.WRITE_ZEROES, Cf.FAST_ZERO),
        (Tf.SEND_CACHE, Cmd.CACHE, 0),
        (Tf.SEND_DF, Cmd.READ, Cf.DF),
    ],
)
def test_what_the_upstream_cannot_do(lab: Lab, missing: Tf, cmd: Cmd, flags: int) -> None:
    """U3: used only if advertised. What the gateway offers nevertheless, it must do itself."""
    lab.fake.script = Script(flags=ALL_FEATURES & ~missing)
    session = lab.session()
    answer = session.ask_plainly(cmd, flags)
    assert answer.error == (0 if session.export.flags & missing else Err.EINVAL)
    session.check()
    session.disc()
    seen = [request for request in lab.fake.wait_end().requests if request.cmd == cmd]
    if cmd == Cmd.READ:
        assert not any(request.flags & Cf.DF for request in seen)
    elif flags:
        assert not any(request.flags & flags for request in seen)
    else:
        assert not seen


def test_df_without_structured_replies(lab: Lab) -> None:
    session = lab.session(structured=False)
    assert not session.export.flags & Tf.SEND_DF
    assert session.ask(Cmd.READ, 0, 512, flags=Cf.DF).error == Err.EINVAL
    session.check()
    session.disc()


def test_flush_with_offset_or_length(lab: Lab) -> None:
    """Reserved, MUST be zero: refused, or cleared on the way."""
    session = lab.session()
    for offset, length in ((512, 0), (0, 512), (512, 512)):
        assert session.ask(Cmd.FLUSH, offset, length).error in (0, Err.EINVAL)
    session.check()
    session.disc()
    flushes = [got for got in lab.fake.wait_end().requests if got.cmd == Cmd.FLUSH]
    assert all(flush.offset == flush.length == 0 for flush in flushes)
