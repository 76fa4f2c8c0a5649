"""Before TLS only STARTTLS and ABORT are served; all else is told so, unknown options too (T1)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Info, Opt, Rep, info_data, meta_data, option

REFUSED = {
    "LIST": (Opt.LIST, b""),
    "PEEK_EXPORT": (Opt.PEEK_EXPORT, b""),
    "INFO": (Opt.INFO, info_data(b"", [Info.BLOCK_SIZE])),
    "INFO_unknown_export": (Opt.INFO, info_data(b"no such export")),
    "INFO_malformed": (Opt.INFO, b"\xff"),
    "GO": (Opt.GO, info_data()),
    "STRUCTURED_REPLY": (Opt.STRUCTURED_REPLY, b""),
    "LIST_META_CONTEXT": (Opt.LIST_META_CONTEXT, meta_data()),
    "SET_META_CONTEXT": (Opt.SET_META_CONTEXT, meta_data()),
    "EXTENDED_HEADERS": (11, b""),
    "zero": (0, b""),
    "unknown": (0xDEAD, b"data"),
    "highest": (0xFFFFFFFF, b""),
}


@pytest.mark.parametrize(("opt", "data"), REFUSED.values(), ids=REFUSED.keys())
def test_tls_required(lab: Lab, opt: int, data: bytes) -> None:
    client = lab.plain()
    for _ in range(3):
        (reply,) = client.ask(opt, data)
        assert reply.type == Rep.ERR_TLS_REQD
    assert client.verdict(Opt.ABORT) == Rep.ACK
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0


@pytest.mark.parametrize("data", [b"", b"an ABORT with data is still an ABORT"])
def test_abort(lab: Lab, data: bytes) -> None:
    client = lab.plain()
    (reply,) = client.ask(Opt.ABORT, data)
    assert reply.type == Rep.ACK
    assert client.recv_to_end() == b""


def test_abort_of_a_client_that_does_not_wait(lab: Lab) -> None:
    """P:1203: closing without reading the reply is tolerated."""
    base = lab.settled_fds()
    for _ in range(10):
        client = lab.plain()
        client.send(option(Opt.ABORT))
        client.reset()
    lab.wait_fds(base)


def test_abort_inside_tls(lab: Lab) -> None:
    client = lab.tls()
    assert client.verdict(Opt.ABORT, b"with data") == Rep.ACK
    assert client.recv_to_end() == b""
    assert client.ended == "close_notify"
