"""Extended headers as the branch `extension-ext-header` draws them: upstream and client."""

from __future__ import annotations

import struct

from tests.hostile.session import Session
from tests.support.fake_upstream import DONE, Link, Script, pattern
from tests.support.rawclient import Cmd, Ct, RawClient, Rep

EXTENDED_HEADERS = 11
ERR_EXT_HEADER_REQD = (1 << 31) + 10
REQUEST = struct.Struct(">IHHQQQ")
REQUEST_MAGIC = 0x21E41C71
CHUNK = struct.Struct(">IHHQQQ")
CHUNK_MAGIC = 0x6E8A278C


class Extended(Script):
    """Knows them; then there are only reads."""

    def option(self, link: Link, opt: int, data: bytes) -> bool:
        if opt != EXTENDED_HEADERS:
            return super().option(link, opt, data)
        assert not data
        link.structured = True
        self.reply(link, opt, Rep.ACK)
        return False

    def transmit(self, link: Link) -> None:
        if (EXTENDED_HEADERS, b"") not in link.options:
            super().transmit(link)
            return
        while True:
            raw = link.take(REQUEST.size, inside=False)
            magic, _, cmd, cookie, offset, length = REQUEST.unpack(raw)
            assert magic == REQUEST_MAGIC, f"request magic {magic:#x}"
            if cmd == Cmd.DISC:
                link.end = "disc"
                return
            assert cmd == Cmd.READ
            link.send(self.answer(cookie, offset, length))

    def answer(self, cookie: int, offset: int, length: int) -> bytes:
        data = struct.pack(">Q", offset) + pattern(offset, length)
        header = (CHUNK_MAGIC, DONE, Ct.OFFSET_DATA, cookie, offset, len(data))
        return CHUNK.pack(*header) + data


def read(cookie: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, Cmd.READ, cookie, offset, length)


def check(client: RawClient) -> None:
    """Both streams are in step, with headers of 32 bytes."""
    client.send(read(0xE, 4093, 999))
    data, done = bytearray(), 0
    while not done:
        magic, done, kind, cookie, offset, length = CHUNK.unpack(client.recv_exactly(CHUNK.size))
        assert (magic, cookie, offset) == (CHUNK_MAGIC, 0xE, 4093)
        payload = client.recv_exactly(length)
        if kind == Ct.OFFSET_DATA:
            data += payload[8:]
    assert data == pattern(4093, 999)


def disconnect(client: RawClient) -> None:
    client.send(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0))
    assert client.recv_to_end() == b""


def compact(client: RawClient) -> Session:
    """In transmission, with the old headers."""
    session = Session(client, client.go(), {})
    session.check()
    return session
