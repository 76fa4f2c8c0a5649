"""From the upstream to the client: every reply checked, put into the client's words, passed on.

The walk reads whole headers, writes the client's cookie back in place, and names what of the buffer
may go on. Payload that runs past the buffer is passed by count. Only where an upgrade is in play
the reply is another than the upstream's: its simple replies become chunks, the answers to the parts
of a plan become one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gateway.errors import PeerError
from gateway.nbd.constants import (
    CHUNK_ERROR_BIT,
    SIMPLE_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Error,
    ReplyFlag,
)
from gateway.nbd.framing import COOKIE_AT, FLAGS_AT, OFFSET_AT, Framing
from gateway.nbd.in_flight import ErrorChunk, InFlight, Request
from gateway.nbd.plans import ZEROES, Plans
from gateway.nbd.replies import ChunkedReply, Replies, legal_error
from gateway.nbd.request_walk import Piece
from gateway.nbd.requests import RequestRules
from gateway.nbd.resumption import Resumption
from gateway.nbd.sparse import Run, runs, whole_blocks
from gateway.nbd.wire import HOLE, SIMPLE_REPLY, U16, U32, U64

_SIMPLE_SIZE: Final = SIMPLE_REPLY.size
_READ, _BLOCK_STATUS = int(Cmd.READ), int(Cmd.BLOCK_STATUS)
_DONE, _DF = int(ReplyFlag.DONE), int(CmdFlag.DF)
_OFFSET_DATA = int(Chunk.OFFSET_DATA)
_HAS_CHUNKS = frozenset({_READ, _BLOCK_STATUS})
_STATUS = frozenset({Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT})


class ReplyWalk:
    """One direction of a `Transmission`, which says what the attributes mean."""

    def __init__(
        self,
        rules: RequestRules,
        framing: Framing,
        in_flight: InFlight,
        plans: Plans,
        replies: Replies,
        *,
        chunks_below: bool,
        resumption: Resumption | None = None,
    ) -> None:
        """With a `resumption` only whole replies and chunks are passed on."""
        self.fault: PeerError | None = None
        self.upstream_ends = False
        self.wanted = 0
        self._rules = rules
        self._framing = framing
        self._in_flight = in_flight
        self._plans = plans
        self._replies = replies
        self._resumption = resumption
        self._chunks_below = chunks_below  # the upstream answers a READ in chunks
        self._converts = rules.chunks_above and not chunks_below
        self._chunked: dict[int, ChunkedReply] = {}  # replies of more than one chunk, under way
        self._pieces: list[Piece] = []
        self._start = 0  # of what is not in `_pieces` yet
        # The data of a READ on its way. It goes to the client as it is, unless:
        self._left = 0
        self._can_fail = False  # it is in a chunk, and an error chunk may follow
        self._converting: Request | None = None  # it has to be put into chunks
        self._holding: Request | None = None  # it is kept until the reply is whole
        self._data_at = 0  # the offset in the export, for these two
        self._last_of = 0  # our cookie, if the reply is over with this data

    @property
    def mid_reply(self) -> bool:
        return bool(self._left and not self._converting and not self._holding)

    def walk(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        """See `Transmission.replies`."""
        pieces: list[Piece] = []
        self._pieces, self._start = pieces, at
        self.wanted = 0
        plans = self._plans
        try:
            if self._left:
                at = self._go_on(buffer, at, end)
            extended = self._framing.extended
            smallest = self._framing.chunk.size if extended else _SIMPLE_SIZE
            while True:
                if plans.said and not self.mid_reply:
                    self._cut(at, at)
                    pieces += plans.take_replies()
                if self._left or end - at < smallest:
                    break
                (magic,) = U32.unpack_from(buffer, at)
                if magic == self._framing.chunk_magic and self._chunks_below:
                    after = self._chunk(buffer, at, end)
                elif magic == SIMPLE_REPLY_MAGIC and not extended:
                    after = self._simple(buffer, at, end)
                else:
                    raise PeerError("upstream", f"reply magic {magic:#010x}")
                if after == at:
                    break
                at = after
        except PeerError as fault:
            self.fault = fault
        self._cut(at, at)
        self._pieces = []  # an idle session must not own what it has sent
        return at, pieces

    def _cut(self, at: int, resume: int) -> None:
        """Up to `at` all may go on; what is between there and `resume` may not."""
        if self._start < at:
            self._pieces.append((self._start, at))
        self._start = resume

    def _request(self, cookie: int) -> Request:
        request = self._in_flight.requests.get(cookie)
        if request is None:
            raise PeerError("upstream", f"a reply with cookie {cookie:#x}, which nobody sent")
        if cookie == self._in_flight.unfinished:
            raise PeerError("upstream", "a reply to a write whose payload it does not have yet")
        return request

    # -- simple replies

    def _simple(self, buffer: bytearray, at: int, end: int) -> int:
        """proto.md, "Simple reply message"."""
        _, error, mine = SIMPLE_REPLY.unpack_from(buffer, at)
        request = self._request(mine)
        data_follows = request.kind == _READ and not error
        if self._chunks_below and (
            request.kind == _READ or (request.kind == _BLOCK_STATUS and not error)
        ):
            raise PeerError("upstream", "a simple reply where a structured one is due")
        if self._has_refused(mine):
            raise PeerError("upstream", "a second reply to what it has refused")
        if mine in self._chunked:
            raise PeerError("upstream", "a simple reply to a request that has chunks")
        after = at + _SIMPLE_SIZE
        if error:
            error = legal_error(error)
            if self._refuses(mine, request, error, last=True):
                self._cut(at, after)
                return after
        if data_follows and self._resumption is not None and end - after < request.length:
            self.wanted = after + request.length - at
            return at
        if data_follows and (self._converts or request.plan is not None):
            self._cut(at, after)
            self._left, self._data_at = request.length, request.offset
            self._can_fail = False
            self._last_of = mine
            return self._divert(buffer, after, end, request)
        del self._in_flight.requests[mine]
        if request.plan is not None:
            self._cut(at, after)
            self._plans.answered(request.plan, error)
        elif error and self._converts:
            self._cut(at, after)
            self._pieces.append(self._replies.error(request, error))
        else:
            if error:
                U32.pack_into(buffer, at + FLAGS_AT, error)
            U64.pack_into(buffer, at + COOKIE_AT, request.cookie)
            if data_follows:
                return self._begin(buffer, after, end, request.length, can_fail=False)
        return after

    # -- chunks

    def _chunk(self, buffer: bytearray, at: int, end: int) -> int:
        """proto.md, "Structured reply chunk message". Returns `at` while it is not whole."""
        size = self._framing.chunk.size
        if end - at < size:
            return at
        header: tuple[int, ...] = self._framing.chunk.unpack_from(buffer, at)
        flags, kind, mine, length = header[1], header[2], header[3], header[-1]
        request = self._request(mine)
        if self._framing.extended and header[4] != request.offset:
            raise PeerError("upstream", f"a reply about {header[4]} to a request at another offset")
        done = bool(flags & _DONE)
        if self._resumption is not None and (request.kind == _READ or self._has_refused(mine)):
            return self._whole_chunk(buffer, at, end, mine, request, self._resumption)
        if kind == _OFFSET_DATA:
            return self._data_chunk(buffer, at, end, mine, request, flags, length)
        after = at + size + length
        if (
            kind == Chunk.NONE
            and done
            and not length
            and request.plan is None
            and request.kind not in _HAS_CHUNKS
            and mine not in self._chunked
        ):  # success, as extended headers have it
            del self._in_flight.requests[mine]
            self._readdress(buffer, at, request, flags)
            return after
        reply = self._chunked_reply(mine, request)
        reply.check_length(kind, length)
        if after > end:
            self.wanted = after - at
            return at
        if self._resumption is not None and kind & CHUNK_ERROR_BIT:
            (error,) = U32.unpack_from(buffer, at + size)
            if self._refuses(mine, request, legal_error(error), last=done):
                self._cut(at, after)
                return after
        error = self._small_chunk(buffer, at + size, kind, reply, length, done=done)
        plan = request.plan
        if done:
            reply.finish()
            del self._in_flight.requests[mine], self._chunked[mine]
        if self._resumption is not None and kind in _STATUS:
            (context,) = U32.unpack_from(buffer, at + size)
            if self._resumption.has_told(mine, context, last=done):
                self._cut(at, after)
                if done:
                    self._pieces.append(self._replies.end(request))
                return after
        if plan is None:
            self._readdress(buffer, at, request, flags)
            return after
        if kind == Chunk.OFFSET_HOLE and not plan.holds:
            self._readdress(buffer, at, plan.request, 0)
        else:
            self._cut(at, after)
        if error:
            reply.error_chunk = reply.error_chunk or (error, _kept(buffer, at + size, kind, length))
        if done:
            self._plans.answered(plan, *(reply.error_chunk or ()))
        return after

    def _whole_chunk(
        self,
        buffer: bytearray,
        at: int,
        end: int,
        mine: int,
        request: Request,
        resumption: Resumption,
    ) -> int:
        """A chunk of a READ, or behind a refusal, where another upstream may be asked: nothing of
        a READ is told before all of it is."""
        header: tuple[int, ...] = self._framing.chunk.unpack_from(buffer, at)
        flags, kind, length = header[1], header[2], header[-1]
        done, begin = bool(flags & _DONE), at + self._framing.chunk.size
        after = begin + length
        if kind != _OFFSET_DATA:
            self._chunked_reply(mine, request).check_length(kind, length)
        elif request.kind != _READ or not U64.size < length <= U64.size + request.length:
            raise PeerError("upstream", f"a data chunk of {length} bytes")
        if after > end:
            self.wanted = after - at
            return at
        if self._has_refused(mine):
            resumption.follows_refusal(mine, last=done)
            self._cut(at, after)
            return after
        alone = done and request.plan is None and mine not in self._chunked
        if alone and kind == _OFFSET_DATA and length == U64.size + request.length:
            if U64.unpack_from(buffer, begin)[0] != request.offset:
                raise PeerError("upstream", "data that is not where it was asked for")
            self._readdress(buffer, at, request, flags)
            del self._in_flight.requests[mine]
            return after
        self._cut(at, after)
        reply = self._chunked_reply(mine, request)
        if kind == _OFFSET_DATA:
            (offset,) = U64.unpack_from(buffer, begin)
            reply.content(offset, length - U64.size)
            with memoryview(buffer) as view, view[begin + U64.size : after] as data:
                resumption.keep(mine, request, offset, data)
        else:
            if kind & CHUNK_ERROR_BIT:
                (error,) = U32.unpack_from(buffer, begin)
                if resumption.refuses(mine, request, legal_error(error), last=done):
                    return after
            error = self._small_chunk(buffer, begin, kind, reply, length, done=done)
            if error and reply.error_chunk is None:
                reply.error_chunk = (error, _kept(buffer, begin, kind, length))
        if done:
            reply.finish()
            del self._in_flight.requests[mine], self._chunked[mine]
            self._pieces += resumption.tell(mine, request, reply)
        return after

    def _chunked_reply(self, mine: int, request: Request) -> ChunkedReply:
        if (reply := self._chunked.get(mine)) is None:
            reply = self._chunked[mine] = ChunkedReply(
                request,
                self._rules.context_ids,
                base_ids=self._rules.base_ids,
                extended=self._framing.extended,
            )
        return reply

    def _readdress(self, buffer: bytearray, at: int, request: Request, flags: int) -> None:
        """Make a chunk's header one for the client, whose request it answers."""
        if flags & ~_DONE or not flags:  # only flags that were negotiated with the client
            U16.pack_into(buffer, at + FLAGS_AT, flags & _DONE)
        U64.pack_into(buffer, at + COOKIE_AT, request.cookie)
        if self._framing.extended:
            U64.pack_into(buffer, at + OFFSET_AT, request.offset)

    def _data_chunk(
        self,
        buffer: bytearray,
        at: int,
        end: int,
        mine: int,
        request: Request,
        flags: int,
        length: int,
    ) -> int:
        """NBD_REPLY_TYPE_OFFSET_DATA."""
        data_at = at + self._framing.chunk.size + U64.size
        if length <= U64.size:
            raise PeerError("upstream", f"a data chunk of {length} bytes")
        if end < data_at:
            return at
        (offset,) = U64.unpack_from(buffer, data_at - U64.size)
        count = length - U64.size
        done = bool(flags & _DONE)
        plan = request.plan
        if not (
            done
            and offset == request.offset
            and count == request.length
            and request.kind == _READ
            and mine not in self._chunked
        ):  # not the whole answer in one chunk
            reply = self._chunked_reply(mine, request)
            reply.content(offset, count)
            if done:
                reply.finish()
        if plan is not None:
            self._left, self._data_at = count, offset
            self._last_of = mine if done else 0
            if plan.holds:
                self._cut(at, data_at)
                return self._divert(buffer, data_at, end, request)
            self._readdress(buffer, at, plan.request, 0)
            self._can_fail = True
            return self._go_on(buffer, data_at, end)
        if done and count > end - data_at:
            # The rest may never come, so this is not the last chunk: "MUST NOT do so for a content
            # chunk if it would still be possible to detect an error".
            self._readdress(buffer, at, request, 0)
            self._last_of = mine
        else:
            self._readdress(buffer, at, request, flags)
            if done:
                del self._in_flight.requests[mine]
                self._chunked.pop(mine, None)
        return self._begin(buffer, data_at, end, count, can_fail=True)

    def _small_chunk(
        self, buffer: bytearray, at: int, kind: int, reply: ChunkedReply, length: int, *, done: bool
    ) -> int:
        """A chunk other than data; its payload is at `at`. Returns the error in it, or 0."""
        if kind == Chunk.NONE:
            if not done:
                raise PeerError("upstream", "NBD_REPLY_TYPE_NONE that is not the last chunk")
        elif kind == Chunk.OFFSET_HOLE:
            reply.content(*HOLE.unpack_from(buffer, at))
        elif kind in _STATUS:
            reply.status(buffer, at, length)
        else:
            error = reply.error(buffer, at, kind, length)
            if self._resumption is None:
                self._look_for_shutdown(error)
            return error
        return 0

    # -- data under way

    def _begin(self, buffer: bytearray, at: int, end: int, length: int, *, can_fail: bool) -> int:
        """Data for the client starts at `at`. Returns where it ends within this buffer."""
        if length > end - at:
            self._left = length - (end - at)
            self._can_fail = can_fail
            return end
        return at + length

    def _divert(self, buffer: bytearray, at: int, end: int, request: Request) -> int:
        """Data starts at `at` that is not for the client as it is."""
        if request.plan is not None and request.plan.holds:
            self._holding = request
        elif request.flags & _DF and end - at < request.length:
            # One chunk, whose end has not come yet: its data can go on as it is.
            header = self._replies.data(request, request.offset, request.length, done=False)
            self._pieces.append(header)
            self._can_fail = True
        else:
            self._converting = request
        return self._go_on(buffer, at, end)

    def _go_on(self, buffer: bytearray, at: int, end: int) -> int:
        """Deal with data that has come. Returns where it ends in this buffer."""
        count = min(self._left, end - at)
        if self._converting is not None:
            count = self._convert(buffer, at, count, self._converting)
        elif self._holding is not None:
            assert self._holding.plan is not None
            with memoryview(buffer) as view, view[at : at + count] as data:
                self._holding.plan.hold(self._data_at, data)
            self._start = at + count
        self._data_at += count
        self._left -= count
        at += count
        if not self._left:
            self._converting, self._holding, converted = None, None, self._converting
            self._end_data(at, told=converted is not None)
        return at

    def _convert(self, buffer: bytearray, at: int, count: int, request: Request) -> int:
        """Put data into chunks. Returns how much of it: whole blocks, until the last."""
        if count < self._left:
            count = whole_blocks(self._data_at, count)
        behind = at + count
        found = runs(buffer, at, behind, self._data_at)
        if request.flags & _DF and len(found) > 1:
            found = [Run(at, behind, False)]
        may_end = request.plan is None and count == self._left
        for start, stop, zeroes in found:
            done = may_end and stop == behind
            offset, length = self._data_at + start - at, stop - start
            header = self._replies.hole if zeroes else self._replies.data
            self._cut(start, start)
            self._pieces.append(header(request, offset, length, done=done))
            if zeroes:
                self._start = stop
        return count

    def _end_data(self, at: int, *, told: bool) -> None:
        """All data of one reply or chunk is through. `told`: its end was in the last chunk."""
        mine, self._last_of = self._last_of, 0
        if not mine:
            return
        request = self._in_flight.requests.pop(mine)
        reply = self._chunked.pop(mine, None)
        if request.plan is not None:
            failed = reply.error_chunk if reply is not None else None
            self._plans.answered(request.plan, *(failed or ()))
        elif not told:
            self._cut(at, at)
            self._pieces.append(self._replies.success(request))

    # -- the end of the upstream

    def _has_refused(self, mine: int) -> bool:
        return self._resumption is not None and mine in self._resumption.refused

    def _refuses(self, mine: int, request: Request, error: int, *, last: bool) -> bool:
        """Whether this error is not for the client, because another upstream will be asked."""
        if self._resumption is None:
            self._look_for_shutdown(error)
            return False
        return self._resumption.refuses(mine, request, error, last=last)

    def resume(self) -> None:
        """Forget what an upstream was in the middle of. See `Resumption.resume`."""
        assert self._resumption is not None
        assert not self._left, "only whole data is passed on"
        self.wanted = 0
        chunked, self._chunked = self._chunked, {}
        self._resumption.resume(chunked)

    def _look_for_shutdown(self, error: int) -> None:
        """ "If the client receives an NBD_ESHUTDOWN error it MUST initiate a soft disconnect." """
        if error == Error.ESHUTDOWN:
            self.upstream_ends = True
            self._rules.refuse_all()
            self._plans.fail_unfinished()

    def lose_upstream(self, unanswered: list[Request]) -> Iterator[bytes | memoryview] | None:
        """What the client is to be told, with an error for each request; None if it cannot be."""
        if self.mid_reply and not self._can_fail:
            return None
        padding = self._left if self.mid_reply else 0  # "it MUST use padding bytes"
        self._left = self._last_of = 0
        self._converting = self._holding = None
        self._chunked.clear()
        return self._last_words(padding, unanswered)

    def _last_words(self, padding: int, unanswered: list[Request]) -> Iterator[bytes | memoryview]:
        while padding:
            zeroes = ZEROES[:padding]
            padding -= len(zeroes)
            yield zeroes
        for request in unanswered:
            yield self._replies.error(request, Error.ESHUTDOWN)


def _kept(buffer: bytearray, at: int, kind: int, length: int) -> ErrorChunk:
    return ErrorChunk(kind, bytes(buffer[at : at + length]))
