"""What `nbd-gateway demo --self-test` does: a client uses the gateway, and two must be refused."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

import gateway
from gateway.certs import Issued
from gateway.client import Client, in_words
from gateway.errors import ChannelClosed, GatewayError, PeerError
from gateway.memory_upstream import MemoryUpstream
from gateway.nbd.constants import Rep, TransmissionFlag
from gateway.nbd.pairing import Granted, Listed, Refused
from gateway.nbd.uri import tcp_uri

Say = Callable[[str], None]
"""Prints one line, or several."""

MIB: Final = 1 << 20
STEP_TIMEOUT_S: Final = 20.0  # for one step


class DemoError(GatewayError):
    """The demo cannot run, or its self-test has failed."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What runs."""

    folder: Path
    issued: Issued
    stranger: Path  # a client's directory without a client's certificate
    memory: MemoryUpstream | None  # None: the upstream is the user's
    socket: str
    host: str
    port: int

    @property
    def uri(self) -> str:
        return tcp_uri(self.host, self.port, "", tls=True)


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


class SelfTest:
    """A client of the gateway, and two that it must refuse. The first fault is a DemoError."""

    def __init__(self, say: Say, scene: Scene) -> None:
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
        client = self._connect()
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

    def _connect(self) -> Client:
        return Client(self._scene.host, self._scene.port)

    async def _open(self, client: Client) -> Granted:
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
                    f"{in_words(answer)}; is an NBD server listening on {self._scene.socket}?"
                )
            access = "read-only" if _has(answer, TransmissionFlag.READ_ONLY) else "read-write"
            done(f'export "{client.name}": {in_units(answer.size)}, {access}')
        return answer

    async def _use(self, client: Client, granted: Granted) -> None:
        minimum = client.sizes.minimum
        length = min(MIB, granted.size) // minimum * minimum
        with self._steps.step("read") as done:
            before = await client.read(length)
            done(f"the first {in_units(length)}")
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

    async def _write(self, client: Client, granted: Granted, length: int) -> None:
        fresh = secrets.token_bytes(length)
        with self._steps.step("write") as done:
            await client.write(fresh)
            done(f"{in_units(length)} of random bytes in their place")
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

    async def _write_and_put_back(self, client: Client, granted: Granted, before: bytes) -> None:
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
        with self._steps.step("refuse") as done, contextlib.closing(self._connect()) as client:
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
                raise DemoError(f"a client without a certificate got in: {in_words(answer)}")

    async def _refuse_without_tls(self) -> None:
        with self._steps.step("refuse") as done, contextlib.closing(self._connect()) as client:
            await client.greet()
            answer = await client.go("")
            if not (isinstance(answer, Refused) and answer.kind == Rep.ERR_TLS_REQD):
                raise DemoError(f"a client without TLS got another answer: {in_words(answer)}")
            await client.abort()
            done("a client without TLS: NBD_REP_ERR_TLS_REQD")


def _own_command() -> str:
    """How the user called us, for a line to copy."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m gateway"
    on_path = shutil.which(called.name)
    if on_path is not None and called.exists() and os.path.samefile(on_path, called):
        return called.name
    return shlex.quote(sys.argv[0])


def in_units(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if count and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def _client_context(scene: Scene, *, certificate: bool) -> ssl.SSLContext:
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
