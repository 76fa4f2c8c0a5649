"""gateway.access: who a client is, out of its certificate, and how that is shown."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.access import Identity, shown

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def certificate(
    key: ec.EllipticCurvePrivateKey, *names: tuple[x509.ObjectIdentifier, str]
) -> bytes:
    """A certificate with this subject, in DER. Nothing else in it matters here."""
    subject = x509.Name([x509.NameAttribute(oid, text) for oid, text in names])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    signed = builder.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.DER)


def test_what_a_certificate_says(key: ec.EllipticCurvePrivateKey) -> None:
    der = certificate(key, (NameOID.ORGANIZATION_NAME, "Disks"), (NameOID.COMMON_NAME, "backup"))
    identity = Identity.of_certificate(der)
    assert identity.common_name == "backup"
    assert identity.subject == "CN=backup,O=Disks"  # RFC 4514: the last one first
    assert identity.sha256 == hashlib.sha256(der).hexdigest()
    assert str(identity) == f"CN=backup,O=Disks sha256:{identity.sha256[:16]}"


def test_no_common_name(key: ec.EllipticCurvePrivateKey) -> None:
    identity = Identity.of_certificate(certificate(key, (NameOID.ORGANIZATION_NAME, "Disks")))
    assert identity.common_name is None
    assert str(identity).startswith("O=Disks sha256:")


def test_no_subject_at_all(key: ec.EllipticCurvePrivateKey) -> None:
    identity = Identity.of_certificate(certificate(key))
    assert identity.common_name is None
    assert str(identity).startswith("no subject sha256:")


def test_the_first_common_name_counts(key: ec.EllipticCurvePrivateKey) -> None:
    der = certificate(key, (NameOID.COMMON_NAME, "first"), (NameOID.COMMON_NAME, "second"))
    assert Identity.of_certificate(der).common_name == "first"


@pytest.mark.parametrize("evil", ["a\nINFO forged", "a\r\x1b[2J", "a\u2028b", "a\u202eb", "a\x85b"])
def test_a_subject_stays_on_its_line(key: ec.EllipticCurvePrivateKey, evil: str) -> None:
    text = str(Identity.of_certificate(certificate(key, (NameOID.COMMON_NAME, evil))))
    assert text.isprintable()
    assert len(text.splitlines()) == 1


def test_a_long_subject_is_cut_in_the_log_only(key: ec.EllipticCurvePrivateKey) -> None:
    names = [(NameOID.ORGANIZATIONAL_UNIT_NAME, 60 * letter) for letter in "abc"]
    identity = Identity.of_certificate(certificate(key, *names))
    assert len(identity.subject) > 180
    assert len(str(identity)) <= 80 + len(" sha256:") + 16
    assert "..." in str(identity)


def test_two_certificates_of_one_name_are_two_identities(key: ec.EllipticCurvePrivateKey) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    first, second = (
        Identity.of_certificate(certificate(each, (NameOID.COMMON_NAME, "backup")))
        for each in (key, other)
    )
    assert first.subject == second.subject
    assert first != second
    assert str(first) != str(second)


@pytest.mark.parametrize("der", [b"", b"no certificate", bytes(100)])
def test_what_cannot_be_parsed(der: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Identity.of_certificate(der)


def test_shown() -> None:
    assert shown("CN=Ren\u00e9, \u65e5\u672c") == "CN=Ren\u00e9, \u65e5\u672c"
    assert shown("a\0b\tc\nd") == "a?b?c?d"
    assert shown(80 * "x") == 80 * "x"
    assert shown(81 * "x") == 77 * "x" + "..."
    assert shown("\n" + 100 * "x") == "?" + 76 * "x" + "..."
