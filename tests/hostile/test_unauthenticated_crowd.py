"""Clients that never prove who they are must not reach the upstream (CVE-2019-14850, rule T9)."""

from __future__ import annotations

import contextlib

from tests.hostile.conftest import Lab
from tests.support.rawclient import (
    Info,
    Opt,
    PeerClosedError,
    RawClient,
    Rep,
    client_hello,
    info_data,
    option,
    tls_context,
)

EACH = 60  # five kinds: 300 clients


def test_no_connection_to_the_upstream(lab: Lab) -> None:
    base = lab.settled_fds()
    for _ in range(EACH):
        lab.raw().close()

        greeted = lab.plain()
        greeted.send(option(Opt.GO, info_data())[:20])
        greeted.close()

        asking = lab.plain()
        for opt in (Opt.LIST, Opt.INFO, Opt.GO, Opt.SET_META_CONTEXT):
            assert asking.verdict(opt, info_data(b"", [Info.BLOCK_SIZE])) == Rep.ERR_TLS_REQD
        asking.close()

        half = lab.plain()
        assert half.verdict(Opt.STARTTLS) == Rep.ACK
        half.send(client_hello(tls_context(lab.pki)))
        half.close()

        assert no_certificate_is_refused(lab.plain(), lab)
    lab.wait_fds(base)
    assert lab.fake.connects == 0


def no_certificate_is_refused(client: RawClient, lab: Lab) -> bool:
    """Under TLS 1.3 the client believes that the handshake is over, and asks at once."""
    with contextlib.closing(client):
        client.start_tls(tls_context(lab.pki, with_certificate=False))
        client.try_send(option(Opt.GO, info_data()))
        with contextlib.suppress(PeerClosedError):
            return client.reply().failed
    return True


def test_authenticated_but_not_asking(lab: Lab) -> None:
    """Not even TLS alone opens it: an option has to need it."""
    client = lab.tls()
    assert client.verdict(99) == Rep.ERR_UNSUP
    assert client.verdict(Opt.ABORT) == Rep.ACK
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0
