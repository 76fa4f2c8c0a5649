"""Certificates in memory: a small private CA, what it signs, and its revocation list.

The profile, and the reason for each of its lines, stands in certs/README.md. `gateway.certs` puts
a set of these certificates into a folder.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NoReturn, TypedDict, Unpack
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.errors import GatewayError

CA_DAYS = 3650
SERVER_DAYS = 397
CLIENT_DAYS = 90
CRL_DAYS = 30
MAX_DAYS = 36500  # ours: a hundred years; keeps the dates within what X.509 and datetime can say
CLOCK_SKEW = timedelta(hours=1)  # how far a peer's clock may be behind ours
MAX_COMMON_NAME = 64  # RFC 5280, ub-common-name
MAX_DNS_NAME = 253  # RFC 1035, 255 bytes on the wire

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_KEY_USAGE_BITS = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class PkiError(GatewayError):
    """Certificates cannot be issued or written as asked. `str()` is one line for a person."""


class Overrides(TypedDict, total=False):
    """What a test of wrong certificates may want otherwise than the profile has it."""

    not_before: datetime
    not_after: datetime
    usages: Sequence[x509.ObjectIdentifier]  # extended key usage; empty leaves it out


@dataclass(frozen=True)
class Credential:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS #8, not encrypted."""
        pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)

    @property
    def common_name(self) -> str:
        (name,) = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(name.value)

    @property
    def not_after(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def sha256(self) -> str:
        """Fingerprint of the certificate: 64 lower-case hexadecimal digits."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()


@dataclass(frozen=True)
class CertificateAuthority(Credential):
    """A CA of depth one: it signs leaves, never another CA.

    In all methods `now` is an aware datetime, and the present when left out.
    """

    @classmethod
    def create(
        cls, name: str, days: int = CA_DAYS, now: datetime | None = None
    ) -> CertificateAuthority:
        """A new self-signed CA. Give each its own name: chains are built by name."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(name)
        ours = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ours)
        builder = (
            _builder(subject, key.public_key(), *_validity(days, now))
            .issuer_name(subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(issuer, critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    def issue_server(
        self,
        names: Sequence[str],
        days: int = SERVER_DAYS,
        now: datetime | None = None,
        **overrides: Unpack[Overrides],
    ) -> Credential:
        """A server certificate for DNS names and IP addresses, in this order."""
        checked = [check_server_name(name) for name in names]
        if not checked:
            raise PkiError("a server certificate needs at least one name")
        fits = len(checked[0]) <= MAX_COMMON_NAME  # CN is for people: clients read the SAN only
        return self._issue(
            checked[0] if fits else "nbd-gateway server",
            [_general_name(name) for name in checked],
            ExtendedKeyUsageOID.SERVER_AUTH,
            _validity(days, now),
            overrides,
        )

    def issue_client(
        self,
        name: str,
        days: int = CLIENT_DAYS,
        now: datetime | None = None,
        uris: Sequence[str] = (),
        **overrides: Unpack[Overrides],
    ) -> Credential:
        """A client certificate: `name` as CN, `uris` as SAN.

        Without URIs there is no SAN: a client's name is no host's name, and a DNS name in the SAN
        would let the holder pass for that host wherever the extended key usage is not looked at.
        """
        return self._issue(
            name,
            [x509.UniformResourceIdentifier(_check_uri(uri)) for uri in uris],
            ExtendedKeyUsageOID.CLIENT_AUTH,
            _validity(days, now),
            overrides,
        )

    def revoke_list(
        self, revoked: Iterable[int], now: datetime | None = None, days: int = CRL_DAYS
    ) -> bytes:
        """A CRL in PEM with these serial numbers. It denies every client once it has expired.

        The CRL number is the time in seconds, so a later list has a higher one.
        """
        this_update, next_update = _validity(days, now)
        number = int((this_update + CLOCK_SKEW).timestamp())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(this_update)
            .next_update(next_update)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        for serial in sorted(set(revoked)):
            entry = x509.RevokedCertificateBuilder().serial_number(serial)
            builder = builder.add_revoked_certificate(entry.revocation_date(this_update).build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        common_name: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        validity: tuple[datetime, datetime],
        overrides: Overrides,
    ) -> Credential:
        key = ec.generate_private_key(ec.SECP256R1())
        not_before = overrides.get("not_before", validity[0])
        # A leaf that outlives its CA fails one day for a reason that nobody sees in the leaf.
        not_after = overrides.get("not_after", min(validity[1], self.not_after))
        if not_after <= not_before:
            raise PkiError(f"nothing can be signed: the CA ends on {self.not_after:%Y-%m-%d}")
        builder = (
            _builder(_subject(common_name), key.public_key(), not_before, not_after)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            # keyEncipherment means nothing for an EC key, but some QEMUs refuse a leaf without it.
            .add_extension(_key_usage("digital_signature", "key_encipherment"), critical=True)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        if usages := overrides.get("usages", [usage]):
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Credential(builder.sign(self.key, hashes.SHA256()), key)

    def _authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        ours = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ours.value)


def check_server_name(name: str) -> str:
    """The name as it goes into a certificate: lower case, addresses in their canonical form.

    Raises PkiError for what is neither a DNS name (a leading `*.` is allowed) nor an IP address.
    """

    def refuse(why: str) -> NoReturn:
        raise PkiError(f"server name {name[:80]!r}: {why}")

    if "%" not in name:  # a zone ("fe80::1%eth0") means something on one machine only
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(name))
    if not name.isascii():
        refuse("give an international name as its A-label (xn--...)")
    dns = name.lower().removesuffix(".")
    labels = dns.removeprefix("*.").split(".")
    if len(dns) > MAX_DNS_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        refuse("not a DNS name or IP address (letters, digits, hyphens and dots; no port)")
    if labels[-1].isdigit():
        refuse("neither an IP address nor a DNS name, whose last part is never a number")
    if dns.startswith("*.") and len(labels) < 2:
        refuse("a wildcard needs two names behind it, as in *.example.com: clients ignore others")
    return dns


def _general_name(checked: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(checked))
    except ValueError:
        return x509.DNSName(checked)


def _check_uri(uri: str) -> str:
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"[!-~]+", uri) and urlsplit(uri).scheme:
            return uri
    raise PkiError(f"not a URI: {uri[:80]!r}")


def _subject(common_name: str) -> x509.Name:
    if not common_name.strip() or not common_name.isprintable():
        raise PkiError(f"not a name for a certificate: {common_name[:80]!r}")
    if len(common_name.encode()) > MAX_COMMON_NAME:
        raise PkiError(f"name longer than {MAX_COMMON_NAME} bytes: {common_name[:80]!r}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _validity(days: int, now: datetime | None) -> tuple[datetime, datetime]:
    if not 1 <= days <= MAX_DAYS:
        raise PkiError(f"a lifetime of {days} days is not between 1 and {MAX_DAYS}")
    moment = (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)
    return moment - CLOCK_SKEW, moment + timedelta(days=days)


def _builder(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*wanted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{bit: bit in wanted for bit in _KEY_USAGE_BITS})
