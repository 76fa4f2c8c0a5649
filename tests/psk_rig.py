"""Both ends of handshakes with pre-shared keys, in this process. They need Python 3.13."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway import psk

needs_psk = pytest.mark.skipif(
    not psk.AVAILABLE,
    reason="needs Python 3.13: where this is older, tests/peers/test_psk_handshakes.py runs it",
)

KEY = {"alice": bytes(range(32)), "bob": bytes(range(32, 48))}
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def keys(wanted: dict[str, bytes] = KEY) -> psk.Keys:
    lines = [f"{name}:{key.hex()}\n" for name, key in wanted.items()]
    return psk.parse(Path("keys.psk"), "".join(lines).encode())


def client_context(
    name: str | None, key: bytes, version: str, ciphers: str = "PSK"
) -> ssl.SSLContext:
    """Without a name: a client that wants to see a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = VERSIONS[version]
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if name is not None:
        context.set_ciphers(ciphers)
        context.set_psk_client_callback(lambda _: (name, key))  # type: ignore[attr-defined]
    return context


class Shaking:
    """Both ends of one handshake, which goes on a step at a time."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext, **more: Any) -> None:
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        late = {"do_handshake_on_connect": False}
        self.server = server.wrap_socket(near, server_side=True, **late)
        self.client = client.wrap_socket(far, **late, **more)
        self._left = [self.client, self.server]
        self.errors: dict[ssl.SSLSocket, ssl.SSLError] = {}

    def step(self, side: int = 0) -> bool:
        """Let one of the two go on for as far as it can. Whether there is more to be done."""
        if self._left:
            sock = self._left[side % len(self._left)]
            try:
                sock.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            except ssl.SSLError as error:
                self.errors[sock] = error
                if sock is self.server:
                    sock.shutdown(socket.SHUT_WR)
            self._left.remove(sock)
        return bool(self._left)

    def finish(self) -> Shaking:
        for side in range(40):
            if not self.step(side):
                return self
        raise AssertionError("the handshake does not end")

    def close(self) -> None:
        self.server.close()
        self.client.close()


Shake = Callable[..., Shaking]


@pytest.fixture
def shake(request: pytest.FixtureRequest) -> Shake:
    def start(*args: Any, **more: Any) -> Shaking:
        made = Shaking(*args, **more)
        request.addfinalizer(made.close)
        return made

    return start
