"""NBD_OPT_EXTENDED_HEADERS with data, twice, and followed by what it forbids."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.extended import (
    ERR_EXT_HEADER_REQD,
    EXTENDED_HEADERS,
    Extended,
    check,
    compact,
    disconnect,
)
from tests.support.fake_upstream import Script
from tests.support.rawclient import Opt, RawClient, Rep, Request, option, tls_context


@pytest.fixture
def client(lab: Lab) -> RawClient:
    """Inside TLS, in front of an upstream that knows extended headers."""
    lab.fake.script = Extended()
    return lab.tls()


@pytest.mark.parametrize("data", [b"x", option(Opt.ABORT), b"y" * 4096, b"z" * 100_000])
def test_data(client: RawClient, data: bytes) -> None:
    """H6: one ERR_INVALID, the data consumed; without data it is granted as ever."""
    for _ in range(2):
        (reply,) = client.ask(EXTENDED_HEADERS, data)
        assert reply.type == Rep.ERR_INVALID
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    client.go()
    check(client)
    disconnect(client)


def test_only_with_data(client: RawClient) -> None:
    """What was refused has not taken effect."""
    assert client.verdict(EXTENDED_HEADERS, b"x") == Rep.ERR_INVALID
    compact(client).disc()


@pytest.mark.parametrize("second", [b"", b"x"])
def test_twice(client: RawClient, second: bytes) -> None:
    """H7: the first stays granted."""
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    assert client.verdict(EXTENDED_HEADERS, second) == Rep.ERR_INVALID
    client.go()
    check(client)
    disconnect(client)


@pytest.mark.parametrize("first", [False, True], ids=["never", "before"])
def test_structured_replies_afterwards(client: RawClient, first: bool) -> None:
    """They "take precedence", whichever came first."""
    if first:
        client.ask_structured()
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    for _ in range(2):
        assert client.verdict(Opt.STRUCTURED_REPLY) == ERR_EXT_HEADER_REQD
    client.go()
    check(client)
    disconnect(client)


def test_export_name_afterwards(lab: Lab, client: RawClient) -> None:
    """It has no error reply, and no upstream is asked for it either."""
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    client.send(option(Opt.EXPORT_NAME))
    assert client.recv_to_end() == b""
    client.close()
    assert Opt.EXPORT_NAME not in [opt for opt, _ in lab.fake.wait_end().options]


def test_old_request_afterwards(lab: Lab, client: RawClient) -> None:
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    client.go()
    check(client)
    client.send(Request(0, 0, 512).pack() + bytes(4))
    assert client.recv_to_end() == b""
    assert lab.fake.wait_end().end == "disc"


@pytest.mark.parametrize("structured", [False, True])
def test_upstream_without_them(lab: Lab, structured: bool) -> None:
    lab.fake.script = Script(structured=structured)
    client = lab.tls()
    for _ in range(2):
        assert client.verdict(EXTENDED_HEADERS) == Rep.ERR_UNSUP
    compact(client).disc()


def test_what_was_said_in_plaintext(lab: Lab) -> None:
    """CVE-2021-3716: it must not survive STARTTLS."""
    lab.fake.script = Extended()
    client = lab.plain()
    assert client.verdict(EXTENDED_HEADERS) == Rep.ERR_TLS_REQD
    client.start_tls(tls_context(lab.pki))
    compact(client).disc()
    assert EXTENDED_HEADERS not in [opt for opt, _ in lab.fake.wait_end().options]
