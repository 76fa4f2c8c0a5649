"""NOTLS mode: STARTTLS is refused, and ERR_TLS_REQD is never an answer (P:565)."""

from __future__ import annotations

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import Opt, Rep, meta_data

OPTIONS = ("--tls", "off")


def test_refused_and_still_in_step(lab: Lab) -> None:
    client = lab.plain()
    for data in (b"", b"", b"data"):
        (reply,) = client.ask(Opt.STARTTLS, data)
        allowed = {Rep.ERR_POLICY, Rep.ERR_UNSUP} | ({Rep.ERR_INVALID} if data else set())
        assert reply.type in allowed
    session = Session(client, client.go(), {})
    session.check()
    session.disc()


def test_never_told_to_start_tls(lab: Lab) -> None:
    client = lab.plain()
    for opt in (Opt.LIST, Opt.PEEK_EXPORT, Opt.INFO, Opt.GO, Opt.SET_META_CONTEXT, 11, 99):
        assert client.verdict(opt, b"garbage") != Rep.ERR_TLS_REQD


def test_state_before_the_refused_starttls_stays(lab: Lab) -> None:
    """Nothing was upgraded, so nothing may be lost."""
    client = lab.plain()
    client.ask_structured()
    assert client.verdict(Opt.STARTTLS) in (Rep.ERR_POLICY, Rep.ERR_UNSUP)
    assert client.verdict(Opt.SET_META_CONTEXT, meta_data(b"", [b"base:allocation"])) == Rep.ACK
    session = Session(client, client.go(), {})
    session.check()
    session.disc()
