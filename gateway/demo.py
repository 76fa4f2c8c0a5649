"""`nbd-gateway demo`: the real gateway, with all that it needs around it made for the occasion.

One process and one temporary directory hold the certificates, a plain NBD server in memory (or
that of the user) and the gateway in front. Then it is the user's turn, or the self-test's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import trio

import gateway
from gateway import pki
from gateway.errors import ChannelClosed, GatewayError, PeerError, SettingsError
from gateway.memory_upstream import MemoryUpstream, new_disk
from gateway.nbd.constants import (
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    Error,
    Info,
    Rep,
    TransmissionFlag,
)
from gateway.nbd.handshake import Greeted, Handshake
from gateway.nbd.pairing import Acked, Answer, Granted, Listed, Refused
from gateway.nbd.uri import tcp_uri
from gateway.nbd.wire import (
    DEFAULT_BLOCK_SIZES,
    REQUEST,
    SIMPLE_REPLY,
    Inbox,
    disconnect_request,
    rep_name,
)
from gateway.server import Server
from gateway.settings import (
    ListenTCP,
    Settings,
    TLSSettings,
    check_socket_path,
    parse_listen,
)
from gateway.transport import Channel

Say = Callable[[str], None]
"""Prints one line, or several."""

MIB: Final = 1 << 20
DISK_SIZE: Final = 64 * MIB
DRAIN_TIMEOUT_S: Final = 5.0
STEP_TIMEOUT_S: Final = 20.0  # for one step of the self-test

# What nbdinfo 1.14 says when the gateway has refused it for want of a certificate.
NO_CERTIFICATE_ERROR: Final = (
    "nbdinfo: nbd_connect_uri: gnutls_record_recv: A TLS fatal alert has been received."
)


class DemoError(GatewayError):
    """The demo cannot run, or its self-test has failed."""


@dataclass(frozen=True, slots=True)
class _Scene:
    """What runs."""

    folder: Path
    issued: pki.Issued
    stranger: Path  # a client's directory without a client's certificate
    memory: MemoryUpstream | None  # None: the upstream is the user's
    socket: str
    host: str
    port: int

    @property
    def uri(self) -> str:
        return tcp_uri(self.host, self.port, "", tls=True)


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
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on, signals, stop)
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


async def _cancel_on(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
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
    issued = pki.init(
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
        scene = _Scene(folder, issued, stranger, memory, path, at.hostname, at.port)
        with stop:  # the client alone: what it still has to tidy up needs a gateway
            if self_test:
                await _SelfTest(say, scene).run()
            else:
                say(_what_runs(scene))
                await trio.sleep_forever()
        nursery.cancel_scope.cancel()


# -- for the user


def _what_runs(scene: _Scene) -> str:
    tls, q = scene.issued.directory, shlex.quote
    client = pki.client_commands(tls, scene.host, scene.port)
    commands = [client.nbdinfo, client.qemu_img, client.nbd_client_list]
    if scene.memory is not None:  # a user's disk may be large, and is not to be written
        scratch = pki.client_commands(tls, scene.host, scene.port, "scratch")
        writing = scratch.qemu_img.removeprefix("qemu-img info")
        uri = scratch.nbdinfo.removeprefix("nbdinfo ")
        commands[1:1] = [
            f"qemu-io{writing} -c 'write -P 0x5a 1M 1M' -c 'read -P 0x5a 1M 1M'",
            f"nbdcopy {uri} {q(str(scene.folder / 'copy.img'))}",
        ]
    refused = pki.client_commands(scene.stranger, scene.host, scene.port).nbdinfo
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


def _disks_in_words(scene: _Scene) -> str:
    if scene.memory is None:
        return "all that the server offers"
    shown = [f'"{name}" ({_bytes(len(disk))})' for name, disk in scene.memory.exports.items()]
    return f"{', '.join(shown)}, in memory"


def _bytes(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if count and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def _own_command() -> str:
    """How the user called us, for a line to copy."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m gateway"
    on_path = shutil.which(called.name)
    if on_path is not None and called.exists() and os.path.samefile(on_path, called):
        return called.name
    return shlex.quote(sys.argv[0])


# -- a client


class _Client:
    """One NBD client of the gateway: simple replies, one request at a time. `close` it."""

    def __init__(self, scene: _Scene) -> None:
        # Never waits: the listener is in this process, and the kernel accepts for it.
        sock = socket.create_connection((scene.host, scene.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._host = scene.host
        self._handshake = Handshake()
        self._inbox = Inbox("upstream")
        self._cookie = 0
        self.channel = Channel(sock)
        self.sizes = DEFAULT_BLOCK_SIZES
        self.name = ""

    def close(self) -> None:
        self.channel.close()

    async def greet(self) -> None:
        greeted = await self._answer()
        assert isinstance(greeted, Greeted)
        await self.channel.send_all(greeted.reply)

    async def start_tls(self, context: ssl.SSLContext) -> str:
        """Returns TLS version and cipher suite."""
        answer = await self._ask(self._handshake.starttls())
        if not isinstance(answer, Acked):
            raise DemoError(f"STARTTLS was refused: {_in_words(answer)}")
        self.channel = tls = await self.channel.start_tls(
            context, server_side=False, server_hostname=self._host
        )
        cipher = tls.tls.cipher()
        return f"{tls.tls.version()}, {cipher[0] if cipher else 'no cipher'}"

    async def go(self, name: str) -> Answer:
        answer = await self._ask(self._handshake.go(name, (Info.BLOCK_SIZE,)))
        if isinstance(answer, Granted):
            self.name, self.sizes = name, answer.block_sizes or self.sizes
        return answer

    async def list_exports(self) -> Answer:
        return await self._ask(self._handshake.list_exports())

    async def abort(self) -> None:
        await self.channel.send_all(self._handshake.abort())

    async def read(self, length: int) -> bytes:
        """The first `length` bytes of the disk."""
        parts = [await self._request(Cmd.READ, *piece) for piece in self._pieces(length)]
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Write to the beginning of the disk."""
        for offset, length in self._pieces(len(data)):
            await self._request(Cmd.WRITE, offset, length, data[offset : offset + length])

    async def flush(self) -> None:
        await self._request(Cmd.FLUSH, 0, 0)

    async def disconnect(self) -> None:
        await self.channel.send_all(disconnect_request())
        if await self.channel.receive() or self.channel.truncated:
            raise DemoError("the answer to NBD_CMD_DISC was not an orderly end of TLS")

    def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
        step = min(self.sizes.maximum, MIB) // self.sizes.minimum * self.sizes.minimum
        for offset in range(0, length, step):
            yield offset, min(step, length - offset)

    async def _ask(self, option: bytes) -> Answer:
        await self.channel.send_all(option)
        answer = await self._answer()
        assert not isinstance(answer, Greeted)
        return answer

    async def _answer(self) -> Greeted | Answer:
        while True:
            data = await self.channel.receive()
            if not data:
                raise self._handshake.closed()
            if (answer := self._handshake.receive(data)) is not None:
                return answer

    async def _request(self, kind: Cmd, offset: int, length: int, payload: bytes = b"") -> bytes:
        self._cookie += 1
        request = REQUEST.pack(REQUEST_MAGIC, 0, kind, self._cookie, offset, length)
        await self.channel.send_all(request + payload)
        magic, error, cookie = SIMPLE_REPLY.unpack(await self._take(SIMPLE_REPLY.size))
        if (magic, cookie) != (SIMPLE_REPLY_MAGIC, self._cookie):
            raise PeerError("upstream", f"reply with magic {magic:#x} and cookie {cookie:#x}")
        if error:
            known = error in frozenset(Error)
            raise DemoError(f"NBD_CMD_{kind.name}: {Error(error).name if known else error}")
        return await self._take(length) if kind == Cmd.READ else b""

    async def _take(self, count: int) -> bytes:
        while (taken := self._inbox.take(count)) is None:
            data = await self.channel.receive()
            if not data:
                raise PeerError("upstream", "closed in the middle of a reply")
            self._inbox.append(data)
        return taken


def _in_words(answer: Answer) -> str:
    if isinstance(answer, Refused):
        return rep_name(answer.kind) + (f', "{answer.text}"' if answer.text.isprintable() else "")
    return type(answer).__name__


# -- the self-test


class _Steps:
    """Prints one line for each step, and turns what goes wrong in it into a DemoError."""

    def __init__(self, say: Say) -> None:
        self._say = say

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Yields what takes the result in words. The step has STEP_TIMEOUT_S."""
        found: list[str] = []
        try:
            with trio.fail_after(STEP_TIMEOUT_S):
                yield found.append
        except (GatewayError, OSError, trio.TooSlowError) as error:
            reason = _why(error)
            self._say(f"  FAILED  {name:<9}  {reason}")
            raise DemoError(f"the self-test has failed at {name!r}: {reason}") from error
        self._say(f"  ok      {name:<9}  {found[0]}")


def _why(error: Exception) -> str:
    match error:
        case PeerError():
            return f"the gateway: {error.what}"
        case ChannelClosed():
            return f"the connection broke: {error}"
        case ssl.SSLCertVerificationError():
            return f"the gateway's certificate: {error.verify_message}"
        case trio.TooSlowError():
            return f"nothing for {STEP_TIMEOUT_S:g} s"
        case ssl.SSLError():
            return f"TLS: {error.reason or error}"
        case OSError():
            return error.strerror or str(error)
        case _:
            return str(error)


class _SelfTest:
    """A client of the gateway, and two that it must refuse. The first fault is a DemoError."""

    def __init__(self, say: Say, scene: _Scene) -> None:
        self._say = say
        self._scene = scene
        self._steps = _Steps(say)

    async def run(self) -> None:
        scene = self._scene
        behind = "NBD server in memory" if scene.memory else scene.socket
        self._say(
            f"nbd-gateway {gateway.__version__}, self-test: reads and writes a disk through the "
            "gateway, all on this machine.\n\n"
            f"  client ==TLS==> gateway on {scene.uri} --plain, Unix socket--> {behind}\n"
        )
        client = _Client(scene)
        try:
            granted = await self._open(client)
            await self._use(client, granted)
        finally:
            client.close()
        await self._refuse_without_certificate()
        await self._refuse_without_tls()
        again = "" if scene.memory else f" --upstream-socket {shlex.quote(scene.socket)}"
        self._say(
            "\nAll is well: data comes through unharmed, and who has no certificate stays out.\n"
            "Next, try it with nbdinfo, nbdcopy or qemu-img. This keeps it running and tells how:\n"
            f"\n    {_own_command()} demo{again}"
        )

    async def _open(self, client: _Client) -> Granted:
        with self._steps.step("connect") as done:
            await client.greet()
            words = await client.start_tls(_client_context(self._scene, certificate=True))
            done(f"{words}; certificates verified on both sides")
        with self._steps.step("open") as done:
            answer = await client.go("")
            if isinstance(answer, Refused):  # a server without a default export
                listed = await client.list_exports()
                if isinstance(listed, Listed) and listed.exports and listed.exports[0].name:
                    answer = await client.go(listed.exports[0].name)
            if not isinstance(answer, Granted):
                raise DemoError(
                    f"{_in_words(answer)}; is an NBD server listening on {self._scene.socket}?"
                )
            access = "read-only" if _has(answer, TransmissionFlag.READ_ONLY) else "read-write"
            done(f'export "{client.name}": {_bytes(answer.size)}, {access}')
        return answer

    async def _use(self, client: _Client, granted: Granted) -> None:
        minimum = client.sizes.minimum
        length = min(MIB, granted.size) // minimum * minimum
        with self._steps.step("read") as done:
            before = await client.read(length)
            done(f"the first {_bytes(length)}")
        if _has(granted, TransmissionFlag.READ_ONLY) or not length:
            why = "is read-only" if length else "is too small"
            self._say(f"  --      write      left out: the disk {why}")
        else:
            # Not to be cut short by Ctrl-C; each step has its own limit.
            with trio.CancelScope(shield=True):
                if self._scene.memory is not None:
                    await self._write(client, granted, length)
                else:
                    await self._write_and_put_back(client, granted, before)
        with self._steps.step("leave") as done:
            await client.disconnect()
            done("the connection ended in order")

    async def _write(self, client: _Client, granted: Granted, length: int) -> None:
        fresh = secrets.token_bytes(length)
        with self._steps.step("write") as done:
            await client.write(fresh)
            done(f"{_bytes(length)} of random bytes in their place")
        with self._steps.step("flush") as done:
            if _has(granted, TransmissionFlag.SEND_FLUSH):
                await client.flush()
                done("acknowledged")
            else:
                done("left out: the server does not offer it")
        with self._steps.step("read back") as done:
            _same(await client.read(length), fresh)
            done("the same bytes")
        if self._scene.memory is not None:
            with self._steps.step("memory") as done:
                _same(bytes(self._scene.memory.exports[client.name][:length]), fresh)
                done("the NBD server itself holds the same bytes")

    async def _write_and_put_back(self, client: _Client, granted: Granted, before: bytes) -> None:
        """The disk is the user's: whatever happens, it gets its bytes back, or the user does."""
        with self._steps.step("save") as done:
            saved = _save(before)
            done(f"in {saved}, until they are back")
        try:
            await self._write(client, granted, len(before))
        finally:
            try:
                with self._steps.step("put back") as done:
                    await client.write(before)
                    if _has(granted, TransmissionFlag.SEND_FLUSH):
                        await client.flush()
                    _same(await client.read(len(before)), before)
                    done("the disk is as it was before")
            except DemoError as error:
                raise DemoError(f"{error}; what the disk began with is in {saved}") from error
            os.unlink(saved)

    async def _refuse_without_certificate(self) -> None:
        with self._steps.step("refuse") as done, contextlib.closing(_Client(self._scene)) as client:
            await client.greet()
            try:
                await client.start_tls(_client_context(self._scene, certificate=False))
                answer = await client.go("")  # TLS 1.3 tells a client only now
            except (ssl.SSLError, ChannelClosed) as refused:
                _, alert, words = _why(refused).rpartition("ALERT_")
                if not alert:
                    raise
                alert = words.lower().replace("_", " ")
                done(f'a client without a certificate: TLS alert "{alert}"')
            else:
                raise DemoError(f"a client without a certificate got in: {_in_words(answer)}")

    async def _refuse_without_tls(self) -> None:
        with self._steps.step("refuse") as done, contextlib.closing(_Client(self._scene)) as client:
            await client.greet()
            answer = await client.go("")
            if not (isinstance(answer, Refused) and answer.kind == Rep.ERR_TLS_REQD):
                raise DemoError(f"a client without TLS got another answer: {_in_words(answer)}")
            await client.abort()
            done("a client without TLS: NBD_REP_ERR_TLS_REQD")


def _client_context(scene: _Scene, *, certificate: bool) -> ssl.SSLContext:
    """Verifies the gateway's certificate, its name included."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(scene.issued.ca.cert)
    if certificate:
        context.load_cert_chain(scene.issued.client.cert, scene.issued.client.key)
    return context


def _has(granted: Granted, flag: TransmissionFlag) -> bool:
    return bool(granted.flags & flag)


def _same(got: bytes, wanted: bytes) -> None:
    if got != wanted:
        at = next(i for i, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1])
        raise DemoError(f"other bytes than were written, from offset {at} on")


def _save(data: bytes) -> str:
    """Put bytes into a new file, for its owner only. Returns its path."""
    descriptor, path = tempfile.mkstemp(prefix="nbd-gateway-saved-")
    with open(descriptor, "wb") as file:
        file.write(data)
    return path
