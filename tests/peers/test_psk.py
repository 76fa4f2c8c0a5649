"""Pre-shared keys: real clients with a key of psktool's, and those with a wrong one or none.

The gateway runs with a Python that has them, the clients are those of this machine and of trixie.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.peers.people import behind_starttls
from tests.support.gateway import Gateway
from tests.support.modern import Modern
from tests.support.peers import (
    Client,
    Nbdkit,
    check,
    find,
    nbdsh,
    run,
    said,
    start_nbdsh,
    wait_until,
)
from tests.support.rawclient import Cmd, Opt, Request, info_data, option
from tests.support.trixie import Trixie

MIB = 1 << 20
NO_1_3 = "GNUTLS_SYSTEM_PRIORITY_FILE"
# For programs that know TLS and not NBD: opens the export, and disconnects.
OPEN = option(Opt.GO, info_data()) + Request(Cmd.DISC).pack()
version = pytest.mark.parametrize("version", ["1.2", "1.3"])


def psktool(path: Path, *names: str) -> Path:
    """A file with a new key for each."""
    path.parent.mkdir(exist_ok=True)
    for name in names:
        check("psktool", "--username", name, "--pskfile", path)
    path.chmod(0o644)  # QEMU and libnbd want no more
    return path


class Keyholder(Client):
    """A client with the key of that name in a directory's keys.psk."""

    def __init__(self, port: int, name: str, directory: Path) -> None:
        super().__init__(f"nbds://{name}@127.0.0.1:{port}/", directory)
        self.name = name
        self.directory = directory

    @property
    def uri(self) -> str:
        return f"{self.address}?tls-psk-file={self.directory / 'keys.psk'}"

    def qemu_object(self, priority: str = "") -> list[str]:
        options = f"tls-creds-psk,id=tls0,endpoint=client,dir={self.directory}"
        return ["--object", f"{options},username={self.name}{priority}"]


@dataclass
class Scene:
    """A disk of nbdkit's behind a gateway with the keys of alice and bob."""

    root: Path  # seen by the gateway and by all clients
    keys: Path
    server: Nbdkit
    gateway: Gateway
    modern: Modern

    def client(self, name: str, keys: str = "") -> Keyholder:
        """`keys`: another directory than the right one."""
        return Keyholder(self.gateway.port, name, self.root / (keys or "keys"))

    def dialled(self) -> int:
        """How many connections the upstream has had so far."""
        return self.server.log().count("accepted connection")

    def refusals(self, reason: str) -> int:
        return self.gateway.log().count(f"TLS handshake failed ({reason}: ")


@contextlib.contextmanager
def start(modern: Modern, *flags: str, lines: str = "") -> Iterator[Scene]:
    """`lines`: of the gateway's file alone."""
    root = modern.place / f"{len(list(modern.place.iterdir()))}"
    root.mkdir(mode=0o755)
    keys = psktool(root / "keys" / "keys.psk", "alice", "bob")
    own = root / "gateway.psk"  # as a gateway's should be, and another file than the clients'
    own.touch(0o600)
    own.write_text(keys.read_text() + lines)
    psktool(root / "wrong" / "keys.psk", "alice", "bob", "carol")
    with Nbdkit(root, "-fv", "memory", "16M") as server:
        sock: str | Path = server.socket
        listen = ["--listen", "127.0.0.1:0"]
        with modern.gateway("--psk-file", own, "--socket", sock, *listen, *flags) as gateway:
            try:
                yield Scene(root, own, server, gateway, modern)
            finally:
                print(gateway.log())


@pytest.fixture(scope="module")
def scene(modern: Modern) -> Iterator[Scene]:
    with start(modern) as made:
        yield made


@pytest.fixture
def gnutls(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs with GnuTLS speak this version. Asked for by hand, as QEMU's priority is."""
    if version == "1.2":
        (tmp_path / "gnutls").write_text("[overrides]\ndisabled-version = tls1.3\n")
        monkeypatch.setenv(NO_1_3, str(tmp_path / "gnutls"))
    return version


WORDS = {"1.2": "TLSv1.2 ECDHE-PSK-CHACHA20-POLY1305", "1.3": "TLSv1.3 TLS_"}


@version
@pytest.mark.parametrize("name", ["alice", "bob"])
def test_nbdinfo_with_a_key_gets_in(scene: Scene, gnutls: str, name: str) -> None:
    before = len(scene.gateway.log())
    assert int(check("nbdinfo", "--size", scene.client(name).uri)) == 16 * MIB
    scene.gateway.wait_log(f"psk:{name}", after=before)
    scene.gateway.wait_log(re.escape(WORDS[gnutls]), after=before)


@version
def test_qemu_img_with_a_key_gets_in(scene: Scene, gnutls: str) -> None:
    before = len(scene.gateway.log())
    assert "16 MiB" in check("qemu-img", "info", *scene.client("bob").qemu())
    scene.gateway.wait_log("psk:bob", after=before)
    scene.gateway.wait_log(re.escape(WORDS[gnutls]), after=before)


@version
def test_the_newer_programs_with_a_key_get_in(scene: Scene, newer: Trixie, version: str) -> None:
    place = newer.directory()
    psk = place / "keys.psk"
    psk.write_bytes((scene.root / "keys" / "keys.psk").read_bytes())
    client = Keyholder(scene.gateway.port, "alice", Path(newer.seen_inside(place)))
    flags = [] if version == "1.3" else ["env", f"{NO_1_3}={newer.seen_inside(place / 'gnutls')}"]
    (place / "gnutls").write_text("[overrides]\ndisabled-version = tls1.3\n")
    before = len(scene.gateway.log())
    assert int(newer.check(*flags, "nbdinfo", "--size", client.uri)) == 16 * MIB
    assert "16 MiB" in newer.check(*flags, "qemu-img", "info", *client.qemu())
    scene.gateway.wait_log(f"psk:alice, {re.escape(WORDS[version])}", after=before)


def test_a_disk_is_written_and_read(scene: Scene) -> None:
    done = nbdsh(
        """
        h = connect()
        data = os.urandom(1 << 20)
        h.pwrite(data, 1 << 20)
        report(same=h.pread(1 << 20, 1 << 20) == data)
        h.shutdown()
        """,
        scene.client("alice"),
    )
    assert done == {"same": True}


@version
@pytest.mark.parametrize(
    ("name", "keys", "reason", "words"),
    [
        ("alice", "wrong", "unknown_psk", "its key for 'alice' is not the one in --psk-file"),
        ("carol", "wrong", "unknown_psk", "--psk-file has no key for 'carol'"),
    ],
)
@pytest.mark.parametrize("program", ["nbdinfo", "qemu-img"])
def test_a_wrong_key_and_an_unknown_name_do_not_get_in(
    scene: Scene, gnutls: str, program: str, name: str, keys: str, reason: str, words: str
) -> None:
    dialled, before = scene.dialled(), len(scene.gateway.log())
    client = scene.client(name, keys)
    argv = ["--size", client.uri] if program == "nbdinfo" else ["info", *client.qemu()]
    done = run(program, *argv)
    assert done.returncode != 0
    scene.gateway.wait_log(
        re.escape(f"closed: TLS handshake failed ({reason}: {words})"), after=before
    )
    assert scene.dialled() == dialled


@version
@pytest.mark.parametrize("program", ["nbdinfo", "qemu-img"])
def test_both_look_the_same_to_the_client(scene: Scene, gnutls: str, program: str) -> None:
    printed = set()
    for name in ("alice", "carol"):
        client = scene.client(name, "wrong")
        argv = ["--size", client.uri] if program == "nbdinfo" else ["info", *client.qemu()]
        done = run(program, *argv)
        printed.add((done.returncode, said(done).replace(name, "NAME")))
    assert len(printed) == 1, printed


@version
def test_a_client_with_a_certificate_does_not_get_in(scene: Scene, gnutls: str, pki: Path) -> None:
    before = len(scene.gateway.log())
    for argv in (["nbdinfo", "--size"], ["qemu-img", "info"]):
        client = Client(scene.gateway.uri, pki)
        args = [client.uri] if argv[0] == "nbdinfo" else client.qemu()
        assert run(*argv, *args).returncode != 0
    wait_until(lambda: scene.gateway.log()[before:].count("(no_psk: ") == 2, "both to be refused")


def test_a_client_without_tls_does_not_get_in(scene: Scene) -> None:
    done = run("nbdinfo", f"nbd://127.0.0.1:{scene.gateway.port}/")
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["-tls1_3"], ""),
        (["-tls1_2"], ""),
        (["-tls1_2", "-cipher", "PSK-AES256-GCM-SHA384"], "no_psk"),  # no forward secrecy
        (["-tls1_2", "-cipher", "ECDHE-PSK-AES256-CBC-SHA384"], "no_psk"),  # no AEAD
        (["-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384"], "no_shared_cipher"),
        (["-tls1_3", "-allow_no_dhe_kex"], ""),  # nor is it made use of
    ],
)
def test_openssl(scene: Scene, flags: list[str], reason: str) -> None:
    key = (scene.root / "keys" / "keys.psk").read_text().split()[0].partition(":")[2]
    before = len(scene.gateway.log())
    with behind_starttls(scene.gateway.port) as port:
        command = [find("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", *flags]
        command += ["-ign_eof"]  # what it has been told by then ends the session
        done = subprocess.run(
            [*command, "-psk_identity", "alice", "-psk", key],
            input=OPEN,
            capture_output=True,
            timeout=60,
            check=False,
        )
    printed = (done.stdout + done.stderr).decode(errors="replace")
    if reason:
        scene.gateway.wait_log(rf"TLS handshake failed \({reason}: ", after=before)
        assert "alert handshake failure" in printed
    else:
        scene.gateway.wait_log("psk:alice", after=before)
        assert "Server certificate" not in printed
        if "-tls1_3" in flags:
            assert "Server Temp Key" in printed  # (EC)DHE, whatever the client would put up with


# gnutls-cli 3.7 dies of a signal where TLS 1.2 and a key come together; libnbd and QEMU do not.
@pytest.mark.parametrize("program", ["gnutls-cli", "openssl 1.2", "openssl 1.3"])
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a b:c"])
def test_odd_names(modern: Modern, program: str, name: str) -> None:
    key = "ab" * 32
    program, _, version = program.partition(" ")
    with start(modern, lines=f"#{name.encode().hex()}:{key}\n") as scene:
        with behind_starttls(scene.gateway.port) as port:
            if program == "openssl":
                command = ["s_client", "-connect", f"127.0.0.1:{port}", "-quiet", "-ign_eof"]
                command += [f"-tls{version.replace('.', '_')}", "-psk_identity", name, "-psk", key]
            else:
                priority = "NORMAL:-KX-ALL:+ECDHE-PSK:-VERS-ALL:+VERS-TLS1.3"
                command = ["-p", str(port), "--priority", priority, "127.0.0.1"]
                command += ["--pskusername", name, "--pskkey", key]
            subprocess.run(
                [find(program), *command], input=OPEN, capture_output=True, timeout=60, check=False
            )
        scene.gateway.wait_log(f"psk:{name[:40]}")


def test_rules_by_name(modern: Modern) -> None:
    with start(modern, "--allow", "psk=alice") as scene:
        dialled = scene.dialled()
        done = run("nbdinfo", "--size", scene.client("bob").uri)
        assert "server policy prevents NBD_OPT_GO" in said(done)
        done = run("qemu-img", "info", *scene.client("bob").qemu())
        assert "psk:bob may not open anything here" in said(done)
        scene.gateway.wait_log(r"not_allowed: .*psk:bob")
        assert scene.dialled() == dialled
        check("nbdinfo", "--size", scene.client("alice").uri)


def test_tls_1_3_only(modern: Modern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(modern, "--tls-min", "1.3") as scene:
        check("nbdinfo", "--size", scene.client("alice").uri)
        (tmp_path / "gnutls").write_text("[overrides]\ndisabled-version = tls1.3\n")
        monkeypatch.setenv(NO_1_3, str(tmp_path / "gnutls"))
        assert run("nbdinfo", "--size", scene.client("alice").uri).returncode != 0
        scene.gateway.wait_log(r"TLS handshake failed \(tls_version: ")


def test_a_key_that_is_replaced_ends_the_sessions_that_came_in_with_it(modern: Modern) -> None:
    """And no others. The file is looked at by itself, or at a SIGHUP as here."""
    script = """
        h = connect()
        report(in_=True)
        while True:
            try:
                h.pread(512, 0)
            except nbd.Error:
                report(out=True)
                break
            time.sleep(0.05)
            if os.path.exists(args["stop"]):
                report(out=False)
                h.shutdown()
                break
        """
    with start(modern) as scene, contextlib.ExitStack() as stack:
        stop = scene.root / "stop"
        sessions = {
            name: stack.enter_context(start_nbdsh(script, scene.client(name), stop=stop))
            for name in ("alice", "bob")
        }
        for one in sessions.values():
            stack.callback(one.kill)
            assert one.stdout is not None
            assert one.stdout.readline()
        alice, bob = scene.keys.read_text().splitlines()
        scene.keys.write_text(f"alice:{'5a' * 32}\n{bob}\n")
        os.kill(scene.gateway.pid, signal.SIGHUP)
        assert sessions["alice"].stdout is not None
        assert '"out": true' in sessions["alice"].stdout.readline()
        stop.touch()
        assert sessions["bob"].stdout is not None
        assert '"out": false' in sessions["bob"].stdout.readline()
        assert alice.partition(":")[2] not in scene.gateway.log()


def test_no_key_is_ever_logged(scene: Scene) -> None:
    """Last, after all that has happened above."""
    log = scene.gateway.log()
    for path in (scene.keys, scene.root / "wrong" / "keys.psk"):
        for line in path.read_text().splitlines():
            assert line.partition(":")[2][:16] not in log
    assert urlsplit(scene.gateway.uri).scheme == "nbds"
