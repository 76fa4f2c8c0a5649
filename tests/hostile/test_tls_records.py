"""TLS records of all sizes, good and bad: what is inside counts, and a bad one ends the session."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.forger import VERSIONS, Forger, opened
from tests.hostile.session import Session
from tests.support.fake_upstream import pattern
from tests.support.rawclient import (
    Cmd,
    Opt,
    Rep,
    Request,
    client_hello,
    info_data,
    option,
    tls_context,
)


@pytest.fixture(params=VERSIONS)
def forger(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Forger:
    return Forger(lab, request.param, tmp_path / "keys")


def test_of_one_byte(lab: Lab, witness: Session, forger: Forger) -> None:
    """All of a session, in one segment or byte by byte."""

    def tiny(data: bytes) -> bytes:
        return b"".join(forger.forge(data[at : at + 1]) for at in range(len(data)))

    forger.sock.sendall(tiny(option(Opt.STRUCTURED_REPLY)))
    assert forger.replies(Opt.STRUCTURED_REPLY)[-1].type == Rep.ACK
    forger.structured = True
    for byte in tiny(option(Opt.LIST)):
        forger.sock.sendall(bytes([byte]))
    assert forger.replies(Opt.LIST)[-1].type == Rep.ACK
    forger.sock.sendall(tiny(option(Opt.INFO, info_data())))
    assert forger.replies(Opt.INFO)[-1].type == Rep.ACK
    session = Session(forger, forger.go(), {})
    payload = pattern(0, 3000)
    requests = [
        Request(Cmd.WRITE, 0, len(payload), 1, payload=payload),
        Request(Cmd.READ, 4093, 999, 2),
        Request(Cmd.FLUSH, cookie=3),
    ]
    for one in requests:
        session.expect(one)
    forger.sock.sendall(tiny(b"".join(one.pack() for one in requests)))
    answers = {answer.request.cookie: answer for answer in (session.collect() for _ in requests)}
    assert all(answer.error == 0 for answer in answers.values())
    assert answers[2].data == pattern(4093, 999)
    assert lab.fake.links[1].requests[0].payload == payload
    session.disc()


def test_of_nothing(lab: Lab, witness: Session, forger: Forger) -> None:
    """A few are legal; OpenSSL has enough of them some time. No byte comes of it."""
    session = opened(forger)
    for _ in range(4):
        forger.sock.sendall(forger.forge(b""))
        session.check()
    with contextlib.suppress(OSError):
        for _ in range(50):
            forger.sock.sendall(b"".join(forger.forge(b"") for _ in range(100)))
    with contextlib.suppress(OSError):
        forger.sock.sendall(forger.forge(Request(Cmd.DISC).pack()))
    assert forger.recv_to_end() == b""
    lab.fake.wait_end(1)
    lab.assert_idle()


def test_padding(lab: Lab, witness: Session, tmp_path: Path) -> None:
    forger = Forger(lab, "1.3", tmp_path / "keys")
    session = opened(forger)
    request = Request(Cmd.READ, 0, 512, 77)
    session.expect(request)
    for byte in request.pack():
        forger.sock.sendall(forger.forge(bytes([byte]), padding=16384 - 1))
    assert session.collect().data == pattern(0, 512)
    session.disc()


def test_too_long(lab: Lab, witness: Session, forger: Forger) -> None:
    session = opened(forger)
    payload = bytes(16385 - 28)
    session.submit(Cmd.READ, 0, 512)
    session.collect()
    forger.sock.sendall(forger.forge(Request(Cmd.WRITE, 0, len(payload), 9).pack() + payload))
    assert forger.recv_to_end() == b""
    assert (forger.ended or "").startswith("alert: ")
    link = lab.fake.wait_end(1)
    assert [one.cmd for one in link.requests] == [Cmd.READ, Cmd.DISC]


def test_any_byte_wrong(lab: Lab, witness: Session, tmp_path: Path) -> None:
    """No request comes out of a record that is not whole and right."""
    base = lab.fds()
    for version in VERSIONS:
        first = Forger(lab, version, tmp_path / "keys")
        size = len(first.forge(Request(Cmd.READ).pack()))
        first.close()
        for at in range(3, size):  # before that is the type, and the version
            forger = Forger(lab, version, tmp_path / "keys")
            forger.go()
            record = bytearray(forger.forge(Request(Cmd.READ, 0, 512).pack()))
            record[at] ^= 1
            forger.sock.sendall(record)
            if at < 5:  # longer or shorter: it may wait for the rest
                forger.close()
            else:
                assert forger.recv_to_end() == b""
                assert (forger.ended or "").startswith("alert: "), forger.ended
            forger.close()
    lab.wait_fds(base)
    assert len(lab.fake.links) > 1 + 2 * 28
    for link in lab.fake.links[1:]:
        assert [one.cmd for one in link.requests] == [Cmd.DISC]


@pytest.mark.parametrize("kind", [0, 20, 24, 25, 255])
def test_of_an_unknown_type(lab: Lab, witness: Session, forger: Forger, kind: int) -> None:
    session = opened(forger)
    session.check()
    forger.sock.sendall(forger.forge(b"\1" * 40, kind))
    with contextlib.suppress(OSError):
        forger.sock.sendall(forger.forge(Request(Cmd.READ, 0, 512).pack()))
    assert forger.recv_to_end() == b""
    link = lab.fake.wait_end(1)
    assert [one.cmd for one in link.requests] == [Cmd.READ, Cmd.DISC]


def hello_records(hello: bytes, size: int) -> bytes:
    """The same ClientHello in records of so many bytes."""
    message = hello[5:]
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(hello[:3] + len(part).to_bytes(2, "big") + part for part in parts)


@pytest.mark.parametrize("size", [0, 1, 2, 5, 50])
def test_client_hello_in_pieces(lab: Lab, witness: Session, size: int) -> None:
    """Byte by byte on the wire (0), and in records as short as that. It is all the same to TLS."""
    client = lab.plain()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    tls = tls_context(lab.pki).wrap_bio(client._incoming, client._outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = client._outgoing.read()
    for byte in hello_records(hello, size) if size else hello:
        client.sock.sendall(bytes([byte]))
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            client._feed()
    for byte in client._outgoing.read():  # certificate and Finished, too
        client.sock.sendall(bytes([byte]))
    client.tls = tls
    client.ask_structured()
    session = Session(client, client.go(), {})
    session.check()
    session.disc()


def test_client_hello_without_end(lab: Lab, witness: Session) -> None:
    """One that claims 16 MiB, in records of one byte: refused long before."""
    lab.forget_peak()
    before = lab.peak_kib()
    client = lab.plain()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    hello = client_hello(tls_context(lab.pki))
    huge = b"\x01\xff\xff\xff" + hello[9:]
    records = b"".join(b"\x16\3\1\0\1" + bytes([byte]) for byte in huge + bytes(300_000))
    with contextlib.suppress(OSError):
        client.sock.sendall(records)
    client.sock.settimeout(5)
    client.recv_to_end()
    assert lab.peak_kib() - before < 4 << 10
    assert lab.fake.connects == 1
