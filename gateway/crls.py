"""Revocation lists: which of them count, and what is revoked by them. Anything odd is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.identity import shown
from gateway.snapshot import File

_WRONG = (
    *(ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature),
    *(x509.DuplicateExtension, x509.InvalidVersion),
)


@dataclass(frozen=True, slots=True)
class CRL:
    """The complete list of what one CA has revoked."""

    issuer: bytes  # SHA-256 of the CA's name, in DER
    serials: frozenset[int] = field(repr=False)
    next_update: datetime | None
    pem: bytes = field(repr=False)


def choose(
    found: Iterable[tuple[File, bytes]], cas: Sequence[x509.Certificate], now: datetime
) -> tuple[CRL, ...]:
    """One for each CA: where a CA has several, the latest. None at all is fine too.

    Raises SettingsError for a list that is broken, partial, stale, not yet valid, or of none of
    the CAs, and for a CA without one: with it, none of that CA's clients could enter.
    """
    latest: dict[tuple[bytes, bytes], tuple[File, x509.CertificateRevocationList]] = {}
    for file, pem in found:
        try:
            crl = x509.load_pem_x509_crl(pem)
            signer = _signer(file, crl, cas)
            _check_complete(file, crl)
        except _WRONG as error:
            raise file.wrong(f"holds a CRL that cannot be used: {error}") from None
        before = latest.get(signer)
        if before is None or _age(before[1]) < _age(crl):
            latest[signer] = file, crl
        elif _age(before[1]) == _age(crl) and before[1] != crl:
            raise file.wrong(f"holds two CRLs of {_name(crl.issuer)} of the same time and number")
    if not latest:
        return ()
    for file, crl in latest.values():
        _check_dates(file, crl, now)
    some_file = next(iter(latest.values()))[0]
    for ca in cas:
        if _id(ca) not in latest:
            raise some_file.wrong(
                f"holds no CRL of {_name(ca.subject)}, a CA of --client-ca, and another one has "
                "one: none of its clients could enter; append its CRL"
            )
    return tuple(_summary(file, crl) for file, crl in latest.values())


def _signer(
    file: File, crl: x509.CertificateRevocationList, cas: Sequence[x509.Certificate]
) -> tuple[bytes, bytes]:
    """Name and key of the CA whose it is."""
    namesakes = [ca for ca in cas if ca.subject.public_bytes() == crl.issuer.public_bytes()]
    if not namesakes:
        raise file.wrong(
            f"holds a CRL of {_name(crl.issuer)}, which is none of the CAs of --client-ca"
        )
    for ca in namesakes:
        if crl.is_signature_valid(ca.public_key()):  # type: ignore[arg-type]
            _check_may_sign(file, ca)
            return _id(ca)
    raise file.wrong(
        f"holds a CRL that says it is of {_name(crl.issuer)}, and is not signed with that CA's key"
    )


def _check_may_sign(file: File, ca: x509.Certificate) -> None:
    try:
        usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.crl_sign:
        raise file.wrong(
            f"holds a CRL of {_name(ca.subject)}, whose certificate has no keyUsage cRLSign: "
            "OpenSSL takes none from it"
        )


def _check_complete(file: File, crl: x509.CertificateRevocationList) -> None:
    """About all certificates of its CA, and of no other."""
    for one in crl.extensions:
        match one.value:
            case x509.DeltaCRLIndicator():
                raise file.wrong("holds a delta CRL: give the complete list")
            case x509.IssuingDistributionPoint() as point:
                if (
                    point.only_contains_user_certs
                    or point.only_contains_ca_certs
                    or point.only_contains_attribute_certs
                    or point.only_some_reasons
                    or point.indirect_crl
                ):
                    raise file.wrong(
                        "holds a CRL about some certificates only: give the complete list"
                    )
            case _ if one.critical and isinstance(one.value, x509.UnrecognizedExtension):
                raise file.wrong(
                    f"holds a CRL with a critical extension that nobody here knows: "
                    f"{one.oid.dotted_string}"
                )


def _check_dates(file: File, crl: x509.CertificateRevocationList, now: datetime) -> None:
    begin, end, name = crl.last_update_utc, crl.next_update_utc, _name(crl.issuer)
    if begin > now:
        raise file.wrong(
            f"holds a CRL of {name} that is not valid before {begin:%Y-%m-%d %H:%M} UTC: "
            "is the clock right?"
        )
    if end is not None and end < now:
        raise file.wrong(
            f"holds a CRL of {name} that expired on {end:%Y-%m-%d %H:%M} UTC, so nobody could "
            "enter: issue a new one (nbd-gateway certs crl)"
        )


def _summary(file: File, crl: x509.CertificateRevocationList) -> CRL:
    serials = set()
    for entry in crl:
        for one in entry.extensions:
            if one.critical and not isinstance(one.value, x509.CRLReason | x509.InvalidityDate):
                raise file.wrong(
                    "holds a CRL with an entry about another CA's certificate, or with a "
                    f"critical extension that nobody here knows: {one.oid.dotted_string}"
                )
        serials.add(entry.serial_number)
    return CRL(
        hashlib.sha256(crl.issuer.public_bytes()).digest(),
        frozenset(serials),
        crl.next_update_utc,
        crl.public_bytes(Encoding.PEM),
    )


def _age(crl: x509.CertificateRevocationList) -> tuple[datetime, int]:
    """The later one is larger."""
    try:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        number = -1
    return crl.last_update_utc, number


def _id(ca: x509.Certificate) -> tuple[bytes, bytes]:
    """Name and key: the same for a CA's old certificate and its renewed one."""
    key = ca.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return ca.subject.public_bytes(), key


def _name(name: x509.Name) -> str:
    return shown(name.rfc4514_string() or "no name")


def revokes(crls: Iterable[CRL], issuer: bytes, serial: int) -> bool:
    """Whether a certificate is revoked. By name and number: namesakes of a CA share its list."""
    return any(one.issuer == issuer and serial in one.serials for one in crls)
