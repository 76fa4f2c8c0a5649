"""A client that is gone after any byte of what it says inside TLS: FIN, RST or close_notify.

With test_vanishing_at_every_byte.py, which is about what comes before, no point of a session is
left out. Each one lets go of its place, its descriptors and its upstream connection.
"""

from __future__ import annotations

import contextlib
import ssl

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import pattern
from tests.support.rawclient import (
    Cmd,
    Info,
    Opt,
    RawClient,
    Rep,
    Request,
    info_data,
    meta_data,
    option,
    tls_context,
)

PLACES = 6
OPTIONS = ("--max-connections", str(PLACES))
STEP = {"rst": 1, "fin": 2, "close_notify": 5}  # how they leave, and after every how many bytes

OPTIONS_SAID = [
    option(Opt.STRUCTURED_REPLY),
    option(Opt.SET_META_CONTEXT, meta_data(b"", [b"base:allocation"])),
    option(Opt.GO, info_data(b"", [Info.BLOCK_SIZE])),
]
REQUESTS_SAID = [
    Request(Cmd.READ, 0, 512, 1).pack(),
    Request(Cmd.WRITE, 512, 64, 2, payload=pattern(512, 64)).pack(),
    Request(Cmd.BLOCK_STATUS, 0, 4096, 3).pack(),
    Request(Cmd.FLUSH, 0, 0, 4).pack(),
]
DISC = Request(Cmd.DISC).pack()
SAID = b"".join(OPTIONS_SAID + REQUESTS_SAID)


def leave(client: RawClient, how: str) -> None:
    if how == "rst":
        client.reset()
        return
    if how == "close_notify":
        assert client.tls is not None
        with contextlib.suppress(ssl.SSLError):  # it has not read all that was said
            client.tls.unwrap()
        client.sock.sendall(client._outgoing.read())
    client.close()


def places_are_free(lab: Lab, base: int) -> None:
    lab.wait_fds(base)
    assert lab.sockets_of_clients() == 0
    together = [lab.session() for _ in range(PLACES)]
    for session in together:
        session.check()
        session.disc()
        session.client.close()
    lab.wait_fds(base)


@pytest.mark.parametrize("how", STEP)
def test_of_options_and_requests(lab: Lab, how: str) -> None:
    """All that a client says, in one go up to a byte, without a look at the answers."""
    base = lab.settled_fds()
    first = sum(map(len, OPTIONS_SAID))
    granted = 0
    for count in range(1, len(SAID) + 1, STEP[how]):
        client = lab.tls()
        client.send(SAID[:count])
        if count >= first and count % 3 == 0:  # half of them have read up to here
            granted += client.replies(Opt.STRUCTURED_REPLY)[-1].type == Rep.ACK
        leave(client, how)
    assert granted > 5
    lab.wait_fds(base)
    for link in lab.fake.links:
        link = lab.fake.wait_end(link.number)
        for request in link.requests:
            assert request.pack()[16:] in [one[16:] for one in (*REQUESTS_SAID, DISC)]
    places_are_free(lab, base)
    lab.assert_idle()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("only_1_2", [False, True], ids=["1.3", "1.2"])
def test_of_the_tls_handshake(lab: Lab, how: str, only_1_2: bool) -> None:
    """Behind the ClientHello: certificate, its proof and Finished."""
    base = lab.settled_fds()
    context = tls_context(lab.pki, only_1_2=only_1_2)
    size = 1
    at = 0
    while at < size:
        client = lab.plain()
        assert client.verdict(Opt.STARTTLS) == Rep.ACK
        tls = context.wrap_bio(client._incoming, client._outgoing)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        client.sock.sendall(client._outgoing.read())
        while not client._outgoing.pending:  # the server's flight may come in pieces
            client._feed()
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
        flight = client._outgoing.read()
        size = len(flight)
        assert size > 500
        client.sock.sendall(flight[:at])
        leave(client, how)
        at += 1 if at < 7 else 61
    lab.wait_fds(base)
    assert lab.fake.connects == 0
    places_are_free(lab, base)


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_with_others_at_work(lab: Lab, witness: Session, how: str) -> None:
    """A good client, whose data are verified, beside one that goes at any byte of a large write."""
    payload = pattern(0, 200_000)
    raw = Request(Cmd.WRITE, 0, len(payload), 5, payload=payload).pack()
    for count in range(1, len(raw), 19_997):
        session = lab.session()
        session.client.send(raw[:count])
        for at in range(5):
            witness.submit(Cmd.READ, 4096 * at + 1, 60_000)
        leave(session.client, how)
        for _ in range(5):
            answer = witness.collect()
            assert answer.error == 0
            assert answer.data == pattern(answer.request.offset, 60_000)
    for link in lab.fake.links[1:]:
        link = lab.fake.wait_end(link.number)
        assert [one.cmd for one in link.requests] in ([], [Cmd.DISC]), "a write that was cut"
