"""Client to upstream: the walk over requests, what it forwards, drops and answers."""

from __future__ import annotations

import pytest

from gateway.errors import PeerError
from gateway.nbd.constants import Chunk, Cmd, CmdFlag, Error
from gateway.nbd.transmission import Transmission
from gateway.nbd.wire import BlockSizes, MetaContext
from tests.nbd.support import (
    DONE,
    MIB,
    REQUEST,
    WITH_LENGTH,
    Req,
    Tf,
    all_cuts,
    parse_requests,
    read,
    request,
    simple,
    terms,
    write,
)
from tests.nbd.walker import Walker, parse_replies, verdicts

CONTEXTS = (MetaContext(7, "base:allocation"),)
EVERYTHING = terms(structured=True, contexts=CONTEXTS)
READ_ONLY = terms(flags=Tf.HAS_FLAGS | Tf.READ_ONLY)
BEYOND_32_MIB = (32 << 20) + 1

# -- forwarding


def test_requests_are_forwarded_as_they_are_but_for_the_cookie() -> None:
    sent = [
        Req(Cmd.READ, 0, 512, 2**64 - 1, CmdFlag.DF),
        Req(Cmd.WRITE, 512, 40, 7, CmdFlag.FUA, bytes(range(40))),
        Req(Cmd.WRITE_ZEROES, 0, 512, 1, CmdFlag.NO_HOLE | CmdFlag.FUA),
        Req(Cmd.BLOCK_STATUS, 0, MIB, 2, CmdFlag.REQ_ONE),
        Req(Cmd.FLUSH, 0, 0, 3),
    ]
    for pieces in all_cuts(b"".join(one.pack() for one in sent)):
        relay = Walker(EVERYTHING).requests(pieces)
        assert [one._replace(cookie=0) for one in relay.forwarded] == [
            one._replace(cookie=0) for one in sent
        ]
        assert len({one.cookie for one in relay.forwarded}) == len(sent)
        assert not relay.client
        assert relay.machine.in_flight == len(sent)


def test_one_cookie_for_many_requests_of_a_sloppy_client() -> None:
    """(X11): cookies are opaque, and ours are unique."""
    relay = Walker(terms()).requests([read(0, 4, 5) * 3])
    ours = [one.cookie for one in relay.forwarded]
    assert len(set(ours)) == 3
    relay.replies([simple(cookie, 0, bytes([cookie]) * 4) for cookie in reversed(ours)])
    assert relay.client == b"".join(simple(5, 0, bytes([one]) * 4) for one in reversed(ours))


def test_cookies_are_not_used_again() -> None:
    relay = Walker(terms())
    seen = set()
    for _ in range(50):
        relay.upstream.clear()
        (one,) = relay.requests([read(0, 4)]).forwarded
        relay.replies([simple(one.cookie, Error.EIO)])
        seen.add(one.cookie)
    assert len(seen) == 50
    assert relay.machine.idle


def test_walk_begins_and_ends_where_it_is_told_to() -> None:
    machine = Transmission(terms())
    buffer = bytearray(read(0, 1, 1) + write(0, b"abcd", 2) + read(0, 1, 3))
    assert machine.requests(buffer, 28, 28 + 30) == (58, [(28, 58)])
    assert buffer[:28] == read(0, 1, 1)
    assert machine.mid_request
    assert machine.requests(buffer, 58, 70) == (60, [(58, 60)])
    assert not machine.mid_request
    assert machine.requests(buffer, 60, 88) == (88, [(60, 88)])
    assert [one.offset for one in parse_requests(bytes(buffer[28:]))] == [0, 0]


def test_requests_side_by_side_are_one_span() -> None:
    machine = Transmission(terms())
    buffer = bytearray(read(0, 1) + write(0, b"ab") + read(0, 1))
    assert machine.requests(buffer, 0, len(buffer)) == (len(buffer), [(0, len(buffer))])


def test_payload_on_its_way_is_owed_to_the_upstream() -> None:
    """(X12): nothing may be said to the upstream in between, DISC least of all."""
    relay = Walker(terms()).requests([write(0, b"abcd")[:-1]])
    assert relay.machine.mid_request
    assert relay.machine.mid_payload
    with pytest.raises(AssertionError):
        relay.machine.disconnect_request()
    relay.requests([b"d"])
    assert not relay.machine.mid_request
    assert not relay.machine.mid_payload
    assert relay.machine.disconnect_request() == Req(Cmd.DISC, cookie=0).pack()


def test_large_write_is_passed_by_count() -> None:
    relay = Walker(terms(64 * MIB)).requests([REQUEST.pack(0x25609513, 0, 1, 9, 0, 32 * MIB)])
    for _ in range(32):
        assert relay.machine.mid_request
        relay.requests([bytes(MIB)])
        assert relay._from_client == b""
    assert not relay.machine.mid_request
    assert relay.forwarded[0].length == 32 * MIB


# -- the end of the client's stream


@pytest.mark.parametrize("magic", [0, 0x12560953, 0x25609514, 0x21E41C71, 0x67446698])
def test_wrong_request_magic_ends_the_session(magic: int) -> None:
    """(X1): and what came before it is forwarded."""
    for pieces in all_cuts(read(0, 512) + magic.to_bytes(4, "big") + read(0, 512)[4:]):
        relay = Walker(terms()).requests(pieces)
        assert isinstance(relay.machine.client_fault, PeerError)
        assert relay.machine.client_fault.side == "client"
        assert len(relay.forwarded) == 1


def test_disc_is_the_last_that_is_read() -> None:
    """(X12): later bytes are ignored, DISC itself is not forwarded, and there is no reply."""
    for pieces in all_cuts(write(0, b"ab") + Req(Cmd.DISC).pack() + read(0, 1) + b"garbage"):
        relay = Walker(terms()).requests(pieces)
        assert relay.machine.client_done
        assert relay.machine.client_fault is None
        assert [one.kind for one in relay.forwarded] == [Cmd.WRITE]
        assert not relay.client
        assert not relay.machine.idle


@pytest.mark.parametrize("given", [EVERYTHING, READ_ONLY])
@pytest.mark.parametrize("length", [BEYOND_32_MIB, 2**32 - 1])
def test_write_of_more_than_32_mib_ends_the_session(given: object, length: int) -> None:
    """(X3): unless the upstream said that it takes so much."""
    for pieces in all_cuts(read(0, 1) + Req(Cmd.WRITE, 0, length).pack()):
        relay = Walker(given).requests(pieces)  # type: ignore[arg-type]
        assert relay.machine.client_fault
        assert len(relay.forwarded) == 1
        assert not relay.client


def test_write_of_more_than_32_mib_is_forwarded_where_the_upstream_takes_it() -> None:
    given = terms(1 << 33, block_sizes=BlockSizes(1, 512, 2**32 - 1))
    relay = Walker(given).requests([Req(Cmd.WRITE, 0, 2**32 - 1).pack(), b"some"])
    assert relay.machine.mid_request
    assert len(relay.upstream) == 32


# -- refused writes (X2)


def test_payload_of_a_refused_write_is_dropped_and_the_reply_comes_behind_it() -> None:
    """(X2): even if the payload looks like requests."""
    payload = write(0, read(0, 8))
    for pieces in all_cuts(write(MIB, payload, 5) + read(0, 8, 6)):
        relay = Walker(terms())
        for piece in pieces:
            relay.requests([piece])
            assert not relay.machine.mid_request
            assert not (relay.client and relay.machine.mid_payload)
        assert [(one.kind, one.length) for one in relay.forwarded] == [(Cmd.READ, 8)]
        assert relay.client == simple(5, Error.ENOSPC)


def test_refused_write_between_forwarded_ones_leaves_two_spans() -> None:
    machine = Transmission(terms())
    first, refused, last = write(0, b"ab"), write(MIB, b"no"), write(2, b"cd")
    buffer = bytearray(first + refused + last)
    assert machine.requests(buffer, 0, 90) == (90, [(0, 30), (60, 90)])
    assert machine.take_local_replies() == simple(1, Error.ENOSPC)
    assert machine.take_local_replies() == b""


def test_local_replies_keep_the_order_of_their_requests() -> None:
    kinds = [read(MIB, 1, 1), write(MIB, b"xy", 2), read(0, 0, 3), Req(99, cookie=4).pack()]
    for pieces in all_cuts(b"".join(kinds)):
        relay = Walker(terms()).requests(pieces)
        assert verdicts(relay.client) == [(1, 22), (2, 28), (3, 0), (4, 22)]


# -- the style of local replies (X6)


@pytest.mark.parametrize("kind", WITH_LENGTH)
def test_refusals_are_structured_and_have_a_text_once_structured_replies_are_on(kind: Cmd) -> None:
    relay = Walker(EVERYTHING).requests([request(kind, 2**63, 8).pack()])
    (seen,) = parse_replies(bytes(relay.client))
    assert (seen.cookie, seen.kind, seen.final) == (9, Chunk.ERROR, True)
    assert len(seen.data) > 6
    relay = Walker(terms()).requests([request(kind, 2**63, 8).pack()])
    (seen,) = parse_replies(bytes(relay.client))
    assert (seen.cookie, seen.kind) == (9, None)


def test_read_of_no_bytes_is_answered_in_the_style_that_reads_have() -> None:
    relay = Walker(EVERYTHING).requests([read(0, 0, 9)])
    assert relay.client.hex() == f"668e33ef{DONE:04x}0000{9:016x}00000000"
    assert Walker(terms()).requests([read(0, 0, 9)]).client == simple(9)


# -- shutdown (X13)


@pytest.mark.parametrize("structured", [True, False])
def test_after_shutdown_every_request_is_answered_that_it_comes_too_late(structured: bool) -> None:
    sent = [request(kind, length=8, cookie=kind) for kind in Cmd if kind != Cmd.DISC]
    sent += [request(kind, length=1, cookie=20 + kind) for kind in (Cmd.READ, Cmd.WRITE)]
    sent += [Req(99, cookie=99), request(Cmd.READ, length=0, cookie=30)]
    raw = b"".join(one.pack() for one in sent)
    for pieces in all_cuts(raw):
        relay = Walker(terms(structured=structured, contexts=CONTEXTS))
        relay.machine.shutdown()
        relay.requests(pieces)
        assert verdicts(relay.client) == [(one.cookie, Error.ESHUTDOWN) for one in sent]
        assert not relay.upstream


def test_request_that_has_begun_before_a_shutdown_goes_on() -> None:
    raw = write(0, b"abcd", 5)
    for at in range(len(raw) + 1):
        relay = Walker(terms()).requests([raw[:at]])
        relay.machine.shutdown()
        relay.requests([raw[at:], read(0, 1, 6)])
        if at < 28:
            assert verdicts(relay.client) == [(5, Error.ESHUTDOWN), (6, Error.ESHUTDOWN)]
            assert not relay.upstream
        else:
            assert verdicts(relay.client) == [(6, Error.ESHUTDOWN)]
            assert [one.payload for one in relay.forwarded] == [b"abcd"]
            (ours,) = relay.forwarded
            assert relay.replies([simple(ours.cookie)]).client[16:] == simple(5)


def test_disc_after_shutdown_is_still_the_end() -> None:
    relay = Walker(terms())
    relay.machine.shutdown()
    assert relay.requests([Req(Cmd.DISC).pack()]).machine.client_done
