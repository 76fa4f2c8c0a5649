"""README's table of refusals: each message in it is what that program prints, for that reason.

The table is between the marks `<!-- refusals -->`. A row says, program by program, what is printed,
and by which words the gateway's log tells the reasons apart; for each of them there is a scenario.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.errors import Refusal
from tests.peers import people as rig
from tests.peers.bench import MIB, Bench, Front
from tests.peers.people import People, behind_starttls, openssl
from tests.support.gateway import ROOT, environment
from tests.support.peers import CLIENT_S, Client, find, run, said

people = rig.people

RULES = """\
[[export]]
name = "disk"
read-write = ["cn=writer"]
read-only = ["cn=reader"]

[[export]]
name = "secret"
read-write = ["cn=nobody"]
"""
WITHOUT_WRITER = RULES.replace("cn=writer", "cn=nobody")
NO_1_3 = "GNUTLS_SYSTEM_PRIORITY_FILE"
PROGRAMS = ("nbdinfo", "qemu-img", "nbd-client")


@dataclass(frozen=True)
class Row:
    messages: dict[str, list[str]]  # by program
    keys: list[str]  # words of the log


def table() -> list[Row]:
    text = (ROOT / "README.md").read_text()
    inside = text.partition("<!-- refusals -->")[2].partition("<!-- /refusals -->")[0]
    lines = [line.split(" | ") for line in inside.strip().splitlines()[2:]]
    rows = []
    for printed, logged, _ in lines:
        messages = {}
        for part in printed.removeprefix("| ").split("; "):
            program = next(one for one in PROGRAMS if part.startswith(one))
            messages[program] = re.findall(r"`([^`]+)`", part)
        rows.append(Row(messages, re.findall(r"`([^`]+)`", logged)))
    return rows


# ---------------------------------------------------------------- gateways


@dataclass
class Stage:
    """What a scenario plays on."""

    bench: Bench
    people: People
    rules: Path

    def front(self, *flags: str | Path, listen: str = "127.0.0.1:0") -> Front:
        return self.bench.gateway(self.bench.nbdkit("memory", "64M"), *flags, listen=listen)

    def client(self, front: Front, who: str, export: str = "disk") -> Client:
        return Client(front.gateway.uri, self.people.certificates(who)).with_export(export)


@pytest.fixture
def stage(tmp_path: Path, people: People) -> Iterator[Stage]:
    rules = tmp_path / "rules.toml"
    rules.write_text(RULES)
    with contextlib.ExitStack() as stack:
        yield Stage(Bench(tmp_path, people.tls_dir, stack), people, rules)


@dataclass(frozen=True)
class Heard:
    printed: dict[str, str]  # by program
    log: str  # what the gateway wrote meanwhile


def ask(front: Front, client: Client, programs: tuple[str, ...] = PROGRAMS) -> Heard:
    """The three programs want to open it, and do not get in."""
    commands = {
        "nbdinfo": ["nbdinfo", client.uri],
        "qemu-img": ["qemu-img", "info", *client.qemu()],
        "nbd-client": [*client.nbd_client("-N", client.export), "-nonetlink", "/dev/null"],
    }
    logged, printed, came = len(front.gateway.log()), {}, 0
    for program in programs:
        done = run(*commands[program])
        assert done.returncode != 0, f"{program} got in: {said(done)}"
        printed[program] = said(done)
        came += "The client certificate" not in said(done)  # else it has not even connected
        front.gateway.wait_log(rf"(?s)(\] [\d.]+:\d+: closed: .*){{{came}}}", after=logged)
    return Heard(printed, front.gateway.log()[logged:])


# ---------------------------------------------------------------- scenarios


def without_tls(stage: Stage) -> Heard:
    front = stage.front()
    return ask(front, front.plain_client().with_export("disk"))


def certificate(who: str) -> Callable[[Stage], Heard]:
    def scenario(stage: Stage) -> Heard:
        front = stage.front()
        return ask(front, stage.client(front, who))

    return scenario


def tls_1_2(stage: Stage) -> Heard:
    """Of a client that has no other."""
    front = stage.front("--tls-min", "1.3")
    return ask(front, stage.client(front, "writer"))


def not_trusted(stage: Stage) -> Heard:
    """127.0.0.2 is in no certificate. Programs with GnuTLS go without a word."""
    front = stage.front()
    ask(front, stage.client(front, "without_our_ca"), PROGRAMS[:1])
    front = stage.front(listen="127.0.0.2:0")
    return ask(front, stage.client(front, "writer"), PROGRAMS[:2])


def not_trusted_and_said_so(stage: Stage) -> Heard:
    front = stage.front()
    with behind_starttls(front.gateway.port) as port:
        openssl(port, stage.people.certificates("without_our_ca"), "1_3")
    front.gateway.wait_log(": closed: ")
    return Heard({}, front.gateway.log())


def stranger(stage: Stage) -> Heard:
    front = stage.front("--config", stage.rules)
    return ask(front, stage.client(front, "stranger"))


def somebody_elses(stage: Stage) -> Heard:
    front = stage.front("--config", stage.rules)
    return ask(front, stage.client(front, "writer", "secret"))


def no_server(stage: Stage) -> Heard:
    front = stage.front("--config", stage.rules)
    front.server.kill()
    return ask(front, stage.client(front, "writer"))


def wrong_address(stage: Stage) -> Heard:
    front = stage.front("--deny-from", "127.0.0.0/8")
    return ask(front, stage.client(front, "writer"))


def reader(stage: Stage) -> Heard:
    """It gets in, and finds out when it wants to write."""
    front = stage.front("--config", stage.rules)
    client = stage.client(front, "reader")
    image = stage.bench.image(64 * MIB)
    image.write_bytes(b"x" * MIB)
    command = ["qemu-img", "convert", "-n", *client.qemu_object(), "-f", "raw"]
    command += ["--target-image-opts", str(image), client.qemu_image()]
    done = run(*command)
    assert done.returncode != 0
    info = run("nbdinfo", client.uri)
    assert "is_read_only: true" in said(info)
    return Heard({"nbdinfo": said(info), "qemu-img": said(done)}, front.gateway.log())


def expelled(stage: Stage) -> Heard:
    """In the middle of reading 64 MiB, a tenth of a second for each of them."""
    server = stage.bench.nbdkit("--filter=delay", "pattern", "64M", "rdelay=100ms")
    front = stage.bench.gateway(server, "--config", stage.rules)
    client = stage.client(front, "writer")
    command = ["qemu-img", "convert", "-m", "1", *client.qemu(), "-O", "raw"]
    command.append(str(stage.bench.directory() / "copy.img"))
    process = subprocess.Popen(
        [find(command[0]), *command[1:]],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        front.gateway.wait_log(": open: ")
        logged = len(front.gateway.log())
        rules = stage.rules.read_text()
        stage.rules.write_text(WITHOUT_WRITER)
        os.kill(front.gateway.pid, signal.SIGHUP)
        printed, _ = process.communicate(timeout=CLIENT_S)
    assert process.returncode != 0
    front.gateway.wait_log(": closed: client no longer allowed", after=logged)
    asked = run("nbdinfo", client.uri)
    stage.rules.write_text(rules)
    return Heard({"nbdinfo": said(asked), "qemu-img": printed}, front.gateway.log()[logged:])


SCENARIOS: dict[str, Callable[[Stage], Heard]] = {
    "plaintext_client": without_tls,
    "no_client_cert": certificate("no_client_cert"),
    "unknown_ca": certificate("unknown_ca"),
    "wrong_eku": certificate("wrong_eku"),
    "revoked": certificate("revoked"),
    "expired": certificate("expired"),
    "not_yet_valid": certificate("not_yet_valid"),
    "tls_version": tls_1_2,
    "eof": not_trusted,
    "client_rejected_us": not_trusted_and_said_so,
    "not_allowed": stranger,
    "no such export here": somebody_elses,
    "cannot be reached": no_server,
    "address_not_allowed": wrong_address,
    "read-only": reader,
    "client no longer allowed": expelled,
}


# Words that no row is about, and why.
ELSEWHERE = {
    "probe": "it printed nothing: it did not ask",
    "eof_before_hello": "its own doing",
    "not_tls": "no NBD program",
    "client_alert": "its own words come first",
    "tls_error": "whatever else OpenSSL finds",
    "resumed": "no NBD program resumes",
    "timeout": "nobody waited",
    "no_shared_cipher": "as tls_version; needs an odd configuration",
    "weak_key": "as unknown_ca, with an alert of its own",
    "bad_certificate": "as unknown_ca, with an alert of its own",
    "no_crl": "ours: the gateway does not start so",
    "crl_expired": "ours: said in the log at WARNING before it comes",
    "crl_not_yet_valid": "ours: the gateway does not start so",
    "no_psk": "README, Pre-shared keys",
    "unknown_psk": "README, Pre-shared keys",
    "too_many_clients": "README, Limits",
    "handshake_rate": "README, Limits",
}


def test_no_word_is_forgotten() -> None:
    assert {key for key in SCENARIOS if key.isidentifier()} | set(ELSEWHERE) == set(Refusal)
    assert not set(SCENARIOS) & set(ELSEWHERE)


def test_every_row_is_about_something_that_the_log_says() -> None:
    keys = [key for row in table() for key in row.keys]
    assert sorted(keys) == sorted(SCENARIOS)
    assert {key for key in keys if key.isidentifier()} <= set(Refusal)


@pytest.mark.parametrize("row", table(), ids=lambda row: " ".join(row.keys))
def test_what_is_printed(
    row: Row, stage: Stage, people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both versions of TLS. nbd-client has 1.2 only, and not always the same words."""
    seen = set()
    for version in ("1.2", "1.3"):
        if version == "1.2":
            monkeypatch.setenv(NO_1_3, str(people.gnutls_1_2))
        else:
            monkeypatch.delenv(NO_1_3)
        for key in row.keys:
            if (key, version) == ("tls_version", "1.3"):
                continue
            heard = SCENARIOS[key](stage)
            assert re.search(rf"\b{key}\b", heard.log), heard.log
            for program, printed in heard.printed.items():
                found = {one for one in row.messages[program] if one.replace("NAME", "") in printed}
                assert found, f"{program} says with TLS {version}:\n{printed}"
                seen |= {(program, one) for one in found}
    for program, messages in row.messages.items():
        if program != "nbd-client":
            assert {(program, one) for one in messages} <= seen
