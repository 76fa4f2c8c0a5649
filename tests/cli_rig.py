"""The command in this process until it exits, and files that are good or bad in every way."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives import serialization

from gateway.cli import main
from gateway.pki import CertificateAuthority


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that says what is wrong; nothing but click's own hint may be around it."""
        found = re.findall(r"^(?:nbd-gateway: error|Error): (.*)$", self.err, re.MULTILINE)
        assert len(found) == 1, self
        for line in self.err.splitlines():
            assert re.match(r"nbd-gateway: error: |Error: |Usage: |Try |$", line), self
        assert self.out == ""
        return str(found[0])


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, until it exits."""

    def run(*args: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nbd-gateway", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good set of files, and beside it what can be wrong with one."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(pki, folder / "tls")
    authority = CertificateAuthority.create("another CA")
    server = authority.issue_server(["localhost"])
    (folder / "other-cert.pem").write_bytes(server.cert_pem)
    (folder / "other-key.pem").write_bytes(server.key_pem)
    (folder / "other-ca.pem").write_bytes(authority.cert_pem)
    encrypted = server.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (folder / "locked-key.pem").write_bytes(encrypted)
    (folder / "garbage.pem").write_bytes(b"\x30\x82no PEM at all\n")
    (folder / "empty.pem").touch()
    (folder / "broken.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nTm90IGEgY2VydGlmaWNhdGU=\n-----END CERTIFICATE-----\n"
    )
    (folder / "good.toml").write_text(
        '[[export]]\nname = "disk"\nread-write = ["cn=vm1"]\n'
        '[[export]]\nname = "public"\nread-write = ["*"]\n'
    )
    (folder / "wrong.toml").write_text(
        '[[export]]\nname = "a"\nread-only = ["*"]\n'
        '[[export]]\nname = "b"\nread_only = ["cn=vm1"]\n'
    )
    for missing in ("server-cert.pem", "server-key.pem", "ca-cert.pem"):
        shutil.copytree(pki, folder / f"no-{missing}")
        (folder / f"no-{missing}" / missing).unlink()
    shutil.copytree(pki, folder / "bad-crl")
    (folder / "bad-crl" / "ca-crl.pem").write_text("no CRL\n")
    shutil.copytree(pki, folder / "dangling-crl")
    (folder / "dangling-crl" / "ca-crl.pem").symlink_to("/nowhere/crl.pem")
    return folder


CERT = "--cert tls/server-cert.pem"
KEY = "--key tls/server-key.pem"
CA = "--client-ca tls/ca-cert.pem"
GOOD = "--tls-dir tls --socket s --listen 127.0.0.1:0"
LONG = 108 * "x"


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder
