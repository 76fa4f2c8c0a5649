"""certs/README.md is a runbook: all its commands are run here, line by line, in their order.

After each line, the clients that should get in do, and those that should not do not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from gateway.certs.cli import certs
from gateway.cli import cli
from tests.support.peers import find

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "certs" / "README.md").read_text()
GATEWAY = Path("etc/nbd-gateway/tls")
CLIENT = Path("vm1-pki")


class Line(NamedTuple):
    section: str
    command: str  # to be given to a shell


def lines() -> Iterator[Line]:
    """Of the blocks that are for a shell, and what the crontab has behind its five fields."""
    section = ""
    for found in re.finditer(r"^## ([^\n]*)$|^```(\w+)\n(.*?)^```$", README, re.M | re.S):
        heading, language, text = found.groups()
        if heading:
            section = heading
            continue
        assert language in ("sh", "crontab"), language
        for line in text.splitlines():
            command = line.split(maxsplit=5)[5] if language == "crontab" else line
            yield Line(section, command)


class Trial:
    """The places of the runbook below one folder, and a gateway that takes up what fits."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.served = here / "served"  # what the gateway took up last: a set that fits together
        (here / "bin").mkdir()
        command = here / "bin" / "nbd-gateway"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway "$@"\n')
        command.chmod(0o755)
        path = os.pathsep.join([str(here / "bin"), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace("/etc/", f"{self.here}/etc/")],
            cwd=self.here,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        # The one thing that is said aside: with a former CA, its list is left out.
        if command.startswith("nbd-gateway"):
            assert re.fullmatch(r"(Left out: the CRL of CN=.*\n)?", done.stderr), command
        return done.stdout

    def take_up(self) -> None:
        folder = self.here / GATEWAY
        try:
            server_context(folder)
        except (OSError, ssl.SSLError):
            return  # half of it is not there yet, as when the gateway looks in between
        shutil.rmtree(self.served, ignore_errors=True)
        shutil.copytree(folder, self.served)

    def gets_in(self, client: Path) -> bool:
        """Whether both sides are content with each other."""
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        theirs.load_verify_locations(client / "ca-cert.pem")
        theirs.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            theirs.wrap_bio(to_client, to_server, server_hostname="disks.example.com"),
            server_context(self.served).wrap_bio(to_server, to_client, server_side=True),
        ]
        waiting = list(ends)
        while waiting:
            end = waiting.pop(0)
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting.append(end)
            except ssl.SSLCertVerificationError:
                return False
        return True


def server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    context.load_verify_locations(folder / "ca-cert.pem")
    context.load_verify_locations(folder / "ca-crl.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF | ssl.VERIFY_X509_STRICT
    return context


@pytest.mark.timeout(300)
def test_every_command_works_and_nobody_is_locked_out(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    third = tmp_path / "vm3"  # what the client has that is revoked in the end
    handshakes = 0
    for section, command in lines():
        if (program := command.split()[0]) in ("openssl", "certtool"):
            find(program)
        if command.startswith("rm -r "):
            shutil.copytree(tmp_path / command.split()[-1], third)
        said = trial.run(command)
        if "expiring" in command:
            assert said == ""
        if "certs show" in command:
            assert "\n    cn=vm2\n" in said
            assert "\n    uri=spiffe://example.com/disks/vm2\n" in said
        trial.take_up()
        with contextlib.suppress(FileNotFoundError):
            assert trial.gets_in(tmp_path / CLIENT), (section, command)
            handshakes += 1
    assert handshakes > 20
    assert not trial.gets_in(third)
    assert not trial.gets_in(tmp_path / "pki")  # of the CA that was given up
    shutil.copy(tmp_path / "pki2/ca-cert.pem", tmp_path / "pki")
    assert not trial.gets_in(tmp_path / "pki")
    assert trial.gets_in(tmp_path / "pki2")
    assert not [path for path in tmp_path.rglob("*.tar")]
    assert (tmp_path / "ca-password").stat().st_mode & 0o777 == 0o600
    for key in tmp_path.rglob("*-key.pem"):
        assert key.stat().st_mode & 0o777 == 0o600, key


def test_the_cron_job_speaks_when_something_ends(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    (job,) = [command for _, command in lines() if "--crl-within" in command]
    trial.run(f"nbd-gateway certs init /{GATEWAY} --days 29")
    said = trial.run(f"{job} || test $? = 1")
    assert said.count("expires in 28 days") == 2
    assert "server-cert.pem" in said
    (tmp_path / GATEWAY / "server-cert.pem").write_text("damaged")
    with pytest.raises(AssertionError, match="no PEM in it"):
        trial.run(job)


def options(command: click.Command) -> set[str]:
    found = {name for parameter in command.params for name in parameter.opts}
    if isinstance(command, click.Group):
        found = found.union(*(options(each) for each in command.commands.values()))
    return found


def test_every_option_that_is_spoken_of_exists() -> None:
    ours = options(certs) | options(cli)
    theirs = {"--tls-certificates", "--verify", "--load-ca-certificate", "--load-crl", "--infile"}
    assert set(re.findall(r"(?<!\S)`?(--[a-z][a-z-]+)", README)) <= ours | theirs


def test_every_command_of_ours_is_in_it() -> None:
    spoken_of = " ".join(command for _, command in lines())
    for name in certs.commands:
        assert f"nbd-gateway certs {name} " in spoken_of
