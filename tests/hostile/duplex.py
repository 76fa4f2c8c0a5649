"""A client that sends and reads at the same time, with small buffers, as fast as it is let."""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence

from tests.support.rawclient import SIMPLE, SIMPLE_MAGIC, TIMEOUT_S, Cmd, RawClient, Request

AHEAD = 1 << 18  # sealed and not yet sent


def narrow(sock: socket.socket, size: int) -> None:
    """Little room in both directions."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


class Duplex:
    """In transmission with simple replies, on a client of which nothing else is asked meanwhile."""

    def __init__(self, client: RawClient) -> None:
        assert client.tls is not None
        assert not client.structured
        self.client = client
        self._inbox = bytearray()
        self._out = bytearray()

    def exchange(
        self,
        requests: Sequence[Request],
        depth: int,
        holds: Callable[[Request, bytes], bool] = lambda request, data: True,
    ) -> None:
        """Ask all of them, so many at a time. Every one succeeds, with data that `holds` likes.

        Fails if nothing moves in either direction for TIMEOUT_S.
        """
        sock = self.client.sock
        sock.setblocking(False)
        waiting = list(reversed(requests))
        pending: dict[int, Request] = {}
        while waiting or pending:
            while waiting and len(pending) < depth and len(self._out) < AHEAD:
                request = waiting.pop()
                pending[request.cookie] = request
                self._out += self.client.seal(request.pack())
            readable, writable, _ = select.select(
                [sock], [sock] if self._out else [], [], TIMEOUT_S
            )
            assert readable or writable, f"stuck, {len(pending)} requests unanswered"
            if writable:
                del self._out[: sock.send(self._out[: 1 << 16])]
            if readable:
                self._hear()
                self._settle(pending, holds)
        sock.settimeout(TIMEOUT_S)

    def _hear(self) -> None:
        client = self.client
        assert client.tls is not None
        raw = client.sock.recv(1 << 16)
        assert raw, "the gateway has hung up"
        client._incoming.write(raw)
        try:
            while True:
                self._inbox += client.tls.read(1 << 16)
        except ssl.SSLWantReadError:
            pass

    def _settle(self, pending: dict[int, Request], holds: Callable[[Request, bytes], bool]) -> None:
        while len(self._inbox) >= SIMPLE.size:
            magic, error, cookie = SIMPLE.unpack_from(self._inbox)
            assert magic == SIMPLE_MAGIC
            request = pending[cookie]
            assert error == 0, f"{request._replace(payload=b'')}: error {error}"
            size = SIMPLE.size + (request.length if request.cmd == Cmd.READ else 0)
            if len(self._inbox) < size:
                break
            assert holds(request, bytes(self._inbox[SIMPLE.size : size])), f"wrong data: {cookie}"
            del self._inbox[:size], pending[cookie]


def push(client: RawClient, data: bytes, still_s: float = 0.5) -> bytes:
    """Send until nothing has been taken for so long. What is left, sealed already."""
    left = memoryview(client.seal(data))
    client.sock.setblocking(False)
    moved = time.monotonic()
    while left and time.monotonic() - moved < still_s:
        if select.select([], [client.sock], [], 0.05)[1]:
            left = left[client.sock.send(left[: 1 << 18]) :]
            moved = time.monotonic()
    client.sock.settimeout(TIMEOUT_S)
    return bytes(left)
