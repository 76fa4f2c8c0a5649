"""deploy/nbd-gateway.service: what it runs works, and is checked with the flags it runs with."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gateway import ROOT, environment

UNIT = ROOT / "deploy" / "nbd-gateway.service"
README = ROOT / "deploy" / "README.md"
COMMAND = "/usr/local/bin/nbd-gateway"
# The shell's own: a small Debian has no /bin/kill, which is in procps.
HANG_UP = "/bin/sh -c 'kill -HUP ${MAINPID}'"
TLS_DIR = "/etc/nbd-gateway/tls"


def lines(text: str, key: str) -> list[str]:
    """What is set by this key, as systemd takes it: an empty one takes back those before it."""
    values = [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]
    return values[max((i + 1 for i, one in enumerate(values) if not one), default=0) :]


def drop_in() -> str:
    """The one that the README gives for a password as a credential."""
    _, _, text = README.read_text().partition("    [Service]\n")
    block = text.partition("\n\n")[0]
    return "".join(f"{line.strip()}\n" for line in ["[Service]", *block.splitlines()])


def test_the_gateway_is_checked_with_its_own_flags() -> None:
    unit = UNIT.read_text()
    (start,) = lines(unit, "ExecStart")
    flags = start.removeprefix(f"{COMMAND} ")
    assert lines(unit, "ExecStartPre") == [f"{COMMAND} check {flags}"]
    # In this order: if the first one fails, systemd does not come to the second.
    assert lines(unit, "ExecReload") == [f"{COMMAND} check {flags}", HANG_UP]


def test_files_are_read_in_place() -> None:
    """Credentials are copies of the start: neither a reload nor its check would see new ones."""
    unit = UNIT.read_text()
    assert lines(unit, "LoadCredential") == []
    assert "%d" not in unit
    assert lines(unit, "User") == ["nbd-gateway"]  # to whom the key can belong
    assert lines(unit, "ProtectSystem") == ["strict"]  # and who cannot change it for all that


def test_the_drop_in_of_the_readme() -> None:
    both = UNIT.read_text() + drop_in()
    (start,) = lines(both, "ExecStart")
    flags = start.removeprefix(f"{COMMAND} ")
    assert "--key-password-file %d/key-password" in flags
    assert lines(both, "ExecStartPre") == [f"{COMMAND} check {flags}"]
    assert lines(both, "ExecReload") == [HANG_UP]
    (credential,) = lines(both, "LoadCredentialEncrypted")
    assert credential.startswith("key-password:/etc/nbd-gateway/")


@pytest.mark.parametrize("extra", [False, True], ids=["unit", "with the drop-in"])
def test_systemd_takes_it(extra: bool, tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    # It looks whether commands are there: any will do.
    unit.write_text(UNIT.read_text().replace(COMMAND, "/bin/true"))
    if extra:
        folder = tmp_path / f"{UNIT.name}.d"
        folder.mkdir()
        (folder / "override.conf").write_text(drop_in().replace(COMMAND, "/bin/true"))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(unit)],
        env={**environment(), "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_exposure_is_what_is_told(tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        [analyze, "security", "--offline=yes", str(UNIT)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r"Overall exposure level for nbd-gateway.service: (\S+)", done.stdout)
    assert found is not None, done
    told = re.search(r"gives the unit (\S+) of 10 .* by systemd 252", README.read_text())
    assert told is not None
    assert float(found[1]) <= float(told[1]), done.stdout  # newer ones have other weights


@pytest.mark.parametrize("key", ["ExecStartPre", "ExecReload"])
def test_its_check_is_what_it_says(key: str, pki: Path, tmp_path: Path) -> None:
    """Run as written, on files of ours, good and bad."""
    tls = tmp_path / "tls"
    shutil.copytree(pki, tls)
    tls.chmod(0o700)

    def run() -> subprocess.CompletedProcess[str]:
        line = lines(UNIT.read_text(), key)[0]
        assert TLS_DIR in line
        line = line.replace(TLS_DIR, str(tls)).replace("/run/disk.sock", str(tmp_path / "up"))
        command = [sys.executable, "-m", "gateway", *shlex.split(line)[1:]]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
        )

    done = run()
    assert (done.returncode, done.stderr) == (0, ""), done
    assert " 0 bad: fit to start or reload" in done.stdout.splitlines()[-1]
    (tls / "server-key.pem").chmod(0o644)
    done = run()
    assert done.returncode == 1
    assert "server-key.pem: everybody can read it" in done.stdout
