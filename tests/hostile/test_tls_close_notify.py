"""close_notify where nobody expects it: the session ends there, and nothing behind it counts.

What was whole before it is carried out; what was not is never made whole.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.forger import ALERT, CLOSE_NOTIFY, VERSIONS, WARNING, Forger, opened
from tests.hostile.session import Session
from tests.support.fake_upstream import Link
from tests.support.rawclient import REQUEST, Cmd, Opt, Rep, Request, info_data, option

PAYLOAD = bytes(range(1, 256)) * 400
WRITE = Request(Cmd.WRITE, 0, len(PAYLOAD), 8, payload=PAYLOAD).pack()
READ = Request(Cmd.READ, 0, 512, 9).pack()
GO = option(Opt.GO, info_data())
SOON_S = 5.0  # at once, and not by the deadline of the handshake
BEHIND = ("nothing", "twice", "rest", "garbage")


def notify(forger: Forger, before: bytes, how: str, rest: bytes) -> None:
    """Some bytes, close_notify, and then more all the same."""
    words = (forger.seal(before) if before else b"") + forger.alert(CLOSE_NOTIFY)
    match how:
        case "twice":
            words += forger.alert(CLOSE_NOTIFY)
        case "rest":  # what was left out, and more
            words += forger.seal(rest)
        case "garbage":
            words += b"\xff" * 3000
    forger.sock.sendall(words)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", BEHIND)
@pytest.mark.parametrize("sent", [0, 8, 16, len(GO) - 1])
def test_while_haggling(
    lab: Lab, witness: Session, tmp_path: Path, version: str, how: str, sent: int
) -> None:
    """Before any option, inside its header and inside its data: it is not asked."""
    base = lab.fds()
    forger = Forger(lab, version, tmp_path / "keys")
    notify(forger, GO[:sent], how, GO[sent:] + READ)
    forger.sock.settimeout(SOON_S)
    assert forger.recv_to_end() == b""
    assert forger.ended in ("close_notify", "reset")  # with bytes unread, the kernel's word
    forger.close()
    lab.wait_fds(base)
    assert lab.fake.connects == 1


def test_with_an_option_whole(lab: Lab, witness: Session, tmp_path: Path) -> None:
    """It is answered, and then the session ends."""
    forger = Forger(lab, "1.3", tmp_path / "keys")
    forger.ask_structured()
    forger.sock.sendall(forger.seal(option(Opt.LIST)) + forger.alert(CLOSE_NOTIFY))
    assert forger.replies(Opt.LIST)[-1].type == Rep.ACK
    assert forger.recv_to_end() == b""
    assert lab.fake.wait_end(1).options[-1] == (Opt.ABORT, b"")


def requests_of(link: Link) -> list[int]:
    return [request.cmd for request in link.requests]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", BEHIND)
@pytest.mark.parametrize("sent", [1, 27, len(READ)])
def test_inside_a_request_header(
    lab: Lab, witness: Session, tmp_path: Path, version: str, how: str, sent: int
) -> None:
    base = lab.fds()
    forger = Forger(lab, version, tmp_path / "keys")
    session = opened(forger)
    session.check()
    notify(forger, READ[:sent], how, READ[sent:] + WRITE)
    forger.recv_to_end()
    forger.close()
    link = lab.fake.wait_end(1)
    assert link.end == "disc"
    whole = [Cmd.READ] if sent == len(READ) else []
    assert requests_of(link) == [Cmd.READ, *whole, Cmd.DISC]
    lab.wait_fds(base)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", BEHIND)
@pytest.mark.parametrize("sent", [len(WRITE) - len(PAYLOAD), len(WRITE) - 1])
def test_inside_a_payload(
    lab: Lab, witness: Session, tmp_path: Path, version: str, how: str, sent: int
) -> None:
    """The upstream gets a part of it and the end of the connection: not a byte to fill the gap,
    and none that came behind close_notify."""
    base = lab.fds()
    forger = Forger(lab, version, tmp_path / "keys")
    opened(forger)
    notify(forger, WRITE[:sent], how, WRITE[sent:] + READ)
    forger.recv_to_end()
    forger.close()
    link = lab.fake.wait_end(1)
    assert link.end in ("cut", "reset", "disc")
    assert requests_of(link) in ([], [Cmd.DISC])
    if link.end != "disc":
        head = bytes(link.received).rfind(REQUEST.pack(0x25609513, 0, 1, 0, 0, 0)[:8])
        assert head >= 0
        got = bytes(link.received[head + REQUEST.size :])
        assert got == PAYLOAD[: len(got)]
        assert len(got) <= sent - REQUEST.size
    lab.wait_fds(base)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", BEHIND)
def test_behind_disc(lab: Lab, witness: Session, tmp_path: Path, version: str, how: str) -> None:
    base = lab.fds()
    forger = Forger(lab, version, tmp_path / "keys")
    session = opened(forger)
    session.check()
    notify(forger, Request(Cmd.DISC).pack(), how, READ + WRITE)
    assert forger.recv_to_end() == b""
    forger.close()
    link = lab.fake.wait_end(1)
    assert link.end == "disc"
    assert requests_of(link) == [Cmd.READ, Cmd.DISC]
    lab.wait_fds(base)


@pytest.mark.parametrize("version", VERSIONS)
def test_requests_in_flight_are_answered(
    lab: Lab, witness: Session, tmp_path: Path, version: str
) -> None:
    """A client may say that it sends no more, and still read (half-close)."""
    forger = Forger(lab, version, tmp_path / "keys")
    session = opened(forger)
    for number in range(20):
        session.submit(Cmd.READ, 4096 * number, 4096)
    forger.sock.sendall(forger.alert(CLOSE_NOTIFY))
    answered = 0
    with contextlib.suppress(Exception):
        while session.pending:
            assert session.collect().error == 0
            answered += 1
    assert answered == 20
    assert forger.recv_to_end() == b""
    assert lab.fake.wait_end(1).end == "disc"


@pytest.mark.parametrize("instead", [b"\x15\3\1\0\2\1\0", b"\x15\3\3\0\2\2\x28"])
def test_in_place_of_the_client_hello(lab: Lab, witness: Session, instead: bytes) -> None:
    assert instead[0] == ALERT
    assert instead[5] in (WARNING, 2)
    client = lab.plain()
    assert client.verdict(Opt.STARTTLS) == Rep.ACK
    client.sock.sendall(instead)
    answer = client.recv_to_end()
    assert answer == b"" or answer[0] == ALERT
    assert lab.fake.connects == 1
