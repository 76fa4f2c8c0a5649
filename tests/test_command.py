"""`python -m gateway` as a process: what it prints, logs and serves, and how signals end it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import certs
from tests.support.fake_upstream import FakeUpstream, Link, Script, pattern
from tests.support.gateway import ROOT, Gateway, environment
from tests.support.rawclient import (
    CLISERV,
    NBDMAGIC,
    Cmd,
    RawClient,
    Request,
    Tf,
    tls_context,
)

# ---------------------------------------------------------------- serving


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


def opened(running: Gateway, context: object) -> RawClient:
    """A client in transmission."""
    client = RawClient(running.uri)
    client.greet()
    client.start_tls(context)  # type: ignore[arg-type]
    client.go()
    return client


def read_works(client: RawClient) -> None:
    client.send(Request(Cmd.READ, 512, 512, cookie=7).pack())
    assert client.recv_exactly(16 + 512)[16:] == pattern(512, 512)


@pytest.mark.parametrize("name", [(), ("serve",)], ids=["bare", "serve"])
def test_serve_is_the_same_as_no_command(
    name: tuple[str, ...], pki: Path, fake: FakeUpstream, tmp_path: Path
) -> None:
    """And standard output holds the URIs, and nothing else."""
    path = tmp_path / "front"
    arguments = ("--tls-dir", pki, "--socket", fake.path, "--export", "d k", "--log-level", "debug")
    listen = ("--listen", "127.0.0.1:0", "--listen", f"unix:{path}", "--listen", "[::1]:0")
    fake.script.names = (b"d k",)
    with Gateway(*name, *arguments, *listen) as running:
        first, second, third = running.uris
        assert re.fullmatch(r"nbds://127\.0\.0\.1:\d+/d%20k", first)
        assert second == f"nbds+unix:///d%20k?socket={path}"
        assert re.fullmatch(r"nbds://\[::1\]:\d+/d%20k", third)
        with opened(running, tls_context(pki)) as client:
            read_works(client)
        for uri in running.uris:
            assert f"INFO listening on {uri}" in running.log()
    assert running.stdout() == f"{first}\n{second}\n{third}\n"
    assert not path.exists()


def test_the_files_that_won_are_logged(pki: Path, tmp_path: Path, fake: FakeUpstream) -> None:
    other = certs.init(tmp_path / "other").server
    flags = ("--cert", other.cert, "--key", other.key)
    common = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0")
    with Gateway(*common) as running:
        pass
    assert f"INFO certificate {pki}/server-cert.pem, key {pki}/server-key.pem" in running.log()
    assert f"INFO clients need a certificate of the CA in {pki}/ca-cert.pem" in running.log()
    assert "revocations" not in running.log()
    with Gateway(*common, *flags) as running:
        pass
    assert f"INFO certificate {flags[1]}, key {flags[3]}" in running.log()
    assert f"INFO clients need a certificate of the CA in {pki}/ca-cert.pem" in running.log()


def test_anonymous_clients_enter_only_if_that_was_said(pki: Path, fake: FakeUpstream) -> None:
    nobody = tls_context(pki, with_certificate=False)
    files = ("--cert", pki / "server-cert.pem", "--key", pki / "server-key.pem")
    with Gateway(
        *files, "--allow-anonymous", "--socket", fake.path, "--listen", "127.0.0.1:0"
    ) as running:
        assert "WARNING anonymous clients are allowed" in running.log()
        with opened(running, nobody) as client:
            read_works(client)
        running.wait_log(r"INFO \[1\] .*: open: .*anonymous")


def test_log_level(pki: Path, fake: FakeUpstream) -> None:
    common = ("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0")
    with Gateway(*common, "--log-level", "warning") as running:
        with opened(running, tls_context(pki)) as client:
            read_works(client)
    lines = running.log().splitlines()
    assert all(" WARNING running as root: " in line for line in lines), running.log()


# ---------------------------------------------------------------- --oldstyle and --no-upgrade


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_oldstyle(where: str, fake: FakeUpstream, tmp_path: Path) -> None:
    """All is said at once, and the URIs are those of any other gateway without TLS."""
    path = tmp_path / "front"
    listen = "127.0.0.1:0" if where == "tcp" else f"unix:{path}"
    fake.script = Script(names=(b"d k",), flags=Tf.HAS_FLAGS | Tf.SEND_FLUSH)
    arguments = ("--tls", "off", "--oldstyle", "--export", "d k", "--no-upgrade", "fua")
    with Gateway(*arguments, "--socket", fake.path, "--listen", listen) as running:
        if where == "tcp":
            assert re.fullmatch(r"nbd://127\.0\.0\.1:\d+/d%20k", running.uri)
        else:
            assert running.uri == f"nbd+unix:///d%20k?socket={path}"
        with RawClient(running.uri) as client:
            greeting = struct.unpack(">QQQI124x", client.recv_exactly(152))
            flags = fake.script.flags | Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO
            assert greeting == (NBDMAGIC, CLISERV, fake.script.size, flags)
            read_works(client)
        assert "WARNING TLS is off" in running.log()
    assert fake.links[0].export == b"d k"


def test_oldstyle_client_without_an_upstream(fake: FakeUpstream) -> None:
    """It is hung up on, and the log says why."""
    fake.close()
    arguments = ("--tls", "off", "--oldstyle", "--listen", "127.0.0.1:0")
    with Gateway(*arguments, "--socket", fake.path) as running:
        with RawClient(running.uri) as client:
            assert client.recv_to_end() == b""
        running.wait_log(r"WARNING \[1\] .*: upstream unavailable: .*: no such socket")
        running.wait_log(r"INFO \[1\] .*: closed: export refused \(.*cannot be reached\)")


# ---------------------------------------------------------------- the end


class Slow(Script):
    """Keeps its answers back until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def requested(self, link: Link, request: Request) -> None:
        self.go_on.wait()
        super().requested(link, request)


@pytest.fixture
def slow(fake: FakeUpstream) -> Iterator[Slow]:
    fake.script = slow = Slow()
    try:
        yield slow
    finally:
        slow.go_on.set()


def serving(pki: Path, fake: FakeUpstream, *more: str) -> Gateway:
    return Gateway("--tls-dir", pki, "--socket", fake.path, "--listen", "127.0.0.1:0", *more)


@contextlib.contextmanager
def request_in_flight(running: Gateway, fake: FakeUpstream, pki: Path) -> Iterator[RawClient]:
    with opened(running, tls_context(pki)) as client:
        client.send(Request(Cmd.READ, 0, 512).pack())
        link = fake.wait_link()
        fake.wait(lambda: link.requests, "the request upstream")
        yield client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_in_order(
    number: signal.Signals, pki: Path, fake: FakeUpstream, slow: Slow
) -> None:
    with serving(pki, fake) as running, request_in_flight(running, fake, pki) as client:
        os.kill(running.pid, number)
        running.wait_log(f"{number.name}: ending")
        running.wait_log("listeners closed, 1 sessions to end")
        with pytest.raises(ConnectionRefusedError):
            RawClient(running.uri)
        slow.go_on.set()
        assert client.recv_exactly(16 + 512)[16:] == pattern(0, 512)
        assert client.recv_to_end() == b""
        assert client.ended == "close_notify"
        client.close()
        assert running.wait() == 0
    assert fake.wait_end().end == "disc"


def test_second_signal_cuts(pki: Path, fake: FakeUpstream, slow: Slow) -> None:
    with serving(pki, fake) as running, request_in_flight(running, fake, pki) as client:
        running.terminate()
        running.wait_log("listeners closed, 1 sessions to end")
        running.terminate()
        assert client.recv_to_end() == b""
        running.exit_code = 1
        client.close()
        assert running.wait() == 1
    assert "WARNING second signal: ending now" in running.log()
    assert "WARNING sessions had to be cut" in running.log()


def test_drain_timeout_cuts(pki: Path, fake: FakeUpstream, slow: Slow) -> None:
    with (
        serving(pki, fake, "--drain-timeout", "0.2") as running,
        request_in_flight(running, fake, pki) as client,
    ):
        running.terminate()
        assert client.recv_to_end() == b""
        running.exit_code = 1
        client.close()
        assert running.wait() == 1
    assert "WARNING sessions had to be cut" in running.log()


# ---------------------------------------------------------------- certs init


def test_what_certs_init_issued_is_served(tmp_path: Path, fake: FakeUpstream) -> None:
    directory = tmp_path / "new"
    command = [sys.executable, "-m", "gateway", "certs", "init", str(directory)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    with serving(directory, fake) as running, opened(running, tls_context(directory)) as client:
        read_works(client)
