"""LIST and STRUCTURED_REPLY carry no data. With data: one ERR_INVALID, and still in step (H6)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import Opt, Rep, option


@pytest.mark.parametrize("data", [b"x", option(Opt.ABORT), b"y" * 4096])
@pytest.mark.parametrize("opt", [Opt.LIST, Opt.STRUCTURED_REPLY])
def test_invalid(lab: Lab, opt: int, data: bytes) -> None:
    client = lab.tls()
    for _ in range(2):
        (reply,) = client.ask(opt, data)
        assert reply.type == Rep.ERR_INVALID
    listed = client.ask(Opt.LIST)
    assert listed[-1].type == Rep.ACK
    session = Session(client, client.go(), {})
    session.check()  # the refused STRUCTURED_REPLY did not take effect
    session.disc()


def test_structured_reply_twice(lab: Lab) -> None:
    """H7: a repeated request may be called invalid; what was granted stays granted."""
    client = lab.tls()
    client.ask_structured()
    assert client.verdict(Opt.STRUCTURED_REPLY) in (Rep.ACK, Rep.ERR_INVALID)
    session = Session(client, client.go(), {})
    session.check()
    session.disc()
