"""Each refusal before an export is opened: what a TLS program is told, and what the log says.

`openssl s_client` and `gnutls-cli` show the alert by its number; the words of NBD programs are in
test_access_words.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.errors import Refusal
from tests.peers import people as rig
from tests.peers.people import WRONG, People, behind_starttls, gnutls, openssl
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import Gateway
from tests.support.peers import Client, nbdsh
from tests.support.rawclient import (
    Opt,
    RawClient,
    Rep,
    client_hello,
    info_data,
    option,
    tls_context,
)

people = rig.people

Program = Callable[[int, Path, str, bytes], str]

# Alerts of RFC 8446, section 6.2. In TLS 1.2 there is none for a certificate that is missing.
ALERTS = {
    "no_client_cert": 116,
    "expired": 45,
    "not_yet_valid": 42,
    "unknown_ca": 48,
    "wrong_eku": 43,
    "revoked": 44,
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path_factory.mktemp("fake") / "up") as fake:
        yield fake


@pytest.fixture(scope="module")
def start(people: People, fake: FakeUpstream) -> Iterator[Callable[..., Gateway]]:
    """A gateway with these flags; the same one for the same flags."""
    running: dict[tuple[str, ...], Gateway] = {}
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> Gateway:
            if flags not in running:
                known = ("--tls-dir", people.tls_dir, "--socket", fake.path)
                known += ("--listen", "127.0.0.1:0", "--log-level", "debug")
                running[flags] = stack.enter_context(Gateway(*known, *flags))
            return running[flags]

        yield start


@pytest.fixture(autouse=True)
def nobody_dials(fake: FakeUpstream) -> Iterator[None]:
    yield
    assert fake.connects == 0


def closed(gateway: Gateway, after: int) -> str:
    """The line at the close."""
    return gateway.wait_log(r".*: closed: .*", after=after)[0]


@pytest.mark.parametrize("version", ["1_2", "1_3"])
@pytest.mark.parametrize("program", [openssl, gnutls])
@pytest.mark.parametrize("who", WRONG)
def test_certificate_is_refused_with_an_alert_that_says_why(
    start: Callable[..., Gateway], people: People, who: str, program: Program, version: str
) -> None:
    gateway = start()
    logged = len(gateway.log())
    with behind_starttls(gateway.port) as port:
        printed = program(port, people.certificates(who), version, b"")
    number = 40 if (who, version) == ("no_client_cert", "1_2") else ALERTS[who]
    assert f"alert number {number}" in printed or f"Received alert [{number}]" in printed
    assert f"closed: TLS handshake failed ({who}: " in closed(gateway, logged)


@pytest.mark.parametrize("version", ["1_2", "1_3"])
@pytest.mark.parametrize("program", [openssl, gnutls])
def test_who_may_open_nothing_is_told_so_inside_tls(
    start: Callable[..., Gateway], people: People, program: Program, version: str
) -> None:
    gateway = start("--allow", "cn=writer")
    logged = len(gateway.log())
    say = option(Opt.LIST) + option(Opt.GO, info_data(b"disk")) + option(Opt.ABORT)
    with behind_starttls(gateway.port) as port:
        printed = program(port, people.certificates("stranger"), version, say)
        assert printed.count("CN=stranger sha256:") == 2
        assert printed.count(" may not open anything here") == 2
        line = closed(gateway, logged)  # before the next one comes
        assert "may not" not in program(
            port, people.certificates("writer"), version, option(Opt.ABORT)
        )
        gateway.wait_log(": closed: client aborted", after=logged)  # not to be the next one's
    assert "closed: client not allowed (not_allowed: CN=stranger sha256:" in line
    assert " INFO " in line


@pytest.mark.parametrize("program", [openssl, gnutls])
def test_tls_that_is_too_old(
    start: Callable[..., Gateway], people: People, program: Program
) -> None:
    gateway = start("--tls-min", "1.3")
    logged = len(gateway.log())
    with behind_starttls(gateway.port) as port:
        printed = program(port, people.certificates("writer"), "1_2", b"")
    assert "alert number 70" in printed or "Received alert [70]" in printed
    assert "closed: TLS handshake failed (tls_version: " in closed(gateway, logged)


@pytest.mark.parametrize("version", ["1_2", "1_3"])
@pytest.mark.parametrize("program", [openssl, gnutls])
def test_client_that_does_not_know_our_ca(
    start: Callable[..., Gateway], people: People, program: Program, version: str
) -> None:
    gateway = start()
    logged = len(gateway.log())
    with behind_starttls(gateway.port) as port:
        printed = program(port, people.certificates("without_our_ca"), version, b"")
    assert "certificate verify failed" in printed or "NOT trusted" in printed
    line = closed(gateway, logged)
    assert "(client_rejected_us: " in line or "(eof: " in line


@pytest.mark.parametrize("program", [openssl, gnutls])
def test_program_that_begins_with_tls(
    start: Callable[..., Gateway], people: People, program: Program
) -> None:
    """As stunnel would: NBD's greeting is no TLS for it, and the log says what is wrong."""
    gateway = start()
    logged = len(gateway.log())
    program(gateway.port, people.certificates("writer"), "1_3", b"")
    line = closed(gateway, logged)
    assert "closed: client broke the protocol (TLS from its first byte: NBD turns it on" in line


# ---------------------------------------------------------------- before TLS, byte by byte


def no_byte(client: RawClient, people: People) -> None:
    client.recv_exactly(18)


def flags_only(client: RawClient, people: People) -> None:
    client.greet()


def an_export(client: RawClient, people: People) -> None:
    client.greet()
    assert client.verdict(Opt.GO, info_data()) == Rep.ERR_TLS_REQD


def the_old_option(client: RawClient, people: People) -> None:
    client.greet()
    client.send(option(Opt.EXPORT_NAME))
    assert client.recv_to_end() == b""


def starttls_and_gone(client: RawClient, people: People) -> None:
    client.greet()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK


def starttls_and_no_tls(client: RawClient, people: People) -> None:
    client.greet()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    client.send(option(Opt.GO, info_data()))
    client.recv_to_end()


def half_a_hello(client: RawClient, people: People) -> None:
    client.greet()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    client.send(client_hello(tls_context(people.certificates("writer")))[:60])


def patience(client: RawClient, people: People) -> None:
    client.greet()
    assert client.recv_to_end() == b""


@pytest.mark.parametrize(
    ("manner", "end"),
    [
        (no_byte, "probe (probe: "),
        (flags_only, "client left without a word (eof_before_hello: "),
        (an_export, "plaintext client (plaintext_client: "),
        (the_old_option, "plaintext client (plaintext_client: "),
        (starttls_and_gone, "TLS handshake failed (eof_before_hello: "),
        (starttls_and_no_tls, "TLS handshake failed (not_tls: "),
        (half_a_hello, "TLS handshake failed (eof: "),
        (patience, "handshake timeout (timeout: it opened no export within 1 s"),
    ],
)
def test_who_does_not_get_as_far_as_tls(
    start: Callable[..., Gateway],
    people: People,
    manner: Callable[[RawClient, People], None],
    end: str,
) -> None:
    gateway = start("--handshake-timeout", "1") if manner is patience else start()
    logged = len(gateway.log())
    with RawClient(gateway.uri) as client:
        manner(client, people)
    line = closed(gateway, logged)
    assert f": closed: {end}" in line
    assert end.split("(")[1].split(":")[0] in set(Refusal)
    assert (" DEBUG " in line) is (manner is no_byte)


def test_address_that_is_not_allowed(start: Callable[..., Gateway]) -> None:
    """Not a byte is said to it."""
    for flags in (("--deny-from", "127.0.0.0/8"), ("--allow-from", "192.0.2.0/24")):
        gateway = start(*flags)
        logged = len(gateway.log())
        with RawClient(gateway.uri) as client:
            assert client.recv_to_end() == b""
        assert (
            "address_not_allowed" in gateway.wait_log(r".*address_not_allowed.*", after=logged)[0]
        )


# ---------------------------------------------------------------- nbdsh

SAYS_WHY = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
try:
    h.connect_uri(args["uri"])
except nbd.Error as error:
    report(why=error.string)
"""


def refused(client: Client) -> str:
    """It wants to open the export, and does not get in. Returns what it has to say of that."""
    return str(nbdsh(SAYS_WHY, client)["why"])


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("who", WRONG)
def test_nbdsh_is_refused(
    start: Callable[..., Gateway],
    people: People,
    who: str,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = start()
    if version == "1.2":
        monkeypatch.setenv("GNUTLS_SYSTEM_PRIORITY_FILE", str(people.gnutls_1_2))
    logged = len(gateway.log())
    printed = refused(Client(gateway.uri, people.certificates(who)))
    assert "TLS" in printed
    assert f"closed: TLS handshake failed ({who}: " in closed(gateway, logged)


def test_nbdsh_without_a_right_to_anything(start: Callable[..., Gateway], people: People) -> None:
    gateway = start("--allow", "cn=writer")
    logged = len(gateway.log())
    assert "policy prevents" in refused(Client(gateway.uri, people.certificates("stranger")))
    assert "closed: client not allowed (not_allowed: CN=stranger" in closed(gateway, logged)


def test_nbdsh_without_tls(start: Callable[..., Gateway]) -> None:
    gateway = start()
    logged = len(gateway.log())
    assert refused(Client(gateway.uri.replace("nbds:", "nbd:")))
    assert "plaintext_client" in closed(gateway, logged)


def test_nbdsh_with_a_tls_that_is_too_old(
    start: Callable[..., Gateway],
    people: People,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = start("--tls-min", "1.3")
    monkeypatch.setenv("GNUTLS_SYSTEM_PRIORITY_FILE", str(people.gnutls_1_2))
    logged = len(gateway.log())
    assert "TLS" in refused(Client(gateway.uri, people.certificates("writer")))
    assert "closed: TLS handshake failed (tls_version: " in closed(gateway, logged)
