"""A server's files, and handshakes over a socket pair."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.pki import CertificateAuthority, Credential
from gateway.settings import TLSSettings
from gateway.tls import refusal

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
BOTH_VERSIONS = pytest.mark.parametrize("version", [V12, V13], ids=["TLS1.2", "TLS1.3"])


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create("test CA")


@pytest.fixture(scope="module")
def client(authority: CertificateAuthority) -> Credential:
    return authority.issue_client("backup")


@dataclass(frozen=True)
class Files:
    """A server's files, and contexts that use them."""

    folder: Path

    def put(self, name: str, *pems: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(b"".join(pems))
        return path

    def settings(self, *, anonymous: bool = False, **more: object) -> TLSSettings:
        return TLSSettings(
            self.folder / "server-cert.pem",
            self.folder / "server-key.pem",
            None if anonymous else self.folder / "ca-cert.pem",
            **more,  # type: ignore[arg-type]
        )

    def client_context(
        self, credential: Credential | None = None, version: ssl.TLSVersion | None = None
    ) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.folder / "ca-cert.pem")
        if credential is not None:
            pem = self.put("a-client.pem", credential.cert_pem, credential.key_pem)
            context.load_cert_chain(pem)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context


@pytest.fixture
def files(tmp_path: Path, authority: CertificateAuthority) -> Files:
    files = Files(tmp_path)
    server = authority.issue_server(["disks.example.com", "localhost"])
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", server.key_pem)
    files.put("ca-cert.pem", authority.cert_pem)
    return files


class Shake:
    """One handshake over a socket pair, both ends in turns, until each is done or has failed."""

    def __init__(
        self,
        server: ssl.SSLContext,
        client: ssl.SSLContext,
        session: ssl.SSLSession | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        late = {"do_handshake_on_connect": False}
        self.server = server.wrap_socket(ours, server_side=True, suppress_ragged_eofs=False, **late)
        self.client = client.wrap_socket(
            theirs, server_hostname="localhost", session=session, **late
        )
        self.server_error: ssl.SSLError | None = None
        self.client_error: ssl.SSLError | None = None
        open_ends = {self.client, self.server}
        while open_ends:
            for end in (self.client, self.server):
                if end in open_ends and self._step(end):
                    open_ends.remove(end)

    def _step(self, end: ssl.SSLSocket) -> bool:
        """Whether this end is through."""
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            if end is self.server:
                self.server_error = error
            else:
                self.client_error = error
            end.shutdown(socket.SHUT_WR)
        return True

    def __enter__(self) -> Shake:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.client.close()

    @property
    def reason(self) -> str:
        """What the gateway calls the failure. The words behind it are one line for a person."""
        assert self.server_error is not None, "the handshake succeeded"
        refused = refusal(self.server_error)
        assert refused.reason.replace("_", "").isalpha()
        assert str(refused).isprintable()
        assert len(str(refused)) > 10
        return refused.reason

    @property
    def alert(self) -> str:
        """What the client gets to see: under TLS 1.3 not before it reads."""
        if self.client_error is None:
            with pytest.raises(ssl.SSLError) as failed:
                self.client.read(1)
            self.client_error = failed.value
        return self.client_error.reason or ""


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    with Shake(server, client) as handshake:
        return handshake.reason
