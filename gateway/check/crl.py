"""Part of `check`: revocation lists, one for each CA, each signed by it and fresh."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from gateway.check.certs import Certificates, name_of, spki_of
from gateway.check.files import read
from gateway.check.report import Report, date
from gateway.identity import shown

_SOON: Final = timedelta(days=7)
_PEM: Final = re.compile(
    rb"-----BEGIN X509 CRL-----(?:(?!-----).)*-----END X509 CRL-----", re.DOTALL
)

CRLs = tuple[x509.CertificateRevocationList, ...]


def load(report: Report, path: Path) -> CRLs:
    """All lists of a PEM file. What is none is a verdict."""
    found: list[x509.CertificateRevocationList] = []
    with report.part(path):
        blocks = _PEM.findall(data := read(path))
        if not blocks or data.count(b"-----BEGIN X509 CRL-----") != len(blocks):
            report.bad(path, "no CRL in PEM format, or one that is cut off")
        for number, block in enumerate(blocks, 1):
            try:
                found.append(x509.load_pem_x509_crl(block))
            except ValueError as error:
                report.bad(path, f"CRL {number} of {len(blocks)} is broken: {error}")
    return tuple(found)


def in_ca_file(report: Report, path: Path) -> CRLs:
    """The lists that stand among the CA certificates, where they count as well."""
    with report.part(path):
        if _PEM.search(read(path)):
            return load(report, path)
    return ()


def check_crls(
    report: Report,
    crls: Sequence[tuple[Path, x509.CertificateRevocationList]],
    cas: Certificates,
    chain: Certificates,
) -> None:
    """All lists together. `chain` is the server's own: a slip of the hand may revoke that."""
    latest: dict[bytes, tuple[Path, x509.CertificateRevocationList, str]] = {}
    for path, crl in crls:
        with report.part(path):
            if (ca := _signer(report, path, crl, cas)) is None:
                continue
            before = latest.get(spki_of(ca))
            if before is not None:
                report.warn(path, f"several CRLs of {name_of(ca)}: only the latest counts")
            if before is None or before[1].last_update_utc < crl.last_update_utc:
                latest[spki_of(ca)] = path, crl, name_of(ca)
    for path, crl, name in latest.values():
        with report.part(path):
            _check_dates(report, path, crl, name)
            for certificate in dict.fromkeys([*chain, *cas]):
                _check_revoked(report, path, crl, certificate)
    for ca in dict.fromkeys(cas):
        with report.part(crls[0][0]):
            if spki_of(ca) not in latest:
                report.bad(
                    crls[0][0],
                    f"no CRL of {name_of(ca)}, a CA of --client-ca: none of its clients could "
                    "enter; append its list",
                )


def _signer(
    report: Report, path: Path, crl: x509.CertificateRevocationList, cas: Certificates
) -> x509.Certificate | None:
    issuer = shown(crl.issuer.rfc4514_string())
    namesakes = [ca for ca in cas if ca.subject == crl.issuer]
    if not namesakes:
        report.bad(path, f"a CRL of {issuer}, which is none of the CAs of --client-ca")
        return None
    for ca in namesakes:
        if _is_signed(crl, ca):
            _check_may_sign(report, path, ca)
            return ca
    report.bad(
        path,
        f"says that it is of {issuer}, and is not signed with the key of that CA: "
        "of another one of the same name, or forged",
    )
    return None


def _is_signed(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    try:
        return crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _check_may_sign(report: Report, path: Path, ca: x509.Certificate) -> None:
    try:
        usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.crl_sign:
        report.bad(path, f"{name_of(ca)} may not sign CRLs (keyUsage without cRLSign)")


def _check_dates(
    report: Report, path: Path, crl: x509.CertificateRevocationList, name: str
) -> None:
    begin, end = crl.last_update_utc, crl.next_update_utc
    kind = _kind(report, path, crl)
    if begin > report.now:
        report.bad(
            path,
            f"{kind}: not valid before {begin:%Y-%m-%d %H:%M} UTC, and until then nobody can "
            "enter: is the clock right?",
        )
    elif end is None:
        report.warn(path, f"{kind} of {name}: has no nextUpdate, so an old one is never found out")
    elif end < report.now:
        report.bad(
            path,
            f"{kind} of {name}: ended on {date(end)}, and nobody can enter: issue a new one "
            "(nbd-gateway certs crl)",
        )
    elif (left := end - report.now) < min(_SOON, (end - begin) / 3):
        report.warn(
            path, f"{kind} of {name}: ends on {date(end)}, in {left.days} days: issue a new one"
        )
    else:
        report.ok(path, f"{kind} of {name}: until {date(end)}, {left.days} days")


def _kind(report: Report, path: Path, crl: x509.CertificateRevocationList) -> str:
    """What to call it. A list that is only about some certificates is not what is checked for."""
    number = "without a number"
    for extension in crl.extensions:
        match extension.value:
            case x509.CRLNumber(crl_number=value):
                number = f"{value}"
            case x509.DeltaCRLIndicator():
                report.bad(path, "a delta CRL: give the complete list")
            case x509.IssuingDistributionPoint() as scope if (
                scope.only_contains_user_certs
                or scope.only_contains_ca_certs
                or scope.only_contains_attribute_certs
                or scope.only_some_reasons
                or scope.indirect_crl
            ):
                report.bad(path, "a CRL about some certificates only: give the complete list")
    count = len(crl)
    return f"CRL {number}, {count} {'entry' if count == 1 else 'entries'},"


def _check_revoked(
    report: Report,
    path: Path,
    crl: x509.CertificateRevocationList,
    certificate: x509.Certificate,
) -> None:
    if certificate.issuer != crl.issuer:
        return
    entry = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
    if entry is not None:
        when = date(entry.revocation_date_utc)
        report.bad(
            path,
            f"{name_of(certificate)}, which is in use here, was revoked on {when}: replace it, "
            "clients that look refuse it",
        )
