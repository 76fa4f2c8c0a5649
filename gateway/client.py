"""A small NBD client over a Channel: handshake, simple replies, one request at a time.

It is for the self-test of `nbd-gateway demo`, whose gateway is in the same process.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Final

from gateway.errors import GatewayError, PeerError
from gateway.nbd.constants import REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, Cmd, Error, Info
from gateway.nbd.handshake import Greeted, Handshake
from gateway.nbd.pairing import Acked, Answer, Granted, Refused
from gateway.nbd.wire import (
    DEFAULT_BLOCK_SIZES,
    REQUEST,
    SIMPLE_REPLY,
    Inbox,
    disconnect_request,
    rep_name,
)
from gateway.transport import Channel

MAX_PIECE: Final = 1 << 20  # bytes of one request at most; ours


class ClientError(GatewayError):
    """The server refused what the client needs, or a request has failed."""


class Client:
    """One connection to a server at a TCP address. `close` it.

    What the server does against the protocol is a PeerError of side "upstream".
    """

    def __init__(self, host: str, port: int) -> None:
        # Never waits: the listener is in this process, and the kernel accepts for it.
        sock = socket.create_connection((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._host = host
        self._handshake = Handshake()
        self._inbox = Inbox("upstream")
        self._cookie = 0
        self.channel = Channel(sock)
        self.sizes = DEFAULT_BLOCK_SIZES
        self.name = ""

    def close(self) -> None:
        self.channel.close()

    async def greet(self) -> None:
        greeted = await self._answer()
        assert isinstance(greeted, Greeted)
        await self.channel.send_all(greeted.reply)

    async def start_tls(self, context: ssl.SSLContext) -> str:
        """Returns TLS version and cipher suite."""
        answer = await self._ask(self._handshake.starttls())
        if not isinstance(answer, Acked):
            raise ClientError(f"STARTTLS was refused: {in_words(answer)}")
        self.channel = tls = await self.channel.start_tls(
            context, server_side=False, server_hostname=self._host
        )
        cipher = tls.tls.cipher()
        return f"{tls.tls.version()}, {cipher[0] if cipher else 'no cipher'}"

    async def go(self, name: str) -> Answer:
        answer = await self._ask(self._handshake.go(name, (Info.BLOCK_SIZE,)))
        if isinstance(answer, Granted):
            self.name, self.sizes = name, answer.block_sizes or self.sizes
        return answer

    async def list_exports(self) -> Answer:
        return await self._ask(self._handshake.list_exports())

    async def abort(self) -> None:
        await self.channel.send_all(self._handshake.abort())

    async def read(self, length: int) -> bytes:
        """The first `length` bytes of the disk."""
        parts = [await self._request(Cmd.READ, *piece) for piece in self._pieces(length)]
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Write to the beginning of the disk."""
        for offset, length in self._pieces(len(data)):
            await self._request(Cmd.WRITE, offset, length, data[offset : offset + length])

    async def flush(self) -> None:
        await self._request(Cmd.FLUSH, 0, 0)

    async def disconnect(self) -> None:
        await self.channel.send_all(disconnect_request())
        if await self.channel.receive() or self.channel.truncated:
            raise ClientError("the answer to NBD_CMD_DISC was not an orderly end of TLS")

    def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
        step = min(self.sizes.maximum, MAX_PIECE) // self.sizes.minimum * self.sizes.minimum
        for offset in range(0, length, step):
            yield offset, min(step, length - offset)

    async def _ask(self, option: bytes) -> Answer:
        await self.channel.send_all(option)
        answer = await self._answer()
        assert not isinstance(answer, Greeted)
        return answer

    async def _answer(self) -> Greeted | Answer:
        while True:
            data = await self.channel.receive()
            if not data:
                raise self._handshake.closed()
            if (answer := self._handshake.receive(data)) is not None:
                return answer

    async def _request(self, kind: Cmd, offset: int, length: int, payload: bytes = b"") -> bytes:
        self._cookie += 1
        request = REQUEST.pack(REQUEST_MAGIC, 0, kind, self._cookie, offset, length)
        await self.channel.send_all(request + payload)
        magic, error, cookie = SIMPLE_REPLY.unpack(await self._take(SIMPLE_REPLY.size))
        if (magic, cookie) != (SIMPLE_REPLY_MAGIC, self._cookie):
            raise PeerError("upstream", f"reply with magic {magic:#x} and cookie {cookie:#x}")
        if error:
            known = error in frozenset(Error)
            raise ClientError(f"NBD_CMD_{kind.name}: {Error(error).name if known else error}")
        return await self._take(length) if kind == Cmd.READ else b""

    async def _take(self, count: int) -> bytes:
        while (taken := self._inbox.take(count)) is None:
            data = await self.channel.receive()
            if not data:
                raise PeerError("upstream", "closed in the middle of a reply")
            self._inbox.append(data)
        return taken


def in_words(answer: Answer) -> str:
    if isinstance(answer, Refused):
        return rep_name(answer.kind) + (f', "{answer.text}"' if answer.text.isprintable() else "")
    return type(answer).__name__
