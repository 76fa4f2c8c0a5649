"""Client certificates, most of them wrong, each in one way, and a CA with all that it needs.

Made with the bare builder and, where that refuses, by changing what is signed byte by byte:
`gateway.pki` would not issue any of them.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
VALID = (NOW - DAY, NOW + 30 * DAY)
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ACCEPTED = ""

_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
# AlgorithmIdentifier in DER.
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_ECDSA_SHA1 = bytes.fromhex("300906072a8648ce3d0401")
_ECDSA_SHA512 = bytes.fromhex("300a06082a8648ce3d040304")
_SAN = bytes.fromhex("0603551d11")  # the object identifier of a subject alternative name
_SAN_OID = x509.ObjectIdentifier("2.5.29.17")


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def usage(*wanted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{bit: bit in wanted for bit in _USAGES})


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def key_pem(key: Key) -> bytes:
    pkcs8, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, no_password)


# ---------------------------------------------------------------- who signs


@dataclass(frozen=True)
class Signer:
    """Who signs: a CA, or somebody who should not."""

    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def root(cls, name: str) -> Signer:
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(common_name(name), key, certify(common_name(name), key, None, ca=True))

    def below(self, name: str, **how: object) -> Signer:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = common_name(name)
        wanted = {"ca": True, **how}
        return Signer(subject, key, certify(subject, key, self, **wanted))  # type: ignore[arg-type]

    def crl(self, *revoked: x509.Certificate) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(NOW - DAY)
            .next_update(NOW + 30 * DAY)
            .add_extension(x509.CRLNumber(1), critical=False)
        )
        for one in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(one.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(NOW - DAY).build())
        crl = builder.sign(self.key, hashes.SHA256())
        return crl.public_bytes(serialization.Encoding.PEM)


def certify(
    subject: x509.Name,
    key: Key,
    by: Signer | None,
    *,
    ca: bool = False,
    path_length: int | None = None,
    valid: tuple[datetime, datetime] = VALID,
    serial: int | None = None,
    key_usage: x509.KeyUsage | None = None,
    eku: Sequence[x509.ObjectIdentifier] = (),
    san: Sequence[x509.GeneralName] = (),
    more: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> x509.Certificate:
    """A certificate; `by` None: self-signed."""
    signs = key_usage or usage("key_cert_sign", "crl_sign")
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.name)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
    )
    if ca or key_usage:
        builder = builder.add_extension(signs, critical=True)
    if eku:
        builder = builder.add_extension(x509.ExtendedKeyUsage(eku), critical=False)
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    for extension, critical in more:
        builder = builder.add_extension(extension, critical)
    if by is None:
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return builder.sign(key, hashes.SHA256())
    return builder.sign(by.key, hashes.SHA256())


# ---------------------------------------------------------------- what no builder makes


def tlv(tag: int, content: bytes) -> bytes:
    """DER."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def body(encoded: bytes) -> bytes:
    """What is behind tag and length."""
    return encoded[2:] if encoded[1] < 0x80 else encoded[2 + (encoded[1] & 0x7F) :]


def forge(
    certificate: x509.Certificate,
    by: Signer,
    old: bytes,
    new: bytes,
    *,
    inside: bytes = _ECDSA_SHA256,
    outside: bytes = _ECDSA_SHA256,
    digest: hashes.HashAlgorithm | None = None,
) -> bytes:
    """The certificate with `old` replaced in what is signed, signed again; in DER.

    Lengths around `old` are the caller's business, but for that of the whole.
    """
    content = body(certificate.tbs_certificate_bytes)
    if old:
        assert content.count(old) == 1, f"{old!r} is there {content.count(old)} times"
        content = content.replace(old, new)
    signed = tlv(0x30, content.replace(_ECDSA_SHA256, inside, 1))
    signature = by.key.sign(signed, ec.ECDSA(digest or hashes.SHA256()))
    return tlv(0x30, signed + outside + tlv(0x03, b"\0" + signature))


def twin_of(certificate: x509.Certificate) -> bytes:
    """The same certificate with the signature (r, -s) in place of (r, s): valid all the same.

    The signer's key has to be of P-256.
    """
    r, s = decode_dss_signature(certificate.signature)
    other = encode_dss_signature(r, P256_ORDER - s)
    signed = certificate.tbs_certificate_bytes
    return tlv(0x30, signed + _ECDSA_SHA256 + tlv(0x03, b"\0" + other))


def to_pem(encoded: bytes) -> bytes:
    """Without a look at what it is."""
    text = base64.encodebytes(encoded)
    return b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"


# ---------------------------------------------------------------- the cases


class Case(NamedTuple):
    """A client's certificate, and what becomes of it."""

    what: str
    reason: str  # of the refusal; ACCEPTED
    chain: bytes  # PEM, leaf first
    key: bytes  # PEM
    words: str = "."  # a regular expression for what the log says besides


@dataclass
class Authority:
    """Two trusted CAs below a root, what they revoked, and who else signs."""

    root: Signer = field(default_factory=lambda: Signer.root("root"))
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self.issuing = self.root.below("issuing CA")
        self.withdrawn = self.root.below("withdrawn CA")
        self.short = self.root.below("CA of leaves", path_length=0)
        self.narrow = self.root.below(
            "CA of example.org",
            more=[(x509.NameConstraints([x509.DNSName("example.org")], None), True)],
        )
        self.stale = self.root.below("expired CA", valid=(NOW - 9 * DAY, NOW - DAY))
        self.lost = self.leaf("lost laptop")

    def leaf(
        self, name: str | x509.Name = "vm1", by: Signer | None = None, **how: object
    ) -> x509.Certificate:
        subject = common_name(name) if isinstance(name, str) else name
        key = how.pop("key", self.key)
        wanted: dict[str, object] = {"key_usage": usage("digital_signature"), "eku": CLIENT, **how}
        return certify(subject, key, by or self.root, **wanted)  # type: ignore[arg-type]

    @property
    def trusted(self) -> tuple[Signer, ...]:
        """Those whose certificate is in the gateway's CA file."""
        return (self.root, self.issuing, self.withdrawn, self.short, self.narrow)

    def write(self, folder: Path) -> None:
        """What `--tls-dir` reads."""
        folder.mkdir(exist_ok=True)
        server = certify(common_name("localhost"), self.key, self.root, san=SERVER)
        (folder / "server-cert.pem").write_bytes(pem(server))
        (folder / "server-key.pem").write_bytes(key_pem(self.key))
        (folder / "server-key.pem").chmod(0o600)
        cas = b"".join(pem(one.certificate) for one in self.trusted)
        (folder / "ca-cert.pem").write_bytes(cas)
        crls = [self.root.crl(self.withdrawn.certificate, self.lost)]
        crls += [one.crl() for one in self.trusted[1:]]
        (folder / "ca-crl.pem").write_bytes(b"".join(crls))

    def case(
        self,
        what: str,
        reason: str,
        leaf: x509.Certificate | bytes,
        *above: Signer,
        key: Key | None = None,
        words: str = ".",
    ) -> Case:
        first = to_pem(leaf) if isinstance(leaf, bytes) else pem(leaf)
        chain = first + b"".join(pem(one.certificate) for one in above)
        return Case(what, reason, chain, key_pem(key or self.key), words)


CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)
SERVER = (x509.DNSName("localhost"),)


@functools.cache
def authority() -> Authority:
    return Authority()


@functools.cache
def cases() -> dict[str, Case]:
    """All of them, by what they are."""
    every = authority()
    found = [*_right(every), *_of_dates_and_uses(every), *_of_issuers(every)]
    found += [*_of_names(every), *_of_encodings(every)]
    assert len({one.what for one in found}) == len(found)
    return {one.what: one for one in found}


def _right(a: Authority) -> Iterator[Case]:
    """Unusual, and nothing wrong with it."""
    yield a.case("plain", ACCEPTED, a.leaf())
    yield a.case("of an intermediate CA", ACCEPTED, a.leaf(by=a.issuing), a.issuing)
    yield a.case("without extended key usage", ACCEPTED, a.leaf(eku=()))
    yield a.case("without key usage", ACCEPTED, a.leaf(key_usage=None))
    two = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in ("vm1", "vm2")])
    yield a.case("two CNs", ACCEPTED, a.leaf(two))
    no_cn = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Disks")])
    yield a.case("no CN", ACCEPTED, a.leaf(no_cn))
    yield a.case("no names at all", ACCEPTED, a.leaf(x509.Name([])))
    yield a.case("serial of 20 octets", ACCEPTED, a.leaf(serial=(1 << 159) - 1))
    yield a.case("wildcard name", ACCEPTED, a.leaf(san=[x509.DNSName("*.example.com")]))
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.9950.1"), b"\x05\x00")
    yield a.case("unknown extension", ACCEPTED, a.leaf(more=[(unknown, False)]))
    inside = a.leaf(by=a.narrow, san=[x509.DNSName("vm1.example.org")])
    yield a.case("name within its CA's", ACCEPTED, inside, a.narrow)
    yield a.case("signature turned round", ACCEPTED, twin_of(a.leaf()))
    edwards = ed25519.Ed25519PrivateKey.generate()
    yield a.case("Ed25519", ACCEPTED, a.leaf(key=edwards), key=edwards)
    many = [x509.DNSName(f"vm{number}.example.com") for number in range(255)]
    yield a.case("256 names", ACCEPTED, a.leaf(san=many))


def _of_dates_and_uses(a: Authority) -> Iterator[Case]:
    yield a.case("expired", "expired", a.leaf(valid=(NOW - 9 * DAY, NOW - DAY)))
    yield a.case("not yet valid", "not_yet_valid", a.leaf(valid=(NOW + DAY, NOW + 9 * DAY)))
    yield a.case("for servers", "wrong_eku", a.leaf(eku=[ExtendedKeyUsageOID.SERVER_AUTH]))
    mail = [ExtendedKeyUsageOID.EMAIL_PROTECTION]
    yield a.case("for emails", "wrong_eku", a.leaf(eku=mail))
    anything = [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]
    yield a.case("for anything", "wrong_eku", a.leaf(eku=anything))
    enciphers = usage("key_encipherment")
    yield a.case("key that may not sign", "wrong_eku", a.leaf(key_usage=enciphers))
    yield a.case("revoked", "revoked", a.lost)
    weak = rsa.generate_private_key(65537, 1024)
    yield a.case("RSA of 1024 bits", "weak_key", a.leaf(key=weak), key=weak)
    sha1 = forge(
        a.leaf(), a.root, b"", b"", inside=_ECDSA_SHA1, outside=_ECDSA_SHA1, digest=hashes.SHA1()
    )
    yield a.case("signed over SHA-1", "weak_key", sha1)
    private = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.9950.1"), b"\x05\x00")
    yield a.case("unknown critical extension", "bad_certificate", a.leaf(more=[(private, True)]))


def _of_issuers(a: Authority) -> Iterator[Case]:
    other, namesake = Signer.root("another CA"), Signer.root("root")
    yield a.case("of another CA", "unknown_ca", a.leaf(by=other))
    yield a.case("of another CA, with it", "unknown_ca", a.leaf(by=other), other)
    yield a.case("of a CA of the same name", "bad_certificate", a.leaf(by=namesake))
    alone = certify(common_name("vm1"), a.key, None)
    yield a.case("self-signed", "unknown_ca", alone)
    leaf = Signer(common_name("vm0"), a.key, a.leaf("vm0"))
    yield a.case("of a client", "bad_certificate", a.leaf(by=leaf), leaf)
    no_ca = a.root.below("no CA", ca=False, key_usage=usage("key_cert_sign"))
    yield a.case("of an issuer with CA:FALSE", "bad_certificate", a.leaf(by=no_ca), no_ca)
    no_sign = a.root.below("no signer", key_usage=usage("crl_sign"))
    yield a.case("of a CA that may not sign", "bad_certificate", a.leaf(by=no_sign), no_sign)
    below = a.short.below("one too many")
    yield a.case("too many CAs", "bad_certificate", a.leaf(by=below), below, a.short)
    unsent = a.root.below("unsent CA")
    yield a.case("intermediate CA missing", "unknown_ca", a.leaf(by=unsent))
    yield a.case("intermediate CA without a CRL", "no_crl", a.leaf(by=unsent), unsent)
    yield a.case("intermediate CA revoked", "revoked", a.leaf(by=a.withdrawn), a.withdrawn)
    outside = a.leaf(by=a.narrow, san=[x509.DNSName("vm1.example.net")])
    yield a.case("name not of its CA's", "bad_certificate", outside, a.narrow)
    deep = [a.root]
    for number in range(102):
        name = common_name(f"CA {number}")
        deep.append(Signer(name, a.key, certify(name, a.key, deep[-1], ca=True)))
    yield a.case("chain of 103 CAs", "bad_certificate", a.leaf(by=deep[-1]), *deep[:0:-1])


def _of_names(a: Authority) -> Iterator[Case]:
    bad = functools.partial(a.case, reason="bad_certificate")
    controls = {"NUL": "\0", "newline": "\n", "escape": "\x1b", "DEL": "\x7f", "NEL": "\x85"}
    for name, char in controls.items():
        leaf = a.leaf(f"vm1{char}evil")
        yield bad(f"{name} in CN", leaf=leaf, words="control characters in its CN")
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Disks\0")
    cn = x509.NameAttribute(NameOID.COMMON_NAME, "vm1")
    leaf = a.leaf(x509.Name([organization, cn]))
    yield bad("NUL in another attribute", leaf=leaf, words="control characters in its O")
    for kind, label, text in (
        (x509.DNSName, "DNS", "vm1.example.com\0.example.net"),
        (x509.UniformResourceIdentifier, "URI", "spiffe://example.org/vm1\n/x"),
        (x509.RFC822Name, "email", "vm1\0@example.com"),
    ):
        leaf = a.leaf(san=[kind(text)])
        yield bad(f"control in {label}", leaf=leaf, words=f"control characters in its {label}")
    many = [x509.DNSName(f"vm{number}.example.com") for number in range(256)]
    yield bad("257 names", leaf=a.leaf(san=many), words="more than 256 names")
    many = [x509.DNSName(f"vm{number:05}.example.com") for number in range(10_000)]
    yield bad("10000 names", leaf=a.leaf(san=many))


def _of_encodings(a: Authority) -> Iterator[Case]:
    bad = functools.partial(a.case, reason="bad_certificate")
    yield bad("signature of another key", leaf=forge(a.leaf(), Signer.root("root"), b"", b""))
    signed = a.leaf().tbs_certificate_bytes
    garbage = tlv(0x30, signed + _ECDSA_SHA256 + tlv(0x03, b"\0garbage"))
    yield bad("signature that is none", leaf=garbage)
    mixed = forge(a.leaf(), a.root, b"", b"", outside=_ECDSA_SHA512, digest=hashes.SHA512())
    yield bad("two algorithms of signature", leaf=mixed)
    # A subject alternative name of one DNS name: SEQUENCE { [2] "x" }.
    one, was = a.leaf(san=[x509.DNSName("x")]), _SAN + b"\x04\x05\x30\x03\x82\x01x"
    # [3], an X.400 address.
    yield bad("SAN of a kind of its own", leaf=forge(one, a.root, was, was[:-3] + b"\xa3\x01x"))
    yield bad("SAN not in ASCII", leaf=forge(one, a.root, was, was[:-1] + b"\xff"))
    empty = x509.UnrecognizedExtension(_SAN_OID, b"\x30\x00")
    yield a.case("empty SAN", ACCEPTED, a.leaf(more=[(empty, False)]))
    number = b"\x02\x04\x7a\x7b\x7c\x7d"
    negative = forge(a.leaf(serial=0x7A7B7C7D), a.root, number, b"\x02\x04\xfa\x7b\x7c\x7d")
    yield bad("negative serial", leaf=negative, words="serial number is not positive")


def unreadable() -> Iterator[tuple[str, bytes]]:
    """In DER, and such that a client with OpenSSL does not even load them."""
    a = authority()
    one, was = a.leaf(san=[x509.DNSName("x")]), _SAN + b"\x04\x05\x30\x03\x82\x01x"
    yield "SAN that is no list", forge(one, a.root, was, was[:-5] + b"\x04\x03\x82\x01x")
    # One program reads the first, another the last.
    second = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), b"\x30\x03\x82\x01y")
    twice = a.leaf(san=[x509.DNSName("x")], more=[(second, False)])
    yield "two SANs", forge(twice, a.root, b"\x06\x03\x55\x1d\x63", _SAN)
    yield "CN not in UTF-8", forge(a.leaf("vmX"), a.root, b"\x0c\x03vmX", b"\x0c\x03vm\xff")
    yield "SAN of a kind of its own", forge(one, a.root, was, was[:-3] + b"\xa3\x01x")
    yield "nothing", b""
    yield "text", b"no certificate"
    yield "behind its end", der(a.leaf()) + b"\0"
