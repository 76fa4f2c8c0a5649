"""An option that is refused before TLS still has a payload, and it must be consumed.

nbdkit left the payload of INFO in the stream, took it for the next option and hung up.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import Info, Opt, Rep, info_data, meta_data, tls_context


@pytest.mark.parametrize(
    ("opt", "data"),
    [
        (Opt.INFO, info_data(b"some export", [Info.NAME, Info.BLOCK_SIZE])),
        (Opt.GO, info_data(b"some export", [Info.BLOCK_SIZE])),
        (Opt.SET_META_CONTEXT, meta_data(b"some export", [b"base:allocation"])),
        (Opt.LIST, b"LIST has no payload"),
        (77, b"nor is there an option of this number"),
    ],
    ids=["INFO", "GO", "SET_META_CONTEXT", "LIST", "unknown"],
)
def test_starttls_works_after_two_refusals(lab: Lab, opt: int, data: bytes) -> None:
    client = lab.plain()
    for _ in range(2):
        (reply,) = client.ask(opt, data)
        assert reply.type == Rep.ERR_TLS_REQD
    assert lab.fake.connects == 0
    client.start_tls(tls_context(lab.pki))
    session = Session(client, client.go(), {})
    session.check()
    session.disc()
