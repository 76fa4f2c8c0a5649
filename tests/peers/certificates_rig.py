"""Servers that are given certificates, and programs that succeed or fail over them.

Servers get their listening socket from us, already bound, as systemd would give it (both nbdkit and
qemu-nbd take it as descriptor 3). So a port is never chosen twice, and nobody waits for a server:
a client that comes early waits in the backlog.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gateway import certs, pki
from tests.support.peers import find as program

TIMEOUT_S = 30
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# argv: the listening descriptor, then the command that gets it as descriptor 3.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def run(command: Sequence[str | Path] | str) -> subprocess.CompletedProcess[str]:
    """A string is given to a shell, as a reader would paste it."""
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        env={**os.environ, "PATH": PATH, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def succeeds(command: Sequence[str | Path] | str) -> str:
    done = run(command)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fails(command: Sequence[str | Path] | str) -> str:
    done = run(command)
    assert done.returncode != 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def issued(tmp_path: Path) -> certs.Issued:
    """In a folder whose name needs every kind of quoting there is."""
    names = ("gateway.test", "*.wild.test", "192.0.2.7", "2001:db8::7")
    return certs.init(tmp_path / "it's a b,c+&#%", names, client_name="vm1")


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Which server to run, and a disk of 1 MiB for it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    return program(request.param), disk


@contextlib.contextmanager
def serving(
    server: tuple[str, Path], folder: Path, host: str = "127.0.0.1", more: Sequence[str] = ()
) -> Iterator[int]:
    """Run the server with TLS and client certificates required, and `more` arguments; its port."""
    command, disk = server
    if command.endswith("nbdkit"):
        tls = ["--tls=require", "--tls-verify-peer", f"--tls-certificates={folder}"]
        arguments = [command, "-f", *tls, "file", str(disk)]
    else:
        doubled = str(folder).replace(",", ",,")
        creds = f"tls-creds-x509,id=tls0,dir={doubled},endpoint=server,verify-peer=on"
        arguments = [command, "-t", "-e", "0", "-f", "raw", "--object", creds]
        arguments += ["--tls-creds", "tls0", *more, str(disk)]
    with socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as listener:
        port: int = listener.getsockname()[1]
        number = listener.fileno()
        activated = [sys.executable, "-c", ACTIVATE, str(number), *arguments]
        process = subprocess.Popen(activated, pass_fds=[number])
    try:
        yield port
        assert process.poll() is None, "the server has gone"
    finally:
        process.kill()
        process.wait(TIMEOUT_S)


def copy_for_client(folder: Path, source: Path, *, certificate: bool = True) -> Path:
    """A folder with what a client gets: three files, or the CA's certificate alone."""
    folder.mkdir()
    names = ["ca-cert.pem", *(["client-cert.pem", "client-key.pem"] if certificate else [])]
    for name in names:
        shutil.copy(source / name, folder)
    return folder


def lay_out(
    folder: Path, authority: pki.CertificateAuthority, role: str, credential: pki.Credential
) -> Path:
    """A folder with a CA's certificate and one credential, under the usual names."""
    folder.mkdir(exist_ok=True)
    (folder / "ca-cert.pem").write_bytes(authority.cert_pem)
    (folder / f"{role}-cert.pem").write_bytes(credential.cert_pem)
    (folder / f"{role}-key.pem").write_bytes(credential.key_pem)
    return folder
