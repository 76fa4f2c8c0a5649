"""The upstream hangs up after each byte of its handshake (CVE-2021-20286: libnbd asserted).

The client gets an error or the end, other clients notice nothing.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import Link, Script
from tests.support.rawclient import Info, Opt, PeerClosedError, Rep, info_data, meta_data, option


class Counting(Script):
    """Notes how many bytes the handshake took."""

    handshake_bytes = 0

    def transmit(self, link: Link) -> None:
        self.handshake_bytes = link.sent
        super().transmit(link)


def haggle(lab: Lab, style: str) -> bool:
    """All options that involve the upstream; True if GO was granted."""
    client = lab.tls()
    try:
        if style == "fixed":
            client.ask(Opt.STRUCTURED_REPLY)
            client.ask(Opt.LIST)
            client.ask(Opt.SET_META_CONTEXT, meta_data(b"", [b"base:allocation"]))
            client.ask(Opt.INFO, info_data(b"", [Info.BLOCK_SIZE]))
        verdict = client.verdict(Opt.GO, info_data(b"", [Info.BLOCK_SIZE]))
        assert verdict != Rep.ERR_TLS_REQD
        return verdict == Rep.ACK
    except PeerClosedError:
        return False
    finally:
        client.close()


@pytest.mark.parametrize("style", ["fixed", "newstyle", "oldstyle"])
def test_every_byte(lab: Lab, witness: Session, style: str) -> None:
    script = Counting(style=style, block_sizes=(1, 4096, 1 << 25))
    lab.fake.script = script
    assert haggle(lab, style)
    lab.fake.wait_end(1)
    assert script.handshake_bytes > 16
    for cut in range(script.handshake_bytes):
        lab.fake.script = Script(style=style, block_sizes=(1, 4096, 1 << 25), cut_after=cut)
        granted = haggle(lab, style)
        # The gateway may ask less or in another order; the last byte of GO's ACK is always needed.
        assert not granted or cut > 26, f"granted after {cut} bytes"
        if cut % 50 == 0:
            witness.check()
    assert not lab.fake.errors


@pytest.mark.parametrize("style", ["fixed", "newstyle", "oldstyle"])
def test_export_name(lab: Lab, witness: Session, style: str) -> None:
    """A client that cannot be told otherwise is told by hanging up."""
    for cut in range(0, 18, 3):
        lab.fake.script = Script(style=style, cut_after=cut)
        client = lab.tls()
        client.send(option(Opt.EXPORT_NAME))
        assert client.recv_to_end() == b""
        client.close()
