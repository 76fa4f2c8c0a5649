"""SIGTERM while clients stand in all stages of the handshake: an end in bound, with code 0."""

from __future__ import annotations

import time

import pytest

from tests.hostile.conftest import Lab
from tests.support.fake_upstream import Link, Script
from tests.support.rawclient import (
    Opt,
    PeerClosedError,
    Rep,
    client_hello,
    info_data,
    option,
    tls_context,
)

OPTIONS = ("--handshake-timeout", "2", "--drain-timeout", "8")
BOUND_S = 10.0


class Mute(Script):
    def serve(self, link: Link) -> None:
        link.take_to_end()


def stop(lab: Lab) -> None:
    begun = time.monotonic()
    lab.gateway.terminate()
    assert lab.gateway.wait(BOUND_S + 5) == 0
    assert time.monotonic() - begun < BOUND_S


@pytest.mark.parametrize("repeat", [1, 3], ids=["once", "three_times"])
def test_half_handshakes(lab: Lab, repeat: int) -> None:
    lab.mortal = True
    for _ in range(5):
        lab.raw()
        lab.plain()
        lab.plain().send(option(Opt.INFO, b"not all", length=100))
        client = lab.plain()
        client.ask(Opt.STARTTLS)
        client.send(client_hello(tls_context(lab.pki))[:50])
        lab.tls()
        client = lab.tls()
        client.sock.sendall(client.seal(option(Opt.GO, info_data()))[:9])
    for _ in range(repeat - 1):  # a second signal may hurry the gateway, not break it
        lab.gateway.terminate()
    stop(lab)


def test_options_during_the_drain(lab: Lab) -> None:
    """P:275: options are errored with ERR_SHUTDOWN, except ABORT; hanging up is allowed too."""
    lab.mortal = True
    session = lab.session()
    session.check()
    client = lab.tls()
    client.ask_structured()
    lab.gateway.terminate()
    try:
        while (verdict := client.verdict(Opt.INFO, info_data())) != Rep.ERR_SHUTDOWN:
            assert verdict == Rep.ACK  # the signal has not been seen yet
        assert client.verdict(Opt.ABORT) == Rep.ACK
    except (PeerClosedError, ConnectionError):
        pass
    stop(lab)


def test_idle_upstream_handshake(lab: Lab) -> None:
    """The gateway itself waits in the upstream's handshake when the signal comes."""
    lab.mortal = True
    lab.fake.script = Mute()
    client = lab.tls()
    client.send(option(Opt.GO, info_data()))
    lab.fake.wait_link()
    stop(lab)
