"""gateway.cli: every wrong flag is one clear line and exit code 2, and how the command ends."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives import serialization

import gateway
from gateway.cli import main
from gateway.nbd.upgrades import Upgrade
from gateway.pki import CertificateAuthority
from gateway.settings import Settings
from tests.support.gateway import ROOT, environment

pytestmark = pytest.mark.timeout(60)


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

# Command line (in a folder with the files above) to words that its complaint must have.
WRONG = {
    "no flag": ("", "--socket"),
    "no --socket": (f"{CERT} {KEY} {CA}", "--socket"),
    "empty --socket": ("--tls-dir tls --socket ''", "--socket: not a path"),
    "--socket too long": (f"--tls-dir tls --socket {LONG}", "--socket: 108 bytes 107"),
    "nobody decided who may enter": (
        f"{CERT} {KEY} --socket s",
        "--client-ca --allow-anonymous",
    ),
    "both decisions": (f"{CERT} {KEY} {CA} --allow-anonymous --socket s", "exclude each other"),
    "both decisions, with --tls-dir": (
        f"--tls-dir tls {CA} --allow-anonymous --socket s",
        "--client-ca --allow-anonymous",
    ),
    "no --cert": (f"{KEY} {CA} --socket s", "--cert --tls-dir"),
    "no --key": (f"{CERT} {CA} --socket s", "--key --tls-dir"),
    "no certificate at all": ("--allow-anonymous --socket s", "--cert --tls-dir"),
    "--cert is not there": (f"--cert nope.pem {KEY} {CA} --socket s", "--cert: nope.pem No such"),
    "--cert is a folder": (f"--cert tls {KEY} {CA} --socket s", "--cert: tls directory"),
    "--cert is no PEM": (f"--cert garbage.pem {KEY} {CA} --socket s", "--cert: garbage.pem PEM"),
    "--cert is empty": (f"--cert empty.pem {KEY} {CA} --socket s", "--cert: empty.pem PEM"),
    "--cert is broken": (f"--cert broken.pem {KEY} {CA} --socket s", "--cert: broken.pem"),
    "--cert is a key": (f"--cert tls/server-key.pem {KEY} {CA} --socket s", "--cert: PEM"),
    "--key is not there": (f"{CERT} --key nope.pem {CA} --socket s", "--key: nope.pem No such"),
    "--key is no PEM": (f"{CERT} --key garbage.pem {CA} --socket s", "--key: garbage.pem PEM"),
    "--key is a certificate": (f"{CERT} --key tls/server-cert.pem {CA} --socket s", "--key: PEM"),
    "--key is encrypted": (f"{CERT} --key locked-key.pem {CA} --socket s", "--key encrypted"),
    "--key of another certificate": (
        f"{CERT} --key other-key.pem {CA} --socket s",
        "--key: other-key.pem not the key tls/server-cert.pem",
    ),
    "--client-ca is not there": (
        f"{CERT} {KEY} --client-ca nope.pem --socket s",
        "--client-ca: nope.pem No such",
    ),
    "--client-ca is no PEM": (
        f"{CERT} {KEY} --client-ca garbage.pem --socket s",
        "--client-ca: garbage.pem PEM",
    ),
    "--client-ca is empty": (f"{CERT} {KEY} --client-ca empty.pem --socket s", "--client-ca: PEM"),
    "--tls-dir is not there": ("--tls-dir nope --socket s", "--tls-dir nope"),
    "--tls-dir is a file": ("--tls-dir garbage.pem --socket s", "--tls-dir garbage.pem"),
    "--tls-dir without a certificate": (
        "--tls-dir no-server-cert.pem --socket s",
        "no-server-cert.pem/server-cert.pem No such",
    ),
    "--tls-dir without a key": (
        "--tls-dir no-server-key.pem --socket s",
        "no-server-key.pem/server-key.pem No such",
    ),
    "--tls-dir without a CA": (
        "--tls-dir no-ca-cert.pem --socket s",
        "no-ca-cert.pem/ca-cert.pem No such",
    ),
    "--tls-dir with a bad CRL": ("--tls-dir bad-crl --socket s", "bad-crl/ca-crl.pem CRL"),
    "--tls-dir with a dangling CRL": (
        "--tls-dir dangling-crl --socket s",
        "dangling-crl/ca-crl.pem No such",
    ),
    "--tls off and all addresses": ("--tls off --socket s", "--tls off 127.0.0.1 unix:"),
    "--tls off and any IPv4 address": (
        "--tls off --socket s --listen 0.0.0.0:0",
        "--tls off loopback",
    ),
    "--tls off and any IPv6 address": (
        "--tls off --socket s --listen [::]:0",
        "--tls off loopback",
    ),
    "--tls off and one address too many": (
        "--tls off --socket s --listen 127.0.0.1:0 --listen :0",
        "--tls off loopback",
    ),
    "--tls off and --cert": (f"--tls off {CERT} --socket s", "--tls off"),
    "--tls off and --key": (f"--tls off {KEY} --socket s", "--tls off"),
    "--tls off and --client-ca": (f"--tls off {CA} --socket s", "--tls off"),
    "--tls off and --tls-dir": ("--tls off --tls-dir tls --socket s", "--tls off"),
    "--tls off and --allow-anonymous": ("--tls off --allow-anonymous --socket s", "--tls off"),
    "--tls no": (f"--tls no {GOOD}", "--tls no require off"),
    "--tls-min 1.1": (f"--tls-min 1.1 {GOOD}", "--tls-min 1.1 1.2 1.3"),
    "--export and --any-export": (f"--export a --any-export {GOOD}", "--export --any-export"),
    "empty --export and --any-export": (
        f"--export '' --any-export {GOOD}",
        "--export --any-export",
    ),
    "export too long": (f"--export {4097 * 'x'} {GOOD}", "--export 4096"),
    "export not UTF-8": (f"--export \udcff {GOOD}", "--export"),
    "no such upgrade": (f"--no-upgrade trim {GOOD}", "--no-upgrade trim write-zeroes block-size"),
    "upgrade in capitals": (f"--no-upgrade FUA {GOOD}", "--no-upgrade FUA"),
    "two upgrades in one": (f"--no-upgrade fua,block-size {GOOD}", "--no-upgrade fua,block-size"),
    "--oldstyle and nothing about TLS": ("--oldstyle --socket s", "--oldstyle TLS --tls off"),
    "--oldstyle with TLS": (f"--oldstyle {GOOD}", "--oldstyle TLS --tls off"),
    "--oldstyle and --tls require": (
        "--oldstyle --tls require --allow-anonymous --socket s",
        "--oldstyle TLS --tls off",
    ),
    "--oldstyle and --any-export": (
        "--oldstyle --any-export --tls off --socket s --listen 127.0.0.1:0",
        "--oldstyle --any-export",
    ),
    "--oldstyle on all addresses": (
        "--oldstyle --tls off --socket s",
        "--tls off 127.0.0.1 unix:",
    ),
    "--oldstyle on the network": (
        "--oldstyle --tls off --socket s --listen 127.0.0.1:0 --listen 0.0.0.0:0",
        "--tls off loopback",
    ),
    "port 99999": (f"{GOOD} --listen :99999", "--listen :99999"),
    "no port": (f"{GOOD} --listen localhost", "--listen localhost HOST:PORT"),
    "host of an empty label": (f"{GOOD} --listen a..b:0", "--listen a..b"),
    "host of a long label": (f"{GOOD} --listen {64 * 'a'}.b:0", "--listen aaa.b"),
    "IPv6 without brackets": (f"{GOOD} --listen ::1:10809", "--listen [::1]:10809"),
    "Unix socket too long": (f"{GOOD} --listen unix:{LONG}", "--listen 108 bytes"),
    "no connections": (f"--max-connections 0 {GOOD}", "--max-connections 0"),
    "connections in words": (f"--max-connections many {GOOD}", "--max-connections many"),
    "no time for the handshake": (f"--handshake-timeout 0 {GOOD}", "--handshake-timeout 0"),
    "handshake time is no number": (f"--handshake-timeout nan {GOOD}", "--handshake-timeout nan"),
    "negative drain time": (f"--drain-timeout -1 {GOOD}", "--drain-timeout -1"),
    "drain time is no number": (f"--drain-timeout nan {GOOD}", "--drain-timeout nan"),
    "log level": (f"--log-level loud {GOOD}", "--log-level loud debug"),
    "unknown flag": (f"--tls-max 1.3 {GOOD}", "--tls-max"),
    "flag without its value": (f"{GOOD} --socket", "--socket"),
    "unknown command": (f"{GOOD} server", "server"),
    "options before the command": ("--socket s serve --tls-dir tls", "--socket serve"),
    "options before another command": (f"--tls-min 1.3 {GOOD} demo", "goes behind demo"),
    "certs without a command": ("certs", ""),
    "certs init without a folder": ("certs init", "DIRECTORY"),
    "a bad server name": ("certs init new --server-name a_b", "server name a_b"),
}


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("line", "words"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.usefixtures("in_folder")
def test_wrong_usage(line: str, words: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cli.click.echo", echo_no_uri)
    outcome = run(*shlex.split(line))
    assert outcome.code == 2, outcome
    if not words:  # click shows the help instead
        assert "Traceback" not in outcome.err
        return
    for word in words.split():
        assert word in outcome.complaint


def echo_no_uri(message: str, *, err: bool = False) -> None:
    """A gateway that starts says so on standard output. Without this the test would wait for it."""
    assert err, f"the gateway starts: {message}"
    print(message, file=sys.stderr)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Not root for a moment, since root may read every file."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("flag", ["--cert", "--key", "--client-ca"])
def test_unreadable_file(flag: str, run: Run, pki: Path) -> None:
    names = {"--cert": "server-cert.pem", "--key": "server-key.pem", "--client-ca": "ca-cert.pem"}
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o755)
        files = {one: Path(folder, name) for one, name in names.items()}
        for path in files.values():
            path.write_bytes((pki / path.name).read_bytes())
            path.chmod(0o644)
        files[flag].chmod(0)
        arguments = [part for pair in files.items() for part in pair]
        with as_nobody():
            outcome = run(*arguments, "--socket", "s")
    assert outcome.code == 2
    assert outcome.complaint == f"{flag}: cannot read {files[flag]}: Permission denied"


# The same from outside


def command(*args: str | Path, cwd: Path = ROOT) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *map(str, args)],
        cwd=cwd,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_wrong_usage_seen_from_outside(folder: Path) -> None:
    outcome = command("--tls-dir", "tls", cwd=folder)
    assert outcome == (
        2,
        "",
        "nbd-gateway: error: --socket PATH is missing: the Unix socket of the NBD server behind\n",
    )


def test_key_with_a_passphrase_asks_nobody(folder: Path) -> None:
    """OpenSSL would ask on the terminal, and a service has none."""
    line = f"{CERT} --key locked-key.pem {CA} --socket s"
    outcome = command(*line.split(), cwd=folder)
    assert outcome.code == 2
    assert "encrypted" in outcome.complaint


# ---------------------------------------------------------------- bind failure


def test_port_in_use(run: Run, pki: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run("--tls-dir", pki, "--socket", "s", "--listen", f"127.0.0.1:{port}")
    assert outcome.code == 1
    assert outcome.complaint == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_socket_file_exists(run: Run, pki: Path, tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_text("something dear")
    outcome = run("--tls-dir", pki, "--socket", "s", "--listen", f"unix:{path}")
    assert outcome.code == 1
    assert f"unix:{path}: the file exists" in outcome.complaint
    assert path.read_text() == "something dear"


def test_no_uri_is_printed_if_one_listener_fails(run: Run, pki: Path, tmp_path: Path) -> None:
    path = tmp_path / "no" / "where"
    arguments = ["--listen", "127.0.0.1:0", "--listen", f"unix:{path}"]
    outcome = run("--tls-dir", pki, "--socket", "s", *arguments)
    assert outcome.code == 1
    assert str(path) in outcome.complaint


# ---------------------------------------------------------------- help and version


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"nbd-gateway, version {gateway.__version__}\n", "")


@pytest.mark.parametrize("line", ["--help", "-h", "serve --help", "serve -h"])
def test_help_has_examples_of_flags_that_exist(line: str, run: Run) -> None:
    code, text, err = run(*line.split())
    assert (code, err) == (0, "")
    options, examples = text.split("Examples:\n")
    assert examples.count("nbd-gateway ") >= 4
    known = set(re.findall(r"--[a-z][a-z-]+", options)) | {"--server-name"}  # of certs init
    assert set(re.findall(r"--[a-z][a-z-]+", examples)) <= known
    assert re.search(r"^ +--listen ADDR .*\[default: :10809", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("line", ["certs --help", "certs init --help", "demo --help"])
def test_help_of_the_other_commands(line: str, run: Run) -> None:
    code, text, err = run(*line.split())
    assert (code, err) == (0, "")
    assert text.startswith("Usage: nbd-gateway ")


# ---------------------------------------------------------------- decisions, said aloud


def test_default_is_all_addresses_and_the_port_of_iana(run: Run, pki: Path) -> None:
    """Not bound here, since the port may be in use: the help and Settings say it, and --tls off."""
    outcome = run("--tls", "off", "--socket", "s")
    assert ":10809 is neither loopback" in outcome.complaint


def test_what_is_announced(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The decision about clients is said aloud, and so are the revocations."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gateway.cli.trio.run", lambda *_: True)
    authority = CertificateAuthority.create("a CA")
    shutil.copytree("tls", "with-crl", dirs_exist_ok=True)
    Path("with-crl/ca-crl.pem").write_bytes(authority.revoke_list([]))

    def said(line: str) -> list[tuple[int, str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert run(*line.split(), "--socket", "s").code == 0
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    warning = logging.WARNING
    aloud = (warning, "anonymous clients are allowed: everybody may open the export")
    assert aloud in said("--tls-dir tls --allow-anonymous")
    assert aloud in said(f"{CERT} {KEY} --allow-anonymous")
    assert aloud not in said("--tls-dir tls")
    ours = (logging.INFO, "clients need a certificate of the CA in other-ca.pem")
    assert ours in said("--tls-dir tls --client-ca other-ca.pem")
    assert ours in said("--tls-dir no-ca-cert.pem --client-ca other-ca.pem")
    assert (logging.INFO, "revocations from with-crl/ca-crl.pem") in said("--tls-dir with-crl")
    assert any(level == warning and "TLS is off" in text for level, text in said("--tls off"))


UPGRADES = [one.value for one in Upgrade]


@pytest.mark.parametrize(
    ("line", "without"),
    [
        ("", []),
        *((f"--no-upgrade {one}", [one]) for one in UPGRADES),
        ("--no-upgrade fua --no-upgrade write-zeroes --no-upgrade fua", ["fua", "write-zeroes"]),
        (" ".join(f"--no-upgrade {one}" for one in UPGRADES), UPGRADES),
    ],
)
@pytest.mark.parametrize("command", ["", "serve "])
def test_upgrades_are_on_unless_switched_off(
    command: str, line: str, without: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Settings] = []
    monkeypatch.setattr("gateway.cli.Server", made.append)
    monkeypatch.setattr("gateway.cli.trio.run", lambda *_: True)
    flags = f"{command}--tls off --socket s --listen 127.0.0.1:0 --oldstyle {line}"
    assert run(*flags.split()).code == 0
    (settings,) = made
    assert settings.upgrades == set(UPGRADES) - set(without)
    assert settings.oldstyle


# ---------------------------------------------------------------- certs init


def test_certs_init(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "new"
    outcome = run("certs", "init", directory, "--server-name", "disks.example.com")
    assert outcome.code == 0
    assert outcome.err == ""
    for program in ("nbd-gateway --tls-dir", "nbdinfo", "qemu-img", "nbd-client"):
        assert program in outcome.out
    assert "disks.example.com" in outcome.out
    assert (directory / "server-key.pem").stat().st_mode & 0o777 == 0o600
    assert (directory / "ca" / "ca-key.pem").exists()


def test_certs_init_replaces_nothing_unless_forced(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "new"
    assert run("certs", "init", directory).code == 0
    former = {path: path.read_bytes() for path in directory.rglob("*.pem")}
    outcome = run("certs", "init", directory)
    assert outcome.code == 1
    assert "--force" in outcome.complaint
    assert {path: path.read_bytes() for path in directory.rglob("*.pem")} == former
    assert run("certs", "init", directory, "--force").code == 0
    assert all(path.read_bytes() != content for path, content in former.items())
