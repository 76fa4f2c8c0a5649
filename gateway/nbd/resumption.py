"""What of the upstream's replies is not for the client yet, because another upstream may be asked.

Used with `--reconnect` only, by `reply_walk`. A READ that is answered in several chunks is told
when its last chunk has come: data before an error may be padding (proto.md, "Structured reply
types", NBD_REPLY_TYPE_OFFSET_DATA), so what came before an upstream was lost is worth nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.errors import PeerError
from gateway.nbd.constants import Cmd, CmdFlag, Error
from gateway.nbd.in_flight import InFlight, Request
from gateway.nbd.plans import Plans
from gateway.nbd.replies import ChunkedReply, Replies
from gateway.nbd.request_walk import Piece
from gateway.nbd.sparse import Run, runs


class Resumption:
    """Replies across several upstreams."""

    def __init__(
        self, in_flight: InFlight, plans: Plans, replies: Replies, *, maximum: int
    ) -> None:
        """`maximum`: the payload, in bytes, that the client was told of."""
        # What the last upstream has refused, by our cookie, and whether nothing of it is to follow.
        self.refused: dict[int, bool] = {}
        self._maximum = maximum
        self._in_flight = in_flight
        self._plans = plans
        self._replies = replies
        self._data: dict[int, bytearray] = {}  # of READs under way; zeroes where nothing has come
        # Meta contexts whose status the client has, of replies that have to be asked for again.
        self._told: dict[int, frozenset[int]] = {}

    def refuses(self, mine: int, request: Request, error: int, *, last: bool) -> bool:
        """Whether this error is not for the client: "shutting down", and another will be asked."""
        if error == Error.ESHUTDOWN:
            self.refused[mine] = last
            self._data.pop(mine, None)
            return True
        if request.kind == Cmd.FLUSH:
            self._in_flight.failed.add(mine)
        return False

    def follows_refusal(self, mine: int, *, last: bool) -> None:
        """A chunk behind a refusal, to be dropped. Raises PeerError if none could follow."""
        if self.refused[mine]:
            raise PeerError("upstream", "a second reply to what it has refused")
        self.refused[mine] = last

    # -- reads

    def keep(self, mine: int, request: Request, offset: int, data: memoryview) -> None:
        """Data of a READ, within its bounds."""
        at = offset - request.offset
        self._data_of(mine, request)[at : at + len(data)] = data

    def _data_of(self, mine: int, request: Request) -> bytearray:
        if (data := self._data.get(mine)) is None:
            data = self._data[mine] = bytearray(request.length)
        return data

    def tell(self, mine: int, request: Request, reply: ChunkedReply) -> list[Piece]:
        """The READ's reply is whole, and out of flight: what the client gets."""
        plan, failed = request.plan, reply.error_chunk
        data = self._data_of(mine, request)
        del self._data[mine]
        if plan is not None:
            told: list[Piece] = []
            if failed is None and plan.holds:
                with memoryview(data) as view:
                    plan.hold(request.offset, view)
            elif failed is None:
                told = self._chunks(plan.request, request, data)
            self._plans.answered(plan, *(failed or ()))
            return told
        if failed is not None:
            return [self._replies.error(request, *failed)]
        return self._chunks(request, request, data)

    def _chunks(self, asked: Request, request: Request, data: bytearray) -> list[Piece]:
        """The data of `request` for what the client has `asked`, which it may be a part of."""
        pieces: list[Piece] = []
        end = len(data)
        if asked.flags & CmdFlag.DF:
            found = [Run(0, end, False)]
        else:
            found = [
                Run(at, min(at + self._maximum, stop), zeroes)
                for start, stop, zeroes in runs(data, 0, end, request.offset)
                for at in range(start, stop, self._maximum)
            ]
        for start, stop, zeroes in found:
            done = asked is request and stop == end
            offset, length = request.offset + start, stop - start
            header = self._replies.hole if zeroes else self._replies.data
            pieces.append(header(asked, offset, length, done=done))
            if not zeroes:
                pieces.append(memoryview(data)[start:stop])
        return pieces

    # -- block status

    def has_told(self, mine: int, context: int, *, last: bool) -> bool:
        """Whether the client has this status from an upstream before. `last`: nothing follows."""
        told = self._told.get(mine, frozenset())
        if last:
            self._told.pop(mine, None)
        return context in told

    # -- another upstream

    def resume(self, chunked: Mapping[int, ChunkedReply]) -> None:
        """The upstream is another one; these replies were under way from the last."""
        self.refused.clear()
        self._data.clear()
        for mine, reply in chunked.items():
            request = self._in_flight.requests[mine]
            if request.kind == Cmd.READ:
                continue
            if reply.failed:  # the client knows, and only the end is missing
                del self._in_flight.requests[mine]
                self._told.pop(mine, None)
                if request.plan is not None:
                    self._plans.answered(request.plan, *(reply.error_chunk or ()))
                else:
                    self._plans.said.append(self._replies.end(request))
            elif reply.contexts_told:
                self._told[mine] = reply.contexts_told | self._told.get(mine, frozenset())
