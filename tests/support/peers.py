"""Real NBD programs on both sides: servers on a Unix socket, and clients with a time limit."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

import pytest

from tests.support.gateway import POLL_S, Output, environment

START_S = 20.0  # for a server to listen
CLIENT_S = 60.0  # for any one client to end; none should take a tenth of it
SYSTEM_PYTHON = "/usr/bin/python3"  # the one that has Debian's nbd module


def find(program: str | Path) -> str:
    """Where a program is. Without it the test is skipped; but where CI is set, it fails.

    Debian keeps nbd-client and nbd-server out of a user's PATH.
    """
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    if (found := shutil.which(program, path=path)) is not None:
        return found
    return missing(f"{program} is not installed (tests/peers/install gets it)")


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(POLL_S)


# ---------------------------------------------------------------- servers


class Server:
    """An NBD server that listens on the Unix socket `socket`; a context manager.

    It counts as started when it has written its pid file, which all three do once they listen: a
    probing connection would show up in what the tests count.
    """

    def __init__(self, argv: list[str | Path], socket: Path, pidfile: Path) -> None:
        self.argv = [find(argv[0]), *map(str, argv[1:])]
        self.socket = socket
        self.pidfile = pidfile
        self._process: subprocess.Popen[bytes] | None = None
        self._output = Output()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()

    def start(self) -> None:
        """Start, or start again after `kill`."""
        self.socket.unlink(missing_ok=True)
        self.pidfile.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self.argv,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output.file,
            stderr=self._output.file,
            start_new_session=True,
        )
        try:
            wait_until(self._listens, f"{self.argv[0]} to listen", START_S)
        except AssertionError as error:
            self.__exit__()
            raise AssertionError(f"{error}\n{self.log()}") from None

    def _listens(self) -> bool:
        assert self._process is not None
        if (status := self._process.poll()) is not None and not self._daemon():
            raise AssertionError(f"{self.argv[0]} ended with exit code {status}")
        with contextlib.suppress(OSError):
            return self.pidfile.read_text().endswith("\n") and self.socket.exists()
        return False

    def _daemon(self) -> bool:
        return False

    def kill(self) -> None:
        """SIGKILL to it and to all its children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log(self) -> str:
        """What it wrote on its standard output and error."""
        return self._output.text()

    def uri(self, export: str = "") -> str:
        """For a client that goes to the server directly."""
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(self.socket))}"


class Nbdkit(Server):
    """nbdkit with these arguments, at the least a plugin's name."""

    def __init__(self, directory: Path, *args: str | Path) -> None:
        sock, pid = directory / "nbdkit.sock", directory / "nbdkit.pid"
        super().__init__(["nbdkit", "-f", "-U", sock, "-P", pid, *args], sock, pid)


class QemuNbd(Server):
    """qemu-nbd with these arguments, at the least `-f FORMAT IMAGE`; any number of clients."""

    def __init__(self, directory: Path, *args: str | Path) -> None:
        sock, pid = directory / "qemu.sock", directory / "qemu.pid"
        flags: list[str | Path] = ["-t", "-e", "0", "-k", sock, f"--pid-file={pid}"]
        super().__init__(["qemu-nbd", *flags, *args], sock, pid)


class NbdServer(Server):
    """nbd-server with one export, `name`, over `image`. It always goes to the background."""

    def __init__(self, directory: Path, image: Path, *, name: str = "disk") -> None:
        sock, pid = directory / "nbd-server.sock", directory / "nbd-server.pid"
        config = directory / "nbd-server.conf"
        config.write_text(
            textwrap.dedent(f"""\
                [generic]
                unixsock = {sock}
                allowlist = true
                [{name}]
                exportname = {image}
                flush = true
                fua = true
                trim = true
                """)
        )
        super().__init__(["nbd-server", "-C", config, "-p", pid], sock, pid)

    def _daemon(self) -> bool:
        return True

    def _listens(self) -> bool:
        # Its pid file may come before its socket listens, and one connection more does no harm.
        if not super()._listens():
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int(self.pidfile.read_text()), signal.SIGKILL)
            self.pidfile.unlink()
        super().kill()


# ---------------------------------------------------------------- clients


class Client:
    """How a client reaches an NBD server: the URI, and a directory of certificates or None."""

    def __init__(self, uri: str, certificates: Path | None = None) -> None:
        self.address = uri
        self.certificates = certificates

    def with_export(self, name: str) -> Client:
        """The same, for another export."""
        split = urlsplit(self.address)
        uri = f"{split.scheme}://{split.netloc}/{quote(name, safe='')}"
        return Client(f"{uri}?{split.query}" if split.query else uri, self.certificates)

    @property
    def export(self) -> str:
        return unquote(urlsplit(self.address).path[1:])

    @property
    def uri(self) -> str:
        """For libnbd's programs."""
        if self.certificates is None:
            return self.address
        query = urlencode({"tls-certificates": self.certificates}, safe="/")
        return f"{self.address}{'&' if '?' in self.address else '?'}{query}"

    def qemu(self, **options: str) -> list[str]:
        """Arguments for a qemu program: `--object ... --image-opts driver=nbd,...`."""
        return [*self.qemu_object(), "--image-opts", self.qemu_image(**options)]

    def qemu_object(self) -> list[str]:
        if self.certificates is None:
            return []
        return [
            "--object",
            f"tls-creds-x509,id=tls0,endpoint=client,dir={self.certificates}",
        ]

    def qemu_image(self, **options: str) -> str:
        split = urlsplit(self.address)
        parts = {"driver": "nbd", "export": self.export}
        if split.hostname:
            parts |= {"server.type": "inet", "server.host": split.hostname}
            parts["server.port"] = str(split.port)
        else:
            parts |= {"server.type": "unix", "server.path": split.query.partition("socket=")[2]}
        if self.certificates is not None:
            parts["tls-creds"] = "tls0"
        parts |= {name.replace("_", "-"): value for name, value in options.items()}
        return ",".join(f"{name}={value}" for name, value in parts.items())

    def nbd_client(self, *flags: str) -> list[str]:
        """The whole command; `flags` stand before the host, as -l and -N do."""
        split = urlsplit(self.address)
        command = ["nbd-client", *flags, str(split.hostname), str(split.port)]
        if self.certificates is not None:
            for flag, file in (
                ("-cacertfile", "ca-cert.pem"),
                ("-certfile", "client-cert.pem"),
                ("-keyfile", "client-key.pem"),
            ):
                command += [flag, str(self.certificates / file)]
            command += ["-tlshostname", str(split.hostname)]
        return command


def run(
    *argv: str | Path,
    timeout_s: float = CLIENT_S,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a client to its end, whatever that is."""
    command = [find(argv[0]), *map(str, argv[1:])]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env=environment(),
        cwd=cwd,
        check=False,
    )


def check(*argv: str | Path, timeout_s: float = CLIENT_S, cwd: Path | None = None) -> str:
    """Run a client that must succeed; what it printed."""
    done = run(*argv, timeout_s=timeout_s, cwd=cwd)
    assert done.returncode == 0, f"{done.args}: exit code {done.returncode}\n{said(done)}"
    return done.stdout


def said(done: subprocess.CompletedProcess[str]) -> str:
    """All that a client printed."""
    return done.stdout + done.stderr


_PRELUDE = """\
import errno, json, os, sys, time
import nbd
args = json.loads(os.environ["ARGS"])
def connect(uri=args["uri"], **settings):
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    for name, value in settings.items():
        getattr(h, "set_" + name)(*value if isinstance(value, tuple) else (value,))
    h.connect_uri(uri)
    return h
def failed(call, *a, **k):
    try:
        call(*a, **k)
    except nbd.Error as error:
        return errno.errorcode.get(error.errnum, error.errnum)
    return None
def until(h, condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        h.poll(100)
def report(**values):
    print(json.dumps(values), flush=True)
"""


@functools.cache
def _has_libnbd() -> bool:
    return run(SYSTEM_PYTHON, "-c", "import nbd").returncode == 0


def start_nbdsh(
    script: str, client: Client, *, python: Sequence[str | Path] = (SYSTEM_PYTHON,), **args: Any
) -> subprocess.Popen[str]:
    """Start a program for libnbd. `connect`, `failed`, `until`, `report` and `args` are there."""
    if python == (SYSTEM_PYTHON,) and not _has_libnbd():
        missing(f"{SYSTEM_PYTHON} has no module nbd (tests/peers/install gets it)")
    values = json.dumps({**args, "uri": client.uri}, default=str)
    return subprocess.Popen(
        [*python, "-c", _PRELUDE + textwrap.dedent(script)],
        env={**environment(), "ARGS": values},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def nbdsh(script: str, client: Client, **args: Any) -> dict[str, Any]:
    """Run a program for libnbd that must succeed; what it reported, all in one."""
    with start_nbdsh(script, client, **args) as process:
        try:
            output, errors = process.communicate(timeout=CLIENT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, f"exit code {process.returncode}\n{output}{errors}"
    reported: dict[str, Any] = {}
    for line in output.splitlines():
        reported |= json.loads(line)
    return reported
