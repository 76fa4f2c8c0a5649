"""What a client needs, in one file to hand out."""

from __future__ import annotations

import io
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from gateway.certs import CLIENTS, CRL, REVOKED
from gateway.certs.folder import REPLACE, client_folder
from gateway.certs.read import certificates_in, crls_in, read, signed_by
from gateway.certs.store import Content, write_together
from gateway.pki_keys import PkiError, load_key
from gateway.revocations import parse_record

_CLIENT_FILES: Final = ("ca-cert.pem", "client-cert.pem", "client-key.pem")


def bundle_client(directory: Path, name: str, now: datetime | None = None) -> bytes:
    """A tar file with exactly the three files that this client needs.

    It is that of `clients/NAME`, or the first client's if that is its name. Raises PkiError for
    files that would not let the client in: they do not fit together, or are out of date or revoked.
    """
    directory = directory.absolute()
    source = directory / CLIENTS / client_folder(name)
    if not source.is_dir():
        first = directory / "client-cert.pem"
        if not first.exists() or _common_name(certificates_in(read(first), first)[0]) != name:
            raise PkiError(f"{source} is not there: issue it with `certs client`, or see --dir")
        source = directory
    files = {each: read(source / each) for each in _CLIENT_FILES}
    _refuse_useless(directory, source, files, now or datetime.now(UTC))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for each, content in files.items():
            member = tarfile.TarInfo(each)  # owner root, as the user who unpacks it otherwise
            member.size = len(content)
            member.mode = 0o600 if each == "client-key.pem" else 0o644
            member.mtime = int((now or datetime.now(UTC)).timestamp())
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_bundle(path: Path, content: bytes, *, force: bool) -> None:
    """The tar file, for its owner only. Raises PkiError."""
    path = path.absolute()
    if not path.parent.is_dir():  # not made here: who may look into it is for its owner to say
        raise PkiError(f"{path.parent} is no folder: make it first, or name another with -o")
    write_together(path.parent, {path: Content(content, secret=True)}, force=force, remedy=REPLACE)


def _refuse_useless(directory: Path, source: Path, files: dict[str, bytes], now: datetime) -> None:
    cert_path = source / "client-cert.pem"
    leaf = certificates_in(files["client-cert.pem"], cert_path)[0]
    trusted = certificates_in(files["ca-cert.pem"], source / "ca-cert.pem")
    renew = "issue it again with `certs client --force`"
    if not any(signed_by(leaf, each) for each in trusted):
        raise PkiError(f"{cert_path} was not issued by a CA in the ca-cert.pem beside it: {renew}")
    if now < leaf.not_valid_before_utc:
        raise PkiError(f"{cert_path} begins only on {leaf.not_valid_before_utc:%Y-%m-%d}: {renew}")
    if now >= leaf.not_valid_after_utc:
        raise PkiError(f"{cert_path} ended on {leaf.not_valid_after_utc:%Y-%m-%d}: {renew}")
    record = directory / REVOKED
    if record.exists() and leaf.serial_number in {
        each.serial for each in parse_record(read(record), record)
    }:
        raise PkiError(f"{cert_path} is revoked: {renew}")
    crl_path = directory / CRL
    for crl in crls_in(read(crl_path), crl_path) if crl_path.exists() else ():
        if crl.issuer == leaf.issuer and crl.get_revoked_certificate_by_serial_number(
            leaf.serial_number
        ):
            raise PkiError(f"{cert_path} is revoked: {renew}")
    key = files["client-key.pem"]
    if b"ENCRYPTED" in key:
        return  # nobody but its holder can tell
    what = str(source / "client-key.pem")
    if load_key(key, None, what=what, flag="").public_key() != leaf.public_key():
        raise PkiError(f"{what} is not the key of {cert_path}: {renew}")


def _common_name(certificate: x509.Certificate) -> str | None:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else None
