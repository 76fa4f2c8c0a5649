"""FUA is legal on any command once offered (P:1727), though only writes have a use for it.

Accepted from the client, kept on writes, stripped from the rest: servers exist that choke on it.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.fake_upstream import ALL_FEATURES, Script
from tests.support.rawclient import Cf, Cmd, Err, Tf

WRITING = [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES]
OTHER = [Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS, Cmd.FLUSH]


@pytest.mark.parametrize("cmd", WRITING + OTHER)
def test_accepted(lab: Lab, cmd: Cmd) -> None:
    session = lab.session(contexts=[b"base:allocation"])
    assert session.export.flags & Tf.SEND_FUA
    assert session.ask_plainly(cmd, Cf.FUA).error == 0
    session.disc()
    seen = lab.fake.wait_end().requests[0]
    assert seen.cmd == cmd
    assert bool(seen.flags & Cf.FUA) == (cmd in WRITING)


@pytest.mark.parametrize("cmd", WRITING + OTHER)
@pytest.mark.parametrize("missing", [Tf.SEND_FUA, Tf.SEND_FUA | Tf.SEND_FLUSH])
def test_upstream_without_fua(lab: Lab, cmd: Cmd, missing: Tf) -> None:
    """Offered all the same, a write needs a FLUSH behind it; not offered, it is an invalid flag."""
    lab.fake.script = Script(flags=ALL_FEATURES & ~missing)
    session = lab.session(contexts=[b"base:allocation"])
    answer = session.ask_plainly(cmd, Cf.FUA)
    offered = bool(session.export.flags & Tf.SEND_FUA)
    if missing & Tf.SEND_FLUSH:
        assert not offered, "nothing in the upstream could make FUA true"
    seen = list(lab.fake.links[0].requests)  # before the DISC
    assert not any(request.flags & Cf.FUA for request in seen)
    if not offered:
        assert answer.error == Err.EINVAL
    elif cmd in WRITING:
        assert [request.cmd for request in seen] == [cmd, Cmd.FLUSH]
    session.check()
    session.disc()
