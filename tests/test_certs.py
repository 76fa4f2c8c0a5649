"""gateway.certs: which files `init` writes, and what is printed about them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gateway import certs
from gateway.pki import Credential, KeyType, PkiError
from gateway.pki_keys import name_of

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)
SIX = (
    *("ca-cert.pem", "server-cert.pem", "client-cert.pem"),
    *("ca/ca-key.pem", "server-key.pem", "client-key.pem"),
)
LOCAL = ("localhost", "127.0.0.1", "::1")


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below the folder: files with their content, folders with None."""
    found = folder.rglob("*")
    return {
        str(each.relative_to(folder)): None if each.is_dir() else each.read_bytes()
        for each in found
    }


# ---------------------------------------------------------------- init


def test_init_writes_six_files_and_says_which(tmp_path: Path) -> None:
    issued = certs.init(tmp_path / "tls", ["gw.example"], client_name="vm1", now=NOW)
    assert sorted(str(path.relative_to(issued.directory)) for path in issued.paths) == sorted(SIX)
    assert {name for name, content in snapshot(tmp_path / "tls").items() if content} == set(SIX)
    assert issued.server_names == ("gw.example", *LOCAL)
    certificates = []
    for pair, name, days in (
        (issued.ca, issued.ca.name, 3650),
        (issued.server, "gw.example", 397),
        (issued.client, "vm1", 90),
    ):
        certificate = x509.load_pem_x509_certificate(pair.cert.read_bytes())
        key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
        assert key.public_key() == certificate.public_key()
        assert certificate.subject.rfc4514_string() == f"CN={name}"
        assert pair.name == name
        assert pair.not_after == certificate.not_valid_after_utc == NOW + days * DAY
        assert pair.sha256 == Credential(certificate, key).sha256  # type: ignore[arg-type]
        certificates.append(certificate)
    for certificate in certificates:
        certificate.verify_directly_issued_by(certificates[0])


def test_two_authorities_never_share_a_name(tmp_path: Path) -> None:
    names = {certs.init(tmp_path / folder).ca.name for folder in "abc"}
    assert len(names) == 3
    assert all(re.fullmatch("nbd-gateway CA [0-9a-f]{8}", name) for name in names)


@pytest.mark.usefixtures("umask")
def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    directory = tmp_path / "tls"

    def modes() -> dict[str, str]:
        found = [directory, *directory.rglob("*")]
        return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in found}

    expected = {name.removeprefix("ca/"): "0o644" for name in SIX} | {"tls": "0o700", "ca": "0o700"}
    expected |= {name: "0o600" for name in ("ca-key.pem", "server-key.pem", "client-key.pem")}
    certs.init(directory)
    assert modes() == expected
    for path in directory.glob("*.pem"):
        path.chmod(0o666)
    certs.init(directory, force=True)
    assert modes() == expected


def test_keys_are_private_from_the_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, created = os.open, {}

    def spy(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            created[Path(path).name] = mode
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", spy)
    certs.init(tmp_path / "tls")
    keys = (".ca-key.pem.new", ".server-key.pem.new", ".client-key.pem.new")
    assert {name: created[name] for name in keys} == dict.fromkeys(keys, 0o600)
    assert len(created) == len(SIX)


def test_the_names_of_this_host_are_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(host: str, full: str, *given: str) -> tuple[str, ...]:
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        monkeypatch.setattr(socket, "getfqdn", lambda: full)
        return certs.init(tmp_path, given, force=True).server_names

    assert names("Disk1", "disk1.example.com") == ("disk1", "disk1.example.com", *LOCAL)
    assert names("disk1", "disk1") == ("disk1", *LOCAL)
    assert names("bad_name", "(none)") == LOCAL
    assert names("localhost", "localhost") == LOCAL
    given = ("a.example", "::1", "a.EXAMPLE")
    assert names("disk1", "disk1", *given) == ("a.example", "::1", "localhost", "127.0.0.1")


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    issued = certs.init(Path("tls"))
    assert issued.directory == tmp_path / "tls"
    assert all(path.is_absolute() and path.is_file() for path in issued.paths)


def test_missing_parents_are_made_and_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        certs.init(tmp_path / "a/b/tls")
        (tmp_path / "mine").mkdir(0o755)
        certs.init(tmp_path / "mine")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a/b", "a/b/tls", "mine")]
    assert modes == [0o755, 0o700, 0o755]


@pytest.mark.parametrize("name", SIX)
def test_nothing_is_overwritten_without_force(name: str, tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    (tmp_path / name).write_bytes(b"mine")
    before = snapshot(tmp_path)
    with pytest.raises(PkiError, match=f"already has {name}.*--force"):
        certs.init(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_dangling_link_counts_as_there(tmp_path: Path) -> None:
    (tmp_path / "server-key.pem").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PkiError, match=r"already has server-key\.pem"):
        certs.init(tmp_path)
    certs.init(tmp_path, force=True)
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "server-key.pem").is_symlink()


def test_force_replaces_the_whole_set_and_leaves_other_files(tmp_path: Path) -> None:
    certs.init(tmp_path)
    (tmp_path / "other.pem").write_bytes(b"other")
    before = snapshot(tmp_path)
    certs.init(tmp_path, force=True)
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == set(SIX)


@pytest.mark.parametrize("name", ["ca-crl.pem", "ca/revoked"])
def test_revocations_of_a_former_authority_are_replaced_too(name: str, tmp_path: Path) -> None:
    """Its CRL would make the gateway refuse the folder; without one, nobody could be revoked."""
    (tmp_path / "ca").mkdir()
    (tmp_path / name).write_bytes(b"former")
    with pytest.raises(PkiError, match=name):
        certs.init(tmp_path)
    assert snapshot(tmp_path) == {"ca": None, name: b"former"}
    issued = certs.init(tmp_path, force=True, now=NOW)
    assert (tmp_path / "ca/revoked").read_bytes() == b""
    crl = x509.load_pem_x509_crl((tmp_path / "ca-crl.pem").read_bytes())
    authority = x509.load_pem_x509_certificate(issued.ca.cert.read_bytes())
    assert crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    assert len(crl) == 0


@pytest.mark.parametrize("kind", KeyType)
def test_every_key_type(kind: KeyType, tmp_path: Path) -> None:
    issued = certs.init(tmp_path, key_type=kind)
    for path in issued.paths[1::2]:
        assert name_of(x509.load_pem_x509_certificate(path.read_bytes()).public_key()) == kind


def test_passphrases(tmp_path: Path) -> None:
    """The client's key stays open: nbdinfo and nbd-client cannot ask for a passphrase."""
    issued = certs.init(tmp_path, passwords=certs.Passwords(b"of the CA", b"of the server"))
    for pair, password in ((issued.ca, b"of the CA"), (issued.server, b"of the server")):
        assert b"ENCRYPTED" in pair.key.read_bytes()
        serialization.load_pem_private_key(pair.key.read_bytes(), password)
    serialization.load_pem_private_key(issued.client.key.read_bytes(), None)
    for line in commands(certs.next_steps(issued))[:2]:
        assert line[line.index("--key-password-file") + 1] == "FILE"


def test_further_names_of_the_server(tmp_path: Path) -> None:
    issued = certs.init(tmp_path, ["gw"], server_sans=["uri=spiffe://x/gw", "dns=b.example"])
    certificate = x509.load_pem_x509_certificate(issued.server.cert.read_bytes())
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(each.value) for each in san] == ["gw", *LOCAL, "spiffe://x/gw", "b.example"]


def test_force_works_with_the_authority_key_taken_away(tmp_path: Path) -> None:
    certs.init(tmp_path)
    (tmp_path / "ca/ca-key.pem").unlink()
    (tmp_path / "ca").rmdir()
    certs.init(tmp_path, force=True)
    assert {name for name, content in snapshot(tmp_path).items() if content} == set(SIX)


# ---------------------------------------------------------------- what to do next


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]


def test_next_steps_are_lines_to_run(tmp_path: Path) -> None:
    directory = tmp_path / "it's a b,c+&#%$HOME"
    issued = certs.init(directory, ["gw.example"])
    folder = str(directory)
    text = certs.next_steps(issued, socket="/run/my disk.sock")
    short, long, nbdinfo, qemu_img, nbd_list, nbd_client, *rest = commands(text)
    assert short == ["nbd-gateway", "--tls-dir", folder, "--socket", "/run/my disk.sock"]
    assert long == [
        *("nbd-gateway", "--cert", f"{folder}/server-cert.pem"),
        *("--key", f"{folder}/server-key.pem", "--client-ca", f"{folder}/ca-cert.pem"),
        *("--socket", "/run/my disk.sock"),
    ]
    program, uri = nbdinfo
    parts = urlsplit(uri)
    assert (program, parts.scheme, parts.netloc, parts.path) == (
        "nbdinfo",
        "nbds",
        "gw.example:10809",
        "/",
    )
    assert parse_qs(parts.query) == {"tls-certificates": [folder]}
    doubled = folder.replace(",", ",,")
    assert qemu_img == [
        *("qemu-img", "info", "--object"),
        f"tls-creds-x509,id=tls0,dir={doubled},endpoint=client",
        "--image-opts",
        "driver=nbd,host=gw.example,port=10809,export=,tls-creds=tls0",
    ]
    tls = [
        *("-cacertfile", f"{folder}/ca-cert.pem", "-certfile", f"{folder}/client-cert.pem"),
        *("-keyfile", f"{folder}/client-key.pem", "-tlshostname", "gw.example"),
    ]
    assert nbd_list == ["nbd-client", "-l", "gw.example", "10809", *tls]
    assert nbd_client == ["nbd-client", "gw.example", "10809", "/dev/nbd0", *tls]
    prefix = ["nbd-gateway", "certs"]
    assert rest == [
        [*prefix, "client", "NAME", "--dir", folder],
        [*prefix, "bundle", "client", "NAME", "--dir", folder],
        [*prefix, "crl", "--dir", folder],
        [*prefix, "revoke", f"{folder}/clients/NAME/client-cert.pem", "--dir", folder],
    ]


def test_next_steps_say_what_was_made_and_who_needs_what(tmp_path: Path) -> None:
    issued = certs.init(tmp_path / "tls", ["gw.example"], client_name="vm1", now=NOW)
    text = certs.next_steps(issued)
    for part in (
        f'CA "{issued.ca.name}", until 2039-12-31',
        "server certificate for gw.example, localhost, 127.0.0.1, ::1, until 2031-02-03",
        'client certificate "vm1", until 2030-04-02',
        "A client needs ca-cert.pem, client-cert.pem and client-key.pem",
        "A gateway elsewhere needs ca-cert.pem, server-cert.pem and server-key.pem",
        f"Keep {tmp_path}/tls/ca offline",
        "--socket /run/disk.sock",
        "it holds for 30 days, so renew it in time",
    ):
        assert part in text


def test_next_steps_for_an_export_a_port_and_an_address(tmp_path: Path) -> None:
    issued = certs.init(tmp_path, ["*.example.com", "2001:db8::1"])
    text = certs.next_steps(issued, port=1234, export="a,b/ü ?")
    _, _, nbdinfo, qemu_img, nbd_list, nbd_client, *_ = commands(text)
    parts = urlsplit(nbdinfo[1])
    assert (parts.hostname, parts.port) == ("2001:db8::1", 1234)
    assert unquote(parts.path.removeprefix("/")) == "a,b/ü ?"
    assert qemu_img[-1].endswith("host=2001:db8::1,port=1234,export=a,,b/ü ?,tls-creds=tls0")
    assert nbd_list[:4] == ["nbd-client", "-l", "2001:db8::1", "1234"]
    assert nbd_client[3:6] == ["/dev/nbd0", "-name", "a,b/ü ?"]


def test_next_steps_never_connect_to_a_wildcard(tmp_path: Path) -> None:
    issued = certs.init(tmp_path, ["*.example.com"])
    assert "localhost:10809" in certs.next_steps(issued)
    assert "a.example.com:10809" in certs.next_steps(issued, host="a.example.com")
