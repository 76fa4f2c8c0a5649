"""STARTTLS inside TLS: ERR_INVALID, and never ERR_TLS_REQD there (P:595)."""

from __future__ import annotations

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import Opt, Rep


def test_refused_and_still_in_step(lab: Lab) -> None:
    client = lab.tls()
    for data in (b"", b"", b"with data"):
        assert client.verdict(Opt.STARTTLS, data) == Rep.ERR_INVALID
    client.ask_structured()
    session = Session(client, client.go(), {})
    session.check()
    session.disc()


def test_no_option_is_told_to_start_tls(lab: Lab) -> None:
    client = lab.tls()
    for opt in (Opt.LIST, Opt.PEEK_EXPORT, Opt.INFO, Opt.GO, Opt.SET_META_CONTEXT, 11, 12, 1 << 31):
        assert client.verdict(opt, b"garbage") != Rep.ERR_TLS_REQD
