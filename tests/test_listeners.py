"""gateway.listeners: real sockets on loopback, Unix socket files, and what systemd hands over."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gateway.errors import ListenError, SettingsError
from gateway.listeners import Listeners
from gateway.settings import Listen, ListenTCP, ListenUnix
from tests.support.rawclient import dial

LOOPBACK = ListenTCP("127.0.0.1", 0)
NO_SYSTEMD: dict[str, str] = {}


def opened(*addresses: Listen, local_only: bool = False) -> Listeners:
    return Listeners.open(addresses, local_only=local_only, environ=NO_SYSTEMD)


def addresses(listening: Listeners) -> list[tuple[str, int]]:
    return [sock.getsockname()[:2] for sock in listening.sockets]


def descriptors() -> set[str]:
    """This process's open files, by what they are: numbers are used again."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # the one that lists
    return found


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = descriptors()
    yield
    assert {one for one in descriptors() - before if one.startswith("socket:")} == set()


def accepts(listening: socket.socket) -> bool:
    """Whether a client gets through to this socket."""
    with socket.socket(listening.family) as client:
        client.connect(listening.getsockname())
        listening.setblocking(True)
        accepted, _ = listening.accept()
        accepted.close()
    return True


# ---------------------------------------------------------------- TCP


def test_port_0_picks_one() -> None:
    with opened(LOOPBACK) as listening:
        ((host, port),) = addresses(listening)
        assert host == "127.0.0.1"
        assert port > 0
        assert accepts(*listening.sockets)


def test_a_given_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with opened(ListenTCP("127.0.0.1", port)) as listening:
        assert addresses(listening) == [("127.0.0.1", port)]


def test_ipv6_loopback() -> None:
    with opened(ListenTCP("::1", 0)) as listening:
        ((host, port),) = addresses(listening)
        assert host == "::1"
        assert port > 0
        assert accepts(*listening.sockets)


def test_all_addresses_have_one_port() -> None:
    with opened(ListenTCP(None, 0)) as listening:
        (v4, port4), (v6, port6) = addresses(listening)
        assert (v4, v6) == ("0.0.0.0", "::")
        assert port4 == port6 > 0
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port4)).close()


def test_all_addresses_of_a_name_have_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def both(host: str, *args: object, **kwargs: object) -> list[object]:
        assert host == "disks.example.com"
        return [*resolve("127.0.0.1", 0), *resolve("::1", 0)]  # each once per socket type

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with opened(ListenTCP("disks.example.com", 0)) as listening:
        (v4, port4), (v6, port6) = addresses(listening)
        assert (v4, v6) == ("127.0.0.1", "::1")
        assert port4 == port6


def test_listening_sockets_do_not_block_and_are_not_inherited() -> None:
    with opened(ListenTCP(None, 0)) as listening:
        for sock in listening.sockets:
            assert not sock.getblocking()
            assert not sock.get_inheritable()
            with pytest.raises(BlockingIOError):
                sock.accept()


def test_port_is_free_again_at_once() -> None:
    """With connections of the former owner in TIME_WAIT: a restart must not fail."""
    with opened(LOOPBACK) as listening:
        ((host, port),) = addresses(listening)
        client = socket.create_connection((host, port))
        listening.sockets[0].setblocking(True)
        accepted, _ = listening.sockets[0].accept()
        accepted.close()  # the server's end closes first
        client.close()
    opened(ListenTCP(host, port)).__exit__()


@pytest.mark.parametrize("host", ["127.0.0.1", None])
def test_port_in_use(host: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=rf":{port}: Address already in use$"):
            opened(ListenTCP(host, port))


def test_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "front"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError):
            opened(LOOPBACK, ListenUnix(str(path)), ListenTCP("127.0.0.1", port))
    assert not path.exists()


def test_address_of_another_machine() -> None:
    with pytest.raises(ListenError, match=r"^cannot listen on 198\.51\.100\.1:0: Cannot assign"):
        opened(ListenTCP("198.51.100.1", 0))  # TEST-NET-2


def test_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ListenError, match=r"disks\.example\.com:0: Name or service not known$"):
        opened(ListenTCP("disks.example.com", 0))


Hook = Callable[[socket.socket, object], None]


def before_bind(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    """Call `hook` before every `bind` in the module under test."""

    class Hooked(socket.socket):
        def bind(self, address: Any) -> None:
            hook(self, address)
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Hooked)


def test_port_0_is_tried_again_if_the_other_family_has_it_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def hook(sock: socket.socket, address: object) -> None:
        assert isinstance(address, tuple)
        if sock.family == socket.AF_INET6 and len(taken) < 3:
            taken.append(address[1])
            raise OSError(errno.EADDRINUSE, "Address already in use")

    before_bind(monkeypatch, hook)
    with opened(ListenTCP(None, 0)) as listening:
        assert len({port for _, port in addresses(listening)}) == 1
    assert len(taken) == 3


def test_port_0_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(sock: socket.socket, address: object) -> None:
        if sock.family == socket.AF_INET6:
            raise OSError(errno.EADDRINUSE, "Address already in use")

    before_bind(monkeypatch, hook)
    with pytest.raises(ListenError, match=r"^cannot listen on :0: no port is free"):
        opened(ListenTCP(None, 0))


@pytest.mark.parametrize("refusal", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_machine_without_ipv6(refusal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without, or switched off: IPv4 is served all the same, and [::1] is an error."""

    class OnlyV4(socket.socket):
        def __init__(self, family: int = -1, *args: int, **kwargs: int) -> None:
            if family == socket.AF_INET6 and refusal == errno.EAFNOSUPPORT:
                raise OSError(refusal, os.strerror(refusal))
            super().__init__(family, *args, **kwargs)

        def bind(self, address: Any) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(refusal, os.strerror(refusal))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", OnlyV4)
    with opened(ListenTCP(None, 0)) as listening:
        assert [host for host, _ in addresses(listening)] == ["0.0.0.0"]
    with pytest.raises(ListenError, match=r"no such addresses$"):
        opened(ListenTCP("::1", 0))


# ---------------------------------------------------------------- --tls off


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_local_addresses(host: str) -> None:
    with opened(ListenTCP(host, 0), local_only=True) as listening:
        assert listening.sockets


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::"])
def test_addresses_that_are_not_local(host: str | None, tmp_path: Path) -> None:
    path = tmp_path / "front"
    with pytest.raises(SettingsError, match=r"^--tls off: .* is neither loopback nor"):
        opened(ListenUnix(str(path)), ListenTCP(host, 0), local_only=True)
    assert not path.exists()


def test_unix_sockets_are_local(tmp_path: Path) -> None:
    with opened(ListenUnix(str(tmp_path / "front")), local_only=True) as listening:
        assert accepts(*listening.sockets)


# ---------------------------------------------------------------- Unix sockets


def test_socket_file_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "front"
    with opened(ListenUnix(str(path))) as listening:
        assert path.is_socket()
        assert accepts(*listening.sockets)
    assert not path.exists()


def test_relative_path_is_removed_from_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with opened(ListenUnix("front")):
        monkeypatch.chdir("elsewhere")
        Path("front").write_text("something dear")
    assert not (tmp_path / "front").exists()
    assert Path("front").read_text() == "something dear"


@pytest.mark.parametrize("kind", ["a file", "another server's socket"])
def test_file_that_replaced_ours_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "front"
    with closing(socket.socket(socket.AF_UNIX)) as other:
        with opened(ListenUnix(str(path))):
            path.unlink()
            if kind == "a file":
                path.write_text("something dear")
            else:
                other.bind(str(path))
        assert path.exists()


def test_socket_file_that_is_gone_already(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "front"
    with opened(ListenUnix(str(path))):
        path.unlink()
    assert not caplog.records


def test_socket_file_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, and the other listeners are closed all the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    really = os.unlink

    def unlink(path: str) -> None:
        if path == str(first):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        really(path)

    with opened(ListenUnix(str(first)), ListenUnix(str(second))) as listening:
        monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.undo()
    assert not second.exists()
    assert all(sock.fileno() < 0 for sock in listening.sockets)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"cannot remove {first}: Permission denied"


@pytest.mark.parametrize("kind", ["a file", "a folder", "a dangling link", "a live socket"])
def test_what_is_there_is_not_touched(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "front"
    with closing(socket.socket(socket.AF_UNIX)) as other:
        match kind:
            case "a file":
                path.write_text("something dear")
            case "a folder":
                path.mkdir()
            case "a dangling link":
                path.symlink_to(tmp_path / "nowhere")
            case _:
                other.bind(str(path))
        with pytest.raises(ListenError, match=rf"^cannot listen on unix:{path}: the file exists"):
            opened(ListenUnix(str(path)))
        assert os.path.lexists(path)


def test_no_folder_for_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "no" / "front"
    with pytest.raises(ListenError, match=rf"^cannot listen on unix:{path}: No such file"):
        opened(ListenUnix(str(path)))


def test_a_fork_closes_its_own_and_removes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "front"
    with opened(LOOPBACK, ListenUnix(str(path))) as listening:
        with listening.shared() as shared:
            assert shared.sockets == listening.sockets
        assert path.is_socket()
    assert not path.exists()


def test_closing_twice_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "front"
    listening = opened(ListenUnix(str(path)))
    listening.__exit__()
    path.write_text("somebody else's")
    listening.__exit__()
    assert path.exists()


# ---------------------------------------------------------------- URIs


def test_uris_of_loopback_name_the_address() -> None:
    with opened(LOOPBACK, ListenTCP("::1", 0)) as listening:
        (_, first), (_, second) = addresses(listening)
        assert listening.uris("disk", ["disks.example.com"], tls=True) == [
            f"nbds://127.0.0.1:{first}/disk",
            f"nbds://[::1]:{second}/disk",
        ]
        assert listening.uris("", [], tls=False)[0] == f"nbd://127.0.0.1:{first}/"


def test_uri_of_all_addresses_names_the_certificate() -> None:
    """Once, though there are two sockets: a client verifies the name that it asked for."""
    with opened(ListenTCP(None, 0)) as listening:
        port = addresses(listening)[0][1]
        names = iter(["disks.example.com", "localhost"])
        assert listening.uris("", names, tls=True) == [f"nbds://disks.example.com:{port}/"]
        assert listening.uris("", ["2001:db8::1"], tls=True) == [f"nbds://[2001:db8::1]:{port}/"]
        assert listening.uris("", [], tls=True) == [f"nbds://{socket.gethostname()}:{port}/"]


def test_each_listener_of_all_addresses_has_the_first_name() -> None:
    with opened(ListenTCP(None, 0), ListenTCP("0.0.0.0", 0)) as listening:
        uris = listening.uris("", iter(["disks.example.com", "other"]), tls=True)
    assert [urlsplit(uri).hostname for uri in uris] == 2 * ["disks.example.com"]


def test_uri_of_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "a b?#&"
    with opened(ListenUnix(str(path))) as listening:
        (uri,) = listening.uris("d/e", ["disks.example.com"], tls=True)
        assert uri == f"nbds+unix:///d%2Fe?socket={tmp_path}/a%20b%3F%23%26"
        dial(uri).close()


def test_unix_path_that_is_not_utf_8(tmp_path: Path) -> None:
    with opened(ListenUnix(f"{tmp_path}/\udcff")) as listening:
        (uri,) = listening.uris("", [], tls=False)
    assert uri == f"nbd+unix:///?socket={tmp_path}/%FF"
