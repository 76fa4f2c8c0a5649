"""Who a client is: what TLS has proved of it, or the kernel."""

from __future__ import annotations

import functools
import hashlib
import math
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from gateway import dn

_SHOWN: Final = 80  # characters of a peer's text in a log line
# Identities kept for clients that come again, a kilobyte or two each. Only what was read out of a
# certificate is kept: whether it is good is looked at each time, by OpenSSL.
_KEPT: Final = 128
# Ours, in one certificate: each is held against each rule.
MAX_NAMES: Final = 256
MAX_NAME_LENGTH: Final = 16 << 10  # of all of them

# Whatever a certificate can hold that `cryptography` does not read.
_UNREADABLE: Final = (
    *(x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType),
    *(UnsupportedAlgorithm, TypeError, KeyError),
)
_ECDSA: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA224,
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
    }
)
# Orders of the groups that a CA's key may be of: P-256, P-384, P-521 (SEC 2); brainpoolP256r1,
# P384r1, P512r1 (RFC 5639); secp256k1 (SEC 2).
_ORDERS: Final = (
    0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    int("F" * 48 + "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16),
    int("1" + "F" * 65 + "A51868783BF2F966B7FCC0148F709A5D03BB5C9B8899C47AEBB6FB71E91386409", 16),
    0xA9FB57DBA1EEA9BC3E660A909D838D718C397AA3B561A6F7901E0E82974856A7,
    int(
        "8CB91E82A3386D280F5D6F7E50E641DF152F7109ED5456B3"
        "1F166E6CAC0425A7CF3AB6AF6B7FC3103B883202E9046565",
        16,
    ),
    int(
        "AADD9DB8DBE9C48B3FD4E6AE33C9FC07CB308DB3B3C9D20ED6639CCA70330870"
        "553E5C414CA92619418661197FAC10471DB1D381085DDADDB58796829CA90069",
        16,
    ),
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141,
)


class Link(NamedTuple):
    """What is remembered of one certificate of a verified chain, to look for it in a later CRL."""

    issuer: bytes  # SHA-256 of the issuer's name, in DER
    serial: int
    sha256: bytes  # of the certificate


@dataclass(frozen=True, slots=True)
class Identity:
    """What was proved of a client; with nothing set, nothing was.

    Texts are a certificate's or a peer's, and shown with `str()` only.
    """

    common_name: str | None = None  # None also when there are several: which one would it be?
    common_names: tuple[str, ...] = ()  # all of them, for rules that deny
    subject: str = ""  # RFC 4514
    rdns: tuple[str, ...] = ()  # the subject again, as `gateway.dn` compares it
    dns: tuple[str, ...] = ()  # these three: subject alternative names
    uris: tuple[str, ...] = ()
    emails: tuple[str, ...] = ()
    sha256: str = ""  # of the certificate, hexadecimal
    # The same of what its holder can make of the certificate without the CA: the signature (r, s)
    # is as good as (r, -s). For rules that deny.
    twins: tuple[str, ...] = ()
    spki: str = ""  # of its public key (SubjectPublicKeyInfo), hexadecimal
    psk: str | None = None  # the name of the pre-shared key that it used
    uid: int | None = None  # of the process at the other end of a Unix socket, when it connected
    gid: int | None = None
    chain: tuple[Link, ...] = ()  # as verified, leaf first
    expires: float = math.inf  # when the first certificate of the chain does, as time.time() has it

    @classmethod
    def of_chain(cls, ders: tuple[bytes, ...]) -> Identity:
        """The identity in a verified chain of certificates in DER, leaf first.

        Raises ValueError if one cannot be parsed, for more names than MAX_NAMES, and for control
        characters (NUL is one) in a name: they have been used to make one name pass for another.
        """
        try:
            return _identity(ders)
        except _UNREADABLE as error:
            raise ValueError(str(error) or type(error).__name__) from None

    @classmethod
    def of_psk(cls, name: str) -> Identity:
        """The identity of a client that has proved to hold the pre-shared key of that name."""
        return cls(psk=name)

    def with_unix(self, uid: int, gid: int) -> Identity:
        """The same client, of whom the kernel says this as well (SO_PEERCRED)."""
        return replace(self, uid=uid, gid=gid)

    def __str__(self) -> str:
        """Fit for a log line."""
        known: list[str] = []
        if self.sha256:
            known.append(f"{shown(self.subject or 'no subject')} sha256:{self.sha256[:16]}")
        if self.psk is not None:
            known.append(f"psk:{shown(self.psk)}")
        if self.uid is not None:
            known.append(f"uid:{self.uid}")
        return " ".join(known) or "anonymous"


def link(der: bytes) -> Link:
    """What is remembered of a certificate. Raises ValueError if it cannot be parsed."""
    return _link(x509.load_der_x509_certificate(der), der)


@functools.lru_cache(_KEPT)
def _identity(ders: tuple[bytes, ...]) -> Identity:
    if not ders:
        raise ValueError("no certificate")
    with warnings.catch_warnings():  # of what is refused below
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        leaf, *others = [x509.load_der_x509_certificate(der) for der in ders]
        if leaf.serial_number <= 0:
            raise ValueError("its serial number is not positive")
    for attribute in leaf.subject:
        _check_text(attribute.rfc4514_attribute_name, str(attribute.value))
    names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    common_names = tuple(str(one.value) for one in names)
    dns: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()
    emails: tuple[str, ...] = ()
    try:
        san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        pass
    else:
        dns = tuple(san.get_values_for_type(x509.DNSName))
        uris = tuple(san.get_values_for_type(x509.UniformResourceIdentifier))
        emails = tuple(san.get_values_for_type(x509.RFC822Name))
        for kind, values in (("DNS", dns), ("URI", uris), ("email", emails)):
            for value in values:
                _check_text(f"{kind} name", value)
                if not value.isascii():  # RFC 5280: IA5String
                    raise ValueError(f"a {kind} name in it that is not ASCII")
    names_found = (*common_names, *dns, *uris, *emails)
    if len(names_found) > MAX_NAMES or sum(map(len, names_found)) > MAX_NAME_LENGTH:
        raise ValueError(
            f"more than {MAX_NAMES} names in it, or more than {MAX_NAME_LENGTH} characters of them"
        )
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Identity(
        common_name=common_names[0] if len(common_names) == 1 else None,
        common_names=common_names,
        subject=leaf.subject.rfc4514_string(),
        rdns=dn.parts_of(leaf.subject),
        dns=dns,
        uris=uris,
        emails=emails,
        sha256=hashlib.sha256(ders[0]).hexdigest(),
        twins=tuple(hashlib.sha256(twin).hexdigest() for twin in _twins(leaf, ders[0])),
        spki=hashlib.sha256(spki).hexdigest(),
        chain=tuple(_links((leaf, *others), ders)),
        expires=min(one.not_valid_after_utc.timestamp() for one in (leaf, *others)),
    )


def _twins(certificate: x509.Certificate, der: bytes) -> Iterator[bytes]:
    """The certificate with the other signature that is as good, for each group it may be of.

    At most one of them is real. Which would be for the issuer's key to tell, which is not always
    at hand; the others are nobody's.
    """
    if certificate.signature_algorithm_oid not in _ECDSA:
        return  # of RSA and Ed25519 signatures, OpenSSL takes only the one spelling
    r, s = decode_dss_signature(certificate.signature)
    old = _tlv(0x03, b"\0" + certificate.signature)
    signed = certificate.tbs_certificate_bytes
    behind = signed + der[der.index(signed) + len(signed) : -len(old)]  # and its algorithm
    for order in _ORDERS:
        if r < order and s < order:
            new = _tlv(0x03, b"\0" + encode_dss_signature(r, order - s))
            yield _tlv(0x30, behind + new)


def _tlv(tag: int, content: bytes) -> bytes:
    """DER."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _links(certificates: tuple[x509.Certificate, ...], ders: tuple[bytes, ...]) -> Iterator[Link]:
    for certificate, der in zip(certificates, ders, strict=True):
        yield _link(certificate, der)


def _link(certificate: x509.Certificate, der: bytes) -> Link:
    issuer = hashlib.sha256(certificate.issuer.public_bytes()).digest()
    return Link(issuer, certificate.serial_number, hashlib.sha256(der).digest())


def _check_text(what: str, text: str) -> None:
    if any(unicodedata.category(char) == "Cc" for char in text):
        raise ValueError(f"control characters in its {what}")


def printable(text: str) -> str:
    """Fit for one line of a terminal or a log: nothing moves the cursor or turns the direction."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)


def shown(text: str) -> str:
    """A peer's text, fit for one log line: printable, not too long."""
    clean = printable(text)
    return clean if len(clean) <= _SHOWN else clean[: _SHOWN - 3] + "..."
