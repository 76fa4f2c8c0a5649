"""The upstream is gone: what the client is told, once and in full, or why it cannot be told."""

from __future__ import annotations

import struct

import pytest

from gateway.nbd.constants import Chunk, Cmd, Error
from gateway.nbd.pairing import Terms
from gateway.nbd.wire import MetaContext
from tests.nbd.answers import FLUSH, OURS, asked
from tests.nbd.support import (
    DONE,
    MIB,
    Req,
    all_cuts,
    data_chunk,
    error_chunk,
    hole_chunk,
    read,
    request,
    simple,
    status_chunk,
    terms,
    write,
)
from tests.nbd.walker import Walker, parse_replies, verdicts

CONTEXTS = (MetaContext(7, "base:allocation"), MetaContext(9, "x-a:b"))
STRUCTURED = terms(structured=True, contexts=CONTEXTS)
KINDS = (Cmd.READ, Cmd.WRITE, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS)
GONE = Error.ESHUTDOWN


@pytest.mark.parametrize("structured", [True, False])
def test_everything_in_flight_and_everything_later_is_told_that_the_server_is_gone(
    structured: bool,
) -> None:
    """(X13, CVE-2021-20286)."""
    kinds = KINDS if structured else KINDS[:-1]
    first = [request(kind, length=8, cookie=10 + kind).pack() for kind in kinds]
    later = [request(kind, length=8, cookie=20 + kind).pack() for kind in KINDS]
    relay = Walker(terms(structured=structured, contexts=CONTEXTS if structured else ()))
    relay.requests(first)
    assert relay.lose_upstream()
    assert relay.machine.idle
    relay.requests(later)
    assert verdicts(relay.client) == [
        *((10 + kind, GONE) for kind in kinds),
        *((20 + kind, GONE) for kind in KINDS),
    ]
    assert len(relay.forwarded) == len(kinds)


def test_last_words_are_said_once() -> None:
    relay = Walker(terms()).requests([read(0, 4, 5)])
    words = relay.machine.lose_upstream()
    assert words is not None
    again = relay.machine.lose_upstream()
    assert again is not None
    assert list(again) == []
    assert list(words) == [simple(5, GONE)]
    assert relay.machine.idle


def test_nothing_in_flight_is_nothing_to_say() -> None:
    relay = Walker(terms())
    assert relay.machine.wanted == 0
    assert relay.lose_upstream()
    assert not relay.client
    assert relay.machine.idle


@pytest.mark.parametrize("given", [terms(), STRUCTURED])
def test_write_on_its_way_is_answered_behind_its_payload(given: Terms) -> None:
    raw = write(0, b"abcd", 5)
    for at in range(28, len(raw)):
        for rest in all_cuts(raw[at:] + read(0, 1, 6)):
            relay = Walker(given).requests([read(0, 1, 4), raw[:at]])
            sent = bytes(relay.upstream)
            assert relay.lose_upstream()
            assert verdicts(relay.client) == [(4, GONE)]
            assert not relay.machine.mid_request
            assert relay.machine.mid_payload
            relay.requests(rest)
            assert verdicts(relay.client) == [(4, GONE), (5, GONE), (6, GONE)]
            assert relay.upstream == sent


def test_refused_write_on_its_way_keeps_its_own_answer() -> None:
    relay = Walker(terms()).requests([write(MIB, b"abcd", 5)[:-2]])
    assert relay.lose_upstream()
    assert not relay.client
    assert verdicts(relay.requests([b"cd"]).client) == [(5, Error.ENOSPC)]


def test_payload_that_was_promised_cannot_be_taken_back() -> None:
    """(X6) "the server MUST immediately initiate a hard disconnect"."""
    reply = simple(1, 0, b"abcd")
    for at in range(len(reply) + 1):
        relay = Walker(terms()).requests([read(0, 4, 5)]).replies([reply[:at]])
        told = relay.lose_upstream()
        assert told is (at < 16 or at == len(reply))
        if at < 16:
            assert relay.client == simple(5, GONE)
        else:
            assert relay.client == simple(5, 0, b"abcd")[:at]
            assert relay.lose_upstream() is told


@pytest.mark.parametrize(("length", "flags"), [(8, 0), (4, DONE)])
def test_chunk_that_has_begun_is_filled_up_and_an_error_follows(length: int, flags: int) -> None:
    """(X7) "it MUST use padding bytes which SHOULD be zero": also where it was to be the last."""
    reply = data_chunk(1, 0, b"abcd", flags=flags)
    for at in range(28, len(reply)):
        relay = Walker(STRUCTURED).requests([read(0, length, 5)]).replies([reply[:at]])
        assert relay.machine.mid_reply
        assert relay.lose_upstream()
        assert not relay.machine.mid_reply
        data, error = parse_replies(bytes(relay.client))
        assert data.data == bytes(8) + reply[28:at].ljust(4, b"\0")
        assert not data.final
        assert (error.cookie, error.kind, error.final, error.error) == (5, Chunk.ERROR, True, GONE)
        assert relay.machine.idle


def test_padding_comes_in_pieces() -> None:
    """Memory: a chunk may be 4 GiB long."""
    given = terms(1 << 33, structured=True)
    raw = data_chunk(1, 0, b"")[:16] + (8 + 600_000).to_bytes(4, "big") + bytes(8)
    relay = Walker(given).requests([read(0, 700_000, 5)]).replies([raw])
    words = relay.machine.lose_upstream()
    assert words is not None
    *padding, error = map(bytes, words)
    assert max(map(len, padding)) <= 1 << 18
    assert b"".join(padding) == bytes(600_000)
    assert verdicts(error) == [(5, GONE)]


@pytest.mark.parametrize(
    "half",
    [
        data_chunk(1, 0, b"abcd"),
        hole_chunk(1, 4, 2) + hole_chunk(1, 0, 1),
        error_chunk(1, Error.EIO, flags=0),
    ],
)
def test_read_that_was_half_answered_ends_in_an_error(half: bytes) -> None:
    for pieces in all_cuts(half):
        relay = Walker(STRUCTURED).requests([read(0, 8, 5)]).replies(pieces)
        before = len(relay.client)
        assert relay.lose_upstream()
        assert verdicts(relay.client[before:]) == [(5, GONE)]
        assert not relay.machine._from_upstream._chunked


def test_block_status_that_was_half_answered_ends_in_an_error() -> None:
    relay = Walker(STRUCTURED).requests([Req(Cmd.BLOCK_STATUS, 0, 512, 5).pack()])
    relay.replies([status_chunk(1, 7, [(512, 0)])])
    assert relay.lose_upstream()
    *_, last = parse_replies(bytes(relay.client))
    assert (last.cookie, last.error, last.final) == (5, GONE, True)


def test_fault_of_the_upstream_and_then_its_loss() -> None:
    """(U5): disconnect the upstream, NBD_ESHUTDOWN downstream."""
    relay = Walker(terms()).requests([read(0, 4, 5), read(4, 4, 6)])
    relay.replies([simple(2, 0, b"good") + b"garbage and more of it"])
    assert relay.machine.upstream_fault
    assert relay.lose_upstream()
    assert relay.client == simple(6, 0, b"good") + simple(5, GONE)


def test_disc_after_the_loss_is_still_the_end() -> None:
    relay = Walker(terms())
    assert relay.lose_upstream()
    assert relay.requests([Req(Cmd.DISC).pack()]).machine.client_done


# -- an upstream that shuts down


@pytest.mark.parametrize("given", [terms(), STRUCTURED])
@pytest.mark.parametrize("style", ["simple", "structured"])
def test_eshutdown_of_the_upstream_is_the_beginning_of_its_end(given: Terms, style: str) -> None:
    """(U6): stop sending, pass it on, let what is in flight go on to its end."""
    if style == "structured" and not given.structured_replies:
        return
    raw = simple(2, Error.ESHUTDOWN) if style == "simple" else error_chunk(2, Error.ESHUTDOWN)
    for pieces in all_cuts(raw):
        relay = Walker(given)
        relay.requests([Req(Cmd.FLUSH, cookie=8).pack() + Req(Cmd.FLUSH, cookie=9).pack()])
        assert not relay.machine.upstream_ends
        relay.replies(pieces)
        assert relay.machine.upstream_ends
        assert relay.machine.in_flight == 1
        assert relay.client == raw.replace(struct.pack(">Q", 2), struct.pack(">Q", 9))
        relay.client.clear()
        relay.requests([Req(Cmd.READ, 0, 1, 10).pack()])
        assert verdicts(relay.client) == [(10, Error.ESHUTDOWN)]
        assert len(relay.forwarded) == 2
        relay.client.clear()
        assert relay.replies([simple(1)]).client == simple(8)


@pytest.mark.parametrize("error", [one for one in Error if one != Error.ESHUTDOWN])
def test_other_errors_end_nothing(error: int) -> None:
    assert not asked(FLUSH).replies([simple(OURS, error)]).machine.upstream_ends
    assert not asked(FLUSH).replies([error_chunk(OURS, error)]).machine.upstream_ends
