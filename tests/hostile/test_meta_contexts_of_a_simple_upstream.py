"""Structured replies that the gateway makes, and meta contexts that nobody has then."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.hostile.test_malformed_meta_context import MALFORMED
from tests.support.fake_upstream import Script
from tests.support.rawclient import Cmd, Err, Opt, RawClient, Rep, meta_data

STYLES = {
    "fixed": Script(structured=False),
    "newstyle": Script(style="newstyle"),
    "oldstyle": Script(style="oldstyle"),
}
QUERIES = [[], [b"base:allocation"], [b"x-nobody:knows", b"qemu:dirty-bitmap:b0"]]


@pytest.fixture(params=STYLES)
def client(request: pytest.FixtureRequest, lab: Lab) -> RawClient:
    """Inside TLS, with structured replies, in front of an upstream without."""
    lab.fake.script = STYLES[request.param]
    client = lab.tls()
    client.ask_structured()
    return client


@pytest.mark.parametrize("opt", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_none(lab: Lab, client: RawClient, opt: int) -> None:
    for queries in QUERIES:
        assert [one.type for one in client.ask(opt, meta_data(b"", queries))] == [Rep.ACK]
    session = Session(client, client.go(), {})
    assert session.ask(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL
    session.check()
    session.disc()
    assert not {Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT} & lab.asked_upstream()


@pytest.mark.parametrize("opt", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_malformed(client: RawClient, opt: int) -> None:
    for data in MALFORMED.values():
        (reply,) = client.ask(opt, data)
        assert reply.type == Rep.ERR_INVALID
    (reply,) = client.ask(opt, meta_data(b"no such export", []))
    assert reply.type == Rep.ERR_UNKNOWN
    session = Session(client, client.go(), {})
    session.check()
    session.disc()
