"""A client that is gone after any byte of the plaintext handshake (CVE-2013-7441), FIN or RST.

The gateway lets go of every one, does not spin, and serves the next client.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import (
    Info,
    Opt,
    client_hello,
    info_data,
    meta_data,
    option,
    tls_context,
)

SAID = (
    b"\0\0\0\3"
    + option(Opt.LIST)
    + option(Opt.STRUCTURED_REPLY)
    + option(Opt.SET_META_CONTEXT, meta_data(b"disk", [b"base:allocation"]))
    + option(Opt.INFO, info_data(b"disk", [Info.BLOCK_SIZE]))
    + option(Opt.STARTTLS)
)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("greeted", [False, True], ids=["at_once", "after_the_greeting"])
def test_plain_part(lab: Lab, how: str, greeted: bool) -> None:
    base = lab.settled_fds()
    for cut in range(len(SAID) + 1):
        client = lab.raw()
        if greeted:
            client.recv_exactly(18)
        client.try_send(SAID[:cut])
        client.reset() if how == "rst" else client.close()
    lab.wait_fds(base)
    lab.assert_idle()
    assert lab.fake.connects == 0
    session = lab.session()
    session.check()
    session.disc()


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_client_hello(lab: Lab, how: str) -> None:
    """The same for the first flight of TLS, a few bytes at a time."""
    hello = client_hello(tls_context(lab.pki))
    base = lab.settled_fds()
    for cut in [*range(12), *range(12, len(hello), 23), len(hello)]:
        client = lab.plain()
        client.ask(Opt.STARTTLS)
        client.send(hello[:cut])
        client.reset() if how == "rst" else client.close()
    lab.wait_fds(base)
    lab.assert_idle()
    assert lab.fake.connects == 0
