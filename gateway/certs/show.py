"""What stands in files of certificates, for people: `certs show` and `certs expiring`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.access import Rule
from gateway.certs.read import Block, blocks_in, read, signed_by
from gateway.certs.store import is_left_over
from gateway.errors import SettingsError
from gateway.identity import Identity, printable, shown
from gateway.pki_keys import PkiError, name_of

_USAGES: Final = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth (a TLS server)",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth (a TLS client)",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "anyExtendedKeyUsage",
}
# As GnuTLS writes them, and so QEMU.
_QEMU_NAMES: Final = {
    NameOID.COMMON_NAME: "CN",
    NameOID.COUNTRY_NAME: "C",
    NameOID.DN_QUALIFIER: "dnQualifier",
    NameOID.DOMAIN_COMPONENT: "DC",
    NameOID.EMAIL_ADDRESS: "EMAIL",
    NameOID.GIVEN_NAME: "givenName",
    NameOID.LOCALITY_NAME: "L",
    NameOID.ORGANIZATIONAL_UNIT_NAME: "OU",
    NameOID.ORGANIZATION_NAME: "O",
    NameOID.SERIAL_NUMBER: "serialNumber",
    NameOID.STATE_OR_PROVINCE_NAME: "ST",
    NameOID.STREET_ADDRESS: "street",
    NameOID.SURNAME: "surName",
    NameOID.TITLE: "title",
    NameOID.USER_ID: "UID",
}
# What can be wrong inside a certificate that was taken for one at first.
_DAMAGED: Final = (
    *(ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
_NEVER: Final = datetime.max.replace(tzinfo=UTC)
_MOMENT: Final = "%Y-%m-%d %H:%M UTC"


# ---------------------------------------------------------------- show


def show(path: Path, now: datetime) -> str:
    """All that is in a PEM file, in its order. Nothing secret: of a key, only that it is there.

    Raises PkiError.
    """
    blocks = blocks_in(read(path), path)
    parts = []
    for number, block in enumerate(blocks, 1):
        where = f" {number} of {len(blocks)}" if len(blocks) > 1 else ""
        title = {"X509 CRL": "CRL"}.get(block.label, block.label.lower())
        try:
            lines = _lines(block, now)
        except _DAMAGED as error:
            lines = [f"cannot be read: {shown(str(error))}"]
        parts.append(
            "\n".join(
                printable(line)
                for line in [f"{path}: {title}{where}", *(f"  {one}" for one in lines)]
            )
        )
    chain = [block.item for block in blocks if isinstance(block.item, x509.Certificate)]
    if len(chain) > 1:
        parts.append(_order(chain))
    return "\n\n".join(parts) + "\n"


def _lines(block: Block, now: datetime) -> list[str]:
    match block.item:
        case x509.Certificate() as certificate:
            return _certificate(certificate, now)
        case x509.CertificateRevocationList() as crl:
            return _crl(crl, now)
        case _:
            return _key(block) if block.is_key else []


def _certificate(certificate: x509.Certificate, now: datetime) -> list[str]:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    lines = [
        f"subject  {_name(certificate.subject)}",
        f"issuer   {_name(certificate.issuer)}",
        f"names    {', '.join(_san(certificate)) or 'none'}",
        f"for      {', '.join(_usage(certificate))}",
        f"valid    {begins:{_MOMENT}} to {ends:{_MOMENT}}, {_left(begins, ends, now)}",
        f"key      {name_of(certificate.public_key())}",
        f"serial   {certificate.serial_number:#x}",
    ]
    try:
        identity = Identity.of_chain((certificate.public_bytes(Encoding.DER),))
    except ValueError as wrong:
        return [*lines, f"the gateway refuses it: {shown(str(wrong))}"]
    lines += ["in --allow, --deny and the rules of the configuration:"]
    lines += [f"  {rule}" for rule in rules_for(identity)]
    if (dn := qemu_dn(certificate.subject)) is not None:
        lines += ["in the rules of QEMU (--object authz-simple):"]
        lines += [f"  identity={dn.replace(',', ',,')}"]
    return lines


def rules_for(identity: Identity) -> list[str]:
    """Rules, each of which means this client and, as far as it says, no other.

    What cannot be said in a rule is left out: a name with a `*` of its own would be a wildcard.
    """
    wanted = [
        ("sha256", identity.sha256),
        ("spki", identity.spki),
        ("cn", identity.common_name),
        *(("dns", name) for name in identity.dns),
        *(("uri", name) for name in identity.uris),
        *(("email", name) for name in identity.emails),
        ("dn", identity.subject),
    ]
    found = []
    for kind, value in wanted:
        if not value or not value.isprintable() or ("*" in value and kind != "dn"):
            continue
        try:
            rule = Rule.parse("show", f"{kind}={value}")
        except SettingsError:
            continue
        if rule.matches(identity):
            found.append(str(rule))
    return found


def qemu_dn(name: x509.Name) -> str | None:
    """A name as QEMU compares it: in the order of the certificate, which is that of RFC 4514 the
    other way round. None for attributes that GnuTLS has no short name for.

    In an option of QEMU's each comma of it is written twice.
    """
    if not all(attribute.oid in _QEMU_NAMES for attribute in name):
        return None
    return ",".join(part.rfc4514_string(_QEMU_NAMES) for part in name.rdns)


def _name(name: x509.Name) -> str:
    return shown(name.rfc4514_string()) or "empty"


def _san(certificate: x509.Certificate) -> Iterator[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    for name in names:
        match name:
            case x509.DNSName():
                yield f"DNS {shown(name.value)}"
            case x509.IPAddress():
                yield f"IP {name.value}"
            case x509.UniformResourceIdentifier():
                yield f"URI {shown(name.value)}"
            case x509.RFC822Name():
                yield f"email {shown(name.value)}"
            case _:
                yield shown(str(name))


def _usage(certificate: x509.Certificate) -> list[str]:
    extensions = certificate.extensions
    found = []
    try:
        if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            found.append("signing certificates (a CA)")
    except x509.ExtensionNotFound:
        pass
    try:
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        found += [_USAGES.get(usage, usage.dotted_string) for usage in usages]
    except x509.ExtensionNotFound:
        if not found:
            found.append("anything: it has no extended key usage")
    return found


def _crl(crl: x509.CertificateRevocationList, now: datetime) -> list[str]:
    try:
        number = str(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
    except x509.ExtensionNotFound:
        number = "none"
    begins, ends = crl.last_update_utc, crl.next_update_utc
    left = "without an end" if ends is None else f"to {ends:{_MOMENT}}, {_left(begins, ends, now)}"
    return [
        f"issuer   {_name(crl.issuer)}",
        f"number   {number}",
        f"valid    {begins:{_MOMENT}} {left}",
        f"revoked  {len(crl) or 'nothing'}",
        *(f"  {one.serial_number:#x} since {one.revocation_date_utc:{_MOMENT}}" for one in crl),
    ]


def _key(block: Block) -> list[str]:
    if b"ENCRYPTED" in block.pem:
        return ["encrypted"]
    return [f"{name_of(load_pem_private_key(block.pem, None).public_key())}, not encrypted"]


def _order(chain: Sequence[x509.Certificate]) -> str:
    if all(each.subject == each.issuer for each in chain):
        return "Each is the root of its own: a set of CAs, no chain."
    for number, (one, other) in enumerate(itertools.pairwise(chain), 1):
        if not signed_by(one, other):
            return f"NOT a chain: certificate {number} is not signed by the one behind it."
    return "A chain: each certificate is signed by the one behind it."


def _left(begins: datetime, ends: datetime, now: datetime) -> str:
    if now < begins:
        return "NOT YET VALID"
    if now >= ends:
        return f"EXPIRED {_days(now - ends)} ago"
    return f"{_days(ends - now)} left"


def _days(span: timedelta) -> str:
    """Whole days; below one, hours."""
    if span.days:
        return f"{span.days} day{'s' if span.days > 1 else ''}"
    hours = span.seconds // 3600
    return f"{hours} hour{'s' if hours != 1 else ''}"


# ---------------------------------------------------------------- expiring


class Expiring(NamedTuple):
    """A certificate or CRL that ends soon, or has."""

    path: Path
    what: str
    ends: datetime

    def line(self, now: datetime) -> str:
        """For people: when it ends, in which file, and what it is."""
        when = f"expired {_days(now - self.ends)} ago"
        if now < self.ends:
            when = f"expires in {_days(self.ends - now)}"
        return printable(f"{self.ends:%Y-%m-%d} {when}: {self.path}: {self.what}")


def expiring(
    paths: Iterable[Path], within: timedelta, crl_within: timedelta, now: datetime
) -> list[Expiring]:
    """What ends within that time in these files and folders, the first to end first.

    Folders are looked through for `*.pem`, those in them too; keys are left alone. What is in
    several files (a CA in each client's folder) is named once. Raises PkiError for what cannot be
    read, and for a folder with nothing in it that could expire: silence must mean that all is well.
    """
    seen: set[bytes] = set()
    found = []
    for path in paths:
        known = 0
        for file in files_of(path):
            for block in blocks_in(read(file), file):
                if block.item is None:
                    continue
                known += 1
                der = block.item.public_bytes(Encoding.DER)
                if der in seen:
                    continue
                seen.add(der)
                if isinstance(block.item, x509.Certificate):
                    limit, ends = now + within, block.item.not_valid_after_utc
                else:
                    limit, ends = now + crl_within, block.item.next_update_utc or _NEVER
                if ends <= limit:
                    found.append(Expiring(file, _what(block.item), ends))
        if not known:
            raise PkiError(f"{path}: no certificate in it and no CRL: nothing to watch")
    return sorted(found, key=lambda each: (each.ends, each.path))


def _what(item: x509.Certificate | x509.CertificateRevocationList) -> str:
    try:
        if isinstance(item, x509.Certificate):
            return f"certificate {_name(item.subject)}"
        return f"CRL of {_name(item.issuer)} (`certs crl` renews it)"
    except _DAMAGED:
        return "it has a name that cannot be read"


def files_of(path: Path) -> list[Path]:
    """The PEM files in a folder and those in it; or the one file. Raises PkiError."""
    if not path.exists():
        raise PkiError(f"{path} does not exist")
    if not path.is_dir():
        return [path]
    try:
        found = [each for each in _walk(path, set()) if not is_left_over(each)]
    except OSError as error:
        raise PkiError(f"{error.filename}: {error.strerror}") from None
    # The folder's own files before those of its clients.
    return sorted(found, key=lambda each: (len(each.parts), each))


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Like rglob, but links are followed, and what cannot be read is an error, not nothing.

    Folders whose names begin with two dots are passed over: Kubernetes keeps the versions there
    that its links do not, or no longer, point to.
    """
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    for each in folder.iterdir():
        if each.is_dir():
            if not each.name.startswith(".."):
                yield from _walk(each, seen)
        elif each.name.endswith(".pem") and not each.name.endswith("-key.pem"):
            yield each
