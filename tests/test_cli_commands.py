"""gateway.cli and gateway.serve: how the command ends, what it says, and its other commands."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import gateway
from gateway.certs.folder import renew_crl
from gateway.errors import SettingsError
from gateway.limits import Limits
from gateway.nbd.upgrades import Upgrade
from gateway.settings import Settings, TLSSettings
from tests import cli_rig
from tests.cli_rig import CA, CERT, GOOD, KEY, Run
from tests.support.gateway import ROOT

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


@pytest.mark.parametrize(
    "line", ["certs --help", "certs init --help", "check --help", "demo --help"]
)
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
    shutil.copytree("tls", "with-crl", dirs_exist_ok=True)
    renew_crl(Path("with-crl"))

    def said(line: str) -> list[tuple[int, str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert run(*line.split(), "--socket", "s", "--listen", "127.0.0.1:0").code == 0
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


class Started(NamedTuple):
    """What `serve` has handed to the gateway."""

    settings: Settings
    reread: Callable[[], Settings]


@pytest.fixture
def start(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Started]:
    """The command up to the moment at which the gateway would start."""
    made: list[Started] = []

    def run_gateway(settings: Settings, say: object, reread: Callable[[], Settings]) -> bool:
        made.append(Started(settings, reread))
        return True

    def start(line: str) -> Started:
        assert run(*shlex.split(line)) == (0, "", "")
        return made.pop()

    monkeypatch.setattr("gateway.cli.run_gateway", run_gateway)
    monkeypatch.chdir(folder)
    return start


Start = Callable[[str], Started]


@pytest.mark.parametrize(
    ("line", "workers"), [("", 1), ("--workers 1", 1), ("--workers 12", 12), ("--workers auto", 3)]
)
def test_workers(line: str, workers: int, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the number of cores that this process may use, not of those that there are."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 4, 5})
    assert start(f"{GOOD} {line}").settings.workers == workers


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
    command: str, line: str, without: list[str], start: Start
) -> None:
    flags = f"{command}--tls off --socket s --listen 127.0.0.1:0 --oldstyle {line}"
    settings = start(flags).settings
    assert settings.upgrades == set(UPGRADES) - set(without)
    assert settings.oldstyle


# ---------------------------------------------------------------- which files, which clients

DIR = {name: Path("tls", f"{name}.pem") for name in ("server-cert", "server-key", "ca-cert")}


def test_files_named_win_over_those_of_the_directory(start: Start) -> None:
    tls = start(f"{GOOD} --crl other-crl.pem --key-password-file word --tls-min 1.3").settings.tls
    assert tls == TLSSettings(
        *DIR.values(), Path("other-crl.pem"), minimum="1.3", key_password=Path("word")
    )
    tls = start(f"--tls-dir bad-crl {CERT} {KEY} {CA} --crl c.pem --socket s").settings.tls
    assert tls == TLSSettings(*DIR.values(), Path("c.pem"))


def test_pre_shared_keys(start: Start) -> None:
    line = "--psk-file keys.psk --tls-min 1.3 --socket s --allow psk=vm1"
    tls = start(line).settings.tls
    assert tls == TLSSettings(None, None, None, minimum="1.3", psk=Path("keys.psk"))


def test_pre_shared_keys_are_not_taken_because_they_are_there(
    start: Start, folder: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(folder / "tls", tmp_path / "tls")
    (directory / "keys.psk").write_text("vm1:00\n")
    tls = start(f"--tls-dir {directory} --socket s").settings.tls
    assert tls is not None
    assert (tls.psk, tls.client_ca) == (None, directory / "ca-cert.pem")


def test_revocation_and_reload(start: Start) -> None:
    settings = start(f"{GOOD} --on-revoke keep --reload-interval 0").settings
    assert (settings.on_revoke, settings.reload_interval_s) == ("keep", 0)


@pytest.mark.parametrize("command", ["", "serve "])
def test_rules_of_flags_and_file_are_added_up(command: str, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(
        'allow = ["cn=f"]\ndeny = ["cn=g"]\nallow-from = ["::2"]\ndeny-from = ["::4"]\n'
    )
    flags = "--allow cn=a --deny cn=b --allow cn=c --allow-from ::1 --deny-from ::3"
    settings = start(f"{command}{GOOD} {flags} --config {file}").settings
    rules = settings.rules
    assert [str(one) for one in rules.allow] == ["cn=a", "cn=c", "cn=f"]
    assert [str(one) for one in rules.deny] == ["cn=b", "cn=g"]
    assert [str(one) for one in rules.allow_from] == ["::1/128", "::2/128"]
    assert [str(one) for one in rules.deny_from] == ["::3/128", "::4/128"]
    assert rules.exports == ()
    assert settings.export == ""
    assert settings.config == file


def test_bounds_of_flags_win_over_those_of_the_file(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text("[limits]\nhandshakes = 7\nclients-per-identity = 8\n")
    settings = start(
        f"{GOOD} --config {file} --limit handshakes=9 --limit idle-timeout=60"
    ).settings
    assert settings.limits == Limits(handshakes=9, clients_per_identity=8, idle_timeout=60)
    assert start(GOOD).settings.limits == Limits()


def test_tables_of_exports(start: Start) -> None:
    settings = start(f"{GOOD} --config good.toml").settings
    assert [one.name for one in settings.rules.exports] == ["disk", "public"]
    assert settings.export == "disk"  # of which the URI is


# ---------------------------------------------------------------- reload


def test_a_reload_reads_the_file_again_and_keeps_the_flags(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text('allow = ["cn=a"]\n')
    line = f"{GOOD} --deny cn=z --workers 2 --on-revoke keep --config {file}"
    settings, reread = start(line)
    assert reread() == settings
    file.write_text('allow = ["cn=b"]\n[[export]]\nname = "disk"\nread-write = ["*"]\n')
    now = reread()
    assert [str(one) for one in (*now.rules.allow, *now.rules.deny)] == ["cn=b", "cn=z"]
    assert [one.name for one in now.rules.exports] == ["disk"]
    assert dataclasses.replace(now, rules=settings.rules, export="") == settings
    file.write_text('allow = ["cn=a"]\n')
    assert reread() == settings


def test_a_reload_finds_a_crl_that_has_come(start: Start, folder: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(folder / "tls", tmp_path / "tls")
    settings, reread = start(f"--tls-dir {directory} --socket s")
    (directory / "ca-crl.pem").touch()
    assert settings.tls is not None
    assert reread().tls == dataclasses.replace(settings.tls, crl=directory / "ca-crl.pem")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "it is empty"),
        ("allow = [", "not TOML"),
        ('alow = ["cn=a"]', r"\$\.alow: unknown key"),
        ('allow = ["cn=a"]', r"the last \[\[export\]\] is gone"),
        ('allow = ["uid=0"]', "uid=0: only clients of a Unix socket"),
        (None, "No such file"),
    ],
)
def test_a_reload_refuses_what_a_start_would(
    content: str | None, words: str, start: Start, tmp_path: Path
) -> None:
    """And tables that are gone: all who may enter would get what was for some."""
    file = tmp_path / "gate.toml"
    file.write_text('[[export]]\nname = "disk"\nread-only = ["cn=a"]\n')
    reread = start(f"{GOOD} --config {file}").reread
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(SettingsError, match=rf"^--(config|allow).*{words}"):
        reread()


# ---------------------------------------------------------------- check


@pytest.mark.parametrize("code", [0, 1])
def test_check_asks_about_what_serve_would_be_given(
    code: int, run: Run, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{GOOD} --config good.toml --workers 3 --log-level debug"
    asked: list[Settings] = []

    def verdict(settings: Settings, say: Callable[[str], None]) -> int:
        asked.append(settings)
        say("ok    a file")
        return code

    monkeypatch.setattr("gateway.check.run", verdict)
    assert run("check", *flags.split()) == (code, "ok    a file\n", "")
    assert asked == [start(flags).settings]


def test_nothing_but_serving_is_loaded_to_serve() -> None:
    """Commands of their own stay out of the gateway's memory, and cannot break its start."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from gateway import cli\n"
            "cli.run_gateway = lambda *_: True\n"
            "sys.argv[1:] = 'serve --tls off --socket s --listen 127.0.0.1:0'.split()\n"
            "try:\n"
            "    cli.main()\n"
            "except SystemExit as ended:\n"
            "    assert ended.code == 0\n"
            "print(*sorted(one for one in sys.modules if one.startswith('gateway.')))\n",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    loaded = done.stdout.split()
    assert "gateway.serve" in loaded
    for module in ("certs", "pki", "check", "demo", "selftest"):
        found = [one for one in loaded if one.startswith(f"gateway.{module}")]
        assert not found


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


@pytest.mark.parametrize(("within", "code"), [("1d", 0), ("90d", 1)])
def test_exit_code_of_a_command_of_certs(within: str, code: int, run: Run, pki: Path) -> None:
    outcome = run("certs", "expiring", pki, "--within", within)
    assert outcome.code == code
    assert outcome.err == ""
    assert ("client-cert.pem" in outcome.out) == bool(code)
