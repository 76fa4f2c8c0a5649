"""Requests and replies with any bit the other way round, or cut off anywhere.

In memory. The upstream is sent legal requests only; and a client whose upstream makes one mistake
is never told of a success for bytes that did not come.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from gateway.nbd.constants import Chunk, Cmd
from gateway.nbd.pairing import Terms
from gateway.nbd.wire import MetaContext
from tests.hostile.replay import flipped
from tests.nbd.server import check_legal, pattern
from tests.nbd.support import (
    DONE,
    REQUEST,
    REQUEST_MAGIC,
    Req,
    Tf,
    data_chunk,
    error_chunk,
    hole_chunk,
    none_chunk,
    simple,
    status_chunk,
    terms,
)
from tests.nbd.walker import Seen, Walker, parse_replies

FIRST = 100  # cookie of the client's first request
ROW = [
    Req(Cmd.READ, 4096, 24),
    Req(Cmd.WRITE, 0, 16, payload=b"0123456789abcdef"),
    Req(Cmd.FLUSH),
    Req(Cmd.TRIM, 512, 512),
    Req(Cmd.WRITE_ZEROES, 512, 512),
    Req(Cmd.READ, 8192, 16),
]
STATUS = Req(Cmd.BLOCK_STATUS, 0, 4096)
ALLOCATION = MetaContext(7, "base:allocation")

SIMPLE = terms()
STRUCTURED = terms(structured=True, contexts=(ALLOCATION,))
READ_ONLY = terms(flags=int(terms().flags | Tf.READ_ONLY))
KINDS = {"simple": SIMPLE, "structured": STRUCTURED, "read_only": READ_ONLY}


def row(given: Terms) -> list[Req]:
    asked = [*ROW, STATUS] if given.contexts else ROW
    return [one._replace(cookie=FIRST + at) for at, one in enumerate(asked)]


def said(given: Terms) -> bytes:
    return b"".join(one.pack() for one in row(given))


def forwarded(relay: Walker) -> list[Req]:
    """As an upstream reads it. The payload of the last write may still be on its way."""
    raw, found = bytes(relay.upstream), []
    while raw:
        magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(raw)
        assert magic == REQUEST_MAGIC
        size = REQUEST.size + (length if kind == Cmd.WRITE else 0)
        assert size <= len(raw) or relay.machine.mid_request
        found.append(Req(kind, offset, length, cookie, flags, raw[REQUEST.size : size]))
        raw = raw[size:]
    return found


@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS.keys())
def test_every_bit_of_the_requests(given: Terms) -> None:
    raw = said(given)
    faults = 0
    for bit in range(len(raw) * 8):
        relay = Walker(given).requests([flipped(raw, bit)])
        faults += relay.machine.client_fault is not None
        for one in forwarded(relay):
            check_legal(given, one)
    assert faults >= 32 * len(row(given)), "a wrong magic is a fault"


@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS.keys())
def test_every_truncation_of_the_requests(given: Terms) -> None:
    raw = said(given)
    whole = forwarded(Walker(given).requests([raw]))
    for count in range(len(raw)):
        relay = Walker(given).requests([raw[:count]])
        assert relay.machine.client_fault is None
        got = forwarded(relay)
        if relay.machine.mid_request:
            last = got.pop()
            assert whole[len(got)].payload.startswith(last.payload)
        assert got == whole[: len(got)]


def answers(relay: Walker, given: Terms) -> bytes:
    words = b""
    for one in relay.forwarded:
        data = pattern(one.offset, one.length)
        if one.kind == Cmd.BLOCK_STATUS:
            words += status_chunk(one.cookie, 7, [(512, 3), (3584, 0)], flags=DONE)
        elif one.kind != Cmd.READ:
            words += simple(one.cookie)
        elif not given.structured_replies:
            words += simple(one.cookie, 0, data)
        elif one.offset == 8192:
            words += error_chunk(one.cookie, 5, b"sorry")
        else:
            words += data_chunk(one.cookie, one.offset, data[:8])
            words += hole_chunk(one.cookie, one.offset + 8, 8)
            words += data_chunk(one.cookie, one.offset + 16, data[16:])
            words += none_chunk(one.cookie)
    return words


def covered(seen: list[Seen], one: Req) -> int:
    """How many bytes of this read came, in content chunks within its bounds."""
    spans = []
    for reply in seen:
        if reply.cookie == one.cookie and reply.kind in (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE):
            (offset,) = struct.unpack_from(">Q", reply.data)
            length = len(reply.data) - 8
            if reply.kind == Chunk.OFFSET_HOLE:
                (length,) = struct.unpack_from(">I", reply.data, 8)
            assert one.offset <= offset < offset + length <= one.offset + one.length
            spans.append((offset, offset + length))
    spans.sort()
    assert all(low[1] <= high[0] for low, high in pairwise(spans)), "content overlaps"
    return sum(high - low for low, high in spans)


def look(relay: Walker, given: Terms, *, over: bool) -> None:
    """At what the client was told. `over`: every request has had its last word."""
    asked = {one.cookie: one for one in row(given)}
    reads = {cookie: one.length for cookie, one in asked.items() if one.kind == Cmd.READ}
    seen = parse_replies(bytes(relay.client), reads, cut_off=not over)
    assert {reply.cookie for reply in seen} <= set(asked)
    final = [reply.cookie for reply in seen if reply.final]
    assert len(final) == len(set(final)), "two last words about one request"
    if over:
        assert sorted(final) == sorted(asked)
    failed = {reply.cookie for reply in seen if reply.error}
    for cookie, one in asked.items():
        if cookie in final and cookie not in failed and given.structured_replies:
            if one.kind == Cmd.READ:
                assert covered(seen, one) == one.length, "success, but bytes are missing"
            if one.kind == Cmd.BLOCK_STATUS:
                (chunk,) = [reply for reply in seen if reply.cookie == cookie]
                assert chunk.kind == Chunk.BLOCK_STATUS
                assert chunk.data[:4] == struct.pack(">I", 7)


@pytest.mark.parametrize("given", [SIMPLE, STRUCTURED], ids=["simple", "structured"])
def test_every_bit_of_the_replies(given: Terms) -> None:
    words = answers(Walker(given).requests([said(given)]), given)
    faults = 0
    for bit in range(len(words) * 8):
        relay = Walker(given).requests([said(given)]).replies([flipped(words, bit)])
        fault = relay.machine.upstream_fault
        if fault is None and relay.machine.idle:
            look(relay, given, over=True)
            continue
        # A fault, or a message that claims to be longer: in the end the upstream is given up.
        assert fault is None or fault.side == "upstream"
        faults += fault is not None
        look(relay, given, over=relay.lose_upstream())
    assert faults >= 32 * len(row(given))


@pytest.mark.parametrize("given", [SIMPLE, STRUCTURED], ids=["simple", "structured"])
def test_every_truncation_of_the_replies(given: Terms) -> None:
    words = answers(Walker(given).requests([said(given)]), given)
    for count in range(len(words)):
        relay = Walker(given).requests([said(given)]).replies([words[:count]])
        assert relay.machine.upstream_fault is None
        assert not relay.machine.idle
        look(relay, given, over=relay.lose_upstream())
