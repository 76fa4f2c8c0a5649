"""Plaintext, then a close, before the TLS handshake has begun.

CVE-2023-40217: CPython's SSLSocket, made on a socket that was closed with data waiting, skipped the
handshake and handed the plaintext out as if it had been decrypted.
"""

from __future__ import annotations

import socket

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Opt, Rep, info_data, option

FORGED = option(Opt.STRUCTURED_REPLY) + option(Opt.GO, info_data())


@pytest.mark.parametrize("half", [True, False], ids=["half_close", "close"])
def test_nothing_is_served(lab: Lab, half: bool) -> None:
    base = lab.settled_fds()
    for _ in range(20):
        client = lab.plain()
        assert client.verdict(Opt.STARTTLS) == Rep.ACK
        client.send(FORGED)
        if half:
            client.sock.shutdown(socket.SHUT_WR)
            answer = client.recv_to_end()
            assert answer == b"" or answer[0] == 0x15
        client.close()
    lab.wait_fds(base)
    assert lab.fake.connects == 0


def test_nothing_is_served_without_waiting_for_the_ack(lab: Lab) -> None:
    """Two segments, the gateway's ACK crosses the second: whichever it sees first, it must end."""
    base = lab.settled_fds()
    for _ in range(20):
        client = lab.plain()
        client.send(option(Opt.STARTTLS))
        client.try_send(FORGED)
        client.close()
    lab.wait_fds(base)
    assert lab.fake.connects == 0
