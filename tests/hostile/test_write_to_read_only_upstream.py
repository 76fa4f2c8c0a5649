"""The upstream says NBD_FLAG_READ_ONLY: the gateway errors writes itself and forwards none."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.fake_upstream import ALL_FEATURES, Script
from tests.support.rawclient import Cmd, Err, Tf


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_refused_and_in_step(lab: Lab, structured: bool) -> None:
    lab.fake.script = Script(flags=ALL_FEATURES | Tf.READ_ONLY)
    session = lab.session(structured=structured)
    assert session.export.flags & Tf.READ_ONLY
    assert session.ask(Cmd.WRITE, 0, payload=bytes(70000)).error == Err.EPERM
    for cmd in (Cmd.TRIM, Cmd.WRITE_ZEROES):
        assert session.ask(cmd, 0, 512).error in (Err.EPERM, Err.EINVAL)
    session.check()
    session.disc()
    assert [request.cmd for request in lab.fake.wait_end().requests] == [Cmd.READ, Cmd.DISC]
