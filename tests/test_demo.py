"""`nbd-gateway demo`: what it prints is true, its self-test notices faults, and nothing stays."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio

from gateway import demo, selftest
from gateway.errors import ListenError, SettingsError
from gateway.memory_upstream import Disk, MemoryUpstream
from gateway.nbd.constants import TransmissionFlag
from gateway.pki import CertificateAuthority
from gateway.selftest import DemoError
from gateway.server import Server
from gateway.settings import ListenTCP, Settings, TLSSettings
from tests.support.gateway import ROOT, Output, environment
from tests.support.peers import CLIENT_S, find, wait_until
from tests.support.rawclient import RawClient, tls_context

COMMAND = [sys.executable, "-W", "always::ResourceWarning", "-m", "gateway", "demo"]
MIB = 1 << 20
WRITING = ["write", "flush", "read back"]
REFUSALS = ["refuse", "refuse"]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo makes its directory. A short path, for the sake of Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="demo-") as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- as a command


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_S,
    )


@contextlib.contextmanager
def running(*args: str) -> Iterator[tuple[subprocess.Popen[bytes], Output]]:
    """The demo once it has said everything. It must be ended by a signal, and with code 0."""
    out, err = Output(), Output()
    process = subprocess.Popen(
        [*COMMAND, *args],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=out.file,
        stderr=err.file,
    )
    try:
        wait_until(
            lambda: process.poll() is not None or "Ctrl-C removes everything" in out.text(),
            "the demo to start",
        )
        yield process, out
        status = process.wait(CLIENT_S)
        assert (status, err.text()) == (0, "")
    finally:
        process.kill()
        process.wait()
        out.close()
        err.close()


def commands_in(text: str) -> list[list[str]]:
    """The lines to copy: indented by four spaces, a program first."""
    lines = (line[4:] for line in text.splitlines() if line.startswith("    "))
    return [shlex.split(line) for line in lines if not line.split()[0].endswith(":")]


def execute(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,  # by its short name, which it prints
        executable=find(command[0]),
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_S,
    )


def test_self_test_as_a_command(folder: Path) -> None:
    done = run("--self-test")
    assert (done.returncode, done.stderr) == (0, "")
    steps = ["connect", "open", "read", *WRITING, "memory", "leave", *REFUSALS]
    assert steps_in(done.stdout) == steps
    assert "TLSv1.3" in done.stdout
    assert "64 MiB" in done.stdout
    assert "nbds://127.0.0.1:" in done.stdout
    assert "NBD_REP_ERR_TLS_REQD" in done.stdout
    assert "certificate required" in done.stdout
    assert commands_in(done.stdout)[-1][-1] == "demo"
    assert left_in(folder) == []


def test_self_test_of_a_missing_server(folder: Path) -> None:
    done = run("--self-test", "--upstream-socket", str(folder / "none.sock"))
    assert done.returncode == 1
    assert "FAILED  open" in done.stdout
    assert f"is an NBD server listening on {folder}/none.sock?" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_in(folder) == []


def test_self_test_of_a_dead_socket(folder: Path) -> None:
    path = folder / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    done = run("--self-test", "--upstream-socket", str(path))
    assert done.returncode == 1
    assert f"is an NBD server listening on {path}?" in done.stderr
    assert left_in(folder) == ["dead.sock"]


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "example.com:0", "unix:/tmp/x", "systemd"],
)
def test_other_than_loopback_is_wrong_usage(listen: str) -> None:
    done = run("--listen", listen)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"--listen {listen}: the demo is for this machine only" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_everything(folder: Path, number: signal.Signals) -> None:
    with running() as (process, out):
        (made,) = folder.iterdir()
        assert made.stat().st_mode & 0o777 == 0o700
        assert (made / "upstream.sock").is_socket()
        assert str(made) in out.text()
        process.send_signal(number)
    assert left_in(folder) == []


def test_a_signal_ends_sessions_in_order(folder: Path) -> None:
    with running() as (process, out):
        (uri,) = re.findall(r"nbds://\S+(?=  )", out.text())
        (certificates,) = folder.glob("*/tls")
        with RawClient(uri) as client:
            client.greet()
            client.start_tls(tls_context(certificates))
            assert client.go(b"scratch").size == demo.DISK_SIZE
            process.send_signal(signal.SIGINT)
            assert client.recv_to_end() == b""
            assert client.ended == "close_notify"
    assert left_in(folder) == []


@pytest.mark.peers
def test_the_printed_commands_do_what_is_said(folder: Path) -> None:
    with running() as (process, out):
        *works, refused = commands_in(out.text())
        assert {command[0] for command in works} == {
            *("nbdinfo", "qemu-io", "nbdcopy", "qemu-img", "nbd-client")
        }
        for command in works:
            done = execute(command)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        (copy,) = folder.glob("*/copy.img")
        assert copy.stat().st_size == demo.DISK_SIZE
        with copy.open("rb") as image:  # after qemu-io has written its pattern
            assert image.read(3 * MIB) == bytes(MIB) + b"\x5a" * MIB + bytes(MIB)
        done = execute(refused)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.strip() in out.text(), "nbdinfo says something else than was promised"
        process.send_signal(signal.SIGTERM)
    assert left_in(folder) == []


def test_nothing_printed_writes_to_the_users_disk(folder: Path) -> None:
    path = folder / "own.sock"
    with running("--upstream-socket", str(path)) as (process, out):
        assert f"{path}  (plain)  (not there yet: start it)" in out.text()
        *works, _ = commands_in(out.text())
        assert [command[0] for command in works] == ["nbdinfo", "qemu-img", "nbd-client"]
        process.send_signal(signal.SIGINT)
    assert left_in(folder) == []


# ---------------------------------------------------------------- the self-test, in this process


def steps_in(text: str) -> list[str]:
    """The names of the steps that went well."""
    lines = [line for line in text.splitlines() if line.startswith("  ok ")]
    return [line[10:21].strip() for line in lines]


class Said(list[str]):
    @property
    def steps(self) -> list[str]:
        return steps_in("\n".join(self))

    @property
    def failed(self) -> str:
        (line,) = [line for line in self if line.startswith("  FAILED")]
        return line


class WrongData(MemoryUpstream):
    def read(self, disk: Disk, offset: int, length: int) -> bytes:
        data = bytearray(super().read(disk, offset, length))
        data[1000] ^= 1
        return bytes(data)


class ReadOnly(MemoryUpstream):
    flags = MemoryUpstream.flags | TransmissionFlag.READ_ONLY


class WithoutFlush(MemoryUpstream):
    flags = MemoryUpstream.flags & ~TransmissionFlag.SEND_FLUSH


def content(length: int) -> bytearray:
    return bytearray(random.Random(length).randbytes(length))


async def try_on(upstream: MemoryUpstream, path: Path, said: Said) -> None:
    """The self-test on a server that the demo takes for a user's own."""
    failure = None
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve, str(path))
        try:
            await demo.run(said.append, self_test=True, upstream=str(path))
        except DemoError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def test_wrong_data_is_noticed(folder: Path) -> None:
    said = Said()
    with pytest.raises(DemoError, match="other bytes than were written, from offset 1000 on"):
        await demo.run(said.append, self_test=True, upstream=WrongData({"": bytearray(2 * MIB)}))
    assert said.steps == ["connect", "open", "read", "write", "flush"]
    assert "read back" in said.failed
    assert left_in(folder) == []


async def test_data_that_never_reaches_the_server_is_noticed(folder: Path) -> None:
    """Bytes that come back all the same, as from a cache, are not taken for written ones."""
    upstream = MemoryUpstream({"": bytearray(MIB)})
    another = MemoryUpstream({"": bytearray(MIB)})
    upstream.serve = another.serve  # type: ignore[method-assign]
    said = Said()
    with pytest.raises(DemoError, match="other bytes than were written"):
        await demo.run(said.append, self_test=True, upstream=upstream)
    assert said.steps[-1] == "read back"
    assert "memory" in said.failed


@pytest.mark.parametrize("size", [1, 511, MIB - 1, MIB, MIB + 1])
async def test_a_users_disk_is_as_before(folder: Path, size: int) -> None:
    disk, said = content(size), Said()
    await try_on(MemoryUpstream({"": disk}), folder / "own.sock", said)
    steps = ["connect", "open", "read", "save", *WRITING, "put back", "leave", *REFUSALS]
    assert said.steps == steps
    assert disk == content(size)
    assert left_in(folder) == []
    assert shlex.split(said[-1].splitlines()[-1])[-2:] == [
        "--upstream-socket",
        f"{folder}/own.sock",
    ]


async def test_a_users_disk_is_as_before_when_interrupted(folder: Path) -> None:
    disk, said = content(2 * MIB), Said()

    class Interrupted(Said):
        def append(self, line: str) -> None:
            said.append(line)
            if "  write " in line:
                assert disk != content(2 * MIB)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(DemoError, match="the self-test was interrupted"):
        await try_on(MemoryUpstream({"": disk}), folder / "own.sock", Interrupted())
    assert "put back" in said.steps
    assert disk == content(2 * MIB)
    assert left_in(folder) == []


async def test_what_cannot_be_put_back_is_kept_in_a_file(folder: Path) -> None:
    disk, said = content(2 * MIB), Said()
    with pytest.raises(DemoError, match="what the disk began with is in ") as failure:
        await try_on(WrongData({"": disk}), folder / "own.sock", said)
    assert "put back" in said[-1]
    (name,) = left_in(folder)
    kept = folder / name
    assert str(failure.value).endswith(str(kept))
    assert kept.stat().st_mode & 0o777 == 0o600
    wrong = content(2 * MIB)[:MIB]
    wrong[1000] ^= 1  # as the server gave it
    assert kept.read_bytes() == wrong


async def test_a_read_only_disk_is_only_read(folder: Path) -> None:
    disk, said = content(2 * MIB), Said()
    await try_on(ReadOnly({"": disk}), folder / "own.sock", said)
    assert said.steps == ["connect", "open", "read", "leave", *REFUSALS]
    assert any("left out: the disk is read-only" in line for line in said)
    assert disk == content(2 * MIB)


async def test_a_disk_without_a_byte(folder: Path) -> None:
    said = Said()
    await try_on(MemoryUpstream({"": bytearray()}), folder / "own.sock", said)
    assert said.steps == ["connect", "open", "read", "leave", *REFUSALS]
    assert any("left out: the disk is too small" in line for line in said)


async def test_a_server_without_flush(folder: Path) -> None:
    said = Said()
    await try_on(WithoutFlush({"": content(MIB)}), folder / "own.sock", said)
    assert any("left out: the server does not offer it" in line for line in said)


async def test_a_server_without_a_default_export(folder: Path) -> None:
    disk, said = content(MIB), Said()
    await try_on(MemoryUpstream({"first": disk, "other": content(5)}), folder / "own.sock", said)
    assert any('export "first": 1 MiB' in line for line in said)
    assert disk == content(MIB)


async def test_a_server_without_exports(folder: Path) -> None:
    with pytest.raises(DemoError, match="'open': NBD_REP_ERR_UNKNOWN"):
        await try_on(MemoryUpstream({}), folder / "own.sock", Said())


async def test_a_silent_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "STEP_TIMEOUT_S", 0.3)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "own.sock"))
        silent.listen()
        with pytest.raises(DemoError, match=r"nothing for 0\.3 s"):
            await demo.run(Said().append, self_test=True, upstream=str(folder / "own.sock"))
    assert left_in(folder) == ["own.sock"]


def anybody(cert: Path, key: Path, client_ca: Path) -> TLSSettings:
    return TLSSettings(cert, key, None)


def with_another_certificate(cert: Path, key: Path, client_ca: Path) -> TLSSettings:
    """One of a CA that no client knows."""
    other = CertificateAuthority.create("another CA").issue_server(["localhost", "127.0.0.1"])
    files = [cert.with_name(f"other-{what}.pem") for what in ("cert", "key")]
    for file, pem in zip(files, (other.cert_pem, other.key_pem), strict=True):
        file.write_bytes(pem)
    return TLSSettings(*files, client_ca)


def no_tls(cert: Path, key: Path, client_ca: Path) -> None:
    return None


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        (anybody, "'refuse': a client without a certificate got in: Granted"),
        (with_another_certificate, "'connect': the gateway's certificate: unable to get"),
        (no_tls, "'connect': STARTTLS was refused: NBD_REP_ERR_POLICY"),
    ],
)
async def test_a_gateway_without_its_guard_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sabotage: Callable[..., object], reason: str
) -> None:
    monkeypatch.setattr(demo, "TLSSettings", sabotage)
    said = Said()
    with pytest.raises(DemoError, match=f"the self-test has failed at {reason}"):
        await demo.run(said.append, self_test=True)
    assert said.failed
    assert left_in(folder) == []


async def test_a_gateway_that_serves_plaintext_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client that asks without TLS is answered by a second gateway, one with TLS off."""
    original = selftest.SelfTest._refuse_without_tls

    async def elsewhere(self: selftest.SelfTest) -> None:
        plain = Server(Settings(self._scene.socket, None, (ListenTCP("127.0.0.1", 0),), None))
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[list[str]]) -> None:
                await plain.run(handle_signals=False, task_status=task_status)

            (uri,) = await nursery.start(serve)
            port = urlsplit(uri).port
            assert port is not None
            self._scene = dataclasses.replace(self._scene, port=port)
            await original(self)

    monkeypatch.setattr(selftest.SelfTest, "_refuse_without_tls", elsewhere)
    with pytest.raises(DemoError, match="without TLS got another answer: Granted"):
        await demo.run(Said().append, self_test=True)


@pytest.mark.parametrize("listen", ["[::1]:0", "localhost:0", "127.3.2.1:0"])
async def test_other_loopback_addresses(folder: Path, listen: str) -> None:
    if listen.startswith("["):
        with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError as error:
                pytest.skip(f"no IPv6 loopback here: {error}")
    said = Said()
    await demo.run(said.append, self_test=True, listen=listen)
    assert said.steps[-2:] == REFUSALS


async def test_a_taken_port(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ListenError, match="cannot listen on 127"):
            await demo.run(Said().append, listen=f"127.0.0.1:{taken.getsockname()[1]}")
    assert left_in(folder) == []


async def test_a_path_too_long_for_a_socket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = folder / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(SettingsError, match=r"^TMPDIR: the path has "):
        await demo.run(Said().append)
    with pytest.raises(SettingsError, match=r"^--upstream-socket: the path has "):
        await demo.run(Said().append, upstream=str(long / "own.sock"))
    assert left_in(long) == []


async def test_no_temporary_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "none"))
    with pytest.raises(DemoError, match="cannot make a temporary directory: No such file"):
        await demo.run(Said().append)


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("/somewhere/gateway/__main__.py", f"{sys.executable} -m gateway"),
        (".venv/bin/nbd-gateway", ".venv/bin/nbd-gateway"),
        ("my tools/nbd-gateway", "'my tools/nbd-gateway'"),
    ],
)
def test_own_command_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, called: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert selftest._own_command() == shown


def test_own_command_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nbd-gateway"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert selftest._own_command() == "nbd-gateway"
