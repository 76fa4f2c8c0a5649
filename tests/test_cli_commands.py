"""gateway.cli and gateway.serve: how the command ends, what it says, and its other commands."""

from __future__ import annotations

import logging
import re
import shutil
import socket
from pathlib import Path

import pytest

import gateway
from gateway.nbd.upgrades import Upgrade
from gateway.pki import CertificateAuthority
from gateway.settings import Settings
from tests import cli_rig
from tests.cli_rig import CERT, KEY, Run

pytestmark = pytest.mark.timeout(60)

run, folder = cli_rig.run, cli_rig.folder

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
    monkeypatch.setattr("gateway.serve.trio.run", lambda *_: True)
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
    monkeypatch.setattr("gateway.serve.Server", made.append)
    monkeypatch.setattr("gateway.serve.trio.run", lambda *_: True)
    flags = f"{command}--tls off --socket s --listen 127.0.0.1:0 --oldstyle {line}"
    assert run(*flags.split()).code == 0
    (settings,) = made
    assert settings.upgrades == set(UPGRADES) - set(without)
    assert settings.oldstyle


@pytest.mark.parametrize(
    ("line", "workers"), [("", 1), ("--workers 1", 1), ("--workers 12", 12), ("--workers auto", 3)]
)
def test_workers(line: str, workers: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the number of cores that this process may use, not of those that there are."""
    made: list[Settings] = []

    def run_gateway(settings: Settings, _: object) -> bool:
        made.append(settings)
        return True

    monkeypatch.setattr("gateway.cli.run_gateway", run_gateway)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 4, 5})
    assert run(*f"--tls off --socket s --listen 127.0.0.1:0 {line}".split()).code == 0
    (settings,) = made
    assert settings.workers == workers


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
