"""gateway.pki: the profile field by field, and which names it takes."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from gateway.pki import (
    CertificateAuthority,
    Credential,
    KeyType,
    PkiError,
    check_server_name,
    general_name,
)
from gateway.pki_keys import name_of

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create("test CA", now=NOW)


def critical(certificate: x509.Certificate) -> dict[x509.ObjectIdentifier, bool]:
    return {each.oid: each.critical for each in certificate.extensions}


def extension(credential: Credential, kind: type[Any]) -> Any:
    return credential.certificate.extensions.get_extension_for_class(kind).value


def key_usage(credential: Credential) -> set[str]:
    usage = extension(credential, x509.KeyUsage)
    always = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment")
    bits = (*always, "key_agreement", "key_cert_sign", "crl_sign")
    return {bit for bit in bits if getattr(usage, bit)}


# ---------------------------------------------------------------- the profile


def test_the_authority(authority: CertificateAuthority) -> None:
    certificate = authority.certificate
    assert certificate.version is x509.Version.v3
    assert certificate.subject.rfc4514_string() == "CN=test CA"
    assert certificate.issuer == certificate.subject
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert isinstance(authority.key.curve, ec.SECP256R1)
    assert certificate.signature_algorithm_oid == x509.SignatureAlgorithmOID.ECDSA_WITH_SHA256
    assert certificate.not_valid_before_utc == NOW - HOUR
    assert certificate.not_valid_after_utc == NOW + 3650 * DAY
    assert critical(certificate) == {
        ExtensionOID.SUBJECT_KEY_IDENTIFIER: False,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER: False,
        ExtensionOID.BASIC_CONSTRAINTS: True,
        ExtensionOID.KEY_USAGE: True,
    }
    assert extension(authority, x509.BasicConstraints) == x509.BasicConstraints(True, 0)
    assert key_usage(authority) == {"key_cert_sign", "crl_sign"}
    certificate.verify_directly_issued_by(certificate)


def test_a_server_certificate(authority: CertificateAuthority) -> None:
    names = ["Gateway.Example.com", "*.example.org.", "192.0.2.1", "2001:DB8:0::1"]
    server = authority.issue_server(names, now=NOW)
    certificate = server.certificate
    certificate.verify_directly_issued_by(authority.certificate)
    assert certificate.subject.rfc4514_string() == "CN=gateway.example.com"
    assert certificate.not_valid_before_utc == NOW - HOUR
    assert certificate.not_valid_after_utc == NOW + 397 * DAY
    assert critical(certificate) == {
        ExtensionOID.SUBJECT_KEY_IDENTIFIER: False,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER: False,
        ExtensionOID.BASIC_CONSTRAINTS: True,
        ExtensionOID.KEY_USAGE: True,
        ExtensionOID.EXTENDED_KEY_USAGE: False,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME: False,
    }
    assert extension(server, x509.BasicConstraints) == x509.BasicConstraints(False, None)
    assert key_usage(server) == {"digital_signature", "key_encipherment"}
    assert list(extension(server, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert list(extension(server, x509.SubjectAlternativeName)) == [
        x509.DNSName("gateway.example.com"),
        x509.DNSName("*.example.org"),
        x509.IPAddress(ip_address("192.0.2.1")),
        x509.IPAddress(ip_address("2001:db8::1")),
    ]


def test_a_client_certificate_has_a_san_only_for_uris(authority: CertificateAuthority) -> None:
    plain = authority.issue_client("Jürgen, vm 1", now=NOW)
    plain.certificate.verify_directly_issued_by(authority.certificate)
    assert plain.certificate.subject.rfc4514_string() == "CN=Jürgen\\, vm 1"
    assert plain.certificate.not_valid_after_utc == NOW + 90 * DAY
    assert list(extension(plain, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert key_usage(plain) == {"digital_signature", "key_encipherment"}
    assert ExtensionOID.SUBJECT_ALTERNATIVE_NAME not in critical(plain.certificate)

    named = authority.issue_client("vm1", uris=["spiffe://example.com/vm1"], now=NOW)
    assert list(extension(named, x509.SubjectAlternativeName)) == [
        x509.UniformResourceIdentifier("spiffe://example.com/vm1")
    ]
    assert critical(named.certificate)[ExtensionOID.SUBJECT_ALTERNATIVE_NAME] is False


def test_key_identifiers_link_leaf_and_authority(authority: CertificateAuthority) -> None:
    ours = extension(authority, x509.SubjectKeyIdentifier).digest
    client = authority.issue_client("c")
    for each in (authority, authority.issue_server(["h"]), client):
        assert extension(each, x509.AuthorityKeyIdentifier).key_identifier == ours
    assert extension(client, x509.SubjectKeyIdentifier).digest != ours


def test_pem_holds_the_certificate_and_its_own_key(authority: CertificateAuthority) -> None:
    for each in (authority, authority.issue_server(["h"]), authority.issue_client("c")):
        assert x509.load_pem_x509_certificate(each.cert_pem) == each.certificate
        assert each.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
        key = serialization.load_pem_private_key(each.key_pem, None)
        assert key.public_key() == each.certificate.public_key()
        assert re.fullmatch("[0-9a-f]{64}", each.sha256)
        assert each.not_after == each.certificate.not_valid_after_utc
        assert "key=" not in repr(each)


def test_serial_numbers_and_keys_are_random(authority: CertificateAuthority) -> None:
    issued = [authority.issue_client("same", now=NOW) for _ in range(8)]
    assert len({each.certificate.serial_number for each in issued}) == len(issued)
    assert len({each.key_pem for each in issued}) == len(issued)
    assert all(each.certificate.serial_number.bit_length() > 64 for each in issued)


def test_a_leaf_does_not_outlive_its_authority() -> None:
    authority = CertificateAuthority.create("short", 10, NOW)
    assert authority.issue_server(["h"], 397, NOW).not_after == NOW + 10 * DAY
    with pytest.raises(PkiError, match="the CA ends on 2030-01-12"):
        authority.issue_client("c", 90, NOW + 11 * DAY)


def test_overrides_for_wrong_certificates(authority: CertificateAuthority) -> None:
    expired = authority.issue_server(
        ["h"], not_before=NOW - 2 * DAY, not_after=NOW - DAY, usages=[]
    )
    assert expired.certificate.not_valid_before_utc == NOW - 2 * DAY
    assert expired.not_after == NOW - DAY
    assert ExtensionOID.EXTENDED_KEY_USAGE not in critical(expired.certificate)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    assert list(extension(authority.issue_client("c", usages=both), x509.ExtendedKeyUsage)) == both


def test_the_time_may_be_given_in_any_zone(authority: CertificateAuthority) -> None:
    local = NOW.astimezone(datetime.strptime("+0530", "%z").tzinfo)
    assert authority.issue_client("c", now=local).not_after == NOW + 90 * DAY


def test_a_revocation_list(authority: CertificateAuthority) -> None:
    crl = x509.load_pem_x509_crl(authority.revoke_list([7, 5, 7], NOW, 30))
    public_key = authority.certificate.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(public_key)
    assert crl.issuer == authority.certificate.subject
    assert [each.serial_number for each in crl] == [5, 7]
    assert crl.last_update_utc == NOW - HOUR
    assert crl.next_update_utc == NOW + 30 * DAY

    def number(raw: bytes) -> int:
        parsed = x509.load_pem_x509_crl(raw)
        return parsed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number

    assert number(authority.revoke_list([], NOW + timedelta(seconds=1))) == 1 + number(
        authority.revoke_list([], NOW)
    )


def test_a_revocation_list_keeps_dates_and_its_number_rises(
    authority: CertificateAuthority,
) -> None:
    since = {9: NOW - 40 * DAY, 3: NOW - DAY}
    crl = x509.load_pem_x509_crl(authority.revoke_list(since, NOW, 30, after=10**12))
    assert {each.serial_number: each.revocation_date_utc for each in crl} == since
    number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    assert number == 10**12 + 1


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("kind", KeyType)
@pytest.mark.parametrize("signer", [KeyType.EC_P384, KeyType.ED25519, KeyType.RSA_3072])
def test_every_key_type_signs_every_other(signer: KeyType, kind: KeyType) -> None:
    authority = CertificateAuthority.create("CA", key_type=signer)
    server = authority.issue_server(["h"], key_type=kind)
    client = authority.issue_client("c", key_type=kind)
    hashed = {KeyType.EC_P384: hashes.SHA384, KeyType.RSA_3072: hashes.SHA256}
    for each in (authority, server, client):
        each.certificate.verify_directly_issued_by(authority.certificate)
        algorithm = each.certificate.signature_hash_algorithm
        assert isinstance(algorithm, hashed.get(signer, type(None)))
    for each in (server, client):
        assert name_of(each.certificate.public_key()) == kind
        # RFC 9295: a key that can only sign is not marked as one that encrypts.
        encipher = set() if kind is KeyType.ED25519 else {"key_encipherment"}
        assert key_usage(each) == {"digital_signature"} | encipher
    crl = x509.load_pem_x509_crl(authority.revoke_list([1]))
    assert crl.is_signature_valid(authority.certificate.public_key())  # type: ignore[arg-type]


def test_an_authority_that_was_issued_before(authority: CertificateAuthority) -> None:
    again = CertificateAuthority.of_files(authority.certificate, authority.key)
    again.issue_client("c").certificate.verify_directly_issued_by(authority.certificate)
    leaf, other = authority.issue_client("c"), CertificateAuthority.create("other")
    for certificate, key, why in (
        (leaf.certificate, leaf.key, "not the certificate of a CA that signs"),
        (other.certificate, authority.key, "not that of the certificate"),
        (bare(leaf).certificate, leaf.key, "not the certificate of a CA: No"),
    ):
        with pytest.raises(PkiError, match=why):
            CertificateAuthority.of_files(certificate, key)


def bare(of: Credential) -> Credential:
    """The same certificate without an extension, signed by itself."""
    old = of.certificate
    builder = x509.CertificateBuilder(
        *(old.issuer, old.subject, old.public_key(), old.serial_number),
        *(old.not_valid_before_utc, old.not_valid_after_utc),
    )
    return Credential(builder.sign(of.key, hashes.SHA256()), of.key)


def test_an_authority_without_a_key_identifier() -> None:
    """As other tools make them."""
    own = CertificateAuthority.create("CA")
    old = own.certificate
    builder = x509.CertificateBuilder(
        *(old.issuer, old.subject, old.public_key(), old.serial_number),
        *(old.not_valid_before_utc, old.not_valid_after_utc),
    )
    for kind in (x509.BasicConstraints, x509.KeyUsage):
        builder = builder.add_extension(extension(own, kind), critical=True)
    made = CertificateAuthority.of_files(builder.sign(own.key, hashes.SHA256()), own.key)
    found = extension(made.issue_client("c"), x509.AuthorityKeyIdentifier)
    assert found == x509.AuthorityKeyIdentifier.from_issuer_public_key(old.public_key())  # type: ignore[arg-type]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("dns=Vm1.Example", x509.DNSName("vm1.example")),
        ("vm1", x509.DNSName("vm1")),
        ("*.example.com", x509.DNSName("*.example.com")),
        ("192.0.2.1", x509.IPAddress(ip_address("192.0.2.1"))),
        ("ip=::1", x509.IPAddress(ip_address("::1"))),
        ("uri=urn:x:y", x509.UniformResourceIdentifier("urn:x:y")),
        ("spiffe://a/b?c=d@e", x509.UniformResourceIdentifier("spiffe://a/b?c=d@e")),
        ("Me@Example.com", x509.RFC822Name("Me@example.com")),
        ("email=a+b@c.example", x509.RFC822Name("a+b@c.example")),
    ],
)
def test_subject_alternative_names(text: str, kept: x509.GeneralName) -> None:
    assert general_name(text) == kept


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a DNS name"),
        ("dns=", "not a DNS name"),
        ("dns=192.0.2.1", "not what dns= stands for"),
        ("ip=vm1", "not what ip= stands for"),
        ("uri=vm1", "not a URI"),
        ("uri=a: b", "not a URI"),
        ("email=vm1", "not an email address"),
        ("@vm1", "not an email address"),
        ("a@b@c", "not an email address"),
        ("a b@c", "not an email address"),
        ("a@b_c", "not a DNS name"),
        ("cn=vm1", "not a DNS name"),
    ],
)
def test_bad_subject_alternative_names(text: str, why: str) -> None:
    with pytest.raises(PkiError, match=why):
        general_name(text)


@pytest.mark.parametrize("text", ["vm1", "192.0.2.1"])
def test_a_client_is_a_host_only_if_that_is_said(text: str) -> None:
    with pytest.raises(PkiError, match="say dns=NAME or ip=ADDRESS"):
        general_name(text, bare_hosts=False)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("LOCALHOST", "localhost"),
        ("a.example.com.", "a.example.com"),
        ("xn--mnchen-3ya.de", "xn--mnchen-3ya.de"),
        ("*.Example.com", "*.example.com"),
        ("3com.example", "3com.example"),
        ("0:0::1", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
    ],
)
def test_good_server_names(given: str, kept: str) -> None:
    assert check_server_name(given) == kept


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "not a DNS name or IP address"),
        (".", "not a DNS name or IP address"),
        ("a..b", "not a DNS name or IP address"),
        ("-a.example", "not a DNS name or IP address"),
        ("under_score", "not a DNS name or IP address"),
        ("host:10809", "no port"),
        ("[::1]", "not a DNS name or IP address"),
        ("fe80::1%eth0", "not a DNS name or IP address"),
        ("10.0.0.0/8", "not a DNS name or IP address"),
        ("two words", "not a DNS name or IP address"),
        ("line\n", "not a DNS name or IP address"),
        ("a" * 64, "not a DNS name or IP address"),
        (".".join(["a" * 63] * 4), "not a DNS name or IP address"),
        ("münchen.de", "A-label"),
        ("300.1.1.1", "never a number"),
        ("1234", "never a number"),
        ("*", "not a DNS name or IP address"),
        ("*.com", "two names behind it"),
        ("a.*.example.com", "not a DNS name or IP address"),
        ("*a.example.com", "not a DNS name or IP address"),
    ],
)
def test_bad_server_names(name: str, why: str, authority: CertificateAuthority) -> None:
    with pytest.raises(PkiError, match=why) as caught:
        authority.issue_server(["good.example", name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", " a", "a ", "a\nb", "\0", "x" * 65, "ü" * 33])
def test_bad_client_names(name: str, authority: CertificateAuthority) -> None:
    with pytest.raises(PkiError, match="name"):
        authority.issue_client(name)


@pytest.mark.parametrize("uri", ["", "no-scheme", "a:b c", "x://ü", "x:\n", "http://["])
def test_bad_uris(uri: str, authority: CertificateAuthority) -> None:
    with pytest.raises(PkiError, match="not a URI"):
        authority.issue_client("c", uris=[uri])


@pytest.mark.parametrize("days", [-1, 0, 36501, 10**12])
def test_bad_lifetimes(days: int, authority: CertificateAuthority) -> None:
    with pytest.raises(PkiError, match="not between 1 and 36500"):
        authority.issue_client("c", days)


def test_a_server_certificate_needs_a_name(authority: CertificateAuthority) -> None:
    with pytest.raises(PkiError, match="at least one name"):
        authority.issue_server([])


def test_a_name_too_long_for_the_cn_is_in_the_san_only(authority: CertificateAuthority) -> None:
    name = "a" * 40 + "." + "b" * 40
    server = authority.issue_server([name])
    assert server.certificate.subject.rfc4514_string() == "CN=nbd-gateway server"
    assert list(extension(server, x509.SubjectAlternativeName)) == [x509.DNSName(name)]
