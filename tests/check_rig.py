"""For the tests of `check`: certificates of any kind, a folder of them, and what is said of it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway import check
from gateway.settings import ListenTCP, Settings, TLSSettings

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
LOCAL = (ListenTCP("127.0.0.1", 10809),)

_BITS = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
LEAF_USAGE = ("digital_signature", "key_encipherment")
CA_USAGE = ("key_cert_sign", "crl_sign")


@dataclass(frozen=True)
class Pair:
    """A certificate of whatever kind, and its key."""

    certificate: x509.Certificate
    key: Any = field(repr=False)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self, password: str | None = None, *, old: bool = False) -> bytes:
        kind = serialization.PrivateFormat.TraditionalOpenSSL
        seal: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password is not None:
            seal = serialization.BestAvailableEncryption(password.encode())
        return self.key.private_bytes(  # type: ignore[no-any-return]
            serialization.Encoding.PEM, kind if old else serialization.PrivateFormat.PKCS8, seal
        )


def make(
    name: str,
    issuer: Pair | None = None,
    *,
    key: Any = None,
    ca: bool | None = None,
    usage: Sequence[str] | None = LEAF_USAGE,
    purposes: Sequence[x509.ObjectIdentifier] | None = (ExtendedKeyUsageOID.SERVER_AUTH,),
    san: Sequence[x509.GeneralName] = (x509.DNSName("localhost"),),
    begin: timedelta = -DAY,
    end: timedelta = 365 * DAY,
    extra: Iterable[x509.ExtensionType] = (),
) -> Pair:
    """Sign one. Without an issuer it signs itself; `begin` and `end` are counted from now."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begin)
        .not_valid_after(NOW + end)
    )
    extensions: list[x509.ExtensionType] = list(extra)
    if ca is not None:
        extensions.append(x509.BasicConstraints(ca=ca, path_length=None))
    if usage is not None:
        extensions.append(x509.KeyUsage(**{bit: bit in usage for bit in _BITS}))
    if purposes is not None:
        extensions.append(x509.ExtendedKeyUsage(purposes))
    if san:
        extensions.append(x509.SubjectAlternativeName(san))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    signer = key if issuer is None else issuer.key
    return Pair(builder.sign(signer, hashes.SHA256()), key)


def make_ca(name: str, issuer: Pair | None = None, **more: Any) -> Pair:
    more = {"ca": True, "usage": CA_USAGE, "purposes": None, "san": (), **more}
    return make(name, issuer, **more)


def make_crl(
    ca: Pair,
    revoked: Iterable[x509.Certificate] = (),
    *,
    begin: timedelta = -DAY,
    end: timedelta = 30 * DAY,
    extra: Iterable[x509.ExtensionType] = (x509.CRLNumber(7),),
    key: Any = None,
) -> bytes:
    """A list of this CA, or by its name and another `key`."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.certificate.subject)
        .last_update(NOW + begin)
        .next_update(NOW + end)
    )
    for extension in extra:
        builder = builder.add_extension(extension, critical=False)
    for one in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(one.serial_number)
        builder = builder.add_revoked_certificate(entry.revocation_date(NOW - DAY).build())
    signed = builder.sign(key or ca.key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


class Folder:
    """Files of a gateway, each good until a test writes another one."""

    def __init__(self, path: Path) -> None:
        path.mkdir(mode=0o700)
        self.path = path
        self.ca = make_ca("ca")
        self.server = make("server", self.ca, san=local_names())
        self.cert, self.key, self.client_ca = path / "cert", path / "key", path / "ca"
        self.crl, self.password, self.socket = path / "crl", path / "password", path / "up"
        self.write(self.cert, self.server.pem)
        self.write(self.key, self.server.key_pem())
        self.write(self.client_ca, self.ca.pem)

    def write(self, path: Path, *content: bytes) -> Path:
        path.write_bytes(b"".join(content))
        path.chmod(0o600)
        return path

    def use(self, *chain: Pair) -> None:
        """Another certificate, with what belongs behind it."""
        self.write(self.cert, *(one.pem for one in chain))
        self.write(self.key, chain[0].key_pem())

    def settings(self, **more: Any) -> Settings:
        """With the CRL and the password's file if they are there."""
        there = {
            "crl": self.crl if self.crl.exists() else None,
            "key_password": self.password if self.password.exists() else None,
        }
        tls = TLSSettings(self.cert, self.key, self.client_ca, **there)  # type: ignore[arg-type]
        if "tls" in more and isinstance(more["tls"], dict):
            more["tls"] = replace(tls, **more["tls"])
        return Settings(**{"socket": str(self.socket), "tls": tls, "listen": LOCAL, **more})

    def check(self, **more: Any) -> Said:
        return said(self.settings(**more))


def local_names() -> tuple[x509.GeneralName, ...]:
    return (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


@dataclass(frozen=True)
class Said:
    """What `check` has said."""

    code: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(["", *self.lines])

    def of(self, level: str) -> list[str]:
        return [line for line in self.lines if line.startswith(f"{level:<5} ")]

    def has(self, level: str, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.of(level))


def said(settings: Settings) -> Said:
    lines: list[str] = []
    code = check.run(settings, lines.append)
    assert lines[-1].count(", ") == 2, lines  # the sum is always there
    found = Said(code, tuple(lines))
    assert code == (1 if found.of("bad") else 0), str(found)
    assert len(found.lines) == 1 + sum(len(found.of(one)) for one in ("ok", "warn", "bad"))
    return found
