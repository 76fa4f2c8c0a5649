"""gateway.cli and gateway.flags: every wrong flag is one clear line and exit code 2."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cli_rig
from tests.cli_rig import CA, CERT, GOOD, KEY, LONG, Outcome, Run
from tests.support.gateway import ROOT, environment

pytestmark = pytest.mark.timeout(60)

run, folder, in_folder = cli_rig.run, cli_rig.folder, cli_rig.in_folder

# Command line (in a folder with the files above) to words that its complaint must have.
WRONG = {
    "no flag": ("", "what is to be served? --socket PATH --tls-dir DIR"),
    "no --socket": (f"{CERT} {KEY} {CA}", "--socket"),
    "empty --socket": ("--tls-dir tls --socket ''", "--socket: not a path"),
    "--socket too long": (f"--tls-dir tls --socket {LONG}", "--socket: 108 bytes 107"),
    "nobody decided who may enter": (
        f"{CERT} {KEY} --socket s",
        "--client-ca --allow-anonymous --psk-file",
    ),
    "a rule is no decision": (
        f"{CERT} {KEY} --socket s --allow cn=vm1 --deny-from ::1",
        "--client-ca --allow-anonymous --psk-file",
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
    "--key is encrypted": (
        f"{CERT} --key locked-key.pem {CA} --socket s",
        "--key --key-password-file",
    ),
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
    "--tls off and --crl": ("--tls off --crl empty.pem --socket s", "--tls off --crl"),
    "--tls off and --psk-file": ("--tls off --psk-file keys --socket s", "--tls off --psk-file"),
    "--tls off and a password": (
        "--tls off --key-password-file word --socket s",
        "--tls off --key-password-file",
    ),
    "--tls off and a rule": ("--tls off --allow cn=a --socket s", "--allow cn=a: --tls off uid="),
    "--tls off, uid= and all addresses": (
        "--tls off --allow uid=0 --socket s",
        "--allow uid=0: --listen unix:PATH",
    ),
    "--tls off, uid= and one address too many": (
        "--tls off --deny uid=0 --socket s --listen unix:l --listen 127.0.0.1:0",
        "--deny uid=0: --listen HOST:PORT --client-ca",
    ),
    **{
        f"--psk-file and {flag.split()[0]}": (
            f"--psk-file keys {flag} --socket s",
            f"--psk-file {flag.split()[0]} exclude each other",
        )
        for flag in (
            *(CERT, KEY, CA, "--crl c", "--key-password-file w", "--tls-dir tls"),
            "--allow-anonymous",
        )
    },
    "--psk-file and a certificate's name": (
        "--psk-file keys --allow cn=a --socket s",
        "--allow cn=a: --psk-file psk=NAME",
    ),
    "certificates and a key's name": (f"{GOOD} --deny psk=a", "--deny psk=a: --psk-file FILE"),
    "--crl and --allow-anonymous": (
        f"{CERT} {KEY} --crl c --allow-anonymous --socket s",
        "--crl --client-ca --allow-anonymous",
    ),
    "--crl, --tls-dir and --allow-anonymous": (
        "--tls-dir tls --crl c --allow-anonymous --socket s",
        "--crl --client-ca --allow-anonymous",
    ),
    "--crl is not there": (f"{GOOD} --crl nope.pem", "--crl: nope.pem No such"),
    "--crl is no PEM": (f"{GOOD} --crl garbage.pem", "--crl: garbage.pem PEM"),
    "--key-password-file is not there": (
        f"{CERT} --key locked-key.pem {CA} --key-password-file nope --socket s",
        "--key-password-file: nope No such",
    ),
    "rule and --allow-anonymous": (
        "--tls-dir tls --allow-anonymous --allow cn=a --socket s",
        "--allow cn=a: --allow-anonymous --client-ca FILE",
    ),
    "uid= for TCP": (f"{GOOD} --allow uid=0", "--allow uid=0: --listen unix:PATH"),
    "rule of no kind": (f"{GOOD} --allow vm1", "--allow vm1: KIND=VALUE cn dn dns uri"),
    "rule of a kind like another": (f"{GOOD} --deny cm=vm1", "--deny cm=vm1: did you mean cn=?"),
    "rule with nothing in it": (f"{GOOD} --allow ''", "--allow : KIND=VALUE"),
    "rule with half a label": (f"{GOOD} --allow dns=vm*.a", "--allow dns=vm*.a: label"),
    "network of no address": (f"{GOOD} --allow-from vm1", "--allow-from vm1: 192.0.2.0/24"),
    "network with host bits": (
        f"{GOOD} --deny-from 192.0.2.1/24",
        "--deny-from 192.0.2.1/24: host bits network is 192.0.2.0/24 one address 192.0.2.1",
    ),
    "IPv6 network with host bits": (
        f"{GOOD} --allow-from 2001:db8::1/32",
        "--allow-from 2001:db8::1/32: host bits network is 2001:db8::/32",
    ),
    "network for Unix sockets": (
        "--tls-dir tls --socket s --listen unix:l --allow-from ::1",
        "--allow-from ::1/128: --listen HOST:PORT",
    ),
    "--on-revoke in other words": (f"--on-revoke cut {GOOD}", "--on-revoke cut close keep"),
    "negative reload interval": (f"--reload-interval -1 {GOOD}", "--reload-interval -1"),
    "reload interval is no number": (f"--reload-interval nan {GOOD}", "--reload-interval nan"),
    "--config is not there": (f"--config nope.toml {GOOD}", "--config: nope.toml No such"),
    "--config is no TOML": (f"--config garbage.pem {GOOD}", "--config garbage.pem: not TOML"),
    "--config is empty": (f"--config empty.pem {GOOD}", "--config empty.pem: empty"),
    "--config with a wrong key": (
        f"--config wrong.toml {GOOD}",
        "--config wrong.toml: $.export[1].read_only: did you mean read-only?",
    ),
    "--config and --export": (
        f"--config good.toml --export disk {GOOD}",
        "--export [[export]] --config good.toml exclude each other",
    ),
    "--config and empty --export": (
        f"--config good.toml --export '' {GOOD}",
        "--export [[export]] --config good.toml exclude each other",
    ),
    "--config and --any-export": (
        f"--config good.toml --any-export {GOOD}",
        "--any-export [[export]]",
    ),
    "--config and --oldstyle": (
        "--config good.toml --oldstyle --tls off --socket s --listen 127.0.0.1:0",
        "--oldstyle [[export]]",
    ),
    "--config and what its rules cannot be about": (
        "--config good.toml --tls-dir tls --allow-anonymous --socket s",
        "[[export]] 'disk': cn=vm1: --allow-anonymous --client-ca FILE",
    ),
    "check without --socket": ("check --tls-dir tls", "--socket"),
    "options before check": (f"{GOOD} check", "goes behind check"),
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
    "no workers": (f"--workers 0 {GOOD}", "--workers '0' 1 or more auto"),
    "fewer than no workers": (f"--workers -1 {GOOD}", "--workers '-1' 1 or more auto"),
    "workers in words": (f"--workers x {GOOD}", "--workers 'x' 1 or more auto"),
    "workers in capitals": (f"--workers AUTO {GOOD}", "--workers 'AUTO' auto"),
    "workers in parts": (f"--workers 1.5 {GOOD}", "--workers '1.5' auto"),
    "workers in other digits": (f"--workers \u0662 {GOOD}", "--workers auto"),
    "workers of many digits": (f"--workers {5000 * '1'} {GOOD}", "--workers auto"),
    "workers of no number": (f"--workers '' {GOOD}", "--workers '' auto"),
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


@pytest.mark.parametrize(("line", "words"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.usefixtures("in_folder")
def test_wrong_usage(line: str, words: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.echo", echo_no_uri)
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
    assert "--key-password-file" in outcome.complaint


@pytest.mark.parametrize("word", ["", "wrong\n", "\nsecret\n", 5000 * "x"])
def test_password_that_does_not_fit(
    word: str, in_folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is in no complaint."""
    monkeypatch.setattr("click.echo", echo_no_uri)
    file = tmp_path / "word"
    file.write_text(word)
    line = f"--cert other-cert.pem --key locked-key.pem {CA} --key-password-file {file} --socket s"
    outcome = run(*line.split())
    assert outcome.code == 2
    assert outcome.complaint.startswith("--key")
    assert str(file) in outcome.complaint
    assert "secret" not in outcome.complaint
    assert "xxx" not in outcome.complaint


def test_password_that_fits(
    in_folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is opened, and the next thing that is wrong is said."""
    file = tmp_path / "word"
    file.write_text("secret\n")
    line = f"--cert other-cert.pem --key locked-key.pem --client-ca nope --key-password-file {file}"
    outcome = run(*line.split(), "--socket", "s")
    assert outcome.complaint == "--client-ca: cannot read nope: No such file or directory"
    monkeypatch.setattr("gateway.serve.trio.run", lambda *_: True)
    line = line.replace("nope", "tls/ca-cert.pem")
    assert run(*line.split(), "--socket", "s").code == 0
