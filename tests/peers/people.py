"""Clients with certificates of their own, right and wrong; and programs that know only TLS."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway.pki import CertificateAuthority, Credential
from tests.support.gateway import environment
from tests.support.peers import CLIENT_S, find
from tests.support.rawclient import C_FIXED, C_NO_ZEROES, TIMEOUT_S, Opt, option

_NOW: Final = datetime.now(UTC)
_DAY: Final = timedelta(days=1)
# Those whose certificate is refused, each named after the reason that the gateway has to give.
WRONG: Final = (
    "no_client_cert",
    "expired",
    "not_yet_valid",
    "unknown_ca",
    "wrong_eku",
    "revoked",
)
RIGHT: Final = ("writer", "reader", "stranger")  # stranger: of the right CA, and in no rule


class People:
    """Makes a folder for each, with the files that a client has; and one for the gateway."""

    def __init__(self, root: Path) -> None:
        self._root = root
        ours, other = CertificateAuthority.create("disks"), CertificateAuthority.create("others")
        self._ca = ours.cert_pem
        for name in RIGHT:
            self._put(name, ours.issue_client(name))
        past, future = (_NOW - 9 * _DAY, _NOW - _DAY), (_NOW + _DAY, _NOW + 9 * _DAY)
        for name, (begin, end) in (("expired", past), ("not_yet_valid", future)):
            self._put(name, ours.issue_client(name, not_before=begin, not_after=end))
        self._put("wrong_eku", ours.issue_client("eku", usages=[ExtendedKeyUsageOID.SERVER_AUTH]))
        self._put("no_client_cert", None)
        # It knows us, and finds no fault with its own certificate either: we have to.
        self._put("unknown_ca", other.issue_client("alien"), other.cert_pem + ours.cert_pem)
        self._put("without_our_ca", ours.issue_client("writer"), other.cert_pem)
        revoked = ours.issue_client("revoked")
        self._put("revoked", revoked)
        server = ours.issue_server(["localhost", "127.0.0.1"])
        self.tls_dir = self._folder("gateway")
        for file, pem in (
            ("ca-cert.pem", ours.cert_pem),
            ("server-cert.pem", server.cert_pem),
            ("server-key.pem", server.key_pem),
            ("ca-crl.pem", ours.revoke_list([revoked.certificate.serial_number])),
        ):
            self._write(self.tls_dir / file, pem)
        self.gnutls_1_2 = root / "gnutls"
        self.gnutls_1_2.write_text("[overrides]\ndisabled-version = tls1.3\n")

    def certificates(self, name: str) -> Path:
        return self._root / name

    def _folder(self, name: str) -> Path:
        path = self._root / name
        path.mkdir()
        return path

    def _put(self, name: str, credential: Credential | None, cas: bytes = b"") -> None:
        folder = self._folder(name)
        self._write(folder / "ca-cert.pem", cas or self._ca)
        if credential is not None:
            self._write(folder / "client-cert.pem", credential.cert_pem)
            self._write(folder / "client-key.pem", credential.key_pem)

    @staticmethod
    def _write(path: Path, pem: bytes) -> None:
        path.touch(mode=0o600)
        path.write_bytes(pem)


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(tmp_path_factory.mktemp("people"))


# ---------------------------------------------------------------- programs without NBD


@contextlib.contextmanager
def behind_starttls(port: int) -> Iterator[int]:
    """A port on which TLS begins at once: what is before it in NBD has been said to the gateway."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_join, args=(client, port), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _join(client: socket.socket, port: int) -> None:
    with client, socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as gateway:
        greeting = gateway.recv(18, socket.MSG_WAITALL)
        assert greeting[:8] == b"NBDMAGIC"
        flags = (C_FIXED | C_NO_ZEROES).to_bytes(4, "big")
        gateway.sendall(flags + option(Opt.STARTTLS))
        assert gateway.recv(20, socket.MSG_WAITALL)[12:16] == b"\0\0\0\1"
        there = threading.Thread(target=_copy, args=(client, gateway), daemon=True)
        there.start()
        _copy(gateway, client)
        there.join(TIMEOUT_S)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def openssl(port: int, certificates: Path, version: str, said: bytes = b"") -> str:
    """What `openssl s_client` prints that says these bytes inside TLS and waits for the end."""
    flags = ["-connect", f"127.0.0.1:{port}", "-quiet", "-ign_eof", f"-tls{version}"]
    flags += ["-CAfile", str(certificates / "ca-cert.pem"), "-verify_return_error"]
    if (certificates / "client-cert.pem").exists():
        flags += ["-cert", str(certificates / "client-cert.pem")]
        flags += ["-key", str(certificates / "client-key.pem")]
    return _talk([find("openssl"), "s_client", *flags], said)


def gnutls(port: int, certificates: Path, version: str, said: bytes = b"") -> str:
    """The same of `gnutls-cli`."""
    versions = f"NORMAL:-VERS-ALL:+VERS-TLS{version.replace('_', '.')}"
    flags = ["-p", str(port), "--priority", versions]
    flags += ["--x509cafile", str(certificates / "ca-cert.pem")]
    if (certificates / "client-cert.pem").exists():
        flags += ["--x509certfile", str(certificates / "client-cert.pem")]
        flags += ["--x509keyfile", str(certificates / "client-key.pem")]
    return _talk([find("gnutls-cli"), *flags, "127.0.0.1"], said)


def _talk(command: list[str], said: bytes) -> str:
    process = subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    # Its standard input stays open: at its end some leave before the answer is there.
    with process, contextlib.suppress(BrokenPipeError):
        stop = threading.Timer(CLIENT_S, process.kill)
        stop.start()
        try:
            process.stdin.write(said)
            process.stdin.flush()
        finally:
            printed = process.stdout.read()
            stop.cancel()
    return printed.decode(errors="replace")
