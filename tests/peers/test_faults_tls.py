"""OpenSSL's own client with what NBD has no use for: renegotiation, early data, key updates.

`openssl s_client` knows no STARTTLS of NBD, so a little forwarder says it for it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers.bench import Bench, Front
from tests.support.gateway import environment
from tests.support.peers import check, find, wait_until
from tests.support.rawclient import (
    OPTION_REPLY,
    REP_MAGIC,
    Opt,
    RawClient,
    Rep,
    info_data,
    option,
)


class Forwarder:
    """A port behind which TLS begins at once: each connection has been through STARTTLS."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._socks = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in self._socks:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            client = RawClient(self._uri)
            self._socks += [sock, client.sock]
            client.greet()
            assert client.verdict(Opt.STARTTLS) == Rep.ACK
            client.sock.settimeout(None)
            self._start(_pump, sock, client.sock)
            self._start(_pump, client.sock, sock)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class Client:
    """`openssl s_client`, and what it prints."""

    def __init__(self, front: Front, port: int, *args: str | Path) -> None:
        pki = front.pki
        self._process = subprocess.Popen(
            [
                *(find("openssl"), "s_client", "-connect", f"127.0.0.1:{port}"),
                *("-CAfile", pki / "ca-cert.pem", "-cert", pki / "client-cert.pem"),
                *("-key", pki / "client-key.pem", *args),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        self.said = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := self._process.stdout.read1():
            self.said += data

    def say(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def say_no_more(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait_for(self, words: bytes) -> None:
        wait_until(lambda: words in self.said or not self.alive(), f"{words!r}")
        if not self.alive():
            self._reader.join(10)
        assert words in self.said, bytes(self.said)

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._reader.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


@pytest.fixture
def front(bench: Bench) -> Front:
    return bench.gateway(bench.nbdkit("-v", "memory", "1M"))


@pytest.fixture
def forwarder(front: Front) -> Iterator[Forwarder]:
    with contextlib.closing(Forwarder(front.gateway.uri)) as forwarder:
        yield forwarder


def verdict(opt: int, kind: int) -> bytes:
    return OPTION_REPLY.pack(REP_MAGIC, opt, kind, 0)


@contextlib.contextmanager
def openssl(front: Front, port: int, *args: str | Path) -> Iterator[Client]:
    client = Client(front, port, *args)
    try:
        yield client
    finally:
        client.end()


def test_renegotiation(front: Front, forwarder: Forwarder) -> None:
    """TLS 1.2: it is refused, the session ends, and nobody else notices."""
    with openssl(front, forwarder.port, "-tls1_2") as client:
        client.wait_for(b"Verify return code: 0 (ok)")
        client.say(b"R\n")
        client.wait_for(b"RENEGOTIATING")
        client.wait_for(b"no renegotiation")
        wait_until(lambda: not client.alive(), "its end")
    front.gateway.wait_log("closed: ")
    assert "open: " not in front.gateway.log()
    assert "connect" not in front.server.log()
    assert check("nbdinfo", "--size", front.client().uri).strip() == str(1 << 20)


def test_key_updates(front: Front, forwarder: Forwarder) -> None:
    """TLS 1.3: as many as it likes, and the options in between are answered."""
    with openssl(front, forwarder.port, "-tls1_3") as client:
        client.wait_for(b"Verify return code: 0 (ok)")
        for number in range(1, 21):
            client.say(b"K\n" if number % 2 else b"k\n")
            wait_until(lambda: client.said.count(b"KEYUPDATE") >= number, "it")  # noqa: B023
        client.say(option(Opt.STRUCTURED_REPLY))
        client.wait_for(verdict(Opt.STRUCTURED_REPLY, Rep.ACK))
        client.say(option(Opt.ABORT))
        client.wait_for(verdict(Opt.ABORT, Rep.ACK))
    front.gateway.wait_log("closed: client aborted the negotiation")


@contextlib.contextmanager
def elsewhere(front: Front) -> Iterator[int]:
    """The port of a server with our certificate that takes early data."""
    server = subprocess.Popen(
        [
            *(find("openssl"), "s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-naccept", "1"),
            *("-early_data", "-max_early_data", "16384", "-no_anti_replay"),
            *("-cert", front.pki / "server-cert.pem", "-key", front.pki / "server-key.pem"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if line.startswith(b"ACCEPT"):
                yield int(line.rpartition(b":")[2])
                break
    finally:
        server.kill()
        server.communicate()


def test_early_data(front: Front, forwarder: Forwarder, tmp_path: Path) -> None:
    """A session made elsewhere, with options as early data: rejected, and none of them is asked."""
    session, early = tmp_path / "session.pem", tmp_path / "early"
    early.write_bytes(option(Opt.STRUCTURED_REPLY) + option(Opt.GO, info_data()))
    with elsewhere(front) as port, openssl(front, port, "-tls1_3", "-sess_out", session) as client:
        client.wait_for(b"Verify return code: 0 (ok)")
        client.say_no_more()
        client.wait_for(b"Max Early Data: 16384")
        wait_until(session.exists, "a session")

    flags = ("-tls1_3", "-sess_in", session, "-early_data", early)
    with openssl(front, forwarder.port, *flags) as client:
        client.wait_for(b"Early data was rejected")
        client.say(option(Opt.LIST))
        client.wait_for(verdict(Opt.LIST, Rep.ACK))
        assert verdict(Opt.STRUCTURED_REPLY, Rep.ACK) not in client.said
        assert struct.pack(">QI", REP_MAGIC, Opt.GO) not in client.said
        client.say(option(Opt.ABORT))
        client.wait_for(verdict(Opt.ABORT, Rep.ACK))
    front.gateway.wait_log("closed: client aborted the negotiation")
    assert "open: " not in front.gateway.log()
