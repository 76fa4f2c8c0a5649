"""The upstream says nothing more after any byte of its handshake, and keeps the connection open.

Such sessions are there at the same time. Each client is told in words before its own deadline,
which would cut it without a word; another client notices nothing, and nothing is left behind.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import Link, Script
from tests.support.rawclient import Info, Opt, RawClient, Rep, info_data, meta_data, option

MOST = 400
# The upstream has half of the first number for an answer, from when the client asks; the client has
# all of it, from when it comes. Between the two there is room for a machine that is busy.
OPTIONS = (
    *("--handshake-timeout", "12"),
    *("--max-connections", str(MOST)),
    *("--limit", "clients-per-identity=0"),
)
SIZES = (1, 4096, 1 << 25)
CONTEXTS = meta_data(b"", [b"base:allocation"])
INFO = info_data(b"", [Info.BLOCK_SIZE])


class Counting(Script):
    """Notes how many bytes the handshake took."""

    handshake_bytes = 0

    def transmit(self, link: Link) -> None:
        self.handshake_bytes = link.sent
        super().transmit(link)


class Muted(Script):
    """On the n-th connection from now on it says n bytes, and then nothing until the other end
    hangs up."""

    def __init__(self, first: int, **changes: object) -> None:
        super().__init__(**changes)
        self.first = first

    def serve(self, link: Link) -> None:
        left = link.number - self.first
        say = link.send

        def send(data: bytes) -> None:
            nonlocal left
            say(data[:left])
            left -= len(data)
            if left <= 0:
                link.take_to_end()

        link.send = send  # type: ignore[method-assign]
        if not left:
            link.take_to_end()
        super().serve(link)


def asks(style: str) -> dict[int, bytes]:
    """The options that involve the upstream, in their order."""
    if style != "fixed":
        return {Opt.GO: INFO}
    first: dict[int, bytes] = {Opt.STRUCTURED_REPLY: b"", Opt.LIST: b""}
    return first | {Opt.SET_META_CONTEXT: CONTEXTS, Opt.INFO: INFO, Opt.GO: INFO}


def ask(client: RawClient, style: str) -> None:
    """All of them, without waiting for an answer."""
    client.send(b"".join(option(opt, data) for opt, data in asks(style).items()))


@pytest.mark.parametrize("style", ["fixed", "newstyle", "oldstyle"])
def test_every_byte(lab: Lab, witness: Session, style: str) -> None:
    base = lab.fds()
    lab.fake.script = whole = Counting(style=style, block_sizes=SIZES)
    client = lab.tls()
    ask(client, style)
    for opt in asks(style):
        assert client.replies(opt)[-1].type == Rep.ACK
    client.close()
    lab.fake.wait_end(1)
    count = whole.handshake_bytes
    assert 16 < count < MOST - 2
    before = len(lab.fake.links)
    lab.fake.script = Muted(lab.fake.connects, style=style, block_sizes=SIZES)
    clients = []
    for _ in range(count):
        clients.append(lab.tls())
        ask(clients[-1], style)
    witness.check()
    for said, client in enumerate(clients):
        for opt in asks(style):
            last = client.replies(opt)[-1]
        assert last.type == Rep.ERR_UNKNOWN, f"granted, though {said} bytes came"
        assert b"cannot be reached" in last.data
        if said % 50 == 0:
            witness.check()
    # Not one was dialled again, and none is held while its client thinks about it.
    assert len(lab.fake.links) - before == count
    for index in range(before, before + count):
        lab.fake.wait_end(index)
    for client in clients:
        client.close()
    lab.wait_fds(base)
    witness.check()
