"""The folder of certificates that `nbd-gateway certs init` writes, and what to do with it.

The files have the names that QEMU, nbdkit and libnbd look for (`ca-cert.pem`, `server-cert.pem`,
`client-cert.pem` and so on). What stands in the certificates is up to `gateway.pki`.

How `init` writes. Everything is made in memory first. Each file then gets a temporary name in its
own folder, exclusively and with its final mode from the first moment, and only when all are safely
on the disk are they renamed, one by one. A former file is moved aside, not overwritten, until the
last new one is in place. Every step puts its own inverse on a stack, so that an error (or Ctrl-C)
at any step leaves the folder as it was. The temporary names are fixed, and so they also serve as a
lock: two runs at once, or one after a run that was killed, cannot mix their files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import socket as socket_module
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from gateway.pki import (
    CA_DAYS,
    CLIENT_DAYS,
    SERVER_DAYS,
    CertificateAuthority,
    Credential,
    PkiError,
    check_server_name,
)

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


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
        return IssuedPair(
            directory / f"{role}-cert.pem",
            key_folder / f"{role}-key.pem",
            credential.common_name,
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
