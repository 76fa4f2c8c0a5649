"""EXPORT_NAME has no error reply, so before TLS the session has to end (P:586)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import BOTH, Lab
from tests.support.rawclient import C_FIXED, Opt, Rep, Request, option


@pytest.mark.parametrize("flags", [BOTH, C_FIXED])
@pytest.mark.parametrize("name", [b"", b"disk", b"x" * 4097])
def test_session_ends(lab: Lab, flags: int, name: bytes) -> None:
    client = lab.plain(flags)
    client.send(option(Opt.EXPORT_NAME, name))
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0


def test_not_even_after_other_options(lab: Lab) -> None:
    client = lab.plain()
    assert client.verdict(Opt.LIST) == Rep.ERR_TLS_REQD
    client.send(option(Opt.EXPORT_NAME) + Request(0, 0, 512).pack())
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0
