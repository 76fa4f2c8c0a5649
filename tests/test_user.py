"""`--user` of the command itself: ports and keys as root, everything else as somebody else."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.certs import init
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import ROOT, Gateway, environment
from tests.support.peers import wait_until
from tests.support.rawclient import PeerClosedError, RawClient, tls_context
from tests.workers_rig import read_works

NOBODY = pwd.getpwnam("nobody")
USER = ("--user", "nobody")
PRIVILEGED = range(1000, 1024)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that anybody can go through, with an upstream that anybody can reach."""
    with tempfile.TemporaryDirectory(prefix="nbd-gateway-user-") as name:
        os.chmod(name, 0o711)
        yield Path(name)


@pytest.fixture
def fake(place: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(place / "up") as fake:
        os.chmod(fake.path, 0o777)
        yield fake


@pytest.fixture
def tls(place: Path) -> Path:
    """Root's own files, as `certs init` makes them."""
    init(place / "tls")
    return place / "tls"


def flags(tls: Path, fake: FakeUpstream, *more: str, port: int = 0) -> tuple[str | Path, ...]:
    listen = ("--listen", f"127.0.0.1:{port}")
    return ("--tls-dir", tls, "--socket", fake.path, *listen, *USER, *more)


def enter(gateway: Gateway, tls: Path) -> RawClient:
    client = RawClient(gateway.uri)
    client.greet()
    client.start_tls(tls_context(tls))
    client.go()
    return client


def who(pid: int) -> set[str]:
    """All user numbers of a process."""
    (line,) = re.findall(r"^Uid:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return set(line.split())


def no_core(pid: int) -> bool:
    limits = Path(f"/proc/{pid}/limits").read_text()
    return re.search(r"^Max core file size +0 +0 ", limits, re.M) is not None


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port() -> int:
    for port in PRIVILEGED:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no privileged port is free")


@pytest.mark.parametrize("workers", [1, 2])
def test_root_is_given_up(workers: int, tls: Path, fake: FakeUpstream) -> None:
    """After keys that only root can read and a port that only root can bind."""
    port = free_port()
    with Gateway(*flags(tls, fake, "--workers", str(workers), port=port)) as gateway:
        processes = [gateway.pid, *children(gateway.pid)]
        assert len(processes) == (1 if workers == 1 else 3)
        for pid in processes:
            assert who(pid) == {str(NOBODY.pw_uid)}
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(r"^CapPrm:\t0+$", status, re.M)
            assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
            # A process that dumps no core belongs to root there.
            assert os.stat(f"/proc/{pid}/environ").st_uid == 0, "its memory can be looked into"
            assert no_core(pid)
        with enter(gateway, tls) as client:
            read_works(client)
        assert "running as root" not in gateway.log()
        assert f"now user nobody ({NOBODY.pw_uid}), group {NOBODY.pw_gid}" in gateway.log()


def test_root_that_stays_is_warned_of_once(tls: Path, fake: FakeUpstream) -> None:
    args = [one for one in flags(tls, fake, "--workers", "2") if one not in USER]
    with Gateway(*args) as gateway, enter(gateway, tls):
        assert len(re.findall("WARNING running as root: --user USER gives", gateway.log())) == 1
        assert no_core(gateway.pid)


def test_reload_of_what_that_user_may_not_read(tls: Path, fake: FakeUpstream) -> None:
    """It is said with the remedy, and the set of the start serves on; then it may."""
    gateway = Gateway(*flags(tls, fake), faults_allowed=True)
    with gateway:
        os.kill(gateway.pid, 1)
        gateway.wait_log(
            r"reload refused.* --cert: cannot read .*: Permission denied; make it, and the folders "
            r"on the way, readable by nobody \(--user\), or restart"
        )
        with enter(gateway, tls) as client:
            read_works(client)
        again = tls.with_name("again")
        init(again)
        for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem"):
            shutil.copy(again / name, tls / name)
            os.chmod(tls / name, 0o640)
            os.chown(tls / name, 0, NOBODY.pw_gid)
        os.chmod(tls, 0o711)
        os.kill(gateway.pid, 1)
        gateway.wait_log("reload: now in use: new")
        with enter(gateway, again) as client:
            read_works(client)
        assert "Traceback" not in gateway.log()


def test_worker_that_takes_a_place_later(tls: Path, fake: FakeUpstream) -> None:
    """It has the set of the start, that user's rights, and what it imports late is there."""
    gateway = Gateway(*flags(tls, fake, "--workers", "2"), faults_allowed=True)
    with gateway:
        before = set(children(gateway.pid))
        os.kill(min(before), 9)
        wait_until(lambda: len(set(children(gateway.pid)) - before) == 1, "the next one", 30)
        (late,) = set(children(gateway.pid)) - before
        gateway.wait_log("those of the start serve on: .*Permission denied; make it")
        assert who(late) == {str(NOBODY.pw_uid)}
        os.kill((before - {min(before)}).pop(), 19)  # only the new one answers
        with enter(gateway, tls) as client:
            read_works(client)
        assert "Traceback" not in gateway.log()
        os.kill((before - {min(before)}).pop(), 18)


def test_socket_file_is_that_users(place: Path, tls: Path, fake: FakeUpstream) -> None:
    """And so it can be removed at the end."""
    folder = place / "run"
    folder.mkdir()
    os.chown(folder, NOBODY.pw_uid, NOBODY.pw_gid)
    with Gateway(*flags(tls, fake, "--listen", f"unix:{folder / 'front'}")) as gateway:
        assert os.stat(folder / "front").st_uid == NOBODY.pw_uid
        assert gateway.uris[1].endswith(f"socket={folder / 'front'}")
    assert not list(folder.iterdir())


def command(*args: str | Path) -> tuple[int, str]:
    line = [sys.executable, "-m", "gateway", *map(str, args)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    return done.returncode, done.stderr + done.stdout


def test_socket_file_where_that_user_has_no_say(place: Path, tls: Path, fake: FakeUpstream) -> None:
    code, text = command(*flags(tls, fake, "--listen", f"unix:{place / 'front'}"))
    assert code == 1
    assert f"user {NOBODY.pw_uid} may not make a file there" in text
    assert "Traceback" not in text
    assert not (place / "front").exists()


def test_user_that_nobody_is(tls: Path, fake: FakeUpstream) -> None:
    for text, words in (("no-such", "there is no such user"), ("root", "that is root itself")):
        code, said = command(*flags(tls, fake), "--user", text)
        assert code == 2
        assert said == f"nbd-gateway: error: --user {text}: {words}" + (
            ": name a user without privileges\n" if text == "root" else "\n"
        )


def test_package_that_only_root_can_read(
    tmp_path: Path, place: Path, tls: Path, fake: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root's own installation: what is needed after the start is there already."""
    shutil.copytree(ROOT / "gateway", tmp_path / "gateway")
    assert not os.stat(tmp_path.parent).st_mode & 0o7, "anybody can read it"
    monkeypatch.setattr("tests.support.gateway.ROOT", tmp_path)
    with Gateway(*flags(tls, fake)) as gateway:
        assert who(gateway.pid) == {str(NOBODY.pw_uid)}
        with enter(gateway, tls) as client:
            read_works(client)
        stranger = place / "stranger"
        init(stranger)
        shutil.copy(tls / "ca-cert.pem", stranger)
        with closing(RawClient(gateway.uri)) as client:
            client.greet()

            def enter_it() -> None:  # TLS 1.3: refused only behind the handshake
                client.start_tls(tls_context(stranger))
                client.go()

            with pytest.raises((PeerClosedError, OSError), match="UNKNOWN_CA"):
                enter_it()
        gateway.wait_log(r"closed: .*unknown_ca")


# ---------------------------------------------------------------- check


def test_check_says_what_that_user_may_not(place: Path, tls: Path, fake: FakeUpstream) -> None:
    os.chmod(fake.path, 0o700)
    code, text = command("check", *flags(tls, fake, "--listen", f"unix:{place / 'front'}"))
    assert code == 1
    assert re.search(r"^warn  .*/server-key.pem: nobody cannot read it, so the gateway", text, re.M)
    assert re.search(r"^bad   --listen unix:.*: no permission to make a file in", text, re.M)
    assert re.search(r"^bad   --socket .*: no permission to connect", text, re.M)


def test_check_of_files_for_that_user(tls: Path, fake: FakeUpstream) -> None:
    for path in (tls, *tls.iterdir()):
        os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    code, text = command("check", *flags(tls, fake))
    assert code == 0, text
    assert re.search(
        r"^ok    --user nobody: user nobody \(\d+\), .* can read the files", text, re.M
    )
    assert "belongs to" not in text, "whose they may be is known now"
    for path in (tls, *tls.iterdir()):
        os.chown(path, 54321, NOBODY.pw_gid)
    code, text = command("check", *flags(tls, fake))
    assert code == 1
    assert "has to be root's or nobody's" in text


def test_check_of_a_user_that_nobody_is(tls: Path, fake: FakeUpstream) -> None:
    code, text = command("check", *flags(tls, fake), "--user", "no-such")
    assert code == 1
    assert re.search(r"^bad   --user: --user no-such: there is no such user$", text, re.M)
