"""Our certificate and key, and the CAs of the clients: parsed out of a snapshot, and checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID as EKU

from gateway.crls import CRL, choose
from gateway.identity import shown
from gateway.snapshot import File, Snapshot

MIN_RSA, MIN_EC = 2048, 256  # bits; NIST SP 800-57: 112 bits of security, and our own floor
NAMELESS: Final = "certificate without a subject"
_MAX_PASSWORD: Final = 1024  # bytes; more is not the file that was meant

# One block at a time is parsed, and that block is what OpenSSL gets: two parsers that see different
# things in one file have been used to show a check another certificate than the one in use.
# Nothing with five hyphens in between: to look for an end from each beginning on would take a
# broken file of some hundred kilobytes a minute, in which nothing else is done.
_BLOCK: Final = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]+)-----(?:(?!-----).)*-----END \1-----", re.DOTALL
)
_BEGIN: Final = b"-----BEGIN "
_CERTIFICATE: Final = frozenset({b"CERTIFICATE", b"X509 CERTIFICATE"})
_CRL: Final = frozenset({b"X509 CRL"})
_KEYS: Final = frozenset(
    {b"PRIVATE KEY", b"ENCRYPTED PRIVATE KEY", b"EC PRIVATE KEY", b"RSA PRIVATE KEY"}
)
_WRONG: Final = (
    *(ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.InvalidVersion, x509.DuplicateExtension),
)


class Block(NamedTuple):
    """One piece of a PEM file."""

    label: bytes
    pem: bytes


@dataclass(frozen=True, slots=True)
class Own:
    """The certificate that clients are shown, its chain, and its key."""

    chain: tuple[x509.Certificate, ...]  # leaf first
    key_pem: bytes = field(repr=False)  # without a password

    @property
    def chain_pem(self) -> bytes:
        return b"".join(one.public_bytes(Encoding.PEM) for one in self.chain)

    @property
    def not_after(self) -> datetime:
        """When the first of them expires."""
        return min(one.not_valid_after_utc for one in self.chain)

    @property
    def not_before(self) -> datetime:
        """When the last of them begins to be valid."""
        return max(one.not_valid_before_utc for one in self.chain)

    def is_valid(self, now: datetime) -> bool:
        """By the dates of all of them. `now` is aware."""
        return self.not_before <= now < self.not_after

    @property
    def names(self) -> tuple[str, ...]:
        """The DNS names and addresses that a client may know us by."""
        try:
            san = self.chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (x509.ExtensionNotFound, *_WRONG):
            return ()
        addresses = [str(one) for one in san.value.get_values_for_type(x509.IPAddress)]
        return (*san.value.get_values_for_type(x509.DNSName), *addresses)


@dataclass(frozen=True, slots=True)
class Clients:
    """Whose clients may enter. `crls` is empty, or has one for each CA."""

    cas: tuple[x509.Certificate, ...]
    crls: tuple[CRL, ...]


def own(files: Snapshot) -> Own:
    """Certificate and key of the gateway. Raises SettingsError that names flag and file."""
    assert files.cert is not None
    assert files.key is not None  # both: TLSSettings sees to it
    chain = tuple(_certificates(files.cert, _blocks(files.cert)))
    if not chain:
        raise files.cert.wrong("does not hold a certificate in PEM format")
    for certificate in chain:
        try:
            weak = weakness(certificate)
            _check_extensions(certificate)
        except _WRONG as error:
            raise files.cert.wrong(f"holds a certificate that cannot be used: {error}") from None
        if weak:
            raise files.cert.wrong(f"has a weak key: {weak}")
    if not _is_for_servers(chain[0]):
        raise files.cert.wrong(
            "is no certificate of a TLS server (its extended key usage): every client would refuse "
            "it; is it a client's?"
        )
    key_pem, key_spki = _key(files.key, files.key_password)
    places = [index for index, one in enumerate(chain) if spki(one) == key_spki]
    if not places:
        raise files.key.wrong(f"is not the key of the certificate in {files.cert.path}")
    if 0 not in places:
        raise files.key.wrong(
            f"is the key of certificate {places[0] + 1} in {files.cert.path}: put that one first"
        )
    return Own(chain, key_pem)


def clients(files: Snapshot, now: datetime) -> Clients | None:
    """The CAs and their CRLs; None without --client-ca. Raises SettingsError."""
    if files.client_ca is None:
        return None
    blocks = _blocks(files.client_ca)
    for label, _ in blocks:
        if label not in _CERTIFICATE | _CRL:
            raise files.client_ca.wrong(
                f"holds a {label.decode().lower()}: certificates of CAs go there, and their CRLs"
            )
    cas = tuple(dict.fromkeys(_certificates(files.client_ca, blocks)))
    if not cas:
        raise files.client_ca.wrong("does not hold a certificate in PEM format")
    for ca in cas:
        try:
            _check_extensions(ca)
        except _WRONG as error:
            raise files.client_ca.wrong(
                f"holds a certificate that cannot be used: {error}"
            ) from None
    found = [(files.client_ca, one.pem) for one in blocks if one.label in _CRL]
    if files.crl is not None:
        inside = [one.pem for one in _blocks(files.crl) if one.label in _CRL]
        if not inside:
            raise files.crl.wrong("does not hold a CRL in PEM format")
        found += [(files.crl, pem) for pem in inside]
    crls = choose(found, cas, now)
    if not any(_is_ca(ca) for ca in cas):
        raise files.client_ca.wrong(
            "holds no certificate of a CA, so nobody could enter: is it a server's or a client's?"
        )
    if all(ca.not_valid_after_utc < now for ca in cas):
        raise files.client_ca.wrong("holds expired CAs only, so nobody could enter: renew them")
    return Clients(cas, crls)


def signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether names and signature fit. Dates and extensions are other matters."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def disorder(chain: Sequence[x509.Certificate]) -> str:
    """Where a chain is not one that a client can follow; empty: nowhere."""
    for number, (one, issuer) in enumerate(pairwise(chain), 1):
        if not signed_by(one, issuer):
            names = [shown(each.subject.rfc4514_string() or NAMELESS) for each in (one, issuer)]
            return (
                f"certificate {number} ({names[0]}) is not signed by the next one ({names[1]}): "
                "the server's own first, then each one's issuer"
            )
    return ""


def weakness(certificate: x509.Certificate) -> str:
    """What is weak about its key; empty: nothing. Raises ValueError, UnsupportedAlgorithm."""
    match certificate.public_key():
        case rsa.RSAPublicKey(key_size=bits):
            return "" if bits >= MIN_RSA else f"RSA of {bits} bits, and {MIN_RSA} are needed"
        case ec.EllipticCurvePublicKey(curve=curve):
            return "" if curve.key_size >= MIN_EC else f"EC {curve.name}, and P-256 is needed"
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return ""
        case key:
            return f"{type(key).__name__.lstrip('_')}, and RSA, EC or Ed25519 is needed"


def spki(certificate: x509.Certificate) -> bytes:
    """Its public key. Raises ValueError, UnsupportedAlgorithm."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_extensions(certificate: x509.Certificate) -> None:
    """Raises ValueError and others for what cannot be parsed: better here than at a client."""
    spki(certificate)
    for _ in certificate.extensions:
        pass


def _is_for_servers(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return bool({EKU.SERVER_AUTH, EKU.ANY_EXTENDED_KEY_USAGE} & set(usage))


def _is_ca(certificate: x509.Certificate) -> bool:
    """Whether OpenSSL takes it for one: RFC 5280, basicConstraints and keyCertSign."""
    extensions = certificate.extensions
    try:
        if not extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
    except x509.ExtensionNotFound:  # of the old kind, if it has signed itself
        return certificate.version is x509.Version.v1 and certificate.issuer == certificate.subject
    try:
        return extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def _blocks(file: File) -> tuple[Block, ...]:
    """What stands in a PEM file. One that ends in the middle of something is still written."""
    found = tuple(Block(one[1], one[0] + b"\n") for one in _BLOCK.finditer(file.data))
    last = file.data.rpartition(b"\n")[2]
    begun = last.startswith(b"-") and not last.startswith(b"-----END ")
    if (
        begun  # a last line of "-----BEG"
        or any(one.pem.count(_BEGIN) != 1 for one in found)
        or file.data.count(_BEGIN) != len(found)
    ):
        raise file.wrong("is cut off: something begins in it and does not end")
    return found


def _certificates(file: File, blocks: tuple[Block, ...]) -> Iterator[x509.Certificate]:
    for number, block in enumerate((one for one in blocks if one.label in _CERTIFICATE), 1):
        try:
            yield x509.load_pem_x509_certificate(block.pem)
        except _WRONG as error:
            raise file.wrong(f"does not hold a certificate: {number} is broken: {error}") from None


def _key(file: File, password_file: File | None) -> tuple[bytes, bytes]:
    """The key in PEM without a password, and its public half. Raises SettingsError."""
    keys = [one for one in _blocks(file) if one.label in _KEYS]
    if not keys:
        raise file.wrong("is no usable PEM private key")
    if len(keys) > 1:
        raise file.wrong(f"holds {len(keys)} private keys: leave the one that is meant")
    (block,) = keys
    encrypted = block.label.startswith(b"ENCRYPTED ") or b"Proc-Type: 4,ENCRYPTED" in block.pem
    password = None if password_file is None else _password(password_file)
    if encrypted and password is None:
        raise file.wrong("is encrypted: name the file of its password, --key-password-file FILE")
    try:
        key = load_pem_private_key(block.pem, password if encrypted else None)
        public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        plain = block.pem
        if encrypted:
            plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    except (*_WRONG, AttributeError):
        if encrypted and password_file is not None:
            raise password_file.wrong(f"does not open {file.path}: wrong password") from None
        raise file.wrong("is no usable PEM private key") from None
    return plain, public


def _password(file: File) -> bytes:
    """The first line, without its end."""
    line = file.data.split(b"\n", 1)[0].removesuffix(b"\r")
    if not line:
        raise file.wrong("is empty: its first line is the password of --key")
    if len(line) > _MAX_PASSWORD:
        raise file.wrong(f"has a first line of more than {_MAX_PASSWORD} bytes: no password")
    return line
