"""BLOCK_STATUS by a client that has no meta context for this export: EINVAL (X8)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import Script
from tests.support.rawclient import Cf, Cmd, Err, Opt, Rep, meta_data, tls_context

OPTIONS = ("--any-export",)
ALLOCATION = b"base:allocation"


def refused(lab: Lab, session: Session) -> None:
    for flags in (0, Cf.REQ_ONE):
        assert session.ask(Cmd.BLOCK_STATUS, 0, 4096, flags=flags).error == Err.EINVAL
    session.check()
    session.disc()
    link = lab.fake.wait_end()
    assert not any(request.cmd == Cmd.BLOCK_STATUS for request in link.requests)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_never_set(lab: Lab, structured: bool) -> None:
    refused(lab, lab.session(structured=structured))


def test_none_selected(lab: Lab) -> None:
    client = lab.tls()
    client.ask_structured()
    assert client.set_contexts([b"x-nobody:knows"]) == {}
    refused(lab, Session(client, client.go(), {}))


def test_replaced_by_none(lab: Lab) -> None:
    """P:1475: the last SET_META_CONTEXT counts, one without queries selects nothing."""
    client = lab.tls()
    client.ask_structured()
    assert client.set_contexts([ALLOCATION])
    assert client.set_contexts([]) == {}
    refused(lab, Session(client, client.go(), {}))


def test_listed_is_not_set(lab: Lab) -> None:
    client = lab.tls()
    client.ask_structured()
    assert client.verdict(Opt.LIST_META_CONTEXT, meta_data(b"", [ALLOCATION])) == Rep.ACK
    refused(lab, Session(client, client.go(), {}))


@pytest.mark.parametrize("between", [False, True], ids=["go", "info_then_go"])
def test_set_for_another_export(lab: Lab, between: bool) -> None:
    lab.fake.script = Script(names=(b"a", b"b"))
    client = lab.tls()
    client.ask_structured()
    assert client.set_contexts([ALLOCATION], b"a")
    if between:
        client.go(b"a", opt=Opt.INFO)
    refused(lab, Session(client, client.go(b"b"), {}))


def test_failed_for_another_export(lab: Lab) -> None:
    """A SET for a name that does not exist fails, and what was set before is gone with it."""
    lab.fake.script = Script(names=(b"a",))
    client = lab.tls()
    client.ask_structured()
    assert client.set_contexts([ALLOCATION], b"a")
    verdict = client.verdict(Opt.SET_META_CONTEXT, meta_data(b"unknown", [ALLOCATION]))
    assert verdict in (Rep.ERR_UNKNOWN, Rep.ACK)
    refused(lab, Session(client, client.go(b"a"), {}))


@pytest.mark.parametrize("between", [False, True], ids=["go", "info_then_go"])
def test_set_for_this_export_is_served(lab: Lab, between: bool) -> None:
    """The counterpart; INFO for another name in between does not matter."""
    lab.fake.script = Script(names=(b"a", b"b"))
    client = lab.tls()
    client.ask_structured()
    contexts = client.set_contexts([ALLOCATION, b"qemu:dirty-bitmap:b0"], b"a")
    if between:
        client.go(b"b", opt=Opt.INFO)
    session = Session(client, client.go(b"a"), contexts)
    answer = session.ask(Cmd.BLOCK_STATUS, 0, 4096)
    assert answer.error == 0
    assert len(answer.extents) == 2
    answer = session.ask(Cmd.BLOCK_STATUS, 0, 4096, flags=Cf.REQ_ONE)
    assert answer.error == 0
    session.disc()


def test_upstream_without_contexts(lab: Lab) -> None:
    """Nothing is made up for an upstream that has no structured replies."""
    lab.fake.script = Script(structured=False)
    client = lab.plain()
    client.start_tls(tls_context(lab.pki))
    client.ask_structured(optional=True)
    if client.structured:
        assert client.set_contexts([ALLOCATION]) == {}
    else:
        verdict = client.verdict(Opt.SET_META_CONTEXT, meta_data(b"", [ALLOCATION]))
        assert verdict == Rep.ERR_INVALID
    refused(lab, Session(client, client.go(), {}))
