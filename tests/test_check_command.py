"""`nbd-gateway check` as it is typed: exit codes, and that `serve` refuses what it calls bad."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cli_rig
from tests.check_rig import Folder, make_crl
from tests.cli_rig import Run
from tests.support.gateway import ROOT, Gateway, environment

run = cli_rig.run  # the fixture


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A complete set: key with a password, CRL."""
    folder = Folder(tmp_path / "tls")
    folder.write(folder.key, folder.server.key_pem("secret"))
    folder.write(folder.password, b"secret\n")
    folder.write(folder.crl, make_crl(folder.ca))
    return folder


def flags(folder: Folder) -> list[str]:
    files = {"cert": "cert", "key": "key", "client-ca": "ca", "crl": "crl"}
    named = [f"--{flag}={folder.path / name}" for flag, name in files.items()]
    return [
        *named,
        f"--key-password-file={folder.password}",
        f"--socket={folder.socket}",
        f"--listen=unix:{folder.path / 'listen'}",
    ]


def test_command_says_all_on_stdout(folder: Folder, run: Run) -> None:
    good = run("check", *flags(folder))
    assert (good.code, good.err) == (0, "")
    assert good.out.splitlines()[-1].endswith("0 bad: fit to start or reload")
    folder.key.unlink()
    bad = run("check", *flags(folder))
    assert (bad.code, bad.err) == (1, "")
    assert f"bad   {folder.key}: cannot be read: No such file or directory" in bad.out.splitlines()
    assert bad.out.splitlines()[-1].endswith("mend what is bad before you start or reload")
    assert len(bad.out.splitlines()) > 8


def test_command_used_wrongly(folder: Folder, run: Run) -> None:
    for wrong in (["check"], ["check", *flags(folder), "--allow=cm=x"]):
        outcome = run(*wrong)
        assert outcome.code == 2
        assert outcome.complaint


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("cert", "half"),
        ("key", "missing"),
        ("ca", "rubbish"),
        ("crl", "flipped"),
        ("password", "empty"),
    ],
)
def test_serve_refuses_what_check_calls_bad(name: str, way: str, folder: Folder) -> None:
    path = folder.path / name
    content = path.read_bytes()
    path.unlink()
    if way != "gone":
        folder.write(path, content[: len(content) // 2] if way == "half" else b"")
    codes = []
    for command in ("check", "serve"):
        done = subprocess.run(
            [sys.executable, "-m", "gateway", command, *flags(folder)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            timeout=60,
            text=True,
        )
        codes.append(done.returncode)
        assert "Traceback" not in done.stderr
    assert codes == [1, 2]
    assert not os.path.lexists(folder.path / "listen")


def test_serve_takes_what_check_calls_good(folder: Folder, run: Run) -> None:
    assert run("check", *flags(folder)).code == 0
    with Gateway(*flags(folder)) as running:
        again = run("check", *flags(folder))  # as before a reload: its own socket is there
        assert running.alive()
    assert again.code == 0
    assert "there already: fine if by the gateway that runs now" in again.out
