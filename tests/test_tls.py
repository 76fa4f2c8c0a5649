"""gateway.tls: the policy, in real handshakes, and the files that it is made of."""

from __future__ import annotations

import contextlib
import ssl
import warnings

import pytest
from cryptography.hazmat.primitives import serialization

from gateway import tls
from gateway.credentials import Own
from gateway.errors import SettingsError, TLSRefused
from gateway.pki import CertificateAuthority, Credential
from gateway.settings import TLSSettings
from gateway.tls import identity, server_context
from tests import tls_rig
from tests.tls_rig import BOTH_VERSIONS, V12, V13, Files, Shake, shake

authority, client, files = tls_rig.authority, tls_rig.client, tls_rig.files  # the fixtures


# ---------------------------------------------------------------- policy


@BOTH_VERSIONS
def test_both_versions_are_spoken(
    files: Files, client: Credential, version: ssl.TLSVersion
) -> None:
    context = server_context(files.settings())
    with Shake(context, files.client_context(client, version)) as handshake:
        assert handshake.server_error is None
        assert handshake.server.version() == version.name.replace("_", ".")
        assert identity(handshake.server) is not None


def test_1_3_is_preferred(files: Files, client: Credential) -> None:
    with Shake(server_context(files.settings()), files.client_context(client)) as handshake:
        assert handshake.server.version() == "TLSv1.3"


def test_minimum_1_3_refuses_1_2(files: Files, client: Credential) -> None:
    context = server_context(files.settings(minimum="1.3"))
    with Shake(context, files.client_context(client, V12)) as handshake:
        assert handshake.reason == "tls_version"
        assert "PROTOCOL_VERSION" in handshake.alert
    with Shake(context, files.client_context(client)) as handshake:
        assert handshake.server.version() == "TLSv1.3"


@pytest.mark.parametrize("old", ["TLSv1", "TLSv1_1"])
def test_older_versions_are_refused(old: str, files: Files, client: Credential) -> None:
    context = files.client_context(client)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[old]
    with Shake(server_context(files.settings()), context) as handshake:
        assert handshake.reason == "tls_version"
        assert "PROTOCOL_VERSION" in handshake.alert


def test_ciphers_are_forward_secret_and_authenticated(files: Files) -> None:
    offered = {one["name"]: one for one in server_context(files.settings()).get_ciphers()}
    assert len(offered) >= 6
    for name, cipher in offered.items():
        assert cipher["aead"], name
        assert cipher["protocol"] == "TLSv1.3" or name.startswith("ECDHE-"), name
        assert cipher["strength_bits"] >= 128, name


@pytest.mark.parametrize(
    "ciphers", ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-CCM8"]
)
def test_other_ciphers_are_refused(ciphers: str, files: Files, client: Credential) -> None:
    context = files.client_context(client, V12)
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    assert shake(server_context(files.settings()), context) == "no_shared_cipher"


def test_the_server_chooses_the_cipher(files: Files, client: Credential) -> None:
    context = files.client_context(client, V12)
    context.set_ciphers("ECDHE+CHACHA20:ECDHE+AESGCM")
    with Shake(server_context(files.settings()), context) as handshake:
        cipher = handshake.server.cipher()
        assert cipher is not None
        assert "AES" in cipher[0]


def test_keys_are_not_logged(
    files: Files, client: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ssl.create_default_context` would obey this."""
    log = files.folder / "keys.log"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    context = server_context(files.settings())
    with Shake(context, files.client_context(client)) as handshake:
        assert handshake.server_error is None
    assert not log.exists()
    assert context.keylog_filename is None


@BOTH_VERSIONS
def test_no_tickets(files: Files, client: Credential, version: ssl.TLSVersion) -> None:
    context = server_context(files.settings())
    with Shake(context, files.client_context(client, version)) as handshake:
        handshake.server.write(b"x")
        assert handshake.client.read(1) == b"x"  # under TLS 1.3 tickets come with the data
        session = handshake.client.session
        assert session is not None
        assert not session.has_ticket


def test_session_of_1_3_cannot_be_resumed(files: Files, client: Credential) -> None:
    context = server_context(files.settings())
    theirs = files.client_context(client, V13)
    with Shake(context, theirs) as first:
        first.server.write(b"x")
        first.client.read(1)
        session = first.client.session
    with Shake(context, theirs, session) as second:
        assert not second.server.session_reused
        assert identity(second.server) is not None


def test_session_of_1_2_is_resumed_by_openssl_and_refused_by_us(
    files: Files, client: Credential
) -> None:
    """OpenSSL keeps sessions by id, and `ssl` has no switch: the CRL would not be looked at."""
    context = server_context(files.settings())
    theirs = files.client_context(client, V12)
    with Shake(context, theirs) as first:
        assert identity(first.server) is not None
        session = first.client.session
        with contextlib.suppress(ssl.SSLWantReadError):
            first.server.unwrap()  # without a proper end OpenSSL forgets the session by itself
    with Shake(context, theirs, session) as second:
        assert second.server_error is None
        if second.server.session_reused:
            with pytest.raises(TLSRefused) as refused:
                identity(second.server)
            assert refused.value.reason == "resumed"
        else:
            assert identity(second.server) is not None
    with Shake(context, theirs) as third:
        assert identity(third.server) is not None, "who shakes hands in full still enters"


# ---------------------------------------------------------------- who is there


@BOTH_VERSIONS
def test_identity(files: Files, client: Credential, version: ssl.TLSVersion) -> None:
    context = server_context(files.settings())
    with Shake(context, files.client_context(client, version)) as handshake:
        who = identity(handshake.server)
    assert who is not None
    assert who.common_name == "backup"
    assert who.sha256 == client.sha256


def test_anonymous_clients_have_no_identity(files: Files, client: Credential) -> None:
    """Nor are they asked: a certificate that nobody verifies would be worth nothing."""
    context = server_context(files.settings(anonymous=True))
    for credential in (None, client):
        with Shake(context, files.client_context(credential)) as handshake:
            assert handshake.server_error is None
            assert identity(handshake.server) is None


def test_certificate_that_openssl_takes_and_cryptography_does_not(
    files: Files, client: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_chain(_: object) -> None:
        raise ValueError("negative serial number")

    monkeypatch.setattr("gateway.tls.Identity.of_chain", of_chain)
    with Shake(server_context(files.settings()), files.client_context(client)) as handshake:
        with pytest.raises(TLSRefused, match="negative serial number") as refused:
            identity(handshake.server)
    assert refused.value.reason == "bad_certificate"


# ---------------------------------------------------------------- files


def test_more_than_one_ca(files: Files, authority: CertificateAuthority) -> None:
    other = CertificateAuthority.create("another CA")
    files.put("ca-cert.pem", authority.cert_pem, other.cert_pem)
    context = server_context(files.settings())
    for each in (authority, other):
        with Shake(context, files.client_context(each.issue_client("x"))) as handshake:
            assert handshake.server_error is None


def test_key_of_the_old_pem_format(files: Files, authority: CertificateAuthority) -> None:
    """BEGIN EC PRIVATE KEY, which older tools write."""
    server = authority.issue_server(["localhost"])
    key = server.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", key)
    server_context(files.settings())


@pytest.mark.parametrize(
    "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
)
def test_key_with_a_passphrase(
    form: serialization.PrivateFormat, files: Files, authority: CertificateAuthority
) -> None:
    key = authority.issue_server(["localhost"]).key.private_bytes(
        serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"secret")
    )
    files.put("server-key.pem", key)
    with pytest.raises(SettingsError, match=r"^--key: .* is encrypted: .* --key-password-file"):
        server_context(files.settings())


def test_certificate_and_key_in_one_file(files: Files, authority: CertificateAuthority) -> None:
    server = authority.issue_server(["localhost"])
    both = files.put("both.pem", server.key_pem, server.cert_pem)
    server_context(TLSSettings(both, both, files.folder / "ca-cert.pem"))


def test_names_of_the_server(authority: CertificateAuthority) -> None:
    names = ["disks.example.com", "192.0.2.1", "*.example.org", "2001:db8::1"]
    server = authority.issue_server(names)
    assert Own((server.certificate, authority.certificate), b"").names == (
        *("disks.example.com", "*.example.org"),
        *("192.0.2.1", "2001:db8::1"),
    )


def test_server_without_names(authority: CertificateAuthority) -> None:
    assert Own((authority.certificate,), b"").names == ()


def test_python_that_takes_plaintext_for_tls_data(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before CVE-2023-40217: `wrap_socket` looks at no data that has come before TLS."""

    class Trusting(ssl.SSLSocket):
        def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
            return b""

    monkeypatch.setattr(tls, "_Probe", Trusting)
    with pytest.raises(SettingsError, match="CVE-2023-40217"):
        server_context(files.settings())
