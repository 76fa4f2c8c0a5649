"""Certificates: a small private CA, and the files that `nbd-gateway certs init` writes.

Two layers. The upper one, `init` and `next_steps`, knows folders and file names: those that QEMU,
nbdkit and libnbd look for (`ca-cert.pem`, `server-cert.pem`, `client-cert.pem` and so on). The
lower one, `CertificateAuthority`, only makes certificates in memory. The profile, and the reason
for each of its lines, stands in certs/README.md.

How `init` writes. Everything is made in memory first. Each file then gets a temporary name in its
own folder, exclusively and with its final mode from the first moment, and only when all are safely
on the disk are they renamed, one by one. A former file is moved aside, not overwritten, until the
last new one is in place. Every step puts its own inverse on a stack, so that an error (or Ctrl-C)
at any step leaves the folder as it was. The temporary names are fixed, and so they also serve as a
lock: two runs at once, or one after a run that was killed, cannot mix their files.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import shlex
import socket as socket_module
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn, TypedDict, Unpack
from urllib.parse import quote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.errors import GatewayError

CA_DAYS = 3650
SERVER_DAYS = 397
CLIENT_DAYS = 90
CRL_DAYS = 30
MAX_DAYS = 36500  # ours: a hundred years; keeps the dates within what X.509 and datetime can say
CLOCK_SKEW = timedelta(hours=1)  # how far a peer's clock may be behind ours
MAX_COMMON_NAME = 64  # RFC 5280, ub-common-name
MAX_DNS_NAME = 253  # RFC 1035, 255 bytes on the wire
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_KEY_USAGE_BITS = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class PkiError(GatewayError):
    """Certificates cannot be issued or written as asked. `str()` is one line for a person."""


# ---------------------------------------------------------------- certificates in memory


class Overrides(TypedDict, total=False):
    """What a test of wrong certificates may want otherwise than the profile has it."""

    not_before: datetime
    not_after: datetime
    usages: Sequence[x509.ObjectIdentifier]  # extended key usage; empty leaves it out


@dataclass(frozen=True)
class Credential:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS #8, not encrypted."""
        pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)

    @property
    def not_after(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def sha256(self) -> str:
        """Fingerprint of the certificate: 64 lower-case hexadecimal digits."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()


@dataclass(frozen=True)
class CertificateAuthority(Credential):
    """A CA of depth one: it signs leaves, never another CA.

    In all methods `now` is an aware datetime, and the present when left out.
    """

    @classmethod
    def create(
        cls, name: str, days: int = CA_DAYS, now: datetime | None = None
    ) -> CertificateAuthority:
        """A new self-signed CA. Give each its own name: chains are built by name."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(name)
        ours = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ours)
        builder = (
            _builder(subject, key.public_key(), *_validity(days, now))
            .issuer_name(subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(issuer, critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    def issue_server(
        self,
        names: Sequence[str],
        days: int = SERVER_DAYS,
        now: datetime | None = None,
        **overrides: Unpack[Overrides],
    ) -> Credential:
        """A server certificate for DNS names and IP addresses, in this order."""
        checked = [check_server_name(name) for name in names]
        if not checked:
            raise PkiError("a server certificate needs at least one name")
        fits = len(checked[0]) <= MAX_COMMON_NAME  # CN is for people: clients read the SAN only
        return self._issue(
            checked[0] if fits else "nbd-gateway server",
            [_general_name(name) for name in checked],
            ExtendedKeyUsageOID.SERVER_AUTH,
            _validity(days, now),
            overrides,
        )

    def issue_client(
        self,
        name: str,
        days: int = CLIENT_DAYS,
        now: datetime | None = None,
        uris: Sequence[str] = (),
        **overrides: Unpack[Overrides],
    ) -> Credential:
        """A client certificate: `name` as CN, `uris` as SAN.

        Without URIs there is no SAN: a client's name is no host's name, and a DNS name in the SAN
        would let the holder pass for that host wherever the extended key usage is not looked at.
        """
        return self._issue(
            name,
            [x509.UniformResourceIdentifier(_check_uri(uri)) for uri in uris],
            ExtendedKeyUsageOID.CLIENT_AUTH,
            _validity(days, now),
            overrides,
        )

    def revoke_list(
        self, revoked: Iterable[int], now: datetime | None = None, days: int = CRL_DAYS
    ) -> bytes:
        """A CRL in PEM with these serial numbers. It denies every client once it has expired.

        The CRL number is the time in seconds, so a later list has a higher one.
        """
        this_update, next_update = _validity(days, now)
        number = int((this_update + CLOCK_SKEW).timestamp())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(this_update)
            .next_update(next_update)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        for serial in sorted(set(revoked)):
            entry = x509.RevokedCertificateBuilder().serial_number(serial)
            builder = builder.add_revoked_certificate(entry.revocation_date(this_update).build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        common_name: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        validity: tuple[datetime, datetime],
        overrides: Overrides,
    ) -> Credential:
        key = ec.generate_private_key(ec.SECP256R1())
        not_before = overrides.get("not_before", validity[0])
        # A leaf that outlives its CA fails one day for a reason that nobody sees in the leaf.
        not_after = overrides.get("not_after", min(validity[1], self.not_after))
        if not_after <= not_before:
            raise PkiError(f"nothing can be signed: the CA ends on {self.not_after:%Y-%m-%d}")
        builder = (
            _builder(_subject(common_name), key.public_key(), not_before, not_after)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            # keyEncipherment means nothing for an EC key, but some QEMUs refuse a leaf without it.
            .add_extension(_key_usage("digital_signature", "key_encipherment"), critical=True)
            .add_extension(self._authority_key_identifier(), critical=False)
        )
        if usages := overrides.get("usages", [usage]):
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Credential(builder.sign(self.key, hashes.SHA256()), key)

    def _authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        ours = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ours.value)


def check_server_name(name: str) -> str:
    """The name as it goes into a certificate: lower case, addresses in their canonical form.

    Raises PkiError for what is neither a DNS name (a leading `*.` is allowed) nor an IP address.
    """

    def refuse(why: str) -> NoReturn:
        raise PkiError(f"server name {name[:80]!r}: {why}")

    if "%" not in name:  # a zone ("fe80::1%eth0") means something on one machine only
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(name))
    if not name.isascii():
        refuse("give an international name as its A-label (xn--...)")
    dns = name.lower().removesuffix(".")
    labels = dns.removeprefix("*.").split(".")
    if len(dns) > MAX_DNS_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        refuse("not a DNS name or IP address (letters, digits, hyphens and dots; no port)")
    if labels[-1].isdigit():
        refuse("neither an IP address nor a DNS name, whose last part is never a number")
    if dns.startswith("*.") and len(labels) < 2:
        refuse("a wildcard needs two names behind it, as in *.example.com: clients ignore others")
    return dns


def _general_name(checked: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(checked))
    except ValueError:
        return x509.DNSName(checked)


def _check_uri(uri: str) -> str:
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"[!-~]+", uri) and urlsplit(uri).scheme:
            return uri
    raise PkiError(f"not a URI: {uri[:80]!r}")


def _subject(common_name: str) -> x509.Name:
    if not common_name.strip() or not common_name.isprintable():
        raise PkiError(f"not a name for a certificate: {common_name[:80]!r}")
    if len(common_name.encode()) > MAX_COMMON_NAME:
        raise PkiError(f"name longer than {MAX_COMMON_NAME} bytes: {common_name[:80]!r}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _validity(days: int, now: datetime | None) -> tuple[datetime, datetime]:
    if not 1 <= days <= MAX_DAYS:
        raise PkiError(f"a lifetime of {days} days is not between 1 and {MAX_DAYS}")
    moment = (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)
    return moment - CLOCK_SKEW, moment + timedelta(days=days)


def _builder(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*wanted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{bit: bit in wanted for bit in _KEY_USAGE_BITS})


# ---------------------------------------------------------------- the folder


class IssuedPair(NamedTuple):
    """One certificate and its key, as written."""

    cert: Path
    key: Path
    name: str  # the certificate's CN
    not_after: datetime
    sha256: str


@dataclass(frozen=True)
class Issued:
    """What `init` wrote, with absolute paths."""

    directory: Path
    ca: IssuedPair
    server: IssuedPair
    client: IssuedPair
    server_names: tuple[str, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """In the order in which they are put in place: who sees a new certificate has its key."""
        pairs = (self.ca, self.server, self.client)
        return tuple(path for pair in pairs for path in (pair.key, pair.cert))


def init(
    directory: Path,
    server_names: Sequence[str] = (),
    *,
    force: bool = False,
    client_name: str = "client",
    ca_days: int = CA_DAYS,
    server_days: int = SERVER_DAYS,
    client_days: int = CLIENT_DAYS,
    now: datetime | None = None,
) -> Issued:
    """Issue a CA, a server and a client certificate, and write them below `directory`.

    The server certificate is for `server_names` (this host's own names if there are none) and
    always for LOCAL_NAMES too, so that a first trial on the same machine works. `force` replaces
    a former set, CA included: what the former CA signed is then worth nothing.
    Raises PkiError, after which the directory is as it was unless the text says otherwise.
    """
    directory = directory.absolute()
    names = [check_server_name(name) for name in server_names] or list(_host_names())
    names = list(dict.fromkeys([*names, *LOCAL_NAMES]))
    # A name of its own: peers that hold two CAs then say "unknown issuer", not "bad signature".
    authority = CertificateAuthority.create(
        f"nbd-gateway CA {secrets.token_hex(4)}", ca_days, moment := now or datetime.now(UTC)
    )
    server = authority.issue_server(names, server_days, moment)
    client = authority.issue_client(client_name, client_days, moment)

    def pair(role: str, credential: Credential, key_folder: Path) -> IssuedPair:
        (common_name,) = credential.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return IssuedPair(
            directory / f"{role}-cert.pem",
            key_folder / f"{role}-key.pem",
            str(common_name.value),
            credential.not_after,
            credential.sha256,
        )

    issued = Issued(
        directory,
        pair("ca", authority, directory / "ca"),
        pair("server", server, directory),
        pair("client", client, directory),
        tuple(names),
    )
    content = (c for each in (authority, server, client) for c in (each.key_pem, each.cert_pem))
    _write_together(directory, dict(zip(issued.paths, content, strict=True)), force=force)
    return issued


def _host_names() -> Iterator[str]:
    """This host's names, as far as a certificate can hold them."""
    for name in (socket_module.gethostname(), socket_module.getfqdn()):
        with contextlib.suppress(PkiError):
            yield check_server_name(name)


def _write_together(directory: Path, files: Mapping[Path, bytes], *, force: bool) -> None:
    """All the files, or none. Files whose name ends in -key.pem are for the owner only."""
    stuck: list[OSError] = []  # steps that could not be undone
    former: list[Path] = []

    def attempt(step: Callable[..., object], *args: object) -> None:
        try:
            step(*args)
        except OSError as error:
            stuck.append(error)

    try:
        with contextlib.ExitStack() as undo:
            _refuse_what_is_there(directory, files, force=force)
            for folder in _missing_folders(files):
                folder.mkdir(mode=0o700 if folder.is_relative_to(directory) else 0o755)
                undo.callback(attempt, folder.rmdir)
            for path, content in files.items():
                mode = 0o600 if path.name.endswith("-key.pem") else 0o644
                descriptor = _open_new(_new(path), mode)
                undo.callback(attempt, _new(path).unlink, True)
                with open(descriptor, "wb") as out:
                    os.fchmod(descriptor, mode)  # the umask took its share
                    out.write(content)
                    out.flush()
                    os.fsync(descriptor)
            # Once more: another run may have finished before we held the temporary names.
            _refuse_what_is_there(directory, files, force=force)
            for path in files:
                if os.path.lexists(path):
                    path.rename(_old(path))
                    undo.callback(attempt, _old(path).rename, path)
                    former.append(_old(path))
                _new(path).rename(path)
                undo.callback(attempt, path.unlink)
            for folder in {path.parent for path in files}:
                _sync_folder(folder)
            undo.pop_all()
    except OSError as error:
        what = f"cannot write the certificates in {directory}: {_in_words(error)}"
        if not stuck:
            raise PkiError(f"{what}; nothing was changed") from error
        raise PkiError(
            f"{what}; and not all could be put back ({_in_words(stuck[0])}): rename each .NAME.old "
            f"in {directory} and in its folder ca to NAME, and remove each .NAME.new"
        ) from error
    try:
        for path in former:
            path.unlink()
    except OSError as error:
        raise PkiError(
            f"the new certificates are in place, but remove each .NAME.old in {directory} and in "
            f"its folder ca by hand, they are the former ones: {_in_words(error)}"
        ) from error


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _refuse_what_is_there(directory: Path, files: Iterable[Path], *, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise PkiError(f"{directory} is a file, not a folder")
    there = [path for path in files if os.path.lexists(path)]
    if there and not force:
        names = ", ".join(str(path.relative_to(directory)) for path in there)
        raise PkiError(
            f"{directory} already has {names}: choose another folder, or replace them all, "
            "the CA too, with --force"
        )
    for path in files:
        if path.is_dir():
            raise PkiError(f"{path} is a folder, not a file")
        if os.path.lexists(_old(path)):
            raise PkiError(
                f"{_old(path)} was left by a run that was cut short: rename it to {path.name} to "
                "have the former file back, or remove it"
            )


def _missing_folders(files: Iterable[Path]) -> list[Path]:
    """Those to make, parents first."""
    wanted = {folder for path in files for folder in path.parents if not folder.exists()}
    return sorted(wanted, key=lambda folder: len(folder.parts))


def _open_new(path: Path, mode: int) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise PkiError(
            f"{path} exists: another run is at work, or one was cut short; if so, remove it"
        ) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_words(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)


# ---------------------------------------------------------------- what to do with them


class ClientCommands(NamedTuple):
    """Shell lines for the common clients, each complete and on one line."""

    nbdinfo: str
    qemu_img: str
    nbd_client_list: str
    nbd_client: str


def client_commands(
    directory: Path, host: str, port: int = 10809, export: str = ""
) -> ClientCommands:
    """How to reach a gateway with the client's files in `directory`.

    `host` is one of the server certificate's names; an IPv6 address comes without brackets.
    """

    q, folder = shlex.quote, str(directory)
    netloc = f"[{host}]" if ":" in host else host
    uri = f"nbds://{netloc}:{port}/{quote(export, safe='')}?tls-certificates={quote(folder)}"
    # In QEMU's option lists a comma is written twice.
    creds = f"tls-creds-x509,id=tls0,dir={folder.replace(',', ',,')},endpoint=client"
    image = f"host={host},port={port},export={export.replace(',', ',,')},tls-creds=tls0"
    ca, cert, key = (q(f"{folder}/{name}.pem") for name in ("ca-cert", "client-cert", "client-key"))
    tls = f"-cacertfile {ca} -certfile {cert} -keyfile {key} -tlshostname {q(host)}"
    name = f" -name {q(export)}" if export else ""
    return ClientCommands(
        f"nbdinfo {q(uri)}",
        f"qemu-img info --object {q(creds)} --image-opts {q(f'driver=nbd,{image}')}",
        f"nbd-client -l {q(host)} {port} {tls}",
        f"nbd-client {q(host)} {port} /dev/nbd0{name} {tls}",
    )


def next_steps(
    issued: Issued,
    *,
    socket: str = "/run/disk.sock",
    host: str | None = None,
    port: int = 10809,
    export: str = "",
) -> str:
    """What to print after `init`: what was made, and lines to copy and paste.

    Commands stand on lines of their own, indented by four spaces, quoted for the shell.
    `host` is the name to connect to: the certificate's first that is no wildcard, when left out.
    """
    ca, server, client = issued.ca, issued.server, issued.client
    host = host or next(name for name in issued.server_names if not name.startswith("*"))
    commands = "\n    ".join(client_commands(issued.directory, host, port, export))
    folder, ca_file, cert, key, upstream = (
        shlex.quote(str(each))
        for each in (issued.directory, ca.cert, server.cert, server.key, socket)
    )
    return f"""\
Issued in {folder}:
- CA "{ca.name}", until {ca.not_after:%Y-%m-%d}
- server certificate for {", ".join(issued.server_names)}, until {server.not_after:%Y-%m-%d}
- client certificate "{client.name}", until {client.not_after:%Y-%m-%d}

Start the gateway, in the short or in the long form:

    nbd-gateway --tls-dir {folder} --socket {upstream}
    nbd-gateway --cert {cert} --key {key} --client-ca {ca_file} --socket {upstream}

Try it from here with one of these clients (the last one attaches a block device, as root):

    {commands}

A client needs {ca.cert.name}, {client.cert.name} and {client.key.name} from this folder, no more.
A gateway elsewhere needs {ca.cert.name}, {server.cert.name} and {server.key.name}.

Keep {ca.key.parent} offline, and a copy of it safe: who holds {ca.key.name} can let anyone in,
and neither the gateway nor a client reads it.
"""
