"""The folder of certificates that `nbd-gateway certs init` writes, and what to do with it.

The files have the names that QEMU, nbdkit and libnbd look for (`ca-cert.pem`, `server-cert.pem`,
`client-cert.pem` and so on). What stands in the certificates is up to `gateway.pki`, how they are
written to `gateway.certs.store`, and what is added to the folder later to `gateway.certs.folder`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import socket as socket_module
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from gateway.certs.store import Content, in_words, locked, write_together
from gateway.pki import (
    CA_DAYS,
    CLIENT_DAYS,
    CRL_DAYS,
    SERVER_DAYS,
    CertificateAuthority,
    Credential,
    KeyType,
    PkiError,
    check_server_name,
    general_name,
)
from gateway.pki_keys import key_pem

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
CA_KEY: Final = Path("ca", "ca-key.pem")  # in the folder; apart from what is served
REVOKED: Final = Path("ca", "revoked")  # the record of revocations, beside the key that signs them
CRL: Final = Path("ca-crl.pem")
CLIENTS: Final = Path("clients")  # a folder in it for each client but the first


class IssuedPair(NamedTuple):
    """One certificate and its key, as written."""

    cert: Path
    key: Path
    name: str  # the certificate's CN
    not_after: datetime
    sha256: str

    @classmethod
    def of(cls, role: str, credential: Credential, folder: Path, key_folder: Path) -> IssuedPair:
        """With the names that a role's files have; `role` is ca, server or client."""
        return cls(
            folder / f"{role}-cert.pem",
            key_folder / f"{role}-key.pem",
            credential.common_name,
            credential.not_after,
            credential.sha256,
        )


class Passwords(NamedTuple):
    """Passphrases for keys; None: the key is not encrypted."""

    ca: bytes | None = None
    key: bytes | None = None  # of what is issued: `init` puts it on the server's key only


NO_PASSWORDS: Final = Passwords()


@dataclass(frozen=True)
class Issued:
    """What `init` wrote, with absolute paths."""

    directory: Path
    ca: IssuedPair
    server: IssuedPair
    client: IssuedPair
    server_names: tuple[str, ...]
    locked: bool = False  # whether the server's key has a passphrase

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
    key_type: KeyType = KeyType.EC_P256,
    server_sans: Sequence[str] = (),
    passwords: Passwords = NO_PASSWORDS,
    now: datetime | None = None,
) -> Issued:
    """Issue a CA, a server and a client certificate, and write them below `directory`.

    The server certificate is for `server_names` (this host's own names if there are none) and
    always for LOCAL_NAMES too, so that a first trial on the same machine works. `force` replaces
    a former set, CA included: what the former CA signed is then worth nothing. If the former had
    revocations, the new one gets a CRL that is empty, since the gateway would refuse the former.
    Raises PkiError, after which the directory is as it was unless the text says otherwise.
    """
    directory = directory.absolute()
    names = [check_server_name(name) for name in server_names] or list(_host_names())
    names = list(dict.fromkeys([*names, *LOCAL_NAMES]))
    sans = [general_name(text) for text in server_sans]
    # A name of its own: peers that hold two CAs then say "unknown issuer", not "bad signature".
    authority = CertificateAuthority.create(
        f"nbd-gateway CA {secrets.token_hex(4)}",
        ca_days,
        moment := now or datetime.now(UTC),
        key_type,
    )
    server = authority.issue_server(names, server_days, moment, key_type, sans)
    client = authority.issue_client(client_name, client_days, moment, key_type=key_type)
    issued = Issued(
        directory,
        IssuedPair.of("ca", authority, directory, (directory / CA_KEY).parent),
        IssuedPair.of("server", server, directory, directory),
        IssuedPair.of("client", client, directory, directory),
        tuple(names),
        locked=passwords.key is not None,
    )
    files: dict[Path, Content] = {}
    for pair, credential, password in (
        (issued.ca, authority, passwords.ca),
        (issued.server, server, passwords.key),
        (issued.client, client, None),
    ):
        files[pair.key] = Content(key_pem(credential.key, password), secret=True)
        files[pair.cert] = Content(credential.cert_pem)
    if any(os.path.lexists(directory / name) for name in (CRL, REVOKED)):
        files[directory / REVOKED] = Content(b"")
        files[directory / CRL] = Content(authority.revoke_list([], moment))
    remedy = "choose another folder, or replace them all, the CA too, with --force"
    with contextlib.ExitStack() as stack:
        if issued.ca.key.parent.is_dir():  # not while somebody revokes with the former CA
            try:
                stack.enter_context(locked(issued.ca.key.parent))
            except OSError as error:
                raise PkiError(
                    f"cannot write the certificates in {directory}: {in_words(error)}; "
                    "nothing was changed"
                ) from error
        write_together(directory, files, force=force, remedy=remedy)
    return issued


def _host_names() -> Iterator[str]:
    """This host's names, as far as a certificate can hold them."""
    for name in (socket_module.gethostname(), socket_module.getfqdn()):
        with contextlib.suppress(PkiError):
            yield check_server_name(name)


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
    unlock = " --key-password-file FILE" if issued.locked else ""
    return f"""\
Issued in {folder}:
- CA "{ca.name}", until {ca.not_after:%Y-%m-%d}
- server certificate for {", ".join(issued.server_names)}, until {server.not_after:%Y-%m-%d}
- client certificate "{client.name}", until {client.not_after:%Y-%m-%d}

Start the gateway, in the short or in the long form:

    nbd-gateway --tls-dir {folder}{unlock} --socket {upstream}
    nbd-gateway --cert {cert} --key {key}{unlock} --client-ca {ca_file} --socket {upstream}

Try it from here with one of these clients (the last one attaches a block device, as root):

    {commands}

A client needs {ca.cert.name}, {client.cert.name} and {client.key.name} from this folder, no more.
A gateway elsewhere needs {ca.cert.name}, {server.cert.name} and {server.key.name}.

Another client, and what it needs in one file:

    nbd-gateway certs client NAME --dir {folder}
    nbd-gateway certs bundle client NAME --dir {folder}

To be able to shut a client out before its certificate ends, begin with a CRL now. The gateway takes
it from the same folder; it holds for {CRL_DAYS} days, so renew it in time: once it is out of date,
nobody gets in.

    nbd-gateway certs crl --dir {folder}
    nbd-gateway certs revoke {folder}/clients/NAME/client-cert.pem --dir {folder}

Keep {ca.key.parent} offline, and a copy of it safe: who holds {ca.key.name} can let anyone in,
and neither the gateway nor a client reads it.
"""
