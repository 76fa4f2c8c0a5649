"""Client flags that nobody knows, or that are missing: the connection is dropped (H2)."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import BOTH, Lab
from tests.support.rawclient import C_NO_ZEROES, Opt, option

UNKNOWN = [1 << bit for bit in range(2, 32)]


@pytest.mark.parametrize("bit", UNKNOWN, ids=[f"{bit:#x}" for bit in UNKNOWN])
def test_unknown_flag(lab: Lab, bit: int) -> None:
    client = lab.raw()
    client.recv_exactly(18)
    client.send(struct.pack(">I", BOTH | bit))
    client.try_send(option(Opt.STARTTLS))
    assert client.recv_to_end() == b""


@pytest.mark.parametrize("flags", [0, C_NO_ZEROES])
def test_not_fixed_newstyle(lab: Lab, flags: int) -> None:
    """P:551: such a client can only be served without TLS, which a FORCEDTLS server does not do."""
    client = lab.raw()
    client.recv_exactly(18)
    client.send(struct.pack(">I", flags))
    client.try_send(option(Opt.STARTTLS))
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0
