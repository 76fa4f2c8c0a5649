"""The two ends of a layer under measurement: a client and an upstream that speak just enough NBD.

Both block, and each is a process of its own. All requests of a workload are of one size, and so are
all replies, so nothing has to be parsed but the cookies.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from gateway.nbd.constants import REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, Cmd
from gateway.nbd.wire import REQUEST, SIMPLE_REPLY

SOCKET_BUFFER = 1 << 20  # of the stubs: they must not be what is slow


@dataclass(frozen=True)
class Workload:
    """Requests of one kind, `depth` of them under way."""

    name: str
    command: Cmd
    length: int
    depth: int

    @property
    def request_size(self) -> int:
        return REQUEST.size + (self.length if self.command == Cmd.WRITE else 0)

    @property
    def reply_size(self) -> int:
        return SIMPLE_REPLY.size + (self.length if self.command == Cmd.READ else 0)

    def request(self, number: int) -> bytes:
        """A request's header."""
        offset = number % 1024 * self.length
        return REQUEST.pack(REQUEST_MAGIC, 0, self.command, number, offset, self.length)


def client(
    sock: socket.socket,
    workload: Workload,
    seconds: float,
    pki: Path | None,
    report: Connection,
) -> None:
    """Keep `depth` requests under way for that time, then leave; report how many were answered."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    if pki is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(pki / "ca-cert.pem")
        sock = context.wrap_socket(sock, server_hostname="localhost")
    payload = random.Random(0).randbytes(workload.request_size - REQUEST.size)
    requests = b"".join(workload.request(i) + payload for i in range(workload.depth))
    inbox = memoryview(bytearray(1 << 20))
    arrived = answered = 0
    end = time.monotonic() + seconds
    sock.sendall(requests)
    asked = workload.depth
    while answered < asked:
        count = sock.recv_into(inbox)
        if not count:
            raise ConnectionError("the layer has hung up")
        arrived += count
        more = arrived // workload.reply_size - answered
        answered += more
        if more and time.monotonic() < end:
            sock.sendall(requests[: more * workload.request_size])
            asked += more
    report.send(answered)
    sock.sendall(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0))
    with contextlib.suppress(OSError):
        if isinstance(sock, ssl.SSLSocket):
            sock.unwrap()
        sock.shutdown(socket.SHUT_WR)
        while sock.recv_into(inbox):
            pass
    sock.close()


def upstream(sock: socket.socket, workload: Workload) -> None:
    """Answer all that has come in one go, until NBD_CMD_DISC or the end."""
    payload = random.Random(1).randbytes(workload.reply_size - SIMPLE_REPLY.size)
    size = workload.request_size
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    inbox = bytearray(max(size * workload.depth, REQUEST.size))
    held = 0
    with sock, memoryview(inbox) as view:
        while count := sock.recv_into(view[held:]):
            held += count
            replies, at = [], 0
            while held - at >= REQUEST.size:
                _, _, command, cookie, _, _ = REQUEST.unpack_from(inbox, at)
                if command == Cmd.DISC:
                    return
                if held - at < size:
                    break
                replies += [SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie), payload]
                at += size
            inbox[: held - at] = inbox[at:held]
            held -= at
            sock.sendall(b"".join(replies))
