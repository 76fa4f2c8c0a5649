"""Exports of 2^63 bytes and more, that is of negative size (CVE-2023-5215): no such export."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import Script
from tests.support.rawclient import Cmd, Err, Opt, PeerClosedError, info_data, option

STYLES = ["fixed", "newstyle", "oldstyle"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [1 << 63, (1 << 63) + 512, (1 << 64) - 1])
def test_refused(lab: Lab, witness: Session, size: int, style: str) -> None:
    lab.fake.script = Script(size=size, style=style)
    for opt in (Opt.INFO, Opt.GO):
        client = lab.tls()
        try:
            (reply,) = client.ask(opt, info_data())
            assert reply.failed
        except PeerClosedError:
            pytest.fail("INFO and GO can be answered in words")
        client.close()
    client = lab.tls()
    client.send(option(Opt.EXPORT_NAME))
    assert client.recv_to_end() == b""


@pytest.mark.parametrize("style", STYLES)
def test_nothing_at_all(lab: Lab, style: str) -> None:
    lab.fake.script = Script(size=0, style=style)
    session = lab.session() if style == "fixed" else lab.session(structured=False)
    assert session.export.size == 0
    assert session.ask(Cmd.READ, 0, 1).error == Err.EINVAL
    assert session.ask(Cmd.WRITE, 0, payload=b"x").error == Err.ENOSPC
    session.disc()


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 512, (1 << 63) - 1])
def test_large_but_possible(lab: Lab, size: int) -> None:
    lab.fake.script = Script(size=size)
    session = lab.session()
    assert session.export.size == size
    session.check(size - 512, 512)
    assert session.ask(Cmd.READ, size - 511, 512).error == Err.EINVAL
    session.disc()
