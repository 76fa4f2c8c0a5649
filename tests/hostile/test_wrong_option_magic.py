"""An option that does not begin with IHAVEOPT: out of step, and no way to answer."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import IHAVEOPT, NBDMAGIC, REP_MAGIC, Opt

WRONG = {
    "zero": 0,
    "one_bit_off": IHAVEOPT ^ 1,
    "little_endian": int.from_bytes(IHAVEOPT.to_bytes(8, "big"), "little"),
    "NBDMAGIC": NBDMAGIC,
    "reply_magic": REP_MAGIC,
    "http": int.from_bytes(b"GET / HT", "big"),
}


@pytest.mark.parametrize("magic", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("inside", [False, True], ids=["plain", "tls"])
def test_dropped(lab: Lab, magic: int, inside: bool) -> None:
    client = lab.tls() if inside else lab.plain()
    client.send(struct.pack(">QII", magic, Opt.ABORT, 0))
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0


def test_not_waited_out(lab: Lab) -> None:
    """Eight wrong bytes are enough to know."""
    client = lab.plain()
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01" + bytes(8))  # TLS from the first byte
    assert client.recv_to_end() == b""
