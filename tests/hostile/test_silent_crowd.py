"""Silent clients in all slots, and a deadline far away: the oldest without TLS makes room."""

from __future__ import annotations

from tests.hostile.conftest import Lab

OPTIONS = ("--max-connections", "5", "--handshake-timeout", "600")


def test_a_good_client_gets_in(lab: Lab) -> None:
    held = lab.session()
    silent = [lab.raw() for _ in range(10)]
    session = lab.session()
    session.check()
    held.check()  # it has shown its certificate, and is never put out
    assert "others wait for its place" in lab.gateway.log()
    session.disc()
    held.disc()
    for client in silent:
        client.close()


def test_those_with_a_certificate_are_never_put_out(lab: Lab) -> None:
    sessions = [lab.session() for _ in range(5)]
    waiting = lab.raw()
    for session in sessions * 3:
        session.check()
    sessions.pop().disc()
    waiting.greet()
    for session in sessions:
        session.check()
        session.disc()
    waiting.close()
