"""What a client asks in plaintext must not survive STARTTLS.

CVE-2021-3716: structured replies, negotiated in plaintext by whoever sits in the middle, stayed on
inside TLS and put the client's reply stream out of step. The same held for meta contexts.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import Cmd, Err, Info, Opt, Rep, meta_data, option, tls_context

BEFORE = {
    "structured": [(Opt.STRUCTURED_REPLY, b"")],
    "context": [(Opt.SET_META_CONTEXT, meta_data(b"", [b"base:allocation"]))],
    "both": [
        (Opt.STRUCTURED_REPLY, b""),
        (Opt.SET_META_CONTEXT, meta_data(b"", [b"base:allocation"])),
        (Opt.LIST_META_CONTEXT, meta_data(b"", [])),
    ],
}


@pytest.mark.parametrize("asked", BEFORE.values(), ids=BEFORE.keys())
def test_nothing_survives(lab: Lab, asked: list[tuple[int, bytes]]) -> None:
    client = lab.plain()
    for opt, data in asked:
        assert client.verdict(opt, data) == Rep.ERR_TLS_REQD
    client.start_tls(tls_context(lab.pki))
    export = client.go(infos=[Info.BLOCK_SIZE])
    session = Session(client, export, {})  # refuses any structured reply
    session.check()
    assert session.ask(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL
    session.check()
    session.disc()
    (link,) = lab.fake.links
    assert not link.contexts


def test_contexts_need_structured_replies_from_inside(lab: Lab) -> None:
    """H11: without STRUCTURED_REPLY inside TLS, SET_META_CONTEXT is invalid there."""
    client = lab.plain()
    assert client.verdict(Opt.STRUCTURED_REPLY) == Rep.ERR_TLS_REQD
    client.start_tls(tls_context(lab.pki))
    assert client.verdict(Opt.SET_META_CONTEXT, meta_data(b"", [b"base:allocation"])) == (
        Rep.ERR_INVALID
    )
    client.ask_structured()
    assert client.set_contexts([b"base:allocation"])


def test_the_same_connection_can_ask_again(lab: Lab) -> None:
    client = lab.plain()
    client.send(option(Opt.STRUCTURED_REPLY))
    assert client.replies(Opt.STRUCTURED_REPLY)[-1].type == Rep.ERR_TLS_REQD
    client.start_tls(tls_context(lab.pki))
    client.ask_structured()
    contexts = client.set_contexts([b"base:allocation"])
    session = Session(client, client.go(), contexts)
    session.check()
    assert session.ask(Cmd.BLOCK_STATUS, 0, 4096).error == 0
    session.disc()
