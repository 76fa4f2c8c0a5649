"""Options sent before the reply to the last one: a breach (P:207), tolerated or dropped inside TLS,
but never mixed up."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import pattern
from tests.support.rawclient import (
    Cmd,
    Info,
    Opt,
    PeerClosedError,
    Rep,
    Request,
    info_data,
    option,
    parse_export,
)


def test_answered_in_order_or_dropped(lab: Lab) -> None:
    client = lab.tls()
    script: list[tuple[int, bytes, int]] = [
        (Opt.STRUCTURED_REPLY, b"", Rep.ACK),
        (Opt.LIST, b"", Rep.ACK),
        (99, b"payload", Rep.ERR_UNSUP),
        (Opt.INFO, info_data(b"unknown"), Rep.ERR_UNKNOWN),
        (Opt.INFO, info_data(b"", [Info.BLOCK_SIZE]), Rep.ACK),
        (Opt.ABORT, b"", Rep.ACK),
    ]
    client.send(b"".join(option(opt, data) for opt, data, _ in script))
    try:
        for opt, _, verdict in script:
            assert client.replies(opt)[-1].type == verdict
    except PeerClosedError:
        return
    assert client.recv_to_end() == b""


@pytest.mark.parametrize("cut", [1, 16, 17, 28])
def test_go_with_a_request_behind(lab: Lab, cut: int) -> None:
    """The first request in GO's own segment, whole or in part."""
    client = lab.tls()
    request = Request(Cmd.READ, 512, 512, cookie=7)
    raw = request.pack()
    client.send(option(Opt.GO, info_data()) + raw[:cut])
    client.try_send(raw[cut:])
    try:
        *given, last = client.replies(Opt.GO)
        assert last.type == Rep.ACK
        session = Session(client, parse_export(given), {})
        session.expect(request)
        assert session.collect().data == pattern(512, 512)
        session.check()
    except PeerClosedError:
        pass


def test_pipelined_before_tls(lab: Lab) -> None:
    """Only behind STARTTLS is it fatal; refusals may be pipelined or dropped."""
    client = lab.plain()
    asked = [Opt.LIST, Opt.INFO, Opt.STRUCTURED_REPLY]
    client.send(b"".join(option(opt, b"") for opt in asked))
    try:
        for opt in asked:
            assert client.replies(opt)[-1].type == Rep.ERR_TLS_REQD
    except PeerClosedError:
        pass
