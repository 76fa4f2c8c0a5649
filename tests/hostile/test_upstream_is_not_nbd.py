"""Something else than an NBD server listens on the socket, or an NBD server of an unknown kind.

The client gets an error to its option; the log tells the cases apart in words.
"""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import Link, Script
from tests.support.rawclient import (
    CLISERV,
    IHAVEOPT,
    NBDMAGIC,
    Opt,
    PeerClosedError,
    Rep,
    info_data,
    option,
)


class Saying(Script):
    """Says this, whatever the gateway may answer."""

    def __init__(self, what: bytes) -> None:
        super().__init__()
        self.what = what

    def serve(self, link: Link) -> None:
        link.send(self.what)
        link.take_to_end()


NOT_NBD = {
    "http": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n",
    "smtp": b"220 mail.example.org ESMTP\r\n",
    "qmp": b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}\r\n',
    "zeroes": bytes(64),
    "almost": struct.pack(">QQH", NBDMAGIC ^ 1, IHAVEOPT, 3),
    "swapped": struct.pack(">QQH", IHAVEOPT, NBDMAGIC, 3),
}
UNKNOWN_VERSION = {
    "zero": struct.pack(">QQH", NBDMAGIC, 0, 3),
    "almost_new": struct.pack(">QQH", NBDMAGIC, IHAVEOPT + 1, 3),
    "almost_old": struct.pack(">QQQI124x", NBDMAGIC, CLISERV ^ 1, 1 << 20, 1),
    "NBDMAGIC_twice": struct.pack(">QQH", NBDMAGIC, NBDMAGIC, 3),
}


def refused(lab: Lab) -> str:
    """GO fails in words, EXPORT_NAME by hanging up. Returns what was logged."""
    logged = len(lab.gateway.log())
    client = lab.tls()
    try:
        (reply,) = client.ask(Opt.GO, info_data())
        assert reply.failed
        assert reply.type != Rep.ERR_TLS_REQD
    except PeerClosedError:
        pytest.fail("GO can be answered in words")
    client.close()
    client = lab.tls()
    client.send(option(Opt.EXPORT_NAME))
    assert client.recv_to_end() == b""
    client.close()
    lab.wait(lambda: lab.gateway.log()[logged:].count("closed") >= 2, "the sessions' last lines")
    return lab.gateway.log()[logged:].lower()


@pytest.mark.parametrize("banner", NOT_NBD.values(), ids=NOT_NBD.keys())
def test_not_an_nbd_server(lab: Lab, witness: Session, banner: bytes) -> None:
    lab.fake.script = Saying(banner)
    log = refused(lab)
    assert "not an nbd server" in log
    assert "unexpected version" not in log
    assert "mail.example.org" not in log


@pytest.mark.parametrize("banner", UNKNOWN_VERSION.values(), ids=UNKNOWN_VERSION.keys())
def test_unexpected_version(lab: Lab, witness: Session, banner: bytes) -> None:
    lab.fake.script = Saying(banner)
    log = refused(lab)
    assert "unexpected version" in log
    assert "not an nbd server" not in log


def test_hangs_up_at_once(lab: Lab, witness: Session) -> None:
    lab.fake.script = Script(cut_after=0)
    log = refused(lab)
    assert "during the handshake" in log
    assert "not an nbd server" not in log


def test_the_next_client_finds_it_mended(lab: Lab) -> None:
    lab.fake.queue = [Saying(NOT_NBD["http"])]
    client = lab.tls()
    assert client.ask(Opt.GO, info_data())[-1].failed
    client.close()
    session = lab.session()
    session.check()
    session.disc()
