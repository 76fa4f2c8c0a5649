"""Key updates without end (TLS 1.3), and handshakes begun anew in the middle of a session.

RFC 8446, section 4.6.3. Each update that wants an answer makes the gateway send one: a client that
never reads them must not fill its memory, nor keep it busy.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.forger import HANDSHAKE, VERSIONS, Forger, flush, opened
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Script
from tests.support.rawclient import Cmd, Request, client_hello, tls_context


@pytest.mark.parametrize("answer", [False, True])
def test_many(lab: Lab, witness: Session, tmp_path: Path, answer: bool) -> None:
    """The data in between is right, and the peer of each answer reads it."""
    forger = Forger(lab, "1.3", tmp_path / "keys")
    session = opened(forger)
    for _ in range(15):
        storm = b"".join(forger.key_update(answer=answer) for _ in range(30))
        request = Request(Cmd.READ, 4093, 999, 5)
        session.expect(request)
        forger.sock.sendall(storm + forger.seal(request.pack()))
        answered = session.collect()
        assert answered.error == 0
        assert len(answered.data) == 999
    session.check()
    session.disc()


def test_between_all_records_of_a_payload(lab: Lab, witness: Session, tmp_path: Path) -> None:
    forger = Forger(lab, "1.3", tmp_path / "keys")
    session = opened(forger)
    payload = bytes(range(256)) * 40
    request = Request(Cmd.WRITE, 0, len(payload), 5, payload=payload)
    session.expect(request)
    raw = request.pack()
    for at in range(0, len(raw), 100):
        update = forger.key_update(answer=at % 200 == 0)
        forger.sock.sendall(update + forger.seal(raw[at : at + 100]))
    assert session.collect().error == 0
    assert lab.fake.links[1].requests[0].payload == payload
    session.disc()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with_replies_on_their_way"])
def test_a_client_that_never_reads(lab: Lab, witness: Session, tmp_path: Path, busy: bool) -> None:
    """One answer is kept for all of them, or the session ends; the gateway does not spin."""
    lab.fake.script = Script(size=32 * MIB)
    forger = Forger(lab, "1.3", tmp_path / "keys")
    forger.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    opened(forger)
    forger.sock.settimeout(0.5)
    if busy:
        forger.send(b"".join(Request(Cmd.READ, 0, 16 * MIB, i).pack() for i in range(8)))
    lab.forget_peak()
    before = lab.peak_kib()
    with contextlib.suppress(OSError):
        for _ in range(100):
            forger.sock.sendall(b"".join(forger.key_update(answer=True) for _ in range(100)))
    for _ in range(10):
        witness.check()
    assert lab.peak_kib() - before < 8 << 10
    lab.assert_idle()
    flush(forger)
    lab.fake.wait_end(1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("part", [1.0, 0.3])
def test_a_handshake_begun_anew(
    lab: Lab, witness: Session, tmp_path: Path, version: str, part: float
) -> None:
    """Renegotiation in TLS 1.2, nothing at all in 1.3: no second handshake, and no request."""
    forger = Forger(lab, version, tmp_path / "keys")
    session = opened(forger)
    session.check()
    hello = client_hello(tls_context(lab.pki, only_1_2=version == "1.2"))[5:]
    heard = len(forger._heard)
    forger.sock.sendall(forger.forge(hello[: int(len(hello) * part)], HANDSHAKE))
    with contextlib.suppress(OSError):
        forger.send(Request(Cmd.DISC).pack())
    assert forger.recv_to_end() == b""
    assert heard <= 64
    link = lab.fake.wait_end(1)
    assert [request.cmd for request in link.requests] == [Cmd.READ, Cmd.DISC]


@pytest.mark.parametrize("version", VERSIONS)
def test_renegotiation_without_end(
    lab: Lab, witness: Session, tmp_path: Path, version: str
) -> None:
    """Asked for thousands of times (CVE-2011-1473): none costs the gateway a key exchange."""
    forger = Forger(lab, version, tmp_path / "keys")
    opened(forger)
    hello = client_hello(tls_context(lab.pki, only_1_2=version == "1.2"))[5:]
    begun = lab.cpu_s()
    with contextlib.suppress(OSError):
        for _ in range(1000):
            forger.sock.sendall(forger.forge(hello, HANDSHAKE))
    witness.check()
    assert lab.cpu_s() - begun < 1.0
    flush(forger)
    lab.fake.wait_end(1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [0, 2, 4, 5, 11, 13, 20, 254])
def test_other_messages_of_a_handshake(
    lab: Lab, witness: Session, tmp_path: Path, version: str, kind: int
) -> None:
    """HelloRequest, a ticket, a certificate, Finished and so on, long after the handshake."""
    forger = Forger(lab, version, tmp_path / "keys")
    opened(forger)
    forger.sock.sendall(forger.forge(bytes([kind, 0, 0, 4]) + bytes(4), HANDSHAKE))
    with contextlib.suppress(OSError):
        forger.send(Request(Cmd.DISC).pack())
    assert forger.recv_to_end() == b""
    assert [request.cmd for request in lab.fake.wait_end(1).requests] == [Cmd.DISC]
