"""gateway.certs.bundle: three files, no more, and only those that let a client in."""

from __future__ import annotations

import io
import shutil
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway import certs
from gateway.certs import Passwords
from gateway.certs.bundle import bundle_client, write_bundle
from gateway.certs.folder import issue_client, revoke
from gateway.pki import PkiError

THREE = ["ca-cert.pem", "client-cert.pem", "client-key.pem"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tls"
    certs.init(folder)
    issue_client(folder, "vm1")
    return folder


def contents(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
            expected = 0o600 if member.name == "client-key.pem" else 0o644
            assert (member.isreg(), member.mode, member.uid, member.uname) == (
                True,
                expected,
                0,
                "",
            )
    return found


def test_exactly_the_three_files(folder: Path) -> None:
    for name, source in (("vm1", folder / "clients/vm1"), ("client", folder)):
        assert contents(bundle_client(folder, name)) == {
            each: (source / each).read_bytes() for each in THREE
        }


def test_other_files_beside_them_stay_behind(folder: Path) -> None:
    (folder / "clients/vm1/notes.txt").write_text("mine")
    assert sorted(contents(bundle_client(folder, "vm1"))) == THREE


def test_it_is_for_its_owner_only_and_replaces_nothing(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "vm1.any"
    write_bundle(path, b"1", force=False)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(PkiError, match=r"already has vm1\.any: replace it with --force"):
        write_bundle(path, b"2", force=False)
    assert path.read_bytes() == b"1"
    write_bundle(path, b"2", force=True)
    assert path.read_bytes() == b"2"


def test_an_unknown_client(folder: Path) -> None:
    for name in ("vm2", "Client"):
        with pytest.raises(PkiError, match=rf"clients/{name} is not there: issue it"):
            bundle_client(folder, name)
    for name in ("../tls", "..", ".", "a/b", ".new"):
        with pytest.raises(PkiError, match="cannot be the name of a folder"):
            bundle_client(folder, name)


def test_the_authoritys_key_is_not_needed(folder: Path) -> None:
    shutil.rmtree(folder / "ca")
    assert sorted(contents(bundle_client(folder, "vm1"))) == THREE


def test_what_would_not_let_the_client_in_is_refused(folder: Path, tmp_path: Path) -> None:
    source = folder / "clients/vm1"
    other = certs.init(tmp_path / "other").directory
    now = datetime.now(UTC)
    with pytest.raises(PkiError, match=r"client-cert\.pem ended on"):
        bundle_client(folder, "vm1", now + timedelta(days=91))
    with pytest.raises(PkiError, match=r"client-cert\.pem begins only on"):
        bundle_client(folder, "vm1", now - timedelta(days=1))
    for name, why in (
        ("client-key.pem", r"client-key\.pem is not the key of"),
        ("ca-cert.pem", "was not issued by a CA in the ca-cert.pem beside it"),
    ):
        good = (source / name).read_bytes()
        shutil.copy(other / name, source)
        with pytest.raises(PkiError, match=why):
            bundle_client(folder, "vm1")
        (source / name).unlink()
        with pytest.raises(PkiError, match="No such file"):
            bundle_client(folder, "vm1")
        (source / name).write_bytes(good)
    bundle_client(folder, "vm1")


@pytest.mark.parametrize("lost", [None, "ca/revoked", "ca-crl.pem"])
def test_a_revoked_client_is_refused(lost: str | None, folder: Path) -> None:
    revoke(folder, [folder / "clients/vm1/client-cert.pem"])
    if lost:
        (folder / lost).unlink()
    with pytest.raises(PkiError, match=r"client-cert\.pem is revoked: issue it again"):
        bundle_client(folder, "vm1")
    bundle_client(folder, "client")
    issue_client(folder, "vm1", force=True)
    bundle_client(folder, "vm1")


def test_an_encrypted_key_is_handed_out_as_it_is(folder: Path) -> None:
    issue_client(folder, "vm2", passwords=Passwords(None, b"secret"))
    assert b"ENCRYPTED" in contents(bundle_client(folder, "vm2"))["client-key.pem"]
