"""An option that claims megabytes (CVE-2017-15119): a reply or a drop, but no allocation."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import MAX_PAYLOAD, Opt, PeerClosedError, Rep, option

ALLOWANCE_KIB = 8 << 10  # what else the process may need meanwhile; a fourth of the smallest claim
PIECE = bytes(1 << 20)
OPTIONS_TRIED = [Opt.INFO, Opt.GO, Opt.LIST, Opt.STARTTLS, Opt.ABORT, Opt.SET_META_CONTEXT, 99]


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("opt", OPTIONS_TRIED)
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, (1 << 31) - 1, (1 << 32) - 1])
def test_more_than_will_ever_come(lab: Lab, inside: bool, opt: int, length: int) -> None:
    client = lab.tls() if inside else lab.plain()
    lab.forget_peak()
    before = lab.peak_kib()
    client.try_send(option(opt, PIECE, length=length))
    client.sock.settimeout(0.05)
    try:
        reply = client.reply()  # legal, if it will then skip what was announced
        assert reply.option == opt
        assert reply.failed
        assert inside or reply.type in (Rep.ERR_TLS_REQD, Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
    except (TimeoutError, PeerClosedError):
        pass  # waits for the rest, or hung up
    assert lab.peak_kib() - before < ALLOWANCE_KIB
    client.close()


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("opt", [Opt.INFO, 99])
def test_all_of_it_comes(lab: Lab, inside: bool, opt: int) -> None:
    client = lab.tls() if inside else lab.plain()
    lab.forget_peak()
    before = lab.peak_kib()
    for i in range(MAX_PAYLOAD // len(PIECE)):
        client.try_send(option(opt, PIECE, length=MAX_PAYLOAD) if i == 0 else PIECE)
    try:
        (reply,) = client.replies(opt)
        assert reply.failed
        assert inside or reply.type == Rep.ERR_TLS_REQD
        assert client.verdict(Opt.ABORT) == Rep.ACK  # in step
    except (PeerClosedError, ConnectionError):
        pass  # dropped
    assert lab.peak_kib() - before < ALLOWANCE_KIB
