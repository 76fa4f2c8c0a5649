"""Whole transmission phases: a random client, a random but legal upstream, and every kind of end.

Whatever happens, the upstream hears legal requests only, and each request of the client has one
final reply.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.nbd.constants import Chunk, Cmd, Error
from gateway.nbd.pairing import Terms
from tests.nbd import strategies as some
from tests.nbd.server import Server
from tests.nbd.support import (
    CHUNK_MAGIC,
    DONE,
    WRITES,
    Req,
    Tf,
    cut,
    data_chunk,
    hole_chunk,
    none_chunk,
    simple,
)
from tests.nbd.walker import Seen, Walker, joined, parse_replies

FIRST_COOKIE = 1 << 60  # of the client: far from ours
EVENTS = ["client", "client", "upstream", "upstream", "server", "server", "server"]
some_requests = st.lists(some.requests, min_size=1, max_size=12)
seeds = st.integers(0, 2**32)


class Session:
    """A client with these requests to send, a walker, and an upstream."""

    def __init__(self, terms: Terms, requests: list[Req], rng: random.Random, odds: float) -> None:
        self.requests = [one._replace(cookie=FIRST_COOKIE + n) for n, one in enumerate(requests)]
        self.relay = Walker(terms)
        self._terms = terms
        self.server = Server(terms, rng, shutdown_odds=odds)
        self._rng = rng
        self._to_send = b"".join(one.pack() for one in self.requests)
        self._on_its_way = b""  # from the upstream
        self._heard = 0
        self.lost = False

    def run(self, steps: int) -> None:
        """So many times, some bytes of the client or of the upstream arrive."""
        for _ in range(steps):
            match self._rng.choice(EVENTS):
                case "client":
                    self._client(self._rng.choice([1, 10, 28, 40, 300, 600]))
                case "upstream" if not self.lost:
                    self._upstream(self._rng.choice([1, 10, 40, 300, 2000]))
                case "server" if self.server.waiting:
                    self._on_its_way += self.server.speak()

    def _client(self, count: int) -> None:
        piece, self._to_send = self._to_send[:count], self._to_send[count:]
        self.relay.requests([piece])
        fresh = bytes(self.relay.upstream[self._heard :])
        self._heard += len(fresh)
        assert not (fresh and self.lost), "sent to an upstream that is gone"
        self.server.hear(fresh)

    def _upstream(self, count: int) -> None:
        piece, self._on_its_way = self._on_its_way[:count], self._on_its_way[count:]
        if piece:
            self.relay.replies([piece])
        assert self.relay.machine.upstream_fault is None

    def drain(self) -> None:
        """Everything arrives."""
        self._client(len(self._to_send))
        while not self.lost and (self.server.waiting or self._on_its_way):
            if self.server.waiting:
                self._on_its_way += self.server.speak()
            self._upstream(len(self._on_its_way))

    def heard_by_client(self, *, cut_off: bool = False) -> list[Seen]:
        lengths = {one.cookie: one.length for one in self.requests if one.kind == Cmd.READ}
        return parse_replies(bytes(self.relay.client), lengths, cut_off=cut_off)

    def check_forwarded(self) -> list[tuple[Req, Req]]:
        """What was forwarded is a part of what was sent, in order: (theirs, ours)."""
        pairs, sent = [], iter(self.requests)
        for ours in self.server.requests:
            for theirs in sent:
                if self._as_forwarded(theirs) == ours._replace(cookie=0):
                    pairs.append((theirs, ours))
                    break
            else:
                raise AssertionError(f"{ours} was never sent, or not in this order")
        return pairs

    def _as_forwarded(self, one: Req) -> Req:
        one = one._replace(cookie=0)
        if one.kind == Cmd.BLOCK_STATUS:
            one = one._replace(length=min(one.length, 2**32 - 65536))
        if one.kind not in WRITES and self._terms.flags & Tf.SEND_FUA:
            one = one._replace(flags=one.flags & 0xFFFE)
        return one


def unchanged(seen: list[Seen], messages: list[bytes], theirs: Req, ours: Req) -> bool:
    """What the client saw of one request is what the upstream said, but for the cookie."""
    lengths = {ours.cookie: ours.length if ours.kind == Cmd.READ else 0}
    said = joined(parse_replies(b"".join(messages), lengths))
    return joined(seen) == [one._replace(cookie=theirs.cookie) for one in said]


@settings(max_examples=200)
@given(
    some.some_terms,
    some_requests,
    seeds,
    st.sampled_from([0.0, 0.0, 0.2]),
    st.booleans(),
)
def test_each_request_has_one_final_reply(
    terms: Terms, requests: list[Req], seed: int, odds: float, shutdown: bool
) -> None:
    """(X2, X7, X11, X13, E1): the upstream's reply unchanged but for the cookie, or one of ours."""
    rng = random.Random(seed)
    session = Session(terms, requests, rng, odds)
    session.run(rng.randrange(80))
    if shutdown:
        session.relay.machine.shutdown()
    session.drain()

    seen = session.heard_by_client()
    assert sorted(one.cookie for one in seen if one.final) == [
        one.cookie for one in session.requests
    ]
    pairs = session.check_forwarded()
    for theirs, ours in pairs:
        mine = [one for one in seen if one.cookie == theirs.cookie]
        assert unchanged(mine, session.server.said[ours.cookie], theirs, ours)
    forwarded = {theirs.cookie for theirs, _ in pairs}
    assert all(one.final for one in seen if one.cookie not in forwarded)
    assert session.relay.machine.idle
    assert not session.relay.machine.mid_payload


@settings(max_examples=200)
@given(
    some.some_terms,
    some_requests,
    seeds,
)
def test_each_request_has_one_final_reply_also_when_the_upstream_is_lost(
    terms: Terms, requests: list[Req], seed: int
) -> None:
    """(X6, X7, X13): at any point, in the middle of a request or of a reply."""
    rng = random.Random(seed)
    session = Session(terms, requests, rng, 0.0)
    session.run(rng.randrange(40))
    told = session.relay.lose_upstream()
    session.lost = True
    if not told:
        *_, last = session.heard_by_client(cut_off=True)
        (theirs,) = [one for one in session.requests if one.cookie == last.cookie]
        assert last.kind is None, "only the data of a simple reply cannot be taken back"
        assert len(last.data) < theirs.length
        return
    session.run(rng.randrange(5))
    session.drain()

    seen = session.heard_by_client()
    assert sorted(one.cookie for one in seen if one.final) == [
        one.cookie for one in session.requests
    ]
    for theirs, ours in session.check_forwarded():
        mine = [one for one in seen if one.cookie == theirs.cookie]
        messages = session.server.said[ours.cookie]
        cut_short = mine[-1].error == Error.ESHUTDOWN
        assert cut_short or unchanged(mine, messages, theirs, ours)
    assert session.relay.machine.idle


@settings(max_examples=100)
@given(
    some.some_terms,
    some_requests,
    st.lists(some.requests, max_size=3),
    some.cuts,
)
def test_nothing_behind_disc_is_read(
    terms: Terms, requests: list[Req], behind: list[Req], cuts: list[int]
) -> None:
    """(X12)."""
    before = b"".join(one.pack() for one in requests)
    relay = Walker(terms).requests([before])
    disc = Req(Cmd.DISC).pack() + b"".join(one.pack() for one in behind)
    other = Walker(terms).requests(cut(before + disc, cuts))
    assert other.machine.client_done
    assert (other.upstream, other.client) == (relay.upstream, relay.client)


# -- an upstream that goes wrong after a while


def _other_cookie(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    cookie = rng.choice([0, 99, 2**64 - 1])
    return rng.choice([none_chunk(cookie), data_chunk(cookie, one.offset, b"x"), simple(cookie)])


def _wrong_style(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    return simple(one.cookie, rng.choice([0, 5]))


def _overlap(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    if not good:
        return _out_of_bounds(good, one, rng)
    (offset,) = struct.unpack_from(">Q", rng.choice(good), 20)
    return data_chunk(one.cookie, offset, b"x", flags=rng.choice([0, DONE]))


def _out_of_bounds(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    offset = rng.choice([one.offset - 1, one.offset + one.length, 2**64 - 1])
    return rng.choice([data_chunk(one.cookie, offset, b"x"), hole_chunk(one.cookie, offset, 1)])


def _short_coverage(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    holes = sum(struct.unpack_from(">I", raw, 28)[0] for raw in good if raw[7] == 2)
    data = sum(len(raw) - 28 for raw in good if raw[7] == 1)
    if holes + data == one.length:  # nothing is short any more
        return _out_of_bounds(good, one, rng)
    return none_chunk(one.cookie)


def _bad_length(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    kind, length = rng.choice(
        [(0, 1), (1, 0), (1, 8), (2, 11), (2, 13), (5, 4), (5, 11), (0x8001, 5), (0x8002, 13)]
    )
    return struct.pack(">IHHQI", CHUNK_MAGIC, DONE, kind, one.cookie, length) + bytes(length)


def _bad_magic(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    return rng.randbytes(3) + b"\0" + bytes(24)


def _bad_kind(good: list[bytes], one: Req, rng: random.Random) -> bytes:
    kind = rng.choice([3, 4, 6, 0x7FFF, Chunk.BLOCK_STATUS])
    return struct.pack(">IHHQI", CHUNK_MAGIC, DONE, kind, one.cookie, 12) + bytes(12)


CORRUPTIONS: list[Callable[[list[bytes], Req, random.Random], bytes]] = [
    _other_cookie,
    _wrong_style,
    _overlap,
    _out_of_bounds,
    _short_coverage,
    _bad_length,
    _bad_magic,
    _bad_kind,
]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 999), st.integers(2, 60)), min_size=1, max_size=4),
    st.sampled_from(CORRUPTIONS),
    seeds,
    some.cuts,
)
def test_corruption_is_found_out_and_what_was_good_is_delivered(
    reads: list[tuple[int, int]],
    corrupt: Callable[[list[bytes], Req, random.Random], bytes],
    seed: int,
    cuts: list[int],
) -> None:
    """(U5): of structured reads, at every cut."""
    rng = random.Random(seed)
    given_terms = some.GENEROUS
    requests = [Req(Cmd.READ, *read, cookie=100 + n) for n, read in enumerate(reads)]
    relay = Walker(given_terms).requests([one.pack() for one in requests])
    server = Server(given_terms, rng)
    server.hear(bytes(relay.upstream))
    good: list[bytes] = []
    while server.left > 1 and rng.random() < 0.75:
        good.append(server.speak())
    victim = rng.choice([one for one in server.requests if one.cookie in server.waiting])
    content = [one for one in server.said[victim.cookie] if one[6:8] in (b"\0\1", b"\0\2")]
    failed = len(content) < len(server.said[victim.cookie])  # then much is forgiven
    bad = (_wrong_style if failed else corrupt)(content, victim, rng)
    raw = b"".join(good) + bad
    relay.replies(cut(raw, cuts))
    assert relay.machine.upstream_fault
    theirs = b"".join(_for_client(one) for one in good)
    assert joined(parse_replies(bytes(relay.client))) == joined(parse_replies(theirs))


def _for_client(message: bytes) -> bytes:
    (ours,) = struct.unpack_from(">Q", message, 8)
    return message[:8] + struct.pack(">Q", 99 + ours) + message[16:]
