"""gateway.listeners and systemd: sockets that are handed over, by number and by name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import ListenError
from gateway.listeners import Listeners
from gateway.settings import ListenSystemd
from tests.support.gateway import ROOT, environment
from tests.support.rawclient import GREETING, dial


def from_systemd(name: str | None, environ: dict[str, str]) -> None:
    Listeners.open([ListenSystemd(name)], local_only=False, environ=environ)


def test_nothing_handed_over() -> None:
    for environ in ({}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}):
        with pytest.raises(ListenError, match=r"^--listen systemd: .*\(LISTEN_PID\)$"):
            from_systemd(None, environ)


@pytest.mark.parametrize("count", ["", "one", "-1", "1.0"])
def test_count_is_no_number(count: str) -> None:
    with pytest.raises(ListenError, match=rf"LISTEN_FDS is '{count}'$"):
        from_systemd(None, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


def test_none_handed_over() -> None:
    with pytest.raises(ListenError, match=r"none of the sockets handed over$"):
        from_systemd(None, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"})


def test_a_descriptor_that_is_not_open() -> None:
    environ = {"LISTEN_FDS": "9000", "LISTEN_FDNAMES": 8999 * ":" + "nbd"}
    with pytest.raises(ListenError, match=r"^--listen systemd: descriptor 9002: Bad file"):
        from_systemd("nbd", {"LISTEN_PID": str(os.getpid()), **environ})


# Puts the descriptors that it was given where systemd puts them, then becomes the gateway.
EXEC = """
import fcntl, os, sys
given, pid, *command = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in given.split(",") if fd]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.environ["LISTEN_PID"] = pid or str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "gateway", *command])
"""


class Activated:
    """`python -m gateway` as systemd starts it."""

    def __init__(
        self,
        sockets: list[socket.socket],
        *args: str | Path,
        names: str | None = None,
        pid: str = "",
        count: int | None = None,
    ) -> None:
        handed = [str(sock.fileno()) for sock in sockets]
        environ = {**environment(), "LISTEN_FDS": str(len(sockets) if count is None else count)}
        if names is not None:
            environ["LISTEN_FDNAMES"] = names
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", EXEC, ",".join(handed), pid, *map(str, args)],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[sock.fileno() for sock in sockets],
            text=True,
        )

    def __enter__(self) -> Activated:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()

    def uri(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ends(self) -> tuple[int, str, str]:
        """Exit code and output, once it has ended by itself or on SIGTERM."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """What systemd listens on: a TCP port and a Unix socket."""
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    with tcp, unix:
        unix.bind(str(tmp_path / "by-systemd"))
        unix.listen()
        yield [tcp, unix]


@pytest.fixture
def arguments(pki: Path, tmp_path: Path) -> list[str | Path]:
    return ["--tls-dir", pki, "--socket", tmp_path / "up"]


def test_sockets_of_systemd_are_served(
    two: list[socket.socket], arguments: list[str | Path], tmp_path: Path
) -> None:
    """All of them without a name, and their files stay systemd's."""
    tcp, _ = two
    with Activated(two, *arguments, "--listen", "systemd") as running:
        uris = [running.uri(), running.uri()]
        assert uris == [
            f"nbds://127.0.0.1:{tcp.getsockname()[1]}/",
            f"nbds+unix:///?socket={tmp_path}/by-systemd",
        ]
        for uri in uris:
            with dial(uri) as client:
                assert len(client.recv(GREETING.size, socket.MSG_WAITALL)) == GREETING.size
        running.process.terminate()
        code, out, err = running.ends()
    assert (code, out) == (0, ""), err
    assert "Traceback" not in err
    assert (tmp_path / "by-systemd").is_socket()
    # The backlog is systemd's: who connects now waits for the next gateway.
    dial(uris[0]).close()
    dial(uris[1]).close()


@pytest.mark.parametrize(("name", "chosen"), [("front", [0]), ("back", [1]), ("", [0, 1])])
def test_names_choose(
    name: str, chosen: list[int], two: list[socket.socket], arguments: list[str | Path]
) -> None:
    known = [f"nbds://127.0.0.1:{two[0].getsockname()[1]}/", "nbds+unix:///"]
    listen = ("--listen", f"systemd:{name}")
    with Activated(two, *arguments, *listen, names="front:back") as running:
        uris = [running.uri() for _ in chosen]
        running.process.terminate()
        assert running.ends()[:2] == (0, "")
    assert [uri.partition("?")[0] for uri in uris] == [known[one] for one in chosen]


def test_one_name_may_stand_for_many(two: list[socket.socket], arguments: list[str | Path]) -> None:
    with Activated(two, *arguments, "--listen", "systemd:nbd", names="nbd:nbd") as running:
        assert running.uri().startswith("nbds://")
        assert running.uri().startswith("nbds+unix://")
        running.process.terminate()
        assert running.ends()[:2] == (0, "")


def test_no_socket_of_that_name(two: list[socket.socket], arguments: list[str | Path]) -> None:
    for names in ("front:back", "front", None):
        with Activated(two, *arguments, "--listen", "systemd:nbd", names=names) as running:
            code, out, err = running.ends()
        assert (code, out) == (1, "")
        wanted = "--listen systemd: none of the sockets handed over named 'nbd'"
        assert err.splitlines()[-1] == f"nbd-gateway: error: {wanted}"


def test_sockets_for_another_process(two: list[socket.socket], arguments: list[str | Path]) -> None:
    with Activated(two, *arguments, "--listen", "systemd", pid="1") as running:
        code, out, err = running.ends()
    assert (code, out) == (1, "")
    assert "LISTEN_PID" in err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["not listening", "datagram"])
def test_descriptors_that_cannot_be_served(kind: str, arguments: list[str | Path]) -> None:
    family = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, family) as sock:
        sock.bind(("127.0.0.1", 0))
        with Activated([sock], *arguments, "--listen", "systemd") as running:
            code, out, err = running.ends()
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("nbd-gateway: error: --listen systemd: descriptor 3")


def test_a_file_is_no_socket(arguments: list[str | Path], tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        with Activated([file], *arguments, "--listen", "systemd") as running:  # type: ignore[list-item]
            code, out, err = running.ends()
    assert (code, out) == (1, "")
    assert "descriptor 3" in err.splitlines()[-1]


def test_fewer_descriptors_than_said(two: list[socket.socket], arguments: list[str | Path]) -> None:
    with Activated(two, *arguments, "--listen", "systemd", count=100) as running:
        code, out, err = running.ends()
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert "--listen systemd: descriptor " in err.splitlines()[-1]


def test_sockets_of_systemd_have_to_be_local_without_tls(tmp_path: Path) -> None:
    arguments = ("--tls", "off", "--socket", tmp_path / "up", "--listen", "systemd")
    with (
        socket.create_server(("0.0.0.0", 0)) as everywhere,
        Activated([everywhere], *arguments) as running,
    ):
        code, out, err = running.ends()
    assert (code, out) == (2, "")
    assert "--tls off: 0.0.0.0:" in err.splitlines()[-1]
