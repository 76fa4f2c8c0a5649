"""Clients that connect and keep still (CVE-2024-7409): dropped at the deadline, others get in."""

from __future__ import annotations

import time

from tests.hostile.conftest import Lab
from tests.support.rawclient import Opt, client_hello, option, tls_context

DEADLINE_S = 2
OPTIONS = ("--max-connections", "25", "--handshake-timeout", str(DEADLINE_S))


def test_a_good_client_gets_in_and_the_silent_are_dropped(lab: Lab) -> None:
    begun = time.monotonic()
    silent = [lab.raw() for _ in range(5)]
    silent += [lab.plain() for _ in range(5)]
    for _ in range(5):
        client = lab.plain()
        client.send(option(Opt.INFO, b"not all", length=100))
        silent.append(client)
    for _ in range(4):
        client = lab.plain()
        client.ask(Opt.STARTTLS)
        client.send(client_hello(tls_context(lab.pki))[:-1])
        silent.append(client)
    silent.append(lab.tls())  # one deadline, TLS included
    session = lab.session()
    session.check()
    for client in silent:
        client.recv_to_end()
        assert client.ended is not None
    assert time.monotonic() - begun < DEADLINE_S + 5
    session.check()  # granted in time: the deadline is not for this one
    session.disc()


def test_a_trickle_is_no_better(lab: Lab) -> None:
    """Options now and then do not move the deadline."""
    client = lab.tls()
    begun = time.monotonic()
    deadline = begun + DEADLINE_S + 5
    while client.ended is None:
        assert time.monotonic() < deadline, "the deadline starts anew with every option"
        client.try_send(option(99))
        client.recv_some()
        time.sleep(0.05)  # the pace of the trickle, not a wait for anything


def test_all_slots_taken_by_the_silent(lab: Lab) -> None:
    """Even then a good client gets in, once the deadline has passed."""
    silent = [lab.raw() for _ in range(40)]
    session = lab.session()
    session.check()
    session.disc()
    for client in silent:
        client.close()
