"""A client that sends and sends and takes no answer: it is made to wait, at no cost to others."""

from __future__ import annotations

import contextlib

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Script
from tests.support.rawclient import Cmd, Request

ALLOWANCE_KIB = 16 << 10
READS = b"".join(Request(Cmd.READ, 0, 16 * MIB, i).pack() for i in range(1, 257))  # 4 GiB in all
FLOODS = {
    "reads": READS * 200,
    "unknown_commands": Request(99, 0, 512).pack() * 500_000,
    "empty_reads": Request(Cmd.READ, 0, 0).pack() * 500_000,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_memory_stays_flat(lab: Lab, witness: Session, flood: bytes) -> None:
    lab.fake.script = Script(size=32 * MIB)
    session = lab.session()
    lab.forget_peak()
    before = lab.peak_kib()
    session.client.sock.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        session.client.send(flood)
    for _ in range(20):
        witness.check()
    assert lab.peak_kib() - before < ALLOWANCE_KIB
    session.client.reset()
    lab.fake.wait_end(1)
