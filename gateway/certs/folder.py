"""What is done with a folder that `certs init` made: issue more, revoke, renew the CRL.

The record of what is revoked is `ca/revoked`, one line a certificate, beside the key that signs the
list; `ca-crl.pem` is made of it. If one of the two is lost, the other makes up for it: what is in
either stays revoked. One run at a time changes a folder, so that no entry is overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from gateway.certs import (
    CA_KEY,
    CLIENTS,
    CRL,
    LOCAL_NAMES,
    NO_PASSWORDS,
    REVOKED,
    IssuedPair,
    Passwords,
)
from gateway.certs.read import certificates_in, crls_in, read, signed_by
from gateway.certs.store import Content, in_words, locked, write_together
from gateway.pki import (
    CLIENT_DAYS,
    CRL_DAYS,
    SERVER_DAYS,
    CertificateAuthority,
    Credential,
    KeyType,
    PkiError,
    check_client_name,
    check_server_name,
    general_name,
)
from gateway.pki_keys import key_pem, load_key
from gateway.revocations import Entry, parse_record, record_of

REPLACE: Final = "replace it with --force"


@dataclass(frozen=True)
class Folder:
    """A folder with a CA that can sign, open for a change."""

    path: Path
    authority: CertificateAuthority
    trusted: tuple[x509.Certificate, ...]  # all that is in ca-cert.pem: several while CAs change
    ca_pem: bytes = field(repr=False)  # ca-cert.pem itself


class Handed(NamedTuple):
    """A certificate that was issued, and the folder that has all that its holder needs."""

    folder: Path
    pair: IssuedPair
    names: tuple[str, ...]  # as in the subject alternative name
    cut: bool  # it ends before it was meant to, with its CA


class Revocations(NamedTuple):
    """What `ca-crl.pem` holds now."""

    path: Path
    entries: tuple[Entry, ...]
    next_update: datetime
    number: int
    added: tuple[Entry, ...]  # of these, what was not revoked before
    dropped: tuple[str, ...]  # names of CAs whose CRL was left out: ca-cert.pem has them no more
    missing: tuple[str, ...]  # names of CAs in ca-cert.pem that have no CRL in the file


@contextlib.contextmanager
def opened(directory: Path, password: bytes | None = None) -> Iterator[Folder]:
    """The folder, for this run alone. Raises PkiError for what is not as `init` made it."""
    directory = directory.absolute()
    key_path = directory / CA_KEY
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(key_path.parent))
            pem = key_path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise PkiError(
                f"{key_path} is not there: name the folder that `certs init` made with --dir, and "
                "bring its folder ca back for the time being if it is kept elsewhere"
            ) from None
        except OSError as error:
            raise PkiError(f"cannot read the CA's key: {in_words(error)}") from None
        key = load_key(pem, password, what=str(key_path), flag="--ca-password-file")
        ca_path = directory / "ca-cert.pem"
        ca_pem = read(ca_path)
        trusted = certificates_in(ca_pem, ca_path)
        ours = [each for each in trusted if each.public_key() == key.public_key()]
        if not ours:
            raise PkiError(f"{ca_path} has no certificate of the key in {key_path}")
        latest = max(ours, key=lambda each: each.not_valid_after_utc)
        try:
            authority = CertificateAuthority.of_files(latest, key)
        except PkiError as wrong:
            raise PkiError(f"{ca_path}: {wrong}") from None
        yield Folder(directory, authority, trusted, ca_pem)


# ---------------------------------------------------------------- issue


def issue_server(
    directory: Path,
    names: Sequence[str] = (),
    *,
    sans: Sequence[str] = (),
    days: int = SERVER_DAYS,
    key_type: KeyType = KeyType.EC_P256,
    out: Path | None = None,
    force: bool = False,
    passwords: Passwords = NO_PASSWORDS,
    now: datetime | None = None,
) -> Handed:
    """A server certificate, into the folder itself or into `out`, for a gateway elsewhere.

    With no names and no `sans` it gets those of the server certificate that is there already;
    otherwise `names` (each a host's) and LOCAL_NAMES. Raises PkiError.
    """
    with opened(directory, passwords.ca) as folder:
        target = (out or directory).absolute()
        hosts = [check_server_name(name) for name in names]
        others = [general_name(text) for text in sans]
        if hosts or others:
            hosts = list(dict.fromkeys([*hosts, *LOCAL_NAMES]))
        else:
            hosts, others = _names_of(target / "server-cert.pem")
        credential = folder.authority.issue_server(hosts, days, now, key_type=key_type, sans=others)
        return _hand_out(folder, target, "server", credential, days, passwords.key, force=force)


def issue_client(
    directory: Path,
    name: str,
    *,
    sans: Sequence[str] = (),
    days: int = CLIENT_DAYS,
    key_type: KeyType = KeyType.EC_P256,
    out: Path | None = None,
    force: bool = False,
    passwords: Passwords = NO_PASSWORDS,
    now: datetime | None = None,
) -> Handed:
    """A client certificate with this CN, into `clients/NAME` or into `out`. Raises PkiError."""
    check_client_name(name)
    target = (out or directory / CLIENTS / client_folder(name)).absolute()
    with opened(directory, passwords.ca) as folder:
        others = [general_name(text, bare_hosts=False) for text in sans]
        credential = folder.authority.issue_client(name, days, now, key_type=key_type, sans=others)
        return _hand_out(folder, target, "client", credential, days, passwords.key, force=force)


def _hand_out(
    folder: Folder,
    target: Path,
    role: str,
    credential: Credential,
    days: int,
    password: bytes | None,
    *,
    force: bool,
) -> Handed:
    pair = IssuedPair.of(role, credential, target, target)
    files = {
        pair.key: Content(key_pem(credential.key, password), secret=True),
        pair.cert: Content(credential.cert_pem),
    }
    ca = target / "ca-cert.pem"
    if not (ca.is_file() and read(ca) == folder.ca_pem):
        files[ca] = Content(folder.ca_pem)
    write_together(target, files, force=force, remedy=REPLACE)
    san = credential.certificate.extensions
    try:
        names = san.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    cut = credential.not_after - credential.certificate.not_valid_before_utc < timedelta(days=days)
    return Handed(target, pair, tuple(str(each.value) for each in names), cut)


def _names_of(path: Path) -> tuple[list[str], list[x509.GeneralName]]:
    """The names of a server certificate that is to be issued again."""
    if not path.exists():
        raise PkiError(f"a server certificate needs a name, and there is no {path} to take it from")
    former = certificates_in(read(path), path)[0]
    hosts: list[str] = []
    others: list[x509.GeneralName] = []
    try:
        names = former.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise PkiError(f"{path} has no names to take over: give them") from None
    for name in names:
        if isinstance(name, x509.DNSName | x509.IPAddress):
            hosts.append(check_server_name(str(name.value)))
        else:
            others.append(name)
    return hosts, others


def client_folder(name: str) -> Path:
    """A client's folder, within the folder of them all. Raises PkiError."""
    if "/" in name or name.startswith("."):
        raise PkiError(
            f"client name {name[:80]!r} cannot be the name of a folder: say --out FOLDER"
        )
    return Path(name)


# ---------------------------------------------------------------- revoke


def revoke(
    directory: Path,
    certificates: Sequence[Path] = (),
    serials: Sequence[int] = (),
    *,
    days: int | None = None,
    password: bytes | None = None,
    now: datetime | None = None,
) -> Revocations:
    """Put these certificates on the CRL, for good. What is there already stays with its date.

    `days` until the CRL has to be renewed: as for the former one when left out.
    Raises PkiError, and then nothing is revoked; so it is for a certificate of another CA.
    """
    with opened(directory, password) as folder:
        moment = (now or datetime.now(UTC)).replace(microsecond=0)
        new = [_entry(folder, path, moment) for path in certificates]
        for serial in serials:
            if serial == folder.authority.certificate.serial_number or serial < 1:
                raise PkiError(
                    f"--serial {serial:#x}: not that of a certificate that the CA issued"
                )
            new.append(Entry(serial, moment, _whose(folder, serial)))
        return _write_crl(folder, new, days, moment)


def renew_crl(
    directory: Path,
    *,
    days: int | None = None,
    password: bytes | None = None,
    now: datetime | None = None,
) -> Revocations:
    """A new CRL with the old entries, which holds for `days` more: as the former one when left
    out, and CRL_DAYS for the first. Raises PkiError.
    """
    with opened(directory, password) as folder:
        return _write_crl(folder, [], days, (now or datetime.now(UTC)).replace(microsecond=0))


def _entry(folder: Folder, path: Path, moment: datetime) -> Entry:
    certificate = certificates_in(read(path), path)[0]  # the first: a chain begins with its leaf
    if certificate in folder.trusted:
        raise PkiError(f"{path} is a CA: take it out of ca-cert.pem instead")
    if not signed_by(certificate, folder.authority.certificate):
        raise PkiError(f"{path} was not issued by the CA in {folder.path}")
    return Entry(certificate.serial_number, moment, certificate.subject.rfc4514_string())


def _whose(folder: Folder, serial: int) -> str:
    """The subject of what has this number, if it is here still and can be read; else nothing."""
    for path in (*folder.path.glob("*-cert.pem"), *folder.path.glob(f"{CLIENTS}/*/*-cert.pem")):
        try:
            first = certificates_in(read(path), path)[0]
        except PkiError:
            continue
        if first.serial_number == serial and signed_by(first, folder.authority.certificate):
            return first.subject.rfc4514_string()
    return ""


def _write_crl(
    folder: Folder, new: Sequence[Entry], days: int | None, moment: datetime
) -> Revocations:
    record_path, crl_path = folder.path / REVOKED, folder.path / CRL
    authority = folder.authority.certificate
    entries: dict[int, Entry] = {}
    if record_path.exists():
        entries = {each.serial: each for each in parse_record(read(record_path), record_path)}
    kept: dict[x509.Name, x509.CertificateRevocationList] = {}  # of other CAs, each its latest
    dropped: list[str] = []
    number = 0
    for crl in crls_in(read(crl_path), crl_path) if crl_path.exists() else ():
        if crl.issuer != authority.subject:
            if any(signed_by(crl, other) for other in folder.trusted):
                former = kept.get(crl.issuer)
                if former is None or _age(former) < _age(crl):
                    kept[crl.issuer] = crl
            else:
                dropped.append(crl.issuer.rfc4514_string())
            continue
        if not signed_by(crl, authority):
            raise PkiError(
                f"{crl_path} has a CRL in the name of this CA that it did not sign: find out who "
                "changed it, and remove it"
            )
        number = max(number, _number(crl))
        days = days or _lifetime(crl)
        for one in crl:
            since = Entry(one.serial_number, one.revocation_date_utc, "")
            entries.setdefault(one.serial_number, since)
    added = []
    for each in new:
        if each.serial not in entries:
            entries[each.serial] = each
            added.append(each)
    ours = folder.authority.revoke_list(
        {each.serial: each.since for each in entries.values()}, moment, days or CRL_DAYS, number
    )
    pem = ours + b"".join(crl.public_bytes(Encoding.PEM) for crl in kept.values())
    # The record first: what is on the list is in the record.
    ordered = sorted(entries.values(), key=lambda each: (each.since, each.serial))
    files = {record_path: Content(record_of(ordered)), crl_path: Content(pem)}
    write_together(folder.path, files, force=True, remedy="")
    written = x509.load_pem_x509_crl(ours)
    named = {authority.subject, *kept}
    missing = [
        each.subject.rfc4514_string() for each in folder.trusted if each.subject not in named
    ]
    next_update = written.next_update_utc
    assert next_update is not None  # we have just set it
    return Revocations(
        crl_path,
        tuple(ordered),
        next_update,
        _number(written),
        tuple(added),
        tuple(dropped),
        tuple(dict.fromkeys(missing)),
    )


def _number(crl: x509.CertificateRevocationList) -> int:
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0


def _age(crl: x509.CertificateRevocationList) -> tuple[datetime, int]:
    """Greater for the later of two by the same CA."""
    return crl.last_update_utc, _number(crl)


def _lifetime(crl: x509.CertificateRevocationList) -> int | None:
    """In days; None if there is no end to it."""
    if crl.next_update_utc is None:
        return None
    return max(1, (crl.next_update_utc - crl.last_update_utc).days)
