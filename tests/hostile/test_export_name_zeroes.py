"""124 zeroes follow EXPORT_NAME unless both sides agreed to do without; they never follow GO."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import BOTH, Lab
from tests.hostile.session import Session
from tests.support.rawclient import C_FIXED, Export, Opt, Tf, option


@pytest.mark.parametrize("flags", [BOTH, C_FIXED], ids=["no_zeroes", "zeroes"])
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_export_name(lab: Lab, flags: int, structured: bool) -> None:
    client = lab.tls(flags)
    if structured:
        client.ask_structured()
    client.send(option(Opt.EXPORT_NAME))
    size, given = struct.unpack(">QH", client.recv_exactly(10))
    assert size == lab.fake.script.size
    assert given & Tf.HAS_FLAGS
    assert structured or not given & Tf.SEND_DF, "SEND_DF without structured replies (P:1123)"
    if flags == C_FIXED:
        assert client.recv_exactly(124) == bytes(124)
    session = Session(client, Export(size, given, {}), {})
    session.check()  # a byte too many or too few, and no reply magic would be found
    session.disc()


@pytest.mark.parametrize("flags", [BOTH, C_FIXED], ids=["no_zeroes", "zeroes"])
def test_go_never_adds_zeroes(lab: Lab, flags: int) -> None:
    client = lab.tls(flags)
    session = Session(client, client.go(), {})
    session.check()
    session.disc()


def test_unknown_name(lab: Lab) -> None:
    client = lab.tls()
    client.send(option(Opt.EXPORT_NAME, b"no such export"))
    assert client.recv_to_end() == b""
