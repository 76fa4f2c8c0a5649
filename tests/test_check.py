"""gateway.check: all of it together, and what is looked at on the machine."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway import check
from gateway.access import ExportRules, Rule, Rules
from gateway.check.report import Report
from gateway.settings import (
    Listen,
    ListenSystemd,
    ListenTCP,
    ListenUnix,
    Settings,
    TLSSettings,
)
from tests.check_rig import DAY, LOCAL, NOW, Folder, said

KEY = b"01234567" * 8


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "tls")


@pytest.fixture
def upstream(folder: Folder) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder.socket))
        sock.listen()
        yield sock


# ---------------------------------------------------------------- verdicts


def test_never_stops_at_the_first(folder: Folder) -> None:
    """Everything is wrong, and each thing is said."""
    for path in (folder.cert, folder.key, folder.client_ca, folder.crl, folder.password):
        folder.write(path, b"rubbish")
    folder.socket.write_bytes(b"")
    folder.path.chmod(0o777)
    found = folder.check(listen=(ListenUnix(str(folder.key)),))
    for name in ("cert", "key", "ca", "crl", f"--socket {folder.socket}", "--listen unix", "start"):
        assert any(name in line.split(": ")[0] for line in found.of("bad")), name
    assert found.lines[-1].endswith("mend what is bad before you start or reload")


def test_one_line_a_verdict(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "line\nbad   faked\x1b[2J\udcff")
    for line in folder.check().lines:
        assert line.isprintable(), line


def test_a_parser_that_raises_is_a_verdict() -> None:
    report = Report()
    with report.part("file"):
        raise RecursionError("deep")
    with report.part("other"):
        raise OSError(5, "Input/output error")
    assert [str(one) for one in report.verdicts] == [
        "bad   file: cannot be judged: RecursionError: deep",
        "bad   other: cannot be read: Input/output error",
    ]


def test_dates_are_measured_by_one_moment(folder: Folder) -> None:
    lines: list[str] = []
    assert check.run(folder.settings(), lines.append, NOW + 364 * DAY) == 0
    assert any("in 1 days: renew it" in line for line in lines)
    assert check.run(folder.settings(), lines.append, NOW + 366 * DAY) == 1


def test_nothing_is_changed(folder: Folder, upstream: socket.socket) -> None:
    before = {path: path.stat().st_mtime_ns for path in [folder.path, *folder.path.iterdir()]}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder.check()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    upstream.setblocking(False)
    with pytest.raises(BlockingIOError):  # nobody has called
        upstream.accept()


# ---------------------------------------------------------------- who may enter


def test_access_is_said_where_there_are_no_rules(folder: Folder) -> None:
    assert folder.check().has("ok", "access: whoever has a certificate of .*/ca may enter: no --al")
    anonymous = folder.check(tls={"client_ca": None})
    assert anonymous.has("warn", "--allow-anonymous: everybody may enter, without a certificate")
    assert anonymous.code == 0
    off = said(Settings(str(folder.socket), None, LOCAL))
    assert off.has("warn", "--tls off: whoever reaches the listeners may open the export")
    assert off.has("ok", "start: ")


def test_rules_are_looked_at(folder: Folder) -> None:
    rule = Rule.parse("--allow", "cn=a")
    found = folder.check(rules=Rules(allow=(rule,), deny=(rule,)))
    assert found.has("warn", "allow cn=a: void")
    assert found.has("bad", "nobody can enter")
    assert not found.has("ok", "access")
    tables = Rules(
        exports=(ExportRules("a", read_only=(rule,)), ExportRules("b", (Rule.anybody(),)))
    )
    found = folder.check(rules=tables)
    assert found.has("ok", "rules: 2 in all and 2 exports")
    assert found.has("ok", 'export "b": all who may enter may write')
    assert not found.has("ok", 'export "a"')


def test_tls_1_3_locks_nbd_client_out(folder: Folder) -> None:
    assert folder.check(tls={"minimum": "1.3"}).has("warn", "--tls-min 1.3: locks nbd-client out")


# ---------------------------------------------------------------- pre-shared keys


def psk_settings(folder: Folder, *lines: bytes, **more: Any) -> Settings:
    path = folder.write(folder.path / "keys.psk", *(line + b"\n" for line in lines))
    tls = TLSSettings(None, None, None, psk=path)
    return Settings(str(folder.socket), tls, **{"listen": LOCAL, **more})


def test_psk_file(folder: Folder) -> None:
    found = said(psk_settings(folder, b"alice:" + KEY, b"bob:" + KEY[::-1]))
    assert found.has("ok", r"keys\.psk: 2 pre-shared keys$"), str(found)
    assert found.has("ok", "access: whoever has a key of --psk-file may enter")
    assert found.has("ok", "modes and owners: 1 files")
    assert not any(KEY.decode() in line for line in found.lines)
    if sys.version_info >= (3, 13):
        assert found.code == 0, str(found)
    else:
        assert found.has("bad", "start: .*pre-shared keys need Python 3.13"), str(found)
    (folder.path / "keys.psk").chmod(0o644)
    found = said(Settings(str(folder.socket), psk_settings(folder).tls, LOCAL))
    assert found.has("bad", r"keys\.psk: --psk-file: .* holds no key")


def test_psk_file_for_all_to_read(folder: Folder) -> None:
    settings = psk_settings(folder, b"alice:" + KEY)
    (folder.path / "keys.psk").chmod(0o644)
    assert said(settings).has("bad", r"keys\.psk: everybody can read it")


def test_psk_file_that_is_broken(folder: Folder) -> None:
    found = said(psk_settings(folder, b"alice:" + KEY, b"bob:secret"))
    assert found.has("bad", r"keys\.psk: .*line 2: the key is not hexadecimal"), str(found)
    assert not any("secret" in line for line in found.lines)


def test_psk_rules_and_names(folder: Folder) -> None:
    rules = Rules(
        allow=tuple(Rule.parse("", one) for one in ("psk=alice", "psk=eve")),
        exports=(ExportRules("a", deny=(Rule.parse("", "psk=*.x"),)),),
    )
    lines = (b"alice:" + KEY, b"bob:" + KEY)
    found = said(psk_settings(folder, *lines, rules=rules))
    assert found.has("warn", "has no key for the rule psk=eve: it never matches"), str(found)
    assert found.has("warn", r"has no key for the rule psk=\*\.x")
    assert not found.has("warn", "rule psk=alice")
    assert found.has("warn", "one key under several names: alice, bob")


# ---------------------------------------------------------------- the machine


def test_upstream_socket(folder: Folder, upstream: socket.socket) -> None:
    assert folder.check().has("ok", f"--socket {folder.socket}: a socket")


def test_upstream_is_no_socket(folder: Folder) -> None:
    folder.socket.write_bytes(b"")
    assert folder.check().has("bad", f"--socket {folder.socket}: no socket: name the one that")


def test_upstream_out_of_reach(
    folder: Folder, upstream: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, effective_ids: False)
    assert folder.check().has("bad", "--socket .*: no permission to connect")


def test_upstream_behind_a_file(folder: Folder) -> None:
    found = folder.check(socket=str(folder.cert / "up"))
    assert found.has("bad", "--socket .*: cannot be read: Not a directory"), str(found)


@pytest.mark.parametrize(
    ("listen", "tls", "level", "text"),
    [
        (ListenTCP("127.0.0.1", 1), True, "ok", "127.0.0.1:1: an address of this machine"),
        (ListenTCP("localhost", 1), False, "ok", "localhost:1: an address of this machine"),
        (ListenTCP("192.0.2.1", 1), True, "bad", "192.0.2.1 is not to be had on this machine"),
        (ListenTCP("192.0.2.1", 1), False, "bad", "--tls off: 192.0.2.1 is neither loopback"),
        (ListenTCP("0.0.0.0", 1), False, "bad", "--tls off: 0.0.0.0 is neither loopback"),
        (ListenTCP(None, 1), False, "bad", "--tls off: all addresses are more than loopback"),
        (ListenTCP("a..b", 1), True, "bad", "no address is known for 'a..b'"),
        (ListenSystemd(None), False, "warn", "--tls off: whoever reaches"),
    ],
)
def test_addresses(listen: Listen, tls: bool, level: str, text: str, folder: Folder) -> None:
    more: dict[str, Any] = {} if tls else {"tls": None}
    found = folder.check(listen=(listen,), **more)
    assert found.has(level, text), str(found)


def test_name_without_an_address(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **more: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = folder.check(listen=(ListenTCP("disks.example.com", 1),))
    assert found.has("bad", "no address is known for 'disks.example.com': .* not known"), str(found)


def test_port_in_use_is_not_looked_at(folder: Folder) -> None:
    """It is in use by the gateway that is to be reloaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = folder.check(listen=(ListenTCP("127.0.0.1", taken.getsockname()[1]),))
    assert found.code == 0, str(found)


def test_unix_listener(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(path: Path) -> Any:
        return folder.check(listen=(ListenUnix(str(path)),))

    new = folder.path / "new"
    assert checked(new).has("ok", f"--listen unix:{new}: can be made")
    assert checked(new / "deeper").has("bad", f"{new} is no folder: make it")
    assert checked(folder.cert).has("bad", "there is a file that is no socket")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(new))
        assert checked(new).has("warn", "there already: fine if by the gateway that runs now")
    monkeypatch.setattr(os, "access", lambda path, mode, effective_ids: False)
    assert checked(folder.path / "newer").has("bad", "no permission to make a file in")


@pytest.mark.parametrize(
    ("limit", "clients", "workers", "good"),
    [(264, 100, 1, True), (263, 100, 1, False), (114, 100, 4, True), (113, 100, 4, False)],
)
def test_descriptors(
    limit: int,
    clients: int,
    workers: int,
    good: bool,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (50, limit))
    found = folder.check(max_connections=clients, workers=workers)
    assert found.has("ok", "--max-connections: .* to be had") is good, str(found)
    assert found.has("warn", f"--max-connections: .* and {limit} are allowed") is not good
    assert found.code == 0
