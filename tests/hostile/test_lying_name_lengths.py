"""Name lengths that contradict the option's own length (CVE-2022-26495, CVE-2022-26496).

nbd-server allocated by the one and copied by the other, and answered twice. Here: exactly one
reply, or the end; nothing reaches the upstream.
"""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Opt, PeerClosedError, RawClient, Rep, info_data, option

NAME_LENGTHS = [0, 1, 5, 6, 4096, 4097, 1 << 31, (1 << 32) - 1]
OPTION_LENGTHS = [0, 1, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 4096, 4100, 4101, 4102, 4104, 5000, 8192]
PROBE = 0x5EED  # an unknown option, asked behind each try


def one_reply(client: RawClient, opt: int, data: bytes) -> bool:
    """True when the session goes on. More than one reply would be taken for the probe's."""
    try:
        client.send(option(opt, data))
        (reply,) = client.replies(opt)
        assert reply.type in (Rep.ERR_INVALID, Rep.ERR_TOO_BIG), reply
        assert client.verdict(PROBE) == Rep.ERR_UNSUP
    except (PeerClosedError, ConnectionError):
        return False
    return True


def ready(lab: Lab) -> RawClient:
    client = lab.tls()
    client.ask_structured()  # or SET_META_CONTEXT would be refused for another reason
    return client


@pytest.mark.parametrize("opt", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_matrix(lab: Lab, opt: int) -> None:
    client = ready(lab)
    lab.forget_peak()
    before = lab.peak_kib()
    for name_length in NAME_LENGTHS:
        for length in OPTION_LENGTHS:
            # All that follows the length is the letter "a": no count that these spell can be true.
            data = (struct.pack(">I", name_length) + b"a" * length)[:length]
            if not one_reply(client, opt, data):
                client.close()
                client = ready(lab)
    assert lab.peak_kib() - before < 8 << 10
    assert client.verdict(Opt.ABORT) == Rep.ACK
    assert not lab.asked_upstream()


@pytest.mark.parametrize("opt", [Opt.INFO, Opt.GO])
@pytest.mark.parametrize(
    "data",
    [
        info_data(b"", [3], count=0),
        info_data(b"", [3], count=2),
        info_data(b"", [], count=1),
        info_data(b"", [], count=0xFFFF),
        info_data(b"", [3]) + b"\0",
        info_data(b"disk", [], name_length=3),
        info_data(b"disk", [], name_length=5),
        info_data(b"disk", [], name_length=6),
    ],
)
def test_off_by_little(lab: Lab, opt: int, data: bytes) -> None:
    client = ready(lab)
    if one_reply(client, opt, data):
        assert client.verdict(Opt.ABORT) == Rep.ACK
    assert not lab.asked_upstream()
