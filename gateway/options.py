"""The options of `nbd-gateway`, `serve` and `check` as they are typed, with their help texts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from gateway.access import KINDS
from gateway.nbd.upgrades import Upgrade
from gateway.settings import DEFAULT_PORT

Command = Callable[..., None]
Option = Callable[[Any], Any]

_PATH: Final = click.Path(path_type=Path)


def serve_options(command: Command) -> Command:
    """All of them: of no command, of `serve`, which is the same, and of `check`, which asks what
    `serve` would say. But for `log_level`, `gateway.flags.settings_of` takes them by their names.
    """
    options = [*_tls_options(), *_access_options(), *_serving_options()]
    return functools.reduce(_put_before, reversed(options), command)


def _put_before(inner: Command, option: Option) -> Command:
    decorated: Command = option(inner)
    return decorated


def _tls_options() -> Sequence[Option]:
    """Which files TLS is made of, and whose clients they let in."""
    return (
        click.option("--cert", type=_PATH, metavar="FILE", help="Server certificate chain, PEM."),
        click.option("--key", type=_PATH, metavar="FILE", help="Its private key, PEM."),
        click.option(
            "--key-password-file",
            type=_PATH,
            metavar="FILE",
            help="The key's password, if it has one, in a file of one line.",
        ),
        click.option(
            "--client-ca",
            type=_PATH,
            metavar="FILE",
            help="CA certificates, PEM: any client with a certificate of theirs may enter.",
        ),
        click.option(
            "--crl",
            type=_PATH,
            metavar="FILE",
            help="Their revocation lists, PEM: of every CA that clients' certificates hang on.",
        ),
        click.option(
            "--allow-anonymous",
            is_flag=True,
            help="TLS without client certificates: everybody may enter.",
        ),
        click.option(
            "--psk-file",
            type=_PATH,
            metavar="FILE",
            help="Pre-shared keys in place of all certificates: user:hex lines, as of psktool. "
            "Whoever has one may enter. Needs Python 3.13.",
        ),
        click.option(
            "--tls-dir",
            type=_PATH,
            metavar="DIR",
            help="Take server-cert.pem, server-key.pem, ca-cert.pem and, if there, ca-crl.pem "
            "from here, the names that QEMU, nbdkit and libnbd use. The flags above win.",
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
    )


def _access_options() -> Sequence[Option]:
    """Who of those may enter, and what becomes of it when files change."""
    return (
        click.option(
            "--allow",
            multiple=True,
            metavar="RULE",
            help="Only clients of a rule like this may enter: KIND=VALUE, with a KIND of "
            f"{', '.join(KINDS)}. * is one whole label or path segment. May be repeated.",
        ),
        click.option(
            "--deny",
            multiple=True,
            metavar="RULE",
            help="No client of this rule may enter, whatever allows it; may be repeated.",
        ),
        click.option(
            "--allow-from",
            multiple=True,
            metavar="CIDR",
            help="Only clients from these addresses are answered at all; may be repeated. Unix "
            "sockets have none, and stay open.",
        ),
        click.option(
            "--deny-from",
            multiple=True,
            metavar="CIDR",
            help="No client from these addresses is answered, whatever allows it; may be repeated.",
        ),
        click.option(
            "--config",
            type=_PATH,
            metavar="FILE",
            help="More rules, and [[export]] tables of who may open what; TOML.",
        ),
        click.option(
            "--on-revoke",
            type=click.Choice(["close", "keep"]),
            default="close",
            show_default=True,
            help="What a reload does with a client that may no longer do what it is doing.",
        ),
        click.option(
            "--reload-interval",
            type=click.FloatRange(min=0),
            default=10.0,
            show_default=True,
            metavar="SECONDS",
            help="How often files are looked at for changes; 0: only at SIGHUP.",
        ),
    )


def _serving_options() -> Sequence[Option]:
    """What is served, where, and to how many."""
    return (
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
            "--limit",
            multiple=True,
            metavar="NAME=VALUE",
            help="One of the bounds, as README lists them (clients-per-identity, stall-timeout, "
            "...); may be repeated.",
        ),
        click.option(
            "--reconnect",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            metavar="SECONDS",
            help="How long a server that is gone is dialled anew, while requests wait; 0: not at "
            "all.",
        ),
        click.option(
            "--user",
            metavar="USER[:GROUP]",
            help="Become this user once files are read and ports bound, for good. Needs root.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            show_default=True,
        ),
    )


def _count_workers(context: click.Context, flag: click.Parameter, value: str) -> int:
    """`auto` is how many cores this process may use. Raises click.BadParameter."""
    if value == "auto":
        return len(os.sched_getaffinity(0))
    if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value)):
        raise click.BadParameter(f"{value!r} is neither a number, 1 or more, nor 'auto'.")
    return int(value)
