"""gateway.reload in a running server: new files and rules, and who notices."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509

from gateway import reload, snapshot
from gateway.access import ExportRules, Rule, Rules, parse_network
from gateway.errors import SettingsError
from gateway.pki import CRL_DAYS, CertificateAuthority, Credential
from gateway.server import Server
from gateway.settings import ListenTCP, Settings, TLSSettings
from gateway.trust import Trust
from tests import server_rig
from tests.server_rig import Clients, in_thread, read_works
from tests.support.fake_upstream import FakeUpstream
from tests.support.rawclient import PeerClosedError, RawClient, tls_context

fake = server_rig.fake
NOW = datetime.now(UTC)
DAY = timedelta(days=1)
REFUSED = "reload refused, the files and rules of before stay: "


class Folder:
    """A `--tls-dir` with its CA at hand, and a client's folder beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ca = CertificateAuthority.create("test CA")
        path.mkdir()
        self.put("ca-cert.pem", self.ca.cert_pem)
        self.server()
        self.crl()

    def put(self, name: str, *pems: bytes) -> None:
        """As one that writes carefully does: never a file that is half there."""
        new = self.path / f".{name}"
        new.write_bytes(b"".join(pems))
        new.rename(self.path / name)

    def server(self, ca: CertificateAuthority | None = None) -> Credential:
        server = (ca or self.ca).issue_server(["localhost", "127.0.0.1"])
        self.put("server-cert.pem", server.cert_pem)
        self.put("server-key.pem", server.key_pem)
        return server

    def crl(self, *revoked: Credential, now: datetime | None = None) -> None:
        serials = [one.certificate.serial_number for one in revoked]
        self.put("ca-crl.pem", self.ca.revoke_list(serials, now))

    def client(self, name: str, ca: CertificateAuthority | None = None) -> Path:
        """A folder for `tls_context`. It knows the CA of the server as it is now."""
        credential = (ca or self.ca).issue_client(name)
        folder = self.path.parent / f"client-{name}"
        folder.mkdir()
        (folder / "client-cert.pem").write_bytes(credential.cert_pem)
        (folder / "client-key.pem").write_bytes(credential.key_pem)
        shutil.copy(self.path / "ca-cert.pem", folder)
        return folder

    def credential(self, folder: Path) -> Credential:
        pem = (folder / "client-cert.pem").read_bytes()
        return Credential(x509.load_pem_x509_certificate(pem), self.ca.key)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "tls")


class Running:
    """A server, and what it did at its last reload."""

    def __init__(self, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
        self.settings = settings
        self.server = Server(settings, reread=self._reread)
        self.uri = ""
        self._caplog = caplog
        self.wrong: SettingsError | None = None

    def _reread(self) -> Settings:
        if self.wrong is not None:
            raise self.wrong
        return self.settings

    async def reload(self) -> str:
        """As after SIGHUP. The line in the log."""
        before = len(self.lines())
        self.server.reload()
        return await self.said(before)

    async def said(self, before: int) -> str:
        """What is said about reloads after so many lines."""
        with trio.fail_after(20):
            while len(self.lines()) <= before:  # noqa: ASYNC110
                await trio.sleep(0.01)
        return self.lines()[before]

    def lines(self) -> list[str]:
        texts = [record.getMessage() for record in self._caplog.records]
        return [text for text in texts if text.startswith("reload")]

    def rules(self, **rules: object) -> None:
        self.settings = dataclasses.replace(self.settings, rules=Rules(**rules))  # type: ignore[arg-type]

    @property
    def trust(self) -> Trust:
        return self.server.trust


@pytest.fixture
async def gateway(
    nursery: trio.Nursery, fake: FakeUpstream, folder: Folder, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Callable[..., object]]:
    caplog.set_level(logging.INFO)
    running: list[Running] = []

    async def start(**more: object) -> Running:
        path = folder.path
        tls = TLSSettings(
            *(path / name for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem")),
            crl=path / "ca-crl.pem",
        )
        changes = {"reload_interval_s": 0, **more}
        settings = Settings(str(fake.path), tls, (ListenTCP("127.0.0.1", 0),), **changes)  # type: ignore[arg-type]
        one = Running(settings, caplog)
        running.append(one)
        (one.uri,) = await nursery.start(one.server.run)
        return one

    yield start
    for one in running:
        one.server.cut()


@pytest.fixture
def clients(folder: Folder) -> AsyncIterator[Clients]:
    clients = Clients(folder.path)
    yield clients  # type: ignore[misc]
    clients.close()


async def opened(clients: Clients, uri: str, folder: Path) -> RawClient:
    client = await clients.greeted(uri)
    await in_thread(client.start_tls, tls_context(folder))
    await in_thread(client.go)
    return client


async def enters(clients: Clients, uri: str, folder: Path) -> bool:
    client = await clients.greeted(uri)
    try:
        await in_thread(client.start_tls, tls_context(folder))
        await in_thread(client.go)
    except (OSError, PeerClosedError):
        return False
    finally:
        client.close()
    return True


# ---------------------------------------------------------------- what is taken over


async def test_nothing_new(gateway, folder: Folder) -> None:  # type: ignore[no-untyped-def]
    running = await gateway()
    before = running.trust
    assert await running.reload() == "reload: the files and rules are those in use"
    assert running.trust is before


async def test_certificate_ca_and_crl(gateway, folder: Folder, clients: Clients) -> None:  # type: ignore[no-untyped-def]
    running = await gateway()
    alice, bob = folder.client("alice"), folder.client("bob")
    stays = await opened(clients, running.uri, alice)
    goes = await opened(clients, running.uri, bob)
    folder.server()
    line = await running.reload()
    assert line.startswith("reload: now in use: new --cert, --key; our certificate is good until ")
    assert ", the CRL until " in line
    for one in (stays, goes):
        await in_thread(read_works, one)
    folder.crl(folder.credential(bob))
    assert (await running.reload()).startswith("reload: now in use: new --crl; ")
    await in_thread(goes.recv_to_end)
    await in_thread(read_works, stays)
    assert not await enters(clients, running.uri, bob)
    assert await enters(clients, running.uri, alice)


@pytest.mark.expects_error_log
async def test_rotation_of_the_ca(gateway, folder: Folder, clients: Clients) -> None:  # type: ignore[no-untyped-def]
    """Both for a while, then the new one alone: who has a new certificate by then notices none."""
    running = await gateway()
    old = await opened(clients, running.uri, folder.client("old"))
    new_ca = CertificateAuthority.create("new CA")
    folder.put("ca-cert.pem", folder.ca.cert_pem, new_ca.cert_pem)
    assert "no CRL of CN=new CA" in (refused := await running.reload())
    assert refused.startswith(REFUSED)
    folder.put("ca-crl.pem", folder.ca.revoke_list([]), new_ca.revoke_list([]))
    assert "new --client-ca, --crl" in await running.reload()
    fresh = folder.client("fresh", new_ca)
    new = await opened(clients, running.uri, fresh)
    await in_thread(read_works, old)
    folder.put("ca-cert.pem", new_ca.cert_pem)
    folder.put("ca-crl.pem", new_ca.revoke_list([]))
    await running.reload()
    await in_thread(old.recv_to_end)
    await in_thread(read_works, new)
    assert await enters(clients, running.uri, fresh)


async def test_rules(gateway, folder: Folder, clients: Clients) -> None:  # type: ignore[no-untyped-def]
    running = await gateway()
    alice, bob = folder.client("alice"), folder.client("bob")
    stays = await opened(clients, running.uri, alice)
    goes = await opened(clients, running.uri, bob)
    running.rules(allow=(Rule.parse("--allow", "cn=alice"),))
    assert (await running.reload()).startswith("reload: now in use: new rules; ")
    await in_thread(goes.recv_to_end)
    await in_thread(read_works, stays)


async def test_on_revoke_keep(gateway, folder: Folder, clients: Clients) -> None:  # type: ignore[no-untyped-def]
    running = await gateway(on_revoke="keep")
    bob = folder.client("bob")
    stays = await opened(clients, running.uri, bob)
    folder.crl(folder.credential(bob))
    await running.reload()
    await in_thread(read_works, stays)
    assert not await enters(clients, running.uri, bob)


async def test_crl_that_runs_out_and_is_renewed(  # type: ignore[no-untyped-def]
    gateway, folder: Folder, clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody enters while it is out of date; who is in stays in, and all is well again after."""
    alice = folder.client("alice")
    left = timedelta(seconds=5)
    folder.crl(now=datetime.now(UTC) - CRL_DAYS * DAY + left)
    running = await gateway()
    client = await opened(clients, running.uri, alice)
    with trio.fail_after(60):
        while "crl_expired" not in caplog.text:
            await enters(clients, running.uri, alice)
            await trio.sleep(0.1)
    assert not await enters(clients, running.uri, alice)
    await in_thread(read_works, client)
    folder.crl()
    assert "now in use: new crl" in (await running.reload()).replace("--", "")
    assert await enters(clients, running.uri, alice)
    await in_thread(read_works, client)


@pytest.mark.expects_error_log
async def test_a_certificate_in_place_of_the_ca_changes_nothing(  # type: ignore[no-untyped-def]
    gateway, folder: Folder, clients: Clients
) -> None:
    """`cp` of the wrong file: the session goes on, and others come in."""
    alice = folder.client("alice")
    running = await gateway()
    client = await opened(clients, running.uri, alice)
    folder.put("ca-cert.pem", (folder.path / "server-cert.pem").read_bytes())
    assert (await running.reload()).startswith(REFUSED)
    await in_thread(read_works, client)
    assert await enters(clients, running.uri, alice)


async def test_settings_that_need_a_restart(  # type: ignore[no-untyped-def]
    gateway, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    running = await gateway()
    running.rules(deny=(Rule.parse("--deny", "cn=x"),))
    running.settings = dataclasses.replace(running.settings, max_connections=7)
    await running.reload()
    assert await running.said(1) == "reload: max_connections: changed, and needs a restart"


# ---------------------------------------------------------------- what is refused


def wrongs(folder: Folder) -> dict[str, tuple[Callable[[], None], str]]:
    other = CertificateAuthority.create("another CA")
    path = folder.path
    return {
        "cert cut off": (
            lambda: (path / "server-cert.pem").write_bytes(folder.ca.cert_pem[:300]),
            "--cert: ",
        ),
        "cert without its key": (
            lambda: folder.put("server-cert.pem", folder.ca.issue_server(["x"]).cert_pem),
            "--key: ",
        ),
        "key gone": (lambda: (path / "server-key.pem").unlink(), "--key: cannot read "),
        "ca empty": (lambda: (path / "ca-cert.pem").write_bytes(b""), "--client-ca: "),
        "crl gone": (lambda: (path / "ca-crl.pem").unlink(), "--crl: cannot read "),
        "crl stale": (lambda: folder.crl(now=NOW - 60 * DAY), "--crl: .* that expired on "),
        "crl foreign": (lambda: folder.put("ca-crl.pem", other.revoke_list([])), "--crl: "),
    }  # type: ignore[return-value]


@pytest.mark.expects_error_log
@pytest.mark.parametrize(
    "case",
    [
        *("cert cut off", "cert without its key", "key gone", "ca empty"),
        *("crl gone", "crl stale", "crl foreign"),
    ],
)
async def test_bad_sets_are_refused_whole(  # type: ignore[no-untyped-def]
    case: str, gateway, folder: Folder, clients: Clients
) -> None:
    """Also the rules that came with them."""
    running = await gateway()
    alice = folder.client("alice")
    stays = await opened(clients, running.uri, alice)
    before = running.trust
    spoil, why = wrongs(folder)[case]
    spoil()
    running.rules(allow=(Rule.parse("--allow", "cn=nobody"),))
    line = await running.reload()
    assert line.startswith(REFUSED + why.partition(".*")[0])
    assert why.rpartition(".*")[2] in line
    assert running.trust is before
    await in_thread(read_works, stays)
    assert await enters(clients, running.uri, alice)
    assert await running.reload() == line  # said again to who asks again
    running.rules()
    folder.put("ca-cert.pem", folder.ca.cert_pem)
    folder.server()
    folder.crl()
    assert (await running.reload()).startswith("reload: now in use: ")
    assert await enters(clients, running.uri, alice)


@pytest.mark.expects_error_log
async def test_rules_that_cannot_be_read(gateway, folder: Folder) -> None:  # type: ignore[no-untyped-def]
    running = await gateway()
    before = running.trust
    running.wrong = SettingsError("--config x.toml: not TOML")
    folder.crl()
    assert await running.reload() == f"{REFUSED}--config x.toml: not TOML"
    assert running.trust is before


@pytest.mark.expects_error_log
async def test_crl_that_nobody_wants_any_more(gateway, folder: Folder) -> None:  # type: ignore[no-untyped-def]
    """With --tls-dir the file of a list that is just being replaced would be no list."""
    running = await gateway()
    assert running.settings.tls is not None
    tls = dataclasses.replace(running.settings.tls, crl=None)
    running.settings = dataclasses.replace(running.settings, tls=tls)
    assert (await running.reload()).startswith(f"{REFUSED}--crl is gone")


# ---------------------------------------------------------------- the timer


async def test_it_looks_by_itself(gateway, folder: Folder) -> None:  # type: ignore[no-untyped-def]
    running = await gateway(reload_interval_s=0.05)
    folder.server()
    assert "new --cert, --key" in await running.said(0)


async def test_symlinks_as_kubernetes_swaps_them(  # type: ignore[no-untyped-def]
    gateway, folder: Folder, clients: Clients
) -> None:
    """The names stay links to `..data/NAME`, and `..data` is what is swapped."""
    path = folder.path
    (path / "..1").mkdir()
    for one in list(path.glob("*.pem")):
        one.rename(path / "..1" / one.name)
        one.symlink_to(Path("..data") / one.name)
    (path / "..data").symlink_to("..1")
    running = await gateway(reload_interval_s=0.05)
    alice = folder.client("alice")
    stays = await opened(clients, running.uri, alice)
    shutil.copytree(path / "..1", path / "..2")
    server = folder.ca.issue_server(["localhost", "127.0.0.1"])
    (path / "..2" / "server-cert.pem").write_bytes(server.cert_pem)
    (path / "..2" / "server-key.pem").write_bytes(server.key_pem)
    (path / "..data_tmp").symlink_to("..2")
    os.rename(path / "..data_tmp", path / "..data")
    shutil.rmtree(path / "..1")
    assert "new --cert, --key" in await running.said(0)
    await in_thread(read_works, stays)
    assert await enters(clients, running.uri, alice)


@pytest.mark.expects_error_log
async def test_what_is_wrong_is_said_once(  # type: ignore[no-untyped-def]
    gateway, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await gateway(reload_interval_s=0.01)
    read, reads = snapshot._read, [0]

    def counted(flag: str, path: Path) -> bytes:
        reads[0] += path.name == "ca-cert.pem"
        return read(flag, path)

    monkeypatch.setattr(snapshot, "_read", counted)

    async def looks(more: int) -> None:
        end = reads[0] + more
        with trio.fail_after(20):
            while reads[0] < end:  # noqa: ASYNC110
                await trio.sleep(0.01)

    (folder.path / "ca-cert.pem").write_bytes(b"")
    assert (await running.said(0)).startswith(f"{REFUSED}--client-ca: ")
    await looks(30)
    assert len(running.lines()) == 1
    folder.put("ca-cert.pem", folder.ca.cert_pem)
    await looks(5)
    (folder.path / "ca-cert.pem").write_bytes(b"")
    assert (await running.said(1)).startswith(f"{REFUSED}--client-ca: ")


async def test_a_file_that_is_half_written_once_is_nobodys_mistake(gateway) -> None:  # type: ignore[no-untyped-def]
    running = await gateway(reload_interval_s=0.01)
    reads = [0]

    def reread() -> Settings:
        reads[0] += 1
        if reads[0] % 2:
            raise SettingsError("--config: half of a line")
        return running.settings

    running.server._reloader._reread = reread
    with trio.fail_after(20):
        while reads[0] < 20:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert running.lines() == []


@pytest.mark.expects_error_log
async def test_files_that_cannot_be_read_for_ever(  # type: ignore[no-untyped-def]
    gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that hangs holds up reloads, and nothing else; and that is said."""
    monkeypatch.setattr(reload, "_READ_S", 0.05)
    running = await gateway(reload_interval_s=0)
    before, hangs = running.trust, threading.Event()

    def reread() -> Settings:
        hangs.wait(20)
        return running.settings

    running.server._reloader._reread = reread
    assert "does a network mount hang?" in await running.reload()
    assert running.trust is before
    hangs.set()
    running.rules(deny=(Rule.parse("--deny", "cn=mallory"),))
    monkeypatch.undo()
    assert "now in use" in await running.reload()


@pytest.mark.expects_error_log
async def test_tables_that_a_reload_has_brought_do_not_go_by_one(gateway) -> None:  # type: ignore[no-untyped-def]
    running = await gateway(reload_interval_s=0)
    running.rules(exports=(ExportRules("disk", (Rule.anybody(),)),))
    assert "now in use" in await running.reload()
    running.rules()
    assert "the last [[export]] is gone" in await running.reload()
    assert running.trust.rules.exports


async def test_only_what_was_read_twice_is_loaded(  # type: ignore[no-untyped-def]
    gateway, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that is being written may be a shorter one, and a good one, at every moment."""
    running = await gateway(reload_interval_s=0.05)
    before = running.trust
    seen: list[bytes] = []

    def crls(_: object, path: Path) -> bytes:
        if path.name != "ca-crl.pem":
            return path.read_bytes()
        seen.append(folder.ca.revoke_list([1 + len(seen)], NOW - DAY))  # each snapshot another one
        return seen[-1] if len(seen) % 2 else seen[-2]

    monkeypatch.setattr("gateway.snapshot._read", crls)
    with trio.fail_after(20):
        while len(seen) < 12:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert running.trust is before
    monkeypatch.undo()


# ---------------------------------------------------------------- addresses


async def test_addresses(gateway, folder: Folder, clients: Clients, fake: FakeUpstream) -> None:  # type: ignore[no-untyped-def]
    """Kept out before a byte, and sent away when they are kept out later."""
    running = await gateway(max_connections=2)
    alice = folder.client("alice")
    goes = await opened(clients, running.uri, alice)
    greeted = await clients.greeted(running.uri)
    running.rules(deny_from=(parse_network("--deny-from", "127.0.0.0/8"),))
    await running.reload()
    await in_thread(goes.recv_to_end)
    await in_thread(greeted.recv_to_end)
    dialled = fake.connects
    for _ in range(20):
        client = clients.connect(running.uri)
        assert await in_thread(client.sock.recv, 1) == b""
        client.close()
    lines = [one.getMessage() for one in running._caplog.records]
    assert sum("closed: client not allowed (address_not_allowed: " in one for one in lines) == 20
    running.rules()
    await running.reload()
    await in_thread(read_works, await opened(clients, running.uri, alice))
    assert fake.connects == dialled + 1
