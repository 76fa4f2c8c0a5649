"""An upstream that grants extended headers and does not keep to it: refused, or lost, never mixed.

A client that was told ACK sends headers of 32 bytes whatever happens behind.
"""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.extended import (
    CHUNK,
    CHUNK_MAGIC,
    EXTENDED_HEADERS,
    Extended,
    check,
    compact,
    disconnect,
    read,
)
from tests.support.fake_upstream import Link, data_chunk, pattern, simple
from tests.support.rawclient import Cmd, Ct, Err, Opt, Rep, Request, info_data


class NoGo(Extended):
    """ "The server MUST NOT fail NBD_OPT_GO with NBD_REP_ERR_UNSUP"."""

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        self.reply(link, opt, Rep.ERR_UNSUP)
        return False


def test_go_unsupported(lab: Lab) -> None:
    lab.fake.script = NoGo()
    client = lab.tls()
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    for opt in (Opt.GO, Opt.INFO, Opt.GO):
        assert client.verdict(opt, info_data()) == Rep.ERR_UNKNOWN
    assert client.verdict(Opt.ABORT) == Rep.ACK
    asked = [opt for opt, _ in lab.fake.wait_end().options]
    assert Opt.EXPORT_NAME not in asked


class Leaving(Extended):
    """Hangs up when it is asked for its export."""

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        link.hang_up()
        return False


def test_hangs_up_after_the_ack(lab: Lab) -> None:
    """The one that is there a moment later has promised nothing."""
    lab.fake.queue = [Leaving()]
    lab.fake.script = Extended()
    client = lab.tls()
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    for opt in (Opt.INFO, Opt.GO, Opt.GO):
        assert client.verdict(opt, info_data()) == Rep.ERR_UNKNOWN
    assert lab.fake.connects == 1


class Falling(Extended):
    """Hangs up at the option, as a server may that has never heard of it."""

    def option(self, link: Link, opt: int, data: bytes) -> bool:
        if opt == EXTENDED_HEADERS:
            link.hang_up()
            return False
        return super().option(link, opt, data)


def test_hangs_up_at_the_option(lab: Lab) -> None:
    lab.fake.script = Falling()
    client = lab.tls()
    assert client.verdict(EXTENDED_HEADERS) == Rep.ERR_UNSUP
    compact(client).disc()


class Chatty(Extended):
    def option(self, link: Link, opt: int, data: bytes) -> bool:
        if opt == EXTENDED_HEADERS:
            self.reply(link, opt, Rep.META_CONTEXT, b"\0\0\0\1base:allocation")
        return super().option(link, opt, data)


def test_more_than_an_ack(lab: Lab) -> None:
    """No server to rely on; the next connection is asked nothing of the kind."""
    lab.fake.queue = [Chatty()]
    client = lab.tls()
    assert client.verdict(EXTENDED_HEADERS) == Rep.ERR_UNSUP
    compact(client).disc()


WRONG = {
    "simple": lambda cookie, offset, length: simple(cookie, 0, pattern(offset, length)),
    "compact chunk": lambda cookie, offset, length: data_chunk(
        cookie, offset, pattern(offset, length), flags=1
    ),
    "wrong offset": lambda cookie, offset, length: (
        CHUNK.pack(CHUNK_MAGIC, 1, Ct.OFFSET_DATA, cookie, offset + 1, 8 + length)
        + struct.pack(">Q", offset)
        + pattern(offset, length)
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_old_replies(lab: Lab, how: str) -> None:
    """U5: the upstream is lost, and the client is told so in the framing that it knows."""

    class Wrong(Extended):
        def answer(self, cookie: int, offset: int, length: int) -> bytes:
            return bytes(WRONG[how](cookie, offset, length))

    lab.fake.script = Wrong()
    client = lab.tls()
    assert client.verdict(EXTENDED_HEADERS) == Rep.ACK
    client.go()
    client.send(read(7, 512, 512))
    error = 0
    done = 0
    while not done:
        magic, done, kind, cookie, offset, length = CHUNK.unpack(client.recv_exactly(CHUNK.size))
        assert (magic, cookie, offset) == (CHUNK_MAGIC, 7, 512)
        payload = client.recv_exactly(length)
        if kind & 1 << 15:
            (error,) = struct.unpack_from(">I", payload)
    assert error in (Err.ESHUTDOWN, Err.EIO)
    disconnect(client)


def test_others_notice_nothing(lab: Lab) -> None:
    lab.fake.script = Extended()
    good = lab.tls()
    assert good.verdict(EXTENDED_HEADERS) == Rep.ACK
    good.go()
    check(good)
    for script in (NoGo(), Leaving(), Falling(), Chatty()):
        lab.fake.queue = [script]
        client = lab.tls()
        client.ask(EXTENDED_HEADERS)
        client.ask(Opt.GO, info_data())
        client.try_send(Request(Cmd.DISC, cookie=0).pack())
        client.close()
        check(good)
    disconnect(good)
