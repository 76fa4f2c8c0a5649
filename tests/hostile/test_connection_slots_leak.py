"""Many more connects than the limit allows at once: the count must go down again."""

from __future__ import annotations

import contextlib

from tests.hostile.conftest import Lab
from tests.support.rawclient import Opt, Request, option

LIMIT = 5
OPTIONS = ("--max-connections", str(LIMIT))


def test_limit_is_not_used_up(lab: Lab) -> None:
    base = lab.settled_fds()
    for i in range(10 * LIMIT):
        client = lab.raw() if i % 5 == 0 else lab.plain()
        match i % 5:
            case 1:
                client.send(option(Opt.STARTTLS) + b"garbage")
            case 2:
                client.reset()
            case 3:
                client.send(option(Opt.ABORT))
            case 4:
                client.send(b"garbage")
        client.close()
    for i in range(2 * LIMIT):
        session = lab.session()
        if i % 2:
            session.disc()
        else:
            session.client.send(Request(0, 0, 4096).pack())
            session.client.reset()
        session.client.close()
    lab.wait_fds(base)
    together = [lab.session() for _ in range(LIMIT)]
    for session in together:
        session.check()
        session.disc()


def test_the_limit_holds(lab: Lab) -> None:
    """One too many is kept waiting or dropped; it enters once another has left."""
    together = [lab.session() for _ in range(LIMIT)]
    extra = lab.raw()
    extra.sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        assert extra.recv_some() == b"", "greeted beyond the limit"
    extra.close()
    for session in together:
        session.check()
        session.disc()
        session.client.close()
    session = lab.session()
    session.check()
    session.disc()
