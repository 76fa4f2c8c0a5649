"""Certificates that change while the gateway runs: renewed, revoked, and not revoked any more."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from gateway.pki import CertificateAuthority


class Authority:
    """A `--tls-dir` at `path`, and beside it a folder for each client."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ca = CertificateAuthority.create("soak CA")
        self._serials: dict[str, int] = {}
        path.mkdir()
        self._put("ca-cert.pem", self._ca.cert_pem)
        self.renew()
        self.revoke()

    def client(self, name: str) -> Path:
        """A new client: a folder as libnbd and qemu want it."""
        credential = self._ca.issue_client(name)
        certificate = x509.load_pem_x509_certificate(credential.cert_pem)
        self._serials[name] = certificate.serial_number
        folder = self.path.parent / f"client-{name}"
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes(self._ca.cert_pem)
        (folder / "client-cert.pem").write_bytes(credential.cert_pem)
        (folder / "client-key.pem").write_bytes(credential.key_pem)
        return folder

    def renew(self) -> None:
        """Another certificate, with another key, for the gateway."""
        server = self._ca.issue_server(["localhost", "127.0.0.1"])
        # One after the other: whoever looks in between sees a pair that does not fit, and a gateway
        # that looks by its clock waits until nothing changes any more.
        self._put("server-key.pem", server.key_pem)
        self._put("server-cert.pem", server.cert_pem)

    def revoke(self, *names: str) -> None:
        """These clients, and no others, are revoked from now on."""
        serials = [self._serials[name] for name in names]
        self._put("ca-crl.pem", self._ca.revoke_list(serials))

    def _put(self, name: str, pem: bytes) -> None:
        new = self.path / f".{name}"
        new.write_bytes(pem)
        new.rename(self.path / name)
