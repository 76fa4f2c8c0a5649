"""A client with a right certificate that no rule lets in, and that does not take it well."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab, PeerClosedError
from tests.support.rawclient import IHAVEOPT, OPTION_REPLY, Opt, Rep, info_data, meta_data, option

OPTIONS = ("--deny", "cn=client")
EXTENDED_HEADERS = 11


@pytest.fixture(autouse=True)
def nobody_dials(lab: Lab) -> object:
    yield
    assert lab.fake.connects == 0


def so_far(lab: Lab) -> int:
    """How much has been logged; nobody else's end will be, from here on."""
    lab.settled_fds()
    return len(lab.gateway.log())


def said(lab: Lab, logged: int) -> str:
    return lab.gateway.wait_log(r": closed: (.*); \d+ bytes in", after=logged)[1]


def test_every_option_and_then_some(lab: Lab) -> None:
    client = lab.tls()
    for number in (3, 4, 5, 6, 7, 8, 9, 10, EXTENDED_HEADERS, 12, 77, 2**32 - 1):
        for data in (b"", b"x", info_data(), meta_data(b"", (b"base:allocation",))):
            if number % 2 and data:
                continue
            (reply,) = client.ask(number, data)
            assert reply.type == Rep.ERR_POLICY
    assert client.verdict(Opt.ABORT) == Rep.ACK
    assert client.recv_to_end() == b""


def test_options_without_end(lab: Lab) -> None:
    """No more than before TLS: one answer is enough."""
    logged = so_far(lab)
    client = lab.tls()
    client.try_send(1000 * option(Opt.LIST))
    assert client.recv_to_end().count(struct.pack(">QI", 0x3E889045565A9, Opt.LIST)) <= 32
    assert said(lab, logged) == "client broke the protocol (too many options)"


@pytest.mark.parametrize("number", [Opt.GO, Opt.LIST, Opt.EXPORT_NAME, 77])
def test_huge_option_is_not_stored(lab: Lab, number: int) -> None:
    client = lab.tls()
    lab.forget_peak()
    before = lab.peak_kib()
    client.send(option(number, length=960 << 10))  # with its header, all that may be said here
    for _ in range(14):
        client.send(bytes(64 << 10))
    assert lab.peak_kib() - before < 512
    client.send(bytes(64 << 10))
    if number == Opt.EXPORT_NAME:
        assert client.recv_to_end() == b""
    else:
        assert client.reply().type == Rep.ERR_POLICY


def test_no_more_than_a_mebibyte_of_options(lab: Lab) -> None:
    logged = so_far(lab)
    client = lab.tls()
    client.send(option(Opt.GO, length=1 << 20))
    assert client.recv_to_end() == b""
    assert said(lab, logged) == "client broke the protocol (too many bytes of options)"


def test_option_too_large_to_skip(lab: Lab) -> None:
    logged = so_far(lab)
    client = lab.tls()
    client.send(struct.pack(">QII", IHAVEOPT, Opt.GO, (32 << 20) + 1))
    assert client.recv_to_end() == b""
    assert said(lab, logged).startswith("client broke the protocol (option 7 of ")


def test_requests_instead_of_options(lab: Lab) -> None:
    logged = so_far(lab)
    client = lab.tls()
    client.send(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
    assert client.recv_to_end() == b""
    assert said(lab, logged).startswith("client broke the protocol (option magic ")


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("answers", [0, 1, 8])
def test_leaving_at_any_time(lab: Lab, how: str, answers: int) -> None:
    base = lab.settled_fds()
    logged = so_far(lab)
    client = lab.tls()
    client.send(8 * option(Opt.LIST))
    for _ in range(answers):
        client.reply()
    getattr(client, how)()
    assert said(lab, logged).startswith("client not allowed (not_allowed: CN=client sha256:")
    lab.wait_fds(base)


def test_the_text_is_one_string_and_holds_nothing_of_the_option(lab: Lab) -> None:
    client = lab.tls()
    client.send(option(Opt.GO, info_data(b"<script>")))
    raw = client.recv_exactly(OPTION_REPLY.size)
    length = OPTION_REPLY.unpack(raw)[3]
    text = client.recv_exactly(length).decode()
    assert text.isprintable()
    assert "script" not in text
    client.send(option(Opt.EXPORT_NAME, b"<script>"))
    with pytest.raises(PeerClosedError):
        client.recv_exactly(1)
