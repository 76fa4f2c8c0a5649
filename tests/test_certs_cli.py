"""`nbd-gateway certs ...` as it is typed: its options, what it prints, and how it ends."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from pathlib import Path

import click
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gateway.certs import cli as certs_cli
from tests import cli_rig
from tests.cli_rig import Run
from tests.test_certs import SIX, snapshot

run = cli_rig.run


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """As `init` makes it, and with a client more."""
    folder = tmp_path / "tls"
    assert run("certs", "init", folder, "--server-name", "gw.example").code == 0
    assert run("certs", "client", "vm1", "--dir", folder).code == 0
    return folder


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def lasts(path: Path) -> int:
    found = certificate(path)
    return (found.not_valid_after_utc - found.not_valid_before_utc).days


# ---------------------------------------------------------------- init


def test_init_has_a_say_in_everything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ca.txt").write_text("of the CA\n")
    (tmp_path / "key.txt").write_text("of the server\n")
    folder = tmp_path / "tls"
    line = "--server-name a.example --client-name vm1 --san uri=spiffe://x/gw --key-type ed25519"
    passwords = ("--ca-password-file", tmp_path / "ca.txt")
    passwords += ("--key-password-file", tmp_path / "key.txt")
    outcome = run("certs", "init", folder, *line.split(), "--days=7", "--ca-days=70", *passwords)
    assert outcome.code == 0, outcome.err
    assert 'client certificate "vm1"' in outcome.out
    assert "certs crl" in outcome.out
    assert [lasts(folder / f"{role}-cert.pem") for role in ("ca", "server", "client")] == [70, 7, 7]
    key = (folder / "ca/ca-key.pem").read_bytes()
    assert serialization.load_pem_private_key(key, b"of the CA")
    key = (folder / "server-key.pem").read_bytes()
    assert serialization.load_pem_private_key(key, b"of the server")
    # And with the CA's passphrase it goes on.
    client = run("certs", "client", "vm2", "--dir", folder, *passwords)
    assert client.code == 0, client.err
    assert run("certs", "client", "vm3", "--dir", folder).code == 1


def test_init_with_force_says_that_other_clients_are_void(run: Run, folder: Path) -> None:
    outcome = run("certs", "init", folder, "--force")
    assert (outcome.code, outcome.err) == (
        0,
        f"What is in {folder}/clients is of the former CA: issue it again.\n",
    )


# ---------------------------------------------------------------- server and client


def test_renewing_a_server(run: Run, folder: Path) -> None:
    before = certificate(folder / "server-cert.pem")
    refused = run("certs", "server", "--dir", folder)
    assert refused.code == 1
    assert "--force" in refused.complaint
    outcome = run("certs", "server", "--dir", folder, "--force", "--days", "20")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Server certificate for gw.example, localhost, 127.0.0.1, ::1, until " in outcome.out
    after = certificate(folder / "server-cert.pem")
    assert before.serial_number != after.serial_number
    assert lasts(folder / "server-cert.pem") == 20
    cut = run("certs", "server", "b.example", "--dir", folder, "--force", "--days", "36500")
    assert "Server certificate for b.example, localhost" in cut.out
    assert ", when its CA ends\n" in cut.out


def test_the_folder_is_the_present_one_unless_said(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert run("certs", "client", "vm2", "--san", "uri=urn:x:y").code == 0
    assert (folder / "clients/vm2/client-key.pem").exists()
    monkeypatch.chdir(folder / "clients")
    outcome = run("certs", "client", "vm3")
    assert outcome.code == 1
    assert "ca/ca-key.pem is not there: name the folder" in outcome.complaint


WRONG = {
    "no such key type": ("client vm2 --key-type rsa-1024", "rsa-1024"),
    "days in letters": ("client vm2 --days abc", "'abc' is not a valid number of days"),
    "no day at all": ("client vm2 --days 0", "--days"),
    "too many days": ("crl --days 36501", "--days"),
    "a bad name": ("server a_b", "NAME: server name 'a_b'"),
    "a bad CN": (f"client {65 * 'x'}", "NAME: name longer than 64 bytes"),
    "a host as a client's name": ("client vm2 --san vm2", "--san: 'vm2': say dns=NAME"),
    "a bad URI": ("client vm2 --san uri=x", "--san: not a URI"),
    "no passphrase": ("client vm2 --key-password-file nowhere", "--key-password-file nowhere: No"),
    "no CA's passphrase": ("crl --ca-password-file nowhere", "--ca-password-file nowhere: No"),
    "nothing to revoke": ("revoke", "which certificate?"),
    "a serial number of letters": ("revoke --serial abc", "begins with 0x"),
    "a serial number too long": (f"revoke --serial 0x{41 * 'a'}", "no serial number"),
    "no file to show": ("show", "FILE"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(case: str, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    line, complaint = WRONG[case]
    outcome = run("certs", *line.split())
    assert outcome.code == 2
    assert complaint in outcome.complaint
    assert snapshot(folder) == before


# ---------------------------------------------------------------- revoke and crl


@pytest.mark.parametrize("form", ["file", "0x", "decimal", "colons"])
def test_revoking(form: str, run: Run, folder: Path) -> None:
    path = folder / "clients/vm1/client-cert.pem"
    serial = certificate(path).serial_number
    digits = f"{serial:040x}"
    colons = ":".join(digits[at : at + 2] for at in range(0, 40, 2)).upper()
    forms = {"0x": f"{serial:#X}", "decimal": f"{serial}", "colons": colons}
    arguments = [path] if form == "file" else ["--serial", forms[form]]
    outcome = run("certs", "revoke", *arguments, "--dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Revoked: {serial:#x}" in outcome.out
    assert "1 revoked, renew it before" in outcome.out
    crl = x509.load_pem_x509_crl((folder / "ca-crl.pem").read_bytes())
    assert [each.serial_number for each in crl] == [serial]
    again = run("certs", "revoke", *arguments, "--dir", folder)
    assert (again.code, again.err) == (0, "")
    assert "Nothing new" in again.out


def test_renewing_a_list(run: Run, folder: Path) -> None:
    assert "0 revoked" in run("certs", "crl", "--dir", folder, "--days", "2").out
    assert run("certs", "expiring", folder).code == 1
    assert run("certs", "crl", "--dir", folder, "--days", "60").code == 0
    assert run("certs", "expiring", folder) == (0, "", "")


def test_lists_of_other_authorities_are_spoken_of(run: Run, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run("certs", "init", other)
    run("certs", "crl", "--dir", other)
    (folder / "ca-crl.pem").write_bytes((other / "ca-crl.pem").read_bytes())
    assert "Left out: the CRL of CN=nbd-gateway CA " in run("certs", "crl", "--dir", folder).err
    with (folder / "ca-cert.pem").open("ab") as file:
        file.write((other / "ca-cert.pem").read_bytes())
    assert "Append the CRL of that CA" in run("certs", "crl", "--dir", folder).err


# ---------------------------------------------------------------- show and expiring


def test_showing(run: Run, folder: Path) -> None:
    outcome = run("certs", "show", *(folder / name for name in SIX))
    assert (outcome.code, outcome.err) == (0, "")
    assert all(f"{folder / name}: " in outcome.out for name in SIX)
    assert "\n    cn=client\n" in outcome.out
    bad = run("certs", "show", folder / "ca-cert.pem", folder / "nowhere")
    assert bad.code == 2
    assert "nowhere: No such file" in bad.complaint


def test_showing_a_folder(run: Run, folder: Path, tmp_path: Path) -> None:
    """All certificates in it, those of clients too, and nothing of its keys."""
    outcome = run("certs", "show", folder)
    assert (outcome.code, outcome.err) == (0, "")
    shown = re.findall(r"^(\S+\.pem): ", outcome.out, re.MULTILINE)
    there = sorted(str(one) for one in folder.rglob("*.pem") if not one.name.endswith("-key.pem"))
    assert sorted(set(shown)) == there
    (empty := tmp_path / "empty").mkdir()
    outcome = run("certs", "show", empty)
    assert outcome.code == 2
    assert "no certificate in this folder" in outcome.complaint


def test_revoking_a_number_that_nothing_here_has(run: Run, folder: Path) -> None:
    """The file may be lost, so it is done; and a slip of the pen is said."""
    ours = x509.load_pem_x509_certificate((folder / "client-cert.pem").read_bytes())
    outcome = run("certs", "revoke", "--dir", folder, "--serial", ours.serial_number)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Revoked: {ours.serial_number:#x} CN=client" in outcome.out
    (folder / "server-cert.pem").write_text("garbage")  # must not be in the way
    outcome = run("certs", "revoke", "--dir", folder, "--serial", "0x4d2")
    assert outcome.code == 0
    assert "Revoked: 0x4d2\n" in outcome.out
    assert f"No certificate in {folder} has the number 0x4d2: if it is mistyped" in outcome.err


@pytest.mark.parametrize(
    ("span", "code"),
    [
        *(("91d", 1), ("91", 1), ("13w", 1), ("2184h", 1)),
        *(("89d", 0), ("89", 0), ("12w", 0), ("2100h", 0), ("0", 0)),
        *(("x", 2), ("-1d", 2), ("1.5d", 2), ("", 2), ("999999d", 2), ("1m", 2)),
    ],
)
def test_the_exit_code_is_for_cron(span: str, code: int, run: Run, folder: Path) -> None:
    outcome = run("certs", "expiring", folder, f"--within={span}")
    assert outcome.code == code
    assert (outcome.out == "") == (code != 1)
    assert (outcome.err == "") == (code != 2)


def test_what_cannot_be_told_is_not_taken_for_good(run: Run, folder: Path) -> None:
    for path in (folder / "nowhere", folder / "client-key.pem"):
        outcome = run("certs", "expiring", folder, path)
        assert outcome.code == 2
        assert outcome.complaint


# ---------------------------------------------------------------- bundle


def test_bundling(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("certs", "bundle", "client", "vm1", "--dir", folder)
    assert (outcome.code, outcome.err) == (0, "")
    tar = tmp_path / "vm1.tar"
    assert tar.stat().st_mode & 0o777 == 0o600
    with tarfile.open(tar) as archive:
        assert archive.getnames() == ["ca-cert.pem", "client-cert.pem", "client-key.pem"]
    again = run("certs", "bundle", "client", "vm1", "--dir", folder)
    assert again.code == 1
    assert "already has vm1.tar" in again.complaint
    assert run("certs", "bundle", "client", "vm1", "--dir", folder, "--force").code == 0


def test_no_folder_is_made_for_a_bundle(run: Run, folder: Path, tmp_path: Path) -> None:
    """Who may look into it is not for a default to say."""
    deep = tmp_path / "deep" / "er"
    outcome = run("certs", "bundle", "client", "vm1", "--dir", folder, "-o", deep / "x.tar")
    assert outcome.code == 1
    assert f"{deep} is no folder: make it first" in outcome.complaint
    assert not deep.parent.exists()


def test_bundling_for_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout(io.TextIOWrapper):
        terminal = False

        def isatty(self) -> bool:
            return self.terminal

    stdout = Stdout(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", f"nbd certs bundle client vm1 -o - --dir {folder}".split())
    for terminal, code in ((False, 0), (True, 2)):
        Stdout.terminal = terminal
        with pytest.raises(SystemExit) as ended:
            cli_rig.main()
        assert ended.value.code == code
    content = stdout.buffer.getvalue()  # type: ignore[attr-defined]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert len(archive.getnames()) == 3


# ---------------------------------------------------------------- help


def commands(group: click.Group, *path: str) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, *path, name)
    return found


def test_the_commands() -> None:
    assert [" ".join(each) for each in commands(certs_cli.certs)] == [
        *("init", "server", "client", "revoke", "crl", "show", "expiring"),
        *("bundle", "bundle client"),
    ]


@pytest.mark.parametrize("path", [(), *commands(certs_cli.certs)], ids=" ".join)
def test_help(path: tuple[str, ...], run: Run) -> None:
    code, text, err = run("certs", *path, "--help")
    assert (code, err) == (0, "")
    assert text.startswith(f"Usage: nbd-gateway certs {' '.join(path)}".rstrip())


def test_nothing_secret_is_ever_an_argument() -> None:
    for path in commands(certs_cli.certs):
        command: click.Command = certs_cli.certs
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        for option in command.params:
            if "password" in (option.name or ""):
                assert isinstance(option.type, click.Path)
