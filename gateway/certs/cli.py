"""The commands `nbd-gateway certs ...`: their options, and what they print.

Nothing secret is ever an argument: passphrases come out of files.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from gateway.certs import CLIENTS, Passwords, init, next_steps
from gateway.certs.bundle import bundle_client, write_bundle
from gateway.certs.folder import (
    Handed,
    Revocations,
    issue_client,
    issue_server,
    renew_crl,
    revoke,
)
from gateway.certs.options import (
    PATH,
    ca_password_option,
    days_option,
    dir_option,
    force_option,
    key_password_option,
    key_type_option,
    options_in_order,
    out_option,
    san_option,
    serial_number,
    span,
)
from gateway.certs.show import expiring, files_of, show
from gateway.errors import SettingsError
from gateway.identity import printable
from gateway.pki import (
    CA_DAYS,
    CLIENT_DAYS,
    CRL_DAYS,
    SERVER_DAYS,
    KeyType,
    PkiError,
    check_client_name,
    check_server_name,
    general_name,
)
from gateway.pki_keys import read_password


@click.group()
def certs() -> None:
    """Issue, show, revoke and hand out the certificates that gateway and clients need."""


# ---------------------------------------------------------------- issue


@certs.command(name="init")
@click.argument("directory", type=PATH)
@click.option(
    "--server-name",
    "server_names",
    multiple=True,
    metavar="NAME",
    help="DNS name or address by which clients know the server; may be repeated.  [default: "
    "this host's name; localhost is always in]",
)
@options_in_order(
    click.option(
        "--client-name",
        default="client",
        show_default=True,
        metavar="NAME",
        help="CN of the first client.",
    ),
    san_option,
    days_option("--days", "server and client certificate last", f"{SERVER_DAYS} and {CLIENT_DAYS}"),
    days_option("--ca-days", "the CA lasts", CA_DAYS),
    key_type_option,
    click.option(
        "--ca-password-file",
        type=PATH,
        metavar="FILE",
        help="Encrypt the CA's key with the passphrase in this file.",
    ),
    key_password_option("the server's key"),
)
@click.option("--force", is_flag=True, help="Replace certificates and keys that are there.")
def _init(
    directory: Path,
    *,
    server_names: tuple[str, ...],
    client_name: str,
    sans: tuple[str, ...],
    days: int | None,
    ca_days: int | None,
    key_type: str,
    ca_password_file: Path | None,
    key_password_file: Path | None,
    force: bool,
) -> None:
    """Issue a CA, a server and a client certificate into DIRECTORY.

    The files have the names that QEMU, nbdkit and libnbd look for. The CA's key is put apart,
    into DIRECTORY/ca.
    """
    _check("--server-name", check_server_name, server_names)
    _check("--client-name", check_client_name, (client_name,))
    _check("--san", general_name, sans)
    issued = init(
        directory,
        server_names,
        force=force,
        client_name=client_name,
        ca_days=ca_days or CA_DAYS,
        server_days=days or SERVER_DAYS,
        client_days=days or CLIENT_DAYS,
        key_type=KeyType(key_type),
        server_sans=sans,
        passwords=_passwords(ca_password_file, key_password_file),
    )
    click.echo(next_steps(issued))
    if (clients := directory / CLIENTS).is_dir():
        folder = shlex.quote(str(clients))
        click.echo(f"What is in {folder} is of the former CA: issue it again.", err=True)


@certs.command(name="server")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@options_in_order(
    dir_option,
    san_option,
    days_option("--days", "it lasts", SERVER_DAYS),
    key_type_option,
    out_option,
    ca_password_option,
    key_password_option("the key"),
    force_option,
)
def _server(
    names: tuple[str, ...],
    *,
    directory: Path,
    sans: tuple[str, ...],
    days: int | None,
    key_type: str,
    out: Path | None,
    ca_password_file: Path | None,
    key_password_file: Path | None,
    force: bool,
) -> None:
    """Issue a server certificate for these NAMEs: DNS names and addresses.

    Without a NAME, for those of the present one: that is how it is renewed, with --force.
    localhost, 127.0.0.1 and ::1 are always added to NAMEs.
    """
    _check("NAME", check_server_name, names)
    _check("--san", general_name, sans)
    handed = issue_server(
        directory,
        names,
        sans=sans,
        days=days or SERVER_DAYS,
        key_type=KeyType(key_type),
        out=out,
        force=force,
        passwords=_passwords(ca_password_file, key_password_file),
    )
    click.echo(f"Server certificate for {', '.join(handed.names)}, {_until(handed)}")
    click.echo(f"A gateway needs ca-cert.pem, server-cert.pem and server-key.pem of {_in(handed)}")


@certs.command(name="client")
@click.argument("name")
@options_in_order(
    dir_option,
    san_option,
    days_option("--days", "it lasts", CLIENT_DAYS),
    key_type_option,
    out_option,
    ca_password_option,
    key_password_option("the key (QEMU can open it; nbdinfo and nbd-client cannot)"),
    force_option,
)
def _client(
    name: str,
    *,
    directory: Path,
    sans: tuple[str, ...],
    days: int | None,
    key_type: str,
    out: Path | None,
    ca_password_file: Path | None,
    key_password_file: Path | None,
    force: bool,
) -> None:
    """Issue a client certificate with NAME as its CN, into DIR/clients/NAME.

    That folder is all that the client needs; `certs bundle client NAME` makes one file of it.
    """
    _check("NAME", check_client_name, (name,))
    _check("--san", functools.partial(general_name, bare_hosts=False), sans)
    handed = issue_client(
        directory,
        name,
        sans=sans,
        days=days or CLIENT_DAYS,
        key_type=KeyType(key_type),
        out=out,
        force=force,
        passwords=_passwords(ca_password_file, key_password_file),
    )
    click.echo(f'Client certificate "{handed.pair.name}", {_until(handed)}')
    click.echo(f"The client needs ca-cert.pem, client-cert.pem and client-key.pem of {_in(handed)}")


# ---------------------------------------------------------------- revoke


@certs.command(name="revoke")
@click.argument("certificates", nargs=-1, type=PATH, metavar="[FILE]...")
@options_in_order(
    click.option(
        "--serial",
        "serials",
        multiple=True,
        type=serial_number,
        metavar="N",
        help="By serial number (0x...), where the file is lost; may be repeated.",
    ),
    dir_option,
    days_option("--days", "the CRL then holds", f"as long as the former one, else {CRL_DAYS}"),
    ca_password_option,
)
def _revoke(
    certificates: tuple[Path, ...],
    *,
    serials: tuple[int, ...],
    directory: Path,
    days: int | None,
    ca_password_file: Path | None,
) -> None:
    """Revoke certificates, for good, and write ca-crl.pem anew.

    It takes effect where that file is copied to. What was revoked before stays so.
    """
    if not (certificates or serials):
        raise click.UsageError("which certificate? Name its FILE, or give its --serial")
    done = revoke(
        directory,
        certificates,
        serials,
        days=days,
        password=_passwords(ca_password_file, None).ca,
    )
    for entry in done.added:
        click.echo(f"Revoked: {entry.serial:#x} {printable(entry.whose)}".rstrip())
        if not entry.whose:
            click.echo(
                f"No certificate in {directory} has the number {entry.serial:#x}: if it is "
                "mistyped, nobody is kept out by it; `certs show` prints those that are here",
                err=True,
            )
    if not done.added:
        click.echo("Nothing new: it was revoked before")
    _say(done)


@certs.command(name="crl")
@options_in_order(
    dir_option,
    days_option("--days", "it holds", f"as long as the former one, else {CRL_DAYS}"),
    ca_password_option,
)
def _crl(*, directory: Path, days: int | None, ca_password_file: Path | None) -> None:
    """Renew ca-crl.pem before it is out of date; or make the first, with nothing in it."""
    _say(renew_crl(directory, days=days, password=_passwords(ca_password_file, None).ca))


def _say(done: Revocations) -> None:
    click.echo(
        f"{done.path}: number {done.number}, {len(done.entries)} revoked, renew it before "
        f"{done.next_update:%Y-%m-%d %H:%M} UTC"
    )
    for name in done.dropped:
        click.echo(
            f"Left out: the CRL of {printable(name)}, a CA that is not in ca-cert.pem", err=True
        )
    for name in done.missing:
        click.echo(
            f"{printable(name)} is in ca-cert.pem without a CRL in {done.path}: the gateway "
            "refuses that. Append the CRL of that CA",
            err=True,
        )


# ---------------------------------------------------------------- look


@certs.command(name="show")
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="DIR|FILE...")
def _show(paths: tuple[Path, ...]) -> None:
    """Print what is in certificates, chains and CRLs, and the rules that mean a client.

    Of a folder: in all its *.pem files, keys apart.
    """
    try:
        texts = [show(file, datetime.now(UTC)) for path in paths for file in _shown_of(path)]
    except PkiError as wrong:
        raise SettingsError(str(wrong)) from None
    click.echo("\n".join(texts), nl=False)


def _shown_of(path: Path) -> list[Path]:
    """What is worth a look: of a folder no keys, of which only that they are there could be said.
    Raises PkiError."""
    if not path.is_dir():
        return [path]
    files = [file for file in files_of(path) if not file.name.endswith("-key.pem")]
    if not files:
        raise PkiError(f"{path}: no certificate in this folder: name one that `certs` made")
    return files


@certs.command(
    name="expiring", epilog="Exit codes: 0 nothing expires, 1 something does, 2 cannot tell."
)
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="DIR|FILE...")
@click.option(
    "--within",
    type=span,
    default="30d",
    show_default=True,
    metavar="SPAN",
    help="For certificates: 30d, 12h, 4w.",
)
@click.option(
    "--crl-within",
    type=span,
    default="7d",
    show_default=True,
    metavar="SPAN",
    help="For CRLs, whose life is shorter.",
)
def _expiring(paths: tuple[Path, ...], *, within: timedelta, crl_within: timedelta) -> None:
    """Print which certificates and CRLs expire soon, or have. For cron: silent if none does."""
    now = datetime.now(UTC)
    try:
        found = expiring(paths, within, crl_within, now)
    except PkiError as wrong:
        raise SettingsError(str(wrong)) from None
    for each in found:
        click.echo(each.line(now))
    if found:
        sys.exit(1)


# ---------------------------------------------------------------- hand out


@certs.group(name="bundle")
def _bundle() -> None:
    """Put what one needs into one file."""


@_bundle.command(name="client")
@click.argument("name")
@options_in_order(
    dir_option,
    click.option(
        "--output",
        "-o",
        type=click.Path(path_type=Path, allow_dash=True),
        metavar="FILE",
        help="Where to; - is standard output, for a pipe.  [default: NAME.tar]",
    ),
    force_option,
)
def _bundle_client(name: str, *, directory: Path, output: Path | None, force: bool) -> None:
    """Put the three files of the client NAME into a tar file, for its owner only (0600).

    Its key is in it: hand it over in a safe way, then remove it.
    """
    _check("NAME", check_client_name, (name,))
    content = bundle_client(directory, name)
    if output == Path("-"):
        if sys.stdout.isatty():
            raise click.UsageError("--output -: a key does not go to a terminal; use a pipe")
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    path = output or Path(f"{name}.tar")
    write_bundle(path, content, force=force)
    click.echo(f"{path}: ca-cert.pem, client-cert.pem, client-key.pem. It holds the key.")


# ---------------------------------------------------------------- parts


def _check(flag: str, check: Callable[[str], object], values: Sequence[str]) -> None:
    for value in values:
        try:
            check(value)
        except PkiError as wrong:
            raise SettingsError(f"{flag}: {wrong}") from None


def _passwords(ca: Path | None, key: Path | None) -> Passwords:
    return Passwords(
        read_password("--ca-password-file", ca) if ca else None,
        read_password("--key-password-file", key) if key else None,
    )


def _until(handed: Handed) -> str:
    end = f"until {handed.pair.not_after:%Y-%m-%d}"
    return f"{end}, when its CA ends" if handed.cut else end


def _in(handed: Handed) -> str:
    return shlex.quote(str(handed.folder))
