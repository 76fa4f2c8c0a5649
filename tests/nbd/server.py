"""An upstream that says only what the specification allows, in any way that it allows."""

from __future__ import annotations

import random
from itertools import pairwise

from gateway.nbd.constants import Cmd, CmdFlag, Error
from gateway.nbd.pairing import Terms
from tests.nbd.support import (
    DONE,
    REQUEST,
    Req,
    Tf,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    hole_chunk,
    none_chunk,
    parse_requests,
    simple,
    status_chunk,
)

ERRORS = [one for one in Error if one != Error.ESHUTDOWN]


def pattern(offset: int, length: int) -> bytes:
    """What the disk holds: no zeroes, and no two places alike within 251 bytes."""
    return bytes((offset + at) % 251 + 1 for at in range(length))


class Server:
    """Reads requests as they come, and answers them out of order, chunk by chunk.

    `shutdown_odds`: how often it answers NBD_ESHUTDOWN.
    """

    def __init__(self, terms: Terms, rng: random.Random, *, shutdown_odds: float = 0.0) -> None:
        self.requests: list[Req] = []
        self.said: dict[int, list[bytes]] = {}  # by cookie, the messages so far
        self._terms = terms
        self._rng = rng
        self._shutdown_odds = shutdown_odds
        self._inbox = b""
        self._to_say: dict[int, list[bytes]] = {}

    def hear(self, raw: bytes) -> None:
        """What the gateway has sent, in any cuts. Only legal requests may be in it."""
        self._inbox += raw
        while len(self._inbox) >= REQUEST.size:
            *_, length = REQUEST.unpack_from(self._inbox)
            whole = REQUEST.size + (length if self._inbox[7] == Cmd.WRITE else 0)
            if len(self._inbox) < whole:
                break
            (one,) = parse_requests(self._inbox[:whole])
            self._inbox = self._inbox[whole:]
            check_legal(self._terms, one)
            assert one.cookie not in self.said, "one cookie for two requests"
            self.requests.append(one)
            self.said[one.cookie] = []
            self._to_say[one.cookie] = self.answer(one)

    @property
    def waiting(self) -> list[int]:
        """The cookies of all requests that are not answered in full."""
        return list(self._to_say)

    @property
    def left(self) -> int:
        """How many messages there are still to say."""
        return sum(map(len, self._to_say.values()))

    def speak(self) -> bytes:
        """One message about one of the waiting requests."""
        cookie = self._rng.choice(self.waiting)
        message = self._to_say[cookie].pop(0)
        if not self._to_say[cookie]:
            del self._to_say[cookie]
        self.said[cookie].append(message)
        return message

    def answer(self, one: Req) -> list[bytes]:
        """All messages about this request, the final one last."""
        rng, cookie = self._rng, one.cookie
        failed = rng.random() < 0.15
        error = rng.choice(ERRORS)
        if rng.random() < self._shutdown_odds:
            failed, error = True, Error.ESHUTDOWN
        if not self._terms.structured_replies:
            if failed:
                return [simple(cookie, error)]
            data = pattern(one.offset, one.length) if one.kind == Cmd.READ else b""
            return [simple(cookie, 0, data)]
        if failed and one.kind != Cmd.READ and rng.random() < 0.5:
            return [simple(cookie, error)]
        if one.kind == Cmd.READ:
            chunks = self._content(one)
        elif one.kind == Cmd.BLOCK_STATUS:
            chunks = self._status(one)
        elif not failed and rng.random() < 0.5:
            return [simple(cookie)]
        else:
            chunks = []
        if failed:
            chunks = chunks[: rng.randrange(len(chunks) + 1)]
            if one.kind == Cmd.FLUSH or rng.random() < 0.5:
                return [*chunks, error_chunk(cookie, error, b"no" * rng.randrange(9))]
            offset = rng.randrange(one.offset, one.offset + one.length)
            return [*chunks, error_offset_chunk(cookie, error, offset, "nö".encode())]
        if chunks and rng.random() < 0.5:
            last = bytearray(chunks[-1])
            last[5] |= DONE
            return [*chunks[:-1], bytes(last)]
        return [*chunks, none_chunk(cookie)]

    def _content(self, one: Req) -> list[bytes]:
        rng = self._rng
        most = 1 if one.flags & CmdFlag.DF else rng.choice([1, 1, 2, 5])
        inner = {rng.randrange(one.length) for _ in range(most - 1)} - {0}
        stops = [0, *sorted(inner), one.length]
        chunks = []
        for start, stop in pairwise(stops):
            offset, length = one.offset + start, stop - start
            if rng.random() < 0.3:
                chunks.append(hole_chunk(one.cookie, offset, length))
            else:
                chunks.append(data_chunk(one.cookie, offset, pattern(offset, length)))
        rng.shuffle(chunks)
        return chunks

    def _status(self, one: Req) -> list[bytes]:
        rng = self._rng
        chunks = []
        for context in self._terms.contexts:
            extents, left = [], one.length
            while left > 1 and not one.flags & CmdFlag.REQ_ONE and rng.random() < 0.6:
                length = rng.randrange(1, left)
                extents.append((length, rng.randrange(4)))
                left -= length
            beyond = 1 if one.flags & CmdFlag.REQ_ONE else rng.choice([1, 3])
            extents.append((min(left * beyond, 2**32 - 1), 0))
            chunks.append(status_chunk(one.cookie, context.id, extents))
        rng.shuffle(chunks)
        return chunks


def check_legal(terms: Terms, one: Req) -> None:
    """proto.md lets a client with these terms send this request."""
    flags, kind = terms.flags, one.kind
    writes = (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)
    may = CmdFlag.FUA if flags & Tf.SEND_FUA and kind in writes else 0
    match kind:
        case Cmd.READ:
            may |= CmdFlag.DF if flags & Tf.SEND_DF else 0
            assert terms.structured_replies or one.length <= terms.block_sizes.maximum
        case Cmd.WRITE:
            assert one.length <= terms.block_sizes.maximum
        case Cmd.FLUSH:
            assert flags & Tf.SEND_FLUSH
            assert one.offset == one.length == one.flags == 0
            return
        case Cmd.TRIM:
            assert flags & Tf.SEND_TRIM
        case Cmd.CACHE:
            assert flags & Tf.SEND_CACHE
        case Cmd.WRITE_ZEROES:
            assert flags & Tf.SEND_WRITE_ZEROES
            may |= CmdFlag.NO_HOLE | (CmdFlag.FAST_ZERO if flags & Tf.SEND_FAST_ZERO else 0)
        case Cmd.BLOCK_STATUS:
            assert terms.contexts
            may |= CmdFlag.REQ_ONE
        case _:
            raise AssertionError(f"request of type {kind}")
    assert not one.flags & ~int(may)
    assert not (terms.read_only and kind in writes)
    assert one.length > 0
    assert one.offset + one.length <= terms.size
    assert not (one.offset | one.length) % terms.block_sizes.minimum
