"""gateway.tls: who is refused, what the log calls it, and what the client gets to see."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from datetime import datetime

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import CertificateBuilder, Name
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway.credentials import Clients, clients, own
from gateway.crls import CRL
from gateway.errors import SettingsError
from gateway.pki import CertificateAuthority, Credential
from gateway.snapshot import Snapshot
from gateway.tls import context_of, refusal, server_context
from tests import tls_rig
from tests.tls_rig import BOTH_VERSIONS, DAY, NOW, Files, Shake, shake

authority, client, files = tls_rig.authority, tls_rig.client, tls_rig.files  # the fixtures


# ---------------------------------------------------------------- who is refused


def wrong_clients(authority: CertificateAuthority) -> Iterator[tuple[str, Credential | None, str]]:
    """What the client shows, what the gateway calls it, what the client's TLS prints."""
    other = CertificateAuthority.create("another CA")
    namesake = CertificateAuthority.create("test CA")
    yield "no_client_cert", None, "CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE"
    yield (
        "expired",
        authority.issue_client("x", not_before=NOW - 9 * DAY, not_after=NOW - DAY),
        "CERTIFICATE_EXPIRED",
    )
    yield (
        "not_yet_valid",
        authority.issue_client("x", not_before=NOW + DAY, not_after=NOW + 9 * DAY),
        "BAD_CERTIFICATE",
    )
    yield "unknown_ca", other.issue_client("x"), "UNKNOWN_CA"
    yield "unknown_ca", namesake.issue_client("x"), "UNKNOWN_CA"
    yield "unknown_ca", other, "UNKNOWN_CA"  # self-signed
    yield (
        "wrong_eku",
        authority.issue_client("x", usages=[ExtendedKeyUsageOID.SERVER_AUTH]),
        "UNSUPPORTED_CERTIFICATE",
    )
    yield "wrong_eku", authority.issue_server(["localhost"]), "UNSUPPORTED_CERTIFICATE"


@BOTH_VERSIONS
@pytest.mark.parametrize("case", range(8))
def test_reasons(
    case: int, version: ssl.TLSVersion, files: Files, authority: CertificateAuthority
) -> None:
    reason, credential, alert = list(wrong_clients(authority))[case]
    context = server_context(files.settings())
    with Shake(context, files.client_context(credential, version)) as handshake:
        assert handshake.reason == reason
        assert any(one in handshake.alert for one in alert.split("|")), handshake.alert


def test_leaf_of_a_leaf(files: Files, client: Credential) -> None:
    """A client's certificate signs nothing, whatever its holder does with the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        CertificateBuilder()
        .subject_name(Name([]))
        .issuer_name(client.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .sign(client.key, hashes.SHA256())
    )
    context = files.client_context()
    pem = Credential(leaf, key)
    chain = files.put("chain.pem", pem.cert_pem, client.cert_pem, pem.key_pem)
    context.load_cert_chain(chain)
    assert shake(server_context(files.settings()), context) in ("unknown_ca", "bad_certificate")


@pytest.mark.parametrize(
    "first",
    [b"GET / HTTP/1.1\r\n\r\n", b"IHAVEOPT\0\0\0\x07\0\0\0\0", bytes(64)],
    ids=["HTTP", "NBD option", "zeroes"],
)
def test_plaintext(files: Files, first: bytes) -> None:
    ours, theirs = socket.socketpair()
    context = server_context(files.settings())
    with theirs, context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False) as end:
        theirs.sendall(first)
        with pytest.raises(ssl.SSLError) as failed:
            end.do_handshake()
    assert refusal(failed.value).reason == "not_tls"


def test_client_that_leaves(files: Files) -> None:
    ours, theirs = socket.socketpair()
    context = server_context(files.settings())
    with context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False) as end:
        theirs.close()
        with pytest.raises(ssl.SSLError) as failed:
            end.do_handshake()
    assert refusal(failed.value).reason == "eof"


@BOTH_VERSIONS
def test_client_that_does_not_know_our_ca(
    files: Files, client: Credential, version: ssl.TLSVersion
) -> None:
    context = files.client_context(client, version)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.minimum_version = stranger.maximum_version = version
    other = files.put("other-ca.pem", CertificateAuthority.create("another CA").cert_pem)
    stranger.load_verify_locations(other)
    ours = server_context(files.settings())
    with Shake(ours, stranger) as handshake:
        assert handshake.reason == "client_rejected_us"
        assert handshake.server_error is not None
        assert "give it our ca-cert.pem" in str(refusal(handshake.server_error))
    with Shake(ours, context) as handshake:
        assert handshake.server_error is None


def test_client_that_asked_for_another_host(
    files: Files, client: Credential, authority: CertificateAuthority
) -> None:
    """The client here asks for localhost."""
    server = authority.issue_server(["disks.example.com"])
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", server.key_pem)
    ours = server_context(files.settings())
    with Shake(ours, files.client_context(client)) as handshake:
        assert handshake.reason == "client_rejected_us"


def test_client_that_finds_our_certificate_expired(
    files: Files, client: Credential, authority: CertificateAuthority
) -> None:
    server = authority.issue_server(["localhost"], not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", server.key_pem)
    with Shake(server_context(files.settings()), files.client_context(client)) as handshake:
        assert handshake.reason == "client_rejected_us"
        assert handshake.server_error is not None
        assert "expired" in str(refusal(handshake.server_error))


def test_reasons_that_are_not_known() -> None:
    alert = ssl.SSLError(1, "[SSL: TLSV1_ALERT_NEWS] news")
    alert.reason = "TLSV1_ALERT_NEWS"
    assert refusal(alert).reason == "client_alert"
    assert "TLSV1_ALERT_NEWS" in str(refusal(alert))
    fault = ssl.SSLError(1, "something else")
    fault.reason = ""
    assert refusal(fault).reason == "tls_error"


# ---------------------------------------------------------------- revocation


def with_crl(files: Files, crl: bytes) -> ssl.SSLContext:
    return server_context(files.settings(crl=files.put("ca-crl.pem", crl)))


@BOTH_VERSIONS
def test_revoked(
    files: Files, authority: CertificateAuthority, client: Credential, version: ssl.TLSVersion
) -> None:
    revoked = authority.issue_client("lost laptop")
    context = with_crl(files, authority.revoke_list([revoked.certificate.serial_number]))
    with Shake(context, files.client_context(revoked, version)) as handshake:
        assert handshake.reason == "revoked"
        assert "CERTIFICATE_REVOKED" in handshake.alert
    with Shake(context, files.client_context(client, version)) as handshake:
        assert handshake.server_error is None


def test_crl_inside_the_ca_file(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    crl = authority.revoke_list([client.certificate.serial_number])
    files.put("ca-cert.pem", authority.cert_pem, crl)
    assert shake(server_context(files.settings()), files.client_context(client)) == "revoked"


def loaded_at(files: Files, crl: bytes, now: datetime) -> ssl.SSLContext:
    """As of a gateway that was started at that time."""
    snapshot = Snapshot.take(files.settings(crl=files.put("ca-crl.pem", crl)))
    return context_of(own(snapshot), clients(snapshot, now), "1.2")


def test_crl_that_has_expired_meanwhile_lets_nobody_in(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    then = NOW - 60 * DAY
    context = loaded_at(files, authority.revoke_list([], then), then)
    with Shake(context, files.client_context(client)) as handshake:
        assert handshake.reason == "crl_expired"
        assert handshake.server_error is not None
        assert "renew" in str(refusal(handshake.server_error))


def test_crl_of_the_future_lets_nobody_in(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    context = loaded_at(files, authority.revoke_list([], NOW + DAY), NOW + DAY)
    assert shake(context, files.client_context(client)) == "crl_not_yet_valid"


def test_crl_of_another_ca_does_not_stand_in(files: Files, client: Credential) -> None:
    """Whose list is missing is known before the first client; this is what OpenSSL makes of it."""
    snapshot = Snapshot.take(files.settings())
    other = CertificateAuthority.create("another CA")
    ours = clients(snapshot, NOW)
    assert ours is not None
    crl = CRL(b"", frozenset(), None, other.revoke_list([]))
    context = context_of(own(snapshot), Clients(ours.cas, (crl,)), "1.2")
    assert shake(context, files.client_context(client)) == "no_crl"


@pytest.mark.parametrize("content", [b"", b"no CRL", None])
def test_crl_that_cannot_be_used(content: bytes | None, files: Files) -> None:
    path = files.folder / "ca-crl.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"^--crl: .*/ca-crl\.pem"):
        server_context(files.settings(crl=path))
