"""Certificates in memory: a small private CA, what it signs, and its revocation list.

The profile, and the reason for each of its lines, stands in certs/README.md. `gateway.certs` and
`gateway.certs.folder` put these certificates into folders.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn, TypedDict, Unpack
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.pki_keys import KeyType, PkiError, PrivateKey, generate, hash_for, key_pem

__all__ = [  # PkiError is raised here too, and is for everybody
    "CA_DAYS",
    "CLIENT_DAYS",
    "CRL_DAYS",
    "MAX_DAYS",
    "SAN_KINDS",
    "SERVER_DAYS",
    "CertificateAuthority",
    "Credential",
    "KeyType",
    "PkiError",
    "check_client_name",
    "check_server_name",
    "general_name",
]

CA_DAYS = 3650
SERVER_DAYS = 397
CLIENT_DAYS = 90
CRL_DAYS = 30
MAX_DAYS = 36500  # ours: a hundred years; keeps the dates within what X.509 and datetime can say
CLOCK_SKEW = timedelta(hours=1)  # how far a peer's clock may be behind ours
MAX_COMMON_NAME = 64  # RFC 5280, ub-common-name
MAX_DNS_NAME = 253  # RFC 1035, 255 bytes on the wire
SAN_KINDS: Final = ("dns", "ip", "uri", "email")  # as in a rule of --allow, where they are in one

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_KEY_USAGE_BITS = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class Overrides(TypedDict, total=False):
    """What a test of wrong certificates may want otherwise than the profile has it."""

    not_before: datetime
    not_after: datetime
    usages: Sequence[x509.ObjectIdentifier]  # extended key usage; empty leaves it out


@dataclass(frozen=True)
class Credential:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS #8, not encrypted."""
        return key_pem(self.key)

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
        cls,
        name: str,
        days: int = CA_DAYS,
        now: datetime | None = None,
        key_type: KeyType = KeyType.EC_P256,
    ) -> CertificateAuthority:
        """A new self-signed CA. Give each its own name: chains are built by name."""
        key = generate(key_type)
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
        return cls(builder.sign(key, hash_for(key)), key)

    @classmethod
    def of_files(cls, certificate: x509.Certificate, key: PrivateKey) -> CertificateAuthority:
        """A CA that was issued before, here or elsewhere. Raises PkiError if it is none."""
        if key.public_key() != certificate.public_key():
            raise PkiError("the key is not that of the certificate")
        try:
            may_sign = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
            usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        except x509.ExtensionNotFound as missing:
            raise PkiError(f"not the certificate of a CA: {missing}") from None
        if not (may_sign.value.ca and usage.key_cert_sign and usage.crl_sign):
            raise PkiError("not the certificate of a CA that signs certificates and CRLs")
        return cls(certificate, key)

    def issue_server(
        self,
        names: Sequence[str],
        days: int = SERVER_DAYS,
        now: datetime | None = None,
        key_type: KeyType = KeyType.EC_P256,
        sans: Sequence[x509.GeneralName] = (),
        **overrides: Unpack[Overrides],
    ) -> Credential:
        """A server certificate for DNS names and IP addresses, in this order, and then `sans`."""
        checked = [check_server_name(name) for name in names]
        if not checked:
            raise PkiError("a server certificate needs at least one name")
        fits = len(checked[0]) <= MAX_COMMON_NAME  # CN is for people: clients read the SAN only
        return self._issue(
            checked[0] if fits else "nbd-gateway server",
            [*(_host(name) for name in checked), *sans],
            ExtendedKeyUsageOID.SERVER_AUTH,
            _validity(days, now),
            key_type,
            overrides,
        )

    def issue_client(
        self,
        name: str,
        days: int = CLIENT_DAYS,
        now: datetime | None = None,
        uris: Sequence[str] = (),
        key_type: KeyType = KeyType.EC_P256,
        sans: Sequence[x509.GeneralName] = (),
        **overrides: Unpack[Overrides],
    ) -> Credential:
        """A client certificate: `name` as CN, `uris` and `sans` as SAN.

        Without them there is no SAN: a client's name is no host's name, and a DNS name in the SAN
        would let the holder pass for that host wherever the extended key usage is not looked at.
        """
        return self._issue(
            name,
            [*(x509.UniformResourceIdentifier(_check_uri(uri)) for uri in uris), *sans],
            ExtendedKeyUsageOID.CLIENT_AUTH,
            _validity(days, now),
            key_type,
            overrides,
        )

    def revoke_list(
        self,
        revoked: Iterable[int] | Mapping[int, datetime],
        now: datetime | None = None,
        days: int = CRL_DAYS,
        after: int = 0,
    ) -> bytes:
        """A CRL in PEM with these serial numbers. It denies every client once it has expired.

        A mapping says for each since when; otherwise it is now. The CRL number is the time in
        seconds, so a later list has a higher one, and in any case one above `after`.
        """
        this_update, next_update = _validity(days, now)
        moment = this_update + CLOCK_SKEW
        number = max(int(moment.timestamp()), after + 1)
        since = revoked if isinstance(revoked, Mapping) else dict.fromkeys(revoked, moment)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(this_update)
            .next_update(next_update)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        for serial, date in sorted(since.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial)
            builder = builder.add_revoked_certificate(entry.revocation_date(date).build())
        return builder.sign(self.key, hash_for(self.key)).public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        common_name: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        validity: tuple[datetime, datetime],
        key_type: KeyType,
        overrides: Overrides,
    ) -> Credential:
        subject = _subject(common_name)
        key = generate(key_type)
        not_before = overrides.get("not_before", validity[0])
        # A leaf that outlives its CA fails one day for a reason that nobody sees in the leaf.
        not_after = overrides.get("not_after", min(validity[1], self.not_after))
        if not_after <= not_before:
            raise PkiError(f"nothing can be signed: the CA ends on {self.not_after:%Y-%m-%d}")
        builder = (
            _builder(subject, key.public_key(), not_before, not_after)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_leaf_usage(key), critical=True)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        if usages := overrides.get("usages", [usage]):
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Credential(builder.sign(self.key, hash_for(self.key)), key)

    def _authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        try:
            ours = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except x509.ExtensionNotFound:  # a CA from elsewhere
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
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


def check_client_name(name: str) -> str:
    """The name, fit for a CN. Raises PkiError."""
    _subject(name)
    return name


def general_name(text: str, *, bare_hosts: bool = True) -> x509.GeneralName:
    """A subject alternative name: `KIND=VALUE`, with the kinds of SAN_KINDS.

    Without a kind it is a URI if it has `://` in it, else an email address if it has an `@`, else
    a DNS name or an address; unless not `bare_hosts`, for clients, who seldom mean to be a host.
    Raises PkiError.
    """
    kind, equals, value = text.partition("=")
    if not equals or kind not in SAN_KINDS:
        value = text
        kind = "uri" if "://" in text else "email" if "@" in text else "host"
    match kind:
        case "uri":
            return x509.UniformResourceIdentifier(_check_uri(value))
        case "email":
            local, _, host = value.rpartition("@")
            if not re.fullmatch(r"[!-~]+", local) or "@" in local:
                raise PkiError(f"not an email address: {value[:80]!r}")
            return x509.RFC822Name(f"{local}@{check_server_name(host)}")
        case "host" if not bare_hosts:
            raise PkiError(
                f"{text[:80]!r}: say dns=NAME or ip=ADDRESS, but only if this client is that host"
            )
        case _:
            name = _host(check_server_name(value))
            if kind != "host" and (kind == "ip") != isinstance(name, x509.IPAddress):
                raise PkiError(f"not what {kind}= stands for: {value[:80]!r}")
            return name


def _host(checked: str) -> x509.GeneralName:
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
    blank = not common_name or common_name != common_name.strip()
    if blank or not common_name.isprintable():
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
    public_key: CertificatePublicKeyTypes,
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


def _leaf_usage(key: PrivateKey) -> x509.KeyUsage:
    if isinstance(key, ed25519.Ed25519PrivateKey):  # RFC 9295 forbids what such a key cannot do
        return _key_usage("digital_signature")
    # keyEncipherment means nothing for an EC key, but some QEMUs refuse a leaf without it.
    return _key_usage("digital_signature", "key_encipherment")


def _key_usage(*wanted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{bit: bit in wanted for bit in _KEY_USAGE_BITS})
