"""From the upstream to the client: every reply's header checked, and what it means for its request.

The walk reads whole headers and writes the client's cookie back in place; what goes on from there
is up to `reply_output`. Only where an upgrade is in play the reply is another than the upstream's:
its simple replies become chunks, the answers to the parts of a plan become one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gateway.errors import PeerError
from gateway.nbd.constants import CHUNK_ERROR_BIT, SIMPLE_REPLY_MAGIC, Chunk, Cmd, Error, ReplyFlag
from gateway.nbd.framing import COOKIE_AT, FLAGS_AT, Framing
from gateway.nbd.in_flight import InFlight, Request
from gateway.nbd.plans import ZEROES, Plans
from gateway.nbd.replies import ChunkedReply, Replies, legal_error
from gateway.nbd.reply_output import ReplyOutput
from gateway.nbd.request_walk import Piece
from gateway.nbd.requests import RequestRules
from gateway.nbd.resumption import Resumption
from gateway.nbd.wire import SIMPLE_REPLY, U32, U64

_SIMPLE_SIZE: Final = SIMPLE_REPLY.size
_READ, _BLOCK_STATUS = int(Cmd.READ), int(Cmd.BLOCK_STATUS)
_DONE = int(ReplyFlag.DONE)
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
        self._out = ReplyOutput(replies)
        self._last_of = 0  # our cookie, if the reply is over with the data that is on its way

    @property
    def mid_reply(self) -> bool:
        return self._out.mid_reply

    def walk(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Piece]]:
        """See `Transmission.replies`."""
        framing, out, plans = self._framing, self._out, self._plans
        pieces = out.start(at)
        self.wanted = 0
        try:
            if out.left:
                at = self._go_on(buffer, at, end)
            extended = framing.extended
            smallest = framing.chunk.size if extended else _SIMPLE_SIZE
            while True:
                if plans.said and not out.mid_reply:
                    out.cut(at, at)
                    pieces += plans.take_replies()
                if out.left or end - at < smallest:
                    break
                (magic,) = U32.unpack_from(buffer, at)
                if magic == framing.chunk_magic and self._chunks_below:
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
        out.cut(at, at)
        out.pieces = []  # an idle session must not own what it has sent
        return at, pieces

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
                self._out.cut(at, after)
                return after
        if data_follows and self._resumption is not None and end - after < request.length:
            self.wanted = after + request.length - at
            return at
        if data_follows and (self._converts or request.plan is not None):
            self._out.cut(at, after)
            self._out.divert(request, request.offset, request.length, at_hand=end - after)
            self._last_of = mine
            return self._go_on(buffer, after, end)
        del self._in_flight.requests[mine]
        if request.plan is not None:
            self._out.cut(at, after)
            self._plans.answered(request.plan, error)
        elif error and self._converts:
            self._out.cut(at, after)
            self._out.pieces.append(self._replies.error(request, error))
        else:
            if error:
                U32.pack_into(buffer, at + FLAGS_AT, error)
            U64.pack_into(buffer, at + COOKIE_AT, request.cookie)
            if data_follows:
                return self._out.begin(after, end, request.length, can_fail=False)
        return after

    # -- chunks

    def _chunk(self, buffer: bytearray, at: int, end: int) -> int:
        """proto.md, "Structured reply chunk message". Returns `at` while it is not whole."""
        framing = self._framing
        size = framing.chunk.size
        if end - at < size:
            return at
        header: tuple[int, ...] = framing.chunk.unpack_from(buffer, at)
        flags, kind, mine, length = header[1], header[2], header[3], header[-1]
        request = self._request(mine)
        if framing.extended and header[4] != request.offset:
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
            framing.readdress(buffer, at, flags, request.cookie, request.offset)
            return after
        reply = self._chunked_reply(mine, request)
        reply.check_length(kind, length)
        if after > end:
            self.wanted = after - at
            return at
        if self._resumption is not None and kind & CHUNK_ERROR_BIT:
            (error,) = U32.unpack_from(buffer, at + size)
            if self._refuses(mine, request, legal_error(error), last=done):
                self._out.cut(at, after)
                return after
        error = reply.take(buffer, at + size, kind, length, done=done)
        if error and self._resumption is None:
            self._look_for_shutdown(error)
        plan = request.plan
        if done:
            reply.finish()
            del self._in_flight.requests[mine], self._chunked[mine]
        if self._resumption is not None and kind in _STATUS:
            (context,) = U32.unpack_from(buffer, at + size)
            if self._resumption.has_told(mine, context, last=done):
                self._out.cut(at, after)
                if done:
                    self._out.pieces.append(self._replies.end(request))
                return after
        if plan is None:
            framing.readdress(buffer, at, flags, request.cookie, request.offset)
            return after
        if kind == Chunk.OFFSET_HOLE and not plan.holds:
            framing.readdress(buffer, at, 0, plan.request.cookie, plan.request.offset)
        else:
            self._out.cut(at, after)
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
            self._out.cut(at, after)
            return after
        alone = done and request.plan is None and mine not in self._chunked
        if alone and kind == _OFFSET_DATA and length == U64.size + request.length:
            if U64.unpack_from(buffer, begin)[0] != request.offset:
                raise PeerError("upstream", "data that is not where it was asked for")
            self._framing.readdress(buffer, at, flags, request.cookie, request.offset)
            del self._in_flight.requests[mine]
            return after
        self._out.cut(at, after)
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
            reply.take(buffer, begin, kind, length, done=done)
        if done:
            reply.finish()
            del self._in_flight.requests[mine], self._chunked[mine]
            self._out.pieces += resumption.tell(mine, request, reply)
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
        framing = self._framing
        data_at = at + framing.chunk.size + U64.size
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
            self._last_of = mine if done else 0
            if plan.holds:
                self._out.cut(at, data_at)
                self._out.divert(request, offset, count, at_hand=end - data_at)
            else:
                framing.readdress(buffer, at, 0, plan.request.cookie, plan.request.offset)
                self._out.expect(count)
            return self._go_on(buffer, data_at, end)
        if done and count > end - data_at:
            # The rest may never come, so this is not the last chunk: "MUST NOT do so for a content
            # chunk if it would still be possible to detect an error".
            framing.readdress(buffer, at, 0, request.cookie, request.offset)
            self._last_of = mine
        else:
            framing.readdress(buffer, at, flags, request.cookie, request.offset)
            if done:
                del self._in_flight.requests[mine]
                self._chunked.pop(mine, None)
        return self._out.begin(data_at, end, count, can_fail=True)

    # -- data under way

    def _go_on(self, buffer: bytearray, at: int, end: int) -> int:
        """Deal with data that has come. Returns where it ends in this buffer."""
        converts = self._out.converts
        at = self._out.go_on(buffer, at, end)
        if self._last_of and not self._out.left:
            self._end_reply(at, told=converts)
        return at

    def _end_reply(self, at: int, *, told: bool) -> None:
        """The data of one is through, and it has no more. `told`: its end was in the last chunk."""
        mine, self._last_of = self._last_of, 0
        request = self._in_flight.requests.pop(mine)
        reply = self._chunked.pop(mine, None)
        if request.plan is not None:
            failed = reply.error_chunk if reply is not None else None
            self._plans.answered(request.plan, *(failed or ()))
        elif not told:
            self._out.cut(at, at)
            self._out.pieces.append(self._replies.success(request))

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
        assert not self._out.left, "only whole data is passed on"
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
        if self._out.mid_reply and not self._out.can_fail:
            return None
        padding = self._out.abandon()  # "it MUST use padding bytes"
        self._last_of = 0
        self._chunked.clear()
        return self._last_words(padding, unanswered)

    def _last_words(self, padding: int, unanswered: list[Request]) -> Iterator[bytes | memoryview]:
        while padding:
            zeroes = ZEROES[:padding]
            padding -= len(zeroes)
            yield zeroes
        for request in unanswered:
            yield self._replies.error(request, Error.ESHUTDOWN)
