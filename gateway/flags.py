"""The flags of `nbd-gateway` and `nbd-gateway serve`: what they are, and Settings from them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from gateway.errors import SettingsError
from gateway.nbd.upgrades import ALL_UPGRADES, Upgrade
from gateway.settings import (
    DEFAULT_PORT,
    OLDSTYLE_NEEDS,
    Settings,
    TLSSettings,
    parse_listen,
    tls_files,
)

Command = Callable[..., None]


def _count_workers(context: click.Context, flag: click.Parameter, value: str) -> int:
    """`auto` is how many cores this process may use. Raises click.BadParameter."""
    if value == "auto":
        return len(os.sched_getaffinity(0))
    if not (value.isascii() and value.isdigit() and int(value)):
        raise click.BadParameter(f"{value!r} is neither a number, 1 or more, nor 'auto'.")
    return int(value)


def serve_options(command: Command) -> Command:
    """The flags of `nbd-gateway` and of `nbd-gateway serve`, which are the same command."""
    path = click.Path(path_type=Path)
    options = [
        click.option("--cert", type=path, metavar="FILE", help="Server certificate chain, PEM."),
        click.option("--key", type=path, metavar="FILE", help="Its private key, PEM."),
        click.option(
            "--client-ca",
            type=path,
            metavar="FILE",
            help="CA certificates, PEM: any client with a certificate of theirs may enter.",
        ),
        click.option(
            "--allow-anonymous",
            is_flag=True,
            help="TLS without client certificates: everybody may enter.",
        ),
        click.option(
            "--tls-dir",
            type=path,
            metavar="DIR",
            help="Take server-cert.pem, server-key.pem, ca-cert.pem and, if there, ca-crl.pem "
            "from here, the names that QEMU, nbdkit and libnbd use. The flags above win.",
        ),
        click.option("--socket", metavar="PATH", help="Unix socket of the NBD server behind."),
        click.option(
            "--export",
            metavar="NAME",
            help="Its export to offer, by this name and by the empty name.  [default: the empty "
            "name, the server's default export]",
        ),
        click.option(
            "--any-export", is_flag=True, help="Offer all its exports, by the server's names."
        ),
        click.option(
            "--listen",
            multiple=True,
            metavar="ADDR",
            help="HOST:PORT, :PORT, [V6]:PORT, unix:PATH or systemd[:NAME]; may be repeated; "
            f"port 0 picks one.  [default: :{DEFAULT_PORT}, all IPv4 and IPv6 addresses]",
        ),
        click.option(
            "--tls",
            type=click.Choice(["require", "off"]),
            default="require",
            show_default=True,
            help="'off' is for loopback and Unix sockets only.",
        ),
        click.option(
            "--tls-min",
            type=click.Choice(["1.2", "1.3"]),
            default="1.2",
            show_default=True,
            help="Oldest TLS version. 1.3 locks nbd-client out, whose default is 1.2 only.",
        ),
        click.option("--read-only", is_flag=True, help="Refuse every write, here in the gateway."),
        click.option(
            "--no-upgrade",
            multiple=True,
            type=click.Choice([one.value for one in Upgrade]),
            metavar="NAME",
            help="Do not add what the server lacks: write-zeroes, fua, structured-replies or "
            "block-size; may be repeated.  [default: all are added]",
        ),
        click.option(
            "--oldstyle",
            is_flag=True,
            help="Serve clients that know only the oldstyle handshake; needs --tls off.",
        ),
        click.option(
            "--max-connections",
            type=click.IntRange(min=1),
            default=100,
            show_default=True,
            metavar="N",
            help="Clients at a time; more wait in the listen queue.",
        ),
        click.option(
            "--workers",
            callback=_count_workers,
            default="1",
            show_default=True,
            metavar="N|auto",
            help="Processes that share the clients; 'auto': one for each core.",
        ),
        click.option(
            "--handshake-timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=10.0,
            show_default=True,
            metavar="SECONDS",
            help="From accept to the granted export, TLS included.",
        ),
        click.option(
            "--drain-timeout",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            metavar="SECONDS",
            help="After SIGTERM: how long requests in flight may take.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            show_default=True,
        ),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def settings_of(
    *,
    cert: Path | None,
    key: Path | None,
    client_ca: Path | None,
    allow_anonymous: bool,
    tls_dir: Path | None,
    socket: str | None,
    export: str | None,
    any_export: bool,
    listen: tuple[str, ...],
    tls: str,
    tls_min: Literal["1.2", "1.3"],
    read_only: bool,
    no_upgrade: tuple[str, ...],
    oldstyle: bool,
    max_connections: int,
    workers: int,
    handshake_timeout: float,
    drain_timeout: float,
) -> Settings:
    """Flags to Settings. Raises SettingsError."""
    if socket is None:
        raise SettingsError("--socket PATH is missing: the Unix socket of the NBD server behind")
    if any_export and export is not None:
        raise SettingsError("--export and --any-export exclude each other")
    if oldstyle and tls != "off":  # said before the certificates that it has no use for are missed
        raise SettingsError(OLDSTYLE_NEEDS)
    more: dict[str, Any] = {}
    if listen:
        more["listen"] = tuple(parse_listen(one) for one in listen)
    return Settings(
        socket=socket,
        tls=_tls_settings(tls, cert, key, client_ca, allow_anonymous, tls_dir, tls_min),
        export=None if any_export else export or "",
        read_only=read_only,
        oldstyle=oldstyle,
        upgrades=ALL_UPGRADES - {Upgrade(name) for name in no_upgrade},
        max_connections=max_connections,
        workers=workers,
        handshake_timeout_s=handshake_timeout,
        drain_timeout_s=drain_timeout,
        **more,
    )


def _tls_settings(
    tls: str,
    cert: Path | None,
    key: Path | None,
    client_ca: Path | None,
    anonymous: bool,
    directory: Path | None,
    minimum: Literal["1.2", "1.3"],
) -> TLSSettings | None:
    if tls == "off":
        if cert or key or client_ca or directory or anonymous:
            raise SettingsError("--tls off goes with no certificate, CA, --tls-dir or anonymity")
        return None
    if anonymous and client_ca:
        raise SettingsError("--client-ca and --allow-anonymous exclude each other")
    found = None
    if directory is not None:
        found = tls_files(directory, anonymous=anonymous, minimum=minimum)
        cert, key = cert or found.cert, key or found.key
        client_ca = client_ca or found.client_ca
    for flag, value in (("--cert", cert), ("--key", key)):
        if value is None:
            raise SettingsError(f"{flag} FILE is missing (or --tls-dir DIR for all the files)")
    assert cert is not None
    assert key is not None
    if client_ca is None and not anonymous:
        raise SettingsError(
            "who may enter? Say --client-ca FILE (clients with a certificate of that CA) "
            "or --allow-anonymous (everybody)"
        )
    return TLSSettings(cert, key, client_ca, found.crl if found else None, minimum)
