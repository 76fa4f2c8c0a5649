"""`nbd-gateway demo`: the real gateway, with all that it needs around it made for the occasion.

One process and one temporary directory hold the certificates, a plain NBD server in memory (or
that of the user) and the gateway in front. Then it is the user's turn, or the self-test's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import trio

from gateway import certs, signals
from gateway.errors import GatewayError, SettingsError
from gateway.memory_upstream import MemoryUpstream, new_disk
from gateway.selftest import MIB, DemoError, Say, Scene, SelfTest, in_units
from gateway.server import Server
from gateway.settings import (
    ListenTCP,
    Settings,
    TLSSettings,
    check_socket_path,
    parse_listen,
)

DISK_SIZE: Final = 64 * MIB
DRAIN_TIMEOUT_S: Final = 5.0

# What nbdinfo 1.14 says when the gateway has refused it for want of a certificate.
NO_CERTIFICATE_ERROR: Final = (
    "nbdinfo: nbd_connect_uri: gnutls_record_recv: A TLS fatal alert has been received."
)


def disks() -> MemoryUpstream:
    """The demo's own upstream."""
    return MemoryUpstream({name: new_disk(DISK_SIZE) for name in ("", "scratch")})


async def run(
    say: Say,
    *,
    self_test: bool = False,
    upstream: str | MemoryUpstream | None = None,
    listen: str = "127.0.0.1:0",
) -> None:
    """The demo, until SIGINT, SIGTERM or SIGHUP, or to the end of the self-test.

    `upstream` is the Unix socket of a running server, or a server to start; None is `disks()`.
    The temporary directory is removed on every path. Raises SettingsError, DemoError (also for a
    self-test that fails), PkiError and ListenError.
    """
    address = _loopback(listen)
    if isinstance(upstream, str):
        check_socket_path("--upstream-socket", upstream)
    failure: BaseException | None = None
    stop = trio.CancelScope()
    try:
        # From before the directory exists until after it is gone. While the gateway serves, it
        # takes SIGINT and SIGTERM itself, as it does without the demo.
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as came:
            signals.release()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on, came, stop)
                with _temporary_directory() as folder:
                    await _run_in(folder, say, self_test, upstream or disks(), address, stop)
                nursery.cancel_scope.cancel()
    except* GatewayError as group:
        failure = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
    if failure is not None:
        raise failure
    if self_test and stop.cancelled_caught:
        raise DemoError("the self-test was interrupted")
    if not self_test and not stop.cancel_called:  # else the terminal may be gone
        say("\nThe gateway has ended; everything is removed.")


def _loopback(listen: str) -> ListenTCP:
    address = parse_listen(listen)
    if isinstance(address, ListenTCP) and address.host is not None:
        with contextlib.suppress(ValueError):
            if address.host == "localhost" or ipaddress.ip_address(address.host).is_loopback:
                return address
    raise SettingsError(
        f"--listen {listen}: the demo is for this machine only: use 127.0.0.1:PORT or [::1]:PORT"
    )


async def _cancel_on(came: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in came:
        scope.cancel()


@contextlib.contextmanager
def _temporary_directory() -> Iterator[Path]:
    try:
        directory = tempfile.TemporaryDirectory(prefix="nbd-gateway-demo-")  # mode 0700
    except OSError as error:
        raise DemoError(f"cannot make a temporary directory: {error.strerror}") from error
    with directory as path:
        yield Path(path)


async def _run_in(
    folder: Path,
    say: Say,
    self_test: bool,
    upstream: str | MemoryUpstream,
    address: ListenTCP,
    stop: trio.CancelScope,
) -> None:
    """The demo in a directory of its own, until `stop` is cancelled."""
    assert address.host is not None
    issued = certs.init(
        folder / "tls",
        ["localhost", address.host],
        client_name="demo",
        ca_days=1,
        server_days=1,
        client_days=1,
    )
    stranger = folder / "stranger"
    stranger.mkdir()
    shutil.copy(issued.ca.cert, stranger)
    path = upstream if isinstance(upstream, str) else str(folder / "upstream.sock")
    check_socket_path("TMPDIR", path)
    server = Server(
        Settings(
            socket=path,
            tls=TLSSettings(issued.server.cert, issued.server.key, issued.ca.cert),
            listen=(address,),
            export=None,
            drain_timeout_s=DRAIN_TIMEOUT_S,
        )
    )

    async def serve(task_status: trio.TaskStatus[list[str]]) -> None:
        await server.run(handle_signals=not self_test, task_status=task_status)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        memory = upstream if isinstance(upstream, MemoryUpstream) else None
        if memory is not None:
            await nursery.start(memory.serve, path)
        uris: list[str] = await nursery.start(serve)
        at = urlsplit(uris[0])
        assert at.hostname is not None
        assert at.port is not None
        scene = Scene(folder, issued, stranger, memory, path, at.hostname, at.port)
        with stop:  # the client alone: what it still has to tidy up needs a gateway
            if self_test:
                await SelfTest(say, scene).run()
            else:
                say(_what_runs(scene))
                await trio.sleep_forever()
        nursery.cancel_scope.cancel()


# -- for the user


def _what_runs(scene: Scene) -> str:
    tls, q = scene.issued.directory, shlex.quote
    client = certs.client_commands(tls, scene.host, scene.port)
    commands = [client.nbdinfo, client.qemu_img, client.nbd_client_list]
    if scene.memory is not None:  # a user's disk may be large, and is not to be written
        scratch = certs.client_commands(tls, scene.host, scene.port, "scratch")
        writing = scratch.qemu_img.removeprefix("qemu-img info")
        uri = scratch.nbdinfo.removeprefix("nbdinfo ")
        commands[1:1] = [
            f"qemu-io{writing} -c 'write -P 0x5a 1M 1M' -c 'read -P 0x5a 1M 1M'",
            f"nbdcopy {uri} {q(str(scene.folder / 'copy.img'))}",
        ]
    refused = certs.client_commands(scene.stranger, scene.host, scene.port).nbdinfo
    shown = "\n".join(f"    {command}" for command in commands)
    missing = "" if os.path.exists(scene.socket) else "  (not there yet: start it)"
    return f"""\
The gateway is running.

  gateway       {scene.uri}  (TLS; clients need a certificate)
  NBD server    {scene.socket}  (plain){missing}
  disks         {_disks_in_words(scene)}
  certificates  {tls}  (CA, server, client "demo"; for 24 hours)

Try it from another terminal (Debian packages: libnbd-bin, qemu-utils, nbd-client):

{shown}

This one must fail, because its directory holds no client certificate:

    {refused}

and nbdinfo will say:

    {NO_CERTIFICATE_ERROR}

Ctrl-C removes everything."""


def _disks_in_words(scene: Scene) -> str:
    if scene.memory is None:
        return "all that the server offers"
    shown = [f'"{name}" ({in_units(len(disk))})' for name, disk in scene.memory.exports.items()]
    return f"{', '.join(shown)}, in memory"
