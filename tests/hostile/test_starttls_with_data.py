"""STARTTLS with a payload: ERR_INVALID, the payload consumed, the session in step (H6)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Opt, Rep, option, tls_context


@pytest.mark.parametrize("size", [1, 16, 4096])
def test_refused_then_granted(lab: Lab, size: int) -> None:
    client = lab.plain()
    (reply,) = client.ask(Opt.STARTTLS, b"x" * size)
    assert reply.type == Rep.ERR_INVALID
    client.start_tls(tls_context(lab.pki))
    assert client.go().size == lab.fake.script.size


def test_payload_that_looks_like_an_option(lab: Lab) -> None:
    client = lab.plain()
    (reply,) = client.ask(Opt.STARTTLS, option(Opt.STARTTLS))
    assert reply.type == Rep.ERR_INVALID
    client.start_tls(tls_context(lab.pki))
    assert client.go().size == lab.fake.script.size
