"""Plaintext options where the ClientHello belongs: the TLS handshake fails and ends the session."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Opt, Rep, client_hello, info_data, option, tls_context

PLAIN = {
    "structured_reply": option(Opt.STRUCTURED_REPLY),
    "go": option(Opt.GO, info_data()),
    "export_name": option(Opt.EXPORT_NAME),
    "abort": option(Opt.ABORT),
    "starttls": option(Opt.STARTTLS),
}


@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN.keys())
def test_no_downgrade(lab: Lab, plain: bytes) -> None:
    """P:575-583: once ACK is out there is no way back to plaintext."""
    client = lab.plain()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    client.send(plain)
    answer = client.recv_to_end()
    assert answer == b"" or answer[0] == 0x15, f"more than a TLS alert: {answer!r}"
    assert lab.fake.connects == 0


@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN.keys())
def test_not_even_with_a_client_hello_behind(lab: Lab, plain: bytes) -> None:
    client = lab.plain()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    client.send(plain + client_hello(tls_context(lab.pki)))
    answer = client.recv_to_end()
    assert answer == b"" or answer[0] == 0x15, f"more than a TLS alert: {answer!r}"
    assert lab.fake.connects == 0
