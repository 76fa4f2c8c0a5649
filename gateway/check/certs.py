"""Part of `check`: the server's certificate, its chain and key, and the CA certificates."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway import credentials
from gateway.check.files import read
from gateway.check.report import Report, date, some
from gateway.credentials import signed_by
from gateway.identity import shown

Certificates = tuple[x509.Certificate, ...]
Extension = TypeVar("Extension", bound=x509.ExtensionType)

SOON: Final = timedelta(days=30)
_USUAL_CURVES: Final = ("secp256r1", "secp384r1", "secp521r1")
_BEGIN, _END = re.compile(rb"-----BEGIN [A-Z0-9 ]+-----"), re.compile(rb"-----END [A-Z0-9 ]+-----")
_BROKEN_HASHES: Final = ("md5", "sha1")


def load(report: Report, path: Path, flag: str) -> Certificates:
    """All certificates of a PEM file; none if it cannot be used, which is a verdict."""
    with report.part(path):
        data = read(path)
        check_whole(report, path, data)
        try:
            return tuple(x509.load_pem_x509_certificates(data))
        except ValueError as error:
            report.bad(path, f"{flag}: no certificate in PEM format, or a broken one: {error}")
    return ()


def check_whole(report: Report, path: Path, data: bytes) -> None:
    """What is cut off was being written, or copied."""
    if len(_BEGIN.findall(data)) != len(_END.findall(data)):
        report.bad(path, "cut off: something begins in it and does not end, or the other way round")


def name_of(certificate: x509.Certificate) -> str:
    """Fit for a line."""
    return shown(certificate.subject.rfc4514_string() or credentials.NAMELESS)


def spki_of(certificate: x509.Certificate) -> bytes:
    """Raises ValueError and UnsupportedAlgorithm."""
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def is_root(certificate: x509.Certificate) -> bool:
    """Whether it has signed itself. With a hash that is not looked at any more, it says so."""
    if certificate.subject != certificate.issuer:
        return False
    algorithm = certificate.signature_hash_algorithm
    broken = algorithm is not None and algorithm.name in _BROKEN_HASHES
    return broken or signed_by(certificate, certificate)


def extension(certificate: x509.Certificate, kind: type[Extension]) -> Extension | None:
    """Raises ValueError for extensions that cannot be parsed."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def dns_and_addresses(certificate: x509.Certificate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a client may know its owner by. Raises ValueError."""
    san = extension(certificate, x509.SubjectAlternativeName)
    if san is None:
        return (), ()
    addresses = tuple(str(one) for one in san.get_values_for_type(x509.IPAddress))
    return tuple(san.get_values_for_type(x509.DNSName)), addresses


# ---------------------------------------------------------------- the server's


def check_server(report: Report, path: Path, chain: Certificates, cas: Certificates | None) -> None:
    """The chain that clients are shown. `cas`: those of --client-ca, if there is one."""
    if not chain:
        return  # said when it was loaded
    leaf = chain[0]
    with report.part(path):
        _check_purpose(report, path, leaf)
    with report.part(path):
        _check_names(report, path, leaf)
    with report.part(path):
        _check_order(report, path, chain)
    for certificate in chain:
        with report.part(path):
            check_dates(report, path, certificate)
        with report.part(path):
            check_strength(report, path, certificate)
    if cas is not None:
        with report.part(path):
            _check_anchor(report, path, chain, cas)


def _check_purpose(report: Report, path: Path, leaf: x509.Certificate) -> None:
    faults = len(report.verdicts)
    usage = extension(leaf, x509.KeyUsage)
    if usage is not None and not usage.digital_signature:
        report.bad(path, "keyUsage lacks digitalSignature, which every handshake needs: reissue it")
    elif usage is not None and not usage.key_encipherment:
        report.warn(path, "keyUsage lacks keyEncipherment: some QEMUs refuse it")
    purposes = extension(leaf, x509.ExtendedKeyUsage)
    fit = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE)
    if purposes is not None and not any(one in purposes for one in fit):
        report.bad(
            path, "not for TLS servers (extended key usage without serverAuth): clients refuse it"
        )
    basic = extension(leaf, x509.BasicConstraints)
    if basic is not None and basic.ca:
        report.warn(path, "a CA itself: QEMU refuses it, and the CA's key is at stake here")
    if len(report.verdicts) == faults:
        report.ok(path, f"{name_of(leaf)}: may be a TLS server's (key usages)")


def _check_names(report: Report, path: Path, leaf: x509.Certificate) -> None:
    dns, addresses = dns_and_addresses(leaf)
    if not (dns or addresses):
        report.bad(
            path,
            "no names (DNS or IP in the subject alternative names): clients that look refuse it, "
            "the CN counts for nothing",
        )
        return
    report.ok(path, f"for {some(tuple(map(shown, (*dns, *addresses))))}")
    for name in dns:
        if is_address(name):
            report.warn(path, f"{name} is an address and stands there as a DNS name: not found")


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_order(report: Report, path: Path, chain: Certificates) -> None:
    if wrong := credentials.disorder(chain):
        report.bad(path, wrong)
        return
    for issuer in chain[1:]:
        _check_is_ca(report, path, issuer)
    last = chain[-1]
    if len(chain) > 1:
        report.ok(path, f"chain of {len(chain)}, each signed by the next")
    if signed_by(last, last):
        if len(chain) > 1:
            report.warn(
                path, f"the root ({name_of(last)}) is superfluous: clients trust their own copy"
            )
        else:
            report.warn(path, "self-signed: each client has to be given this very certificate")


def _check_anchor(report: Report, path: Path, chain: Certificates, cas: Certificates) -> None:
    """Mostly one CA signs both sides; not to be of it is no fault, but often one of copying."""
    last = chain[-1]
    namesakes = [ca for ca in cas if ca.subject == last.issuer]
    found = next((ca for ca in namesakes if signed_by(last, ca)), None)
    if found is not None:
        report.ok(path, f"its CA is {name_of(found)}, which --client-ca has too")
    elif namesakes:
        report.bad(
            path,
            f"its issuer {shown(last.issuer.rfc4514_string())} is in --client-ca by name, with "
            "another key: certificates of before and after a renewal of the CA are mixed up",
        )
    else:
        report.warn(
            path,
            f"its issuer {shown(last.issuer.rfc4514_string())} is not in --client-ca: clients need "
            "that CA's certificate, not the one by which they are known",
        )


# ---------------------------------------------------------------- the CAs


def check_cas(report: Report, path: Path, cas: Certificates) -> None:
    """The file that says whose clients may enter."""
    expired = 0
    with report.part(path):
        if b" KEY-----" in read(path):
            report.bad(path, "there is a key in it: only certificates of CAs go there, and CRLs")
    for number, ca in enumerate(cas):
        with report.part(path):
            if ca in cas[:number]:
                report.warn(path, f"{name_of(ca)} is in it twice")
                continue
            _check_is_ca(report, path, ca)
            expired += ca.not_valid_after_utc < report.now
            check_dates(report, path, ca, fatal=False)
        with report.part(path):
            if not is_root(ca):
                _check_parent(report, path, ca, cas)
            check_strength(report, path, ca)
    if cas and expired == len(set(cas)):
        report.bad(path, "no CA in it is valid any more: nobody can enter")
    with report.part(path):
        for ca in dict.fromkeys(cas):
            rivals = {other for other in cas if other.subject == ca.subject} - {ca}
            if any(spki_of(other) != spki_of(ca) for other in rivals):
                report.warn(path, f"several CAs are called {name_of(ca)}, with different keys")
                return


def _check_parent(report: Report, path: Path, ca: x509.Certificate, cas: Certificates) -> None:
    parent = next((other for other in cas if other != ca and signed_by(ca, other)), None)
    issuer = shown(ca.issuer.rfc4514_string())
    if parent is None and ca.issuer == ca.subject:
        report.bad(path, f"{name_of(ca)}: it says that it signed itself, and did not")
    elif parent is None:
        report.bad(
            path,
            f"{name_of(ca)} is an intermediate CA, and its issuer {issuer} is not in the file: "
            "no client of it can be verified; add the certificates up to the root",
        )
    else:
        report.ok(path, f"{name_of(ca)}: an intermediate CA of {name_of(parent)}")


def _check_is_ca(report: Report, path: Path, ca: x509.Certificate) -> None:
    basic, usage = extension(ca, x509.BasicConstraints), extension(ca, x509.KeyUsage)
    if basic is None or not basic.ca:
        report.bad(path, f"{name_of(ca)} is no CA (basicConstraints): nobody's issuer; remove it")
    elif usage is not None and not usage.key_cert_sign:
        report.bad(path, f"{name_of(ca)} may not sign certificates (keyUsage): reissue it")


# ---------------------------------------------------------------- any


def check_dates(
    report: Report, path: Path, certificate: x509.Certificate, *, fatal: bool = True
) -> None:
    """`fatal` False: there are others, so that an expired one is only a warning."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    name = name_of(certificate)
    complain = report.bad if fatal else report.warn
    left = end - report.now
    if left < timedelta(0):
        complain(path, f"{name}: expired on {date(end)}, {(-left).days} days ago: renew it")
    elif begin > report.now:
        complain(path, f"{name}: not valid before {begin:%Y-%m-%d %H:%M} UTC: is the clock right?")
    elif left < SOON:
        report.warn(path, f"{name}: ends on {date(end)}, in {left.days} days: renew it")
    else:
        report.ok(path, f"{name}: valid until {date(end)}, {left.days} days")


def check_strength(report: Report, path: Path, certificate: x509.Certificate) -> None:
    """Size of the key, and the hash of the signature, which counts for nothing in a root."""
    name, key = name_of(certificate), certificate.public_key()
    if weak := credentials.weakness(certificate):
        report.bad(path, f"{name}: weak key, {weak}: issue a new one")
    elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name not in _USUAL_CURVES:
        report.warn(path, f"{name}: few clients know the curve {key.curve.name}: take P-256")
    if is_root(certificate):
        return
    try:
        algorithm = certificate.signature_hash_algorithm  # None: the key's own, as Ed25519
    except UnsupportedAlgorithm as error:
        report.bad(path, f"{name}: unknown signature: {error}")
        return
    if algorithm is not None and algorithm.name in _BROKEN_HASHES:
        report.bad(path, f"{name}: signed with {algorithm.name.upper()}, which can be forged")


# ---------------------------------------------------------------- names that are listened on


def check_listened(
    report: Report, path: Path, leaf: x509.Certificate, hosts: Sequence[str], machine: str | None
) -> None:
    """Whether the certificate is for what clients are likely to dial: `hosts` of --listen, and for
    addresses that stand for all the `machine`'s name. Warnings: there may be other names in DNS.
    """
    dns, addresses = dns_and_addresses(leaf)
    if not (dns or addresses):
        return
    missing = tuple(host for host in hosts if not covers(dns, addresses, host))
    for host in missing:
        report.warn(path, f"not for {shown(host)} (--listen): who connects by that is put off")
    if machine is not None and not covers(dns, addresses, machine):
        report.warn(
            path,
            f"not for {shown(machine)}, this machine's name: fine if clients use another one",
        )
    elif not missing and (hosts or machine):
        wanted = (*hosts, machine) if machine else tuple(hosts)
        report.ok(path, f"covers what is listened on: {some(tuple(map(shown, wanted)))}")


def covers(dns: Sequence[str], addresses: Sequence[str], host: str) -> bool:
    """RFC 9525: a wildcard is one whole label, the leftmost one."""
    host = host.partition("%")[0].lower().removesuffix(".")
    if is_address(host):
        return str(ipaddress.ip_address(host)) in addresses
    return any(one in {*_forms(host)} for one in (name.lower().removesuffix(".") for name in dns))


def _forms(host: str) -> Iterator[str]:
    yield host
    _, dot, parent = host.partition(".")
    if dot:
        yield f"*.{parent}"
