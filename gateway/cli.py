"""The command line: commands, logging, exit codes.

Exit codes: 0 after an orderly end, 1 for a failure, 2 for wrong usage (a flag, or a file that a
flag names). A gateway ends in order by SIGTERM and SIGINT, also while it starts; other commands
that are interrupted have not done what they were to do: 128 and the number of the signal.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
from typing import Any, Final, NoReturn

import click
import trio

import gateway
from gateway import signals
from gateway.errors import GatewayError, SettingsError
from gateway.flags import rereader, settings_of
from gateway.options import serve_options
from gateway.privileges import no_core_dumps
from gateway.serve import run_gateway

logger = logging.getLogger(__name__)

_EPILOG: Final = """
\b
Examples:
  nbd-gateway certs init tls --server-name disks.example.com
  nbd-gateway --tls-dir tls --socket /run/disk.sock
  nbd-gateway --cert server-cert.pem --key server-key.pem \\
      --client-ca ca-cert.pem --socket /run/disk.sock --read-only
  nbd-gateway --tls-dir tls --socket /run/disk.sock --allow cn=vm1
  nbd-gateway check --tls-dir tls --socket /run/disk.sock
  nbd-gateway demo

\b
Exit codes: 0 ended in order, 1 failure, 2 wrong usage.
"""

_LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"


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
    if given := _given(context):
        flag = "--" + given[0].replace("_", "-")
        raise click.UsageError(f"{flag} goes behind the command: {context.invoked_subcommand}")


@cli.command(epilog=_EPILOG)
@serve_options
def serve(**flags: Any) -> None:
    """Serve until SIGTERM or SIGINT. The same as no command."""
    _serve(**flags)


@cli.command(
    epilog="""
\b
Exit codes: 0 nothing bad, 1 something bad, 2 wrong usage.
"""
)
@serve_options
def check(*, log_level: str, **flags: Any) -> None:
    """Say of each file and rule whether it is good. Serve nobody, and dial nobody.

    Takes the same options as serve.
    """
    from gateway import check  # not needed to serve

    _log_to_stderr(log_level)
    sys.exit(check.run(settings_of(**flags), click.echo))


class _Certs(click.Group):
    """Loads its commands when it is asked for one: nobody needs them to serve."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        from gateway.certs.cli import certs

        self.commands = certs.commands


@cli.group(cls=_Certs)
def certs() -> None:
    """Issue, show, revoke and hand out the certificates that gateway and clients need."""


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

    _log_to_stderr(log_level)
    signals.hold()  # until it receives them
    trio.run(
        functools.partial(
            run, click.echo, self_test=self_test, upstream=upstream_socket, listen=listen
        )
    )


def main() -> NoReturn:
    """The `nbd-gateway` command."""
    try:
        signals.interrupt()
        try:
            code = _outcome()
        finally:
            signals.ignore()
    except signals.Interrupted as interrupted:
        code = interrupted.code
    sys.exit(code)


def _outcome() -> int:
    """The exit code."""
    try:
        no_core_dumps()  # whatever command: each may come to hold a key
        code = cli.main(prog_name="nbd-gateway", standalone_mode=False)
    except click.Abort:
        return 1
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except SettingsError as wrong:
        return _failed(wrong, 2)
    except GatewayError as failed:
        return _failed(failed, 1)
    return code if isinstance(code, int) else 0  # of context.exit(); a command returns None


def _failed(error: GatewayError, code: int) -> int:
    click.echo(f"nbd-gateway: error: {error}", err=True)
    return code


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level.upper(), format=_LOG_FORMAT, stream=sys.stderr)


def _given(context: click.Context) -> list[str]:
    """The options that were, by their names."""
    default = click.core.ParameterSource.DEFAULT
    return [name for name in context.params if context.get_parameter_source(name) is not default]


def _serve(*, log_level: str, **flags: Any) -> None:
    if not _given(click.get_current_context()):
        raise SettingsError(
            "what is to be served? Say --socket PATH (the NBD server's Unix socket), and --tls-dir "
            "DIR or --cert, --key and --client-ca\n"
            "Try `nbd-gateway demo`, which shows it at work, or `nbd-gateway --help`"
        )
    _log_to_stderr(log_level)
    signals.hold(signal.SIGHUP)  # a reload, and the files are only being loaded
    try:
        settings = settings_of(**flags)
        drained = run_gateway(settings, click.echo, rereader(settings, flags))
    except signals.Interrupted as interrupted:
        logger.info("%s: ending, before anybody was served", interrupted)
        return
    if not drained:
        logger.warning("sessions had to be cut")
        sys.exit(1)
