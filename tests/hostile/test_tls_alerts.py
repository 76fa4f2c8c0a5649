"""TLS alerts of a client, each of either level: the session goes on as it was, or it ends.

RFC 8446, section 6: in TLS 1.3 all but close_notify and user_canceled are fatal, whatever level
they claim; TLS 1.2 has warnings, of which OpenSSL takes a few.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.forger import (
    ALERT,
    FATAL,
    NO_RENEGOTIATION,
    USER_CANCELED,
    VERSIONS,
    WARNING,
    Forger,
    flush,
    opened,
)
from tests.hostile.session import Session
from tests.support.fake_upstream import pattern
from tests.support.rawclient import Cmd, Opt, PeerClosedError, Request

KNOWN = [10, 20, 21, 22, 30, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 60, 70, 71, 80, 86, 90]
KNOWN += [100, 109, 110, 111, 112, 113, 114, 115, 116, 120]
UNKNOWN = [1, 5, 99, 121, 200, 255]


def goes_on(session: Session) -> bool:
    """Or it has ended; nothing in between."""
    try:
        session.client.send(Request(Cmd.READ, 4096, 512, 7).pack())
        session.expect(Request(Cmd.READ, 4096, 512, 7))
        answer = session.collect()
    except (PeerClosedError, ConnectionError):
        return False
    assert answer.error == 0
    assert answer.data == pattern(4096, 512)
    return True


@pytest.mark.parametrize("version", VERSIONS)
def test_any(lab: Lab, witness: Session, tmp_path: Path, version: str) -> None:
    base = lab.fds()
    alive = set()
    for level in (WARNING, FATAL, 0, 3, 255):
        for what in KNOWN + UNKNOWN if level in (WARNING, FATAL) else (USER_CANCELED, 40):
            forger = Forger(lab, version, tmp_path / "keys")
            session = opened(forger)
            forger.sock.sendall(forger.alert(what, level))
            if goes_on(session):
                alive.add((level, what))
            flush(forger)
    lab.wait_fds(base)
    for link in lab.fake.links[1:]:
        kinds = [request.cmd for request in link.requests]
        assert kinds in ([Cmd.READ, Cmd.DISC], [Cmd.DISC]), "a request that nobody made"
    if version == "1.3":
        assert alive <= {(level, USER_CANCELED) for level in range(256)}
    else:
        assert all(level == WARNING for level, _ in alive)
    assert (WARNING, USER_CANCELED) in alive, "this one is legal"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", [USER_CANCELED, NO_RENEGOTIATION])
def test_no_end_of_them(
    lab: Lab, witness: Session, tmp_path: Path, version: str, what: int
) -> None:
    forger = Forger(lab, version, tmp_path / "keys")
    opened(forger)
    lab.forget_peak()
    before = lab.peak_kib()
    with contextlib.suppress(OSError):
        for _ in range(20):
            forger.sock.sendall(b"".join(forger.alert(what) for _ in range(100)))
    witness.check()
    flush(forger)
    lab.fake.wait_end(1)
    assert lab.peak_kib() - before < 4 << 10
    lab.assert_idle()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("content", [b"", b"\1", b"\1\0\0", b"\1\x5a\1\x5a", b"\2\x28" * 50])
def test_of_odd_sizes(
    lab: Lab, witness: Session, tmp_path: Path, version: str, content: bytes
) -> None:
    """Half an alert, or several in one record."""
    forger = Forger(lab, version, tmp_path / "keys")
    opened(forger)
    forger.sock.sendall(forger.forge(content, ALERT))
    forger.sock.sendall(forger.forge(content, ALERT))
    with contextlib.suppress(OSError):
        forger.send(Request(Cmd.DISC).pack())
    forger.recv_to_end()
    forger.close()
    assert [request.cmd for request in lab.fake.wait_end(1).requests] == [Cmd.DISC]


@pytest.mark.parametrize("version", VERSIONS)
def test_fatal_inside_a_payload(lab: Lab, witness: Session, tmp_path: Path, version: str) -> None:
    forger = Forger(lab, version, tmp_path / "keys")
    opened(forger)
    payload = b"\1" * 100_000
    forger.send(Request(Cmd.WRITE, 0, len(payload), 3).pack() + payload[:70_000])
    forger.sock.sendall(forger.alert(40, FATAL))
    assert forger.recv_to_end() == b""
    forger.close()
    link = lab.fake.wait_end(1)
    assert link.requests == []
    assert link.end in ("cut", "reset")
    assert not bytes(link.received).endswith(b"\0")


def test_bad_certificate_of_a_client_that_had_agreed(
    lab: Lab, witness: Session, tmp_path: Path
) -> None:
    """An alert that belongs into the handshake, while options are haggled about."""
    base = lab.fds()
    for version in VERSIONS:
        forger = Forger(lab, version, tmp_path / "keys")
        forger.ask_structured()
        forger.sock.sendall(forger.alert(42, FATAL))
        assert forger.recv_to_end() == b""
        flush(forger)
    lab.wait_fds(base)
    for number in (1, 2):
        assert lab.fake.wait_end(number).options[-1] == (Opt.ABORT, b"")
