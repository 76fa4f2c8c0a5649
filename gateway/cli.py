"""The command line: flags to Settings, logging, exit codes. The only caller of `trio.run`.

Exit codes: 0 after an orderly end, 1 for a failure, 2 for wrong usage (a flag, or a file that a
flag names).
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import click
import trio

import gateway
from gateway.errors import GatewayError, SettingsError
from gateway.nbd.upgrades import ALL_UPGRADES, Upgrade
from gateway.server import Server
from gateway.settings import (
    DEFAULT_PORT,
    OLDSTYLE_NEEDS,
    Settings,
    TLSSettings,
    parse_listen,
    tls_files,
)

logger = logging.getLogger(__name__)

_EPILOG: Final = """
\b
Examples:
  nbd-gateway certs init tls --server-name disks.example.com
  nbd-gateway --tls-dir tls --socket /run/disk.sock
  nbd-gateway --cert server-cert.pem --key server-key.pem \\
      --client-ca ca-cert.pem --socket /run/disk.sock --read-only
  nbd-gateway demo

\b
Exit codes: 0 ended in order, 1 failure, 2 wrong usage.
"""

_LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"

Command = Callable[..., None]


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


@click.group(
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@serve_options
@click.version_option(gateway.__version__, prog_name="nbd-gateway")
@click.pass_context
def cli(context: click.Context, /, **flags: Any) -> None:
    """TLS in front of any local NBD server.

    Network clients speak NBD with STARTTLS to the gateway; the gateway speaks plain NBD to the
    server's Unix socket. No command is the same as `serve`.
    """
    if context.invoked_subcommand is None:
        _serve(**flags)
        return
    given = [
        name
        for name in flags
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise click.UsageError(f"{flag} goes behind the command: {context.invoked_subcommand}")


@cli.command(epilog=_EPILOG)
@serve_options
def serve(**flags: Any) -> None:
    """Serve until SIGTERM or SIGINT. The same as no command."""
    _serve(**flags)


@cli.group()
def certs() -> None:
    """Issue the certificates that gateway and clients need."""


@certs.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--server-name",
    "server_names",
    multiple=True,
    metavar="NAME",
    help="DNS name or address by which clients know the server; may be repeated.  [default: "
    "this host's name; localhost is always in]",
)
@click.option("--force", is_flag=True, help="Replace certificates and keys that are there.")
def init(directory: Path, server_names: tuple[str, ...], *, force: bool) -> None:
    """Issue a CA, a server and a client certificate into DIRECTORY.

    The files have the names that QEMU, nbdkit and libnbd look for. The CA's key is put apart,
    into DIRECTORY/ca.
    """
    from gateway import certs, pki  # not needed to serve

    for name in server_names:
        try:
            pki.check_server_name(name)
        except pki.PkiError as wrong:
            raise SettingsError(f"--server-name: {wrong}") from None
    issued = certs.init(directory, server_names, force=force)
    click.echo(certs.next_steps(issued))


@cli.command()
@click.option("--self-test", is_flag=True, help="Let a client try everything; exit with 0 or 1.")
@click.option(
    "--upstream-socket",
    metavar="PATH",
    help="Put the gateway in front of your own NBD server. The self-test then overwrites the "
    "first MiB of its disk for a moment: nobody else may use it meanwhile.",
)
@click.option(
    "--listen", default="127.0.0.1:0", show_default=True, metavar="ADDR", help="Loopback only."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
)
def demo(*, self_test: bool, upstream_socket: str | None, listen: str, log_level: str) -> None:
    """Run a gateway with a disk in memory, and say how to use it.

    Certificates and sockets are in a temporary directory, which is removed at the end.
    """
    from gateway.demo import run  # not needed to serve

    logging.basicConfig(level=log_level.upper(), format=_LOG_FORMAT, stream=sys.stderr)
    trio.run(
        functools.partial(
            run, click.echo, self_test=self_test, upstream=upstream_socket, listen=listen
        )
    )


def main() -> NoReturn:
    """The `nbd-gateway` command."""
    try:
        cli.main(prog_name="nbd-gateway", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        sys.exit(1)
    except click.ClickException as wrong:
        wrong.show()
        sys.exit(wrong.exit_code)
    except SettingsError as wrong:
        _fail(str(wrong), 2)
    except GatewayError as failed:
        _fail(str(failed), 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"nbd-gateway: error: {message}", err=True)
    sys.exit(code)


def _serve(*, log_level: str, **flags: Any) -> None:
    logging.basicConfig(level=log_level.upper(), format=_LOG_FORMAT, stream=sys.stderr)
    settings = _settings(**flags)
    server = Server(settings)
    _announce(settings)
    if not trio.run(_run, server):
        logger.warning("sessions had to be cut")
        sys.exit(1)


async def _run(server: Server) -> bool:
    """Run the server and print what it listens on. Raises what the server raises, ungrouped."""
    drained = False

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        nonlocal drained
        drained = await server.run(task_status=task_status)

    failure: GatewayError | None = None
    try:
        async with trio.open_nursery() as nursery:
            for uri in await nursery.start(run):
                click.echo(uri)
                logger.info("listening on %s", uri)
    except* GatewayError as group:
        failure = _first(group)
    if failure is not None:
        raise failure
    return drained


def _first(group: BaseExceptionGroup[GatewayError]) -> GatewayError:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _settings(
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


def _announce(settings: Settings) -> None:
    """Say aloud what was decided, and from which files."""
    tls = settings.tls
    if tls is None:
        logger.warning("TLS is off: whoever reaches the listener may open the export")
        return
    logger.info("certificate %s, key %s", tls.cert, tls.key)
    if tls.client_ca is None:
        logger.warning("anonymous clients are allowed: everybody may open the export")
    else:
        logger.info("clients need a certificate of the CA in %s", tls.client_ca)
    if tls.crl is not None:
        logger.info("revocations from %s", tls.crl)
