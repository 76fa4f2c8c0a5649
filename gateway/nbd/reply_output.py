"""What the client gets of what the upstream has sent.

Most of it goes on as it is, in the caller's buffer, with words of our own in between. The data of a
READ may run past that buffer: the rest is passed by count, in later walks. Where an upgrade is in
play, data is put into chunks, or kept in its plan until the reply is whole.
"""

from __future__ import annotations

from typing import Final

from gateway.nbd.constants import CmdFlag
from gateway.nbd.in_flight import Plan, Request
from gateway.nbd.replies import Replies
from gateway.nbd.request_walk import Piece
from gateway.nbd.sparse import Run, runs, whole_blocks

_DF: Final = int(CmdFlag.DF)


class ReplyOutput:
    """One session's. `start` it for each buffer; then `pieces` is what to send, up to the last
    `cut`.

    For data say once what is to become of it, with `begin`, `expect` or `divert`. While some of it
    is `left`, whatever comes from the upstream is data, and is for `go_on`.
    """

    def __init__(self, replies: Replies) -> None:
        self.pieces: list[Piece] = []
        self.left = 0  # bytes of data that are still to come
        self.can_fail = False  # they are in a chunk, and an error chunk may follow
        self._replies = replies
        self._start = 0  # of what is not in `pieces` yet
        # The data on its way goes to the client as it is, unless:
        self._converting: Request | None = None  # it has to be put into chunks
        self._holding: Plan | None = None  # it is kept until the reply is whole
        self._data_at = 0  # the offset in the export, for these two

    @property
    def mid_reply(self) -> bool:
        """Whether the client is in the middle of data."""
        return bool(self.left and self._converting is None and self._holding is None)

    @property
    def converts(self) -> bool:
        """Whether the data that is left is put into chunks, of which the last may end the reply."""
        return self._converting is not None

    def start(self, at: int) -> list[Piece]:
        """Of another buffer, from `at`. Returns its `pieces`, which there are none of yet."""
        self.pieces, self._start = [], at
        return self.pieces

    def cut(self, at: int, resume: int) -> None:
        """Up to `at` all may go on; what is between there and `resume` may not."""
        if self._start < at:
            self.pieces.append((self._start, at))
        self._start = resume

    # -- data

    def begin(self, at: int, end: int, length: int, *, can_fail: bool) -> int:
        """Data for the client starts at `at`. Returns where it ends within this buffer."""
        if length > end - at:
            self.left = length - (end - at)
            self.can_fail = can_fail
            return end
        return at + length

    def expect(self, length: int) -> None:
        """Data for the client, in a chunk; all of it is for `go_on`."""
        self.left = length
        self.can_fail = True

    def divert(self, request: Request, offset: int, length: int, *, at_hand: int) -> None:
        """Data that is not for the client as it is; `at_hand` of it has come. All for `go_on`."""
        self.left, self._data_at = length, offset
        self.can_fail = False
        if request.plan is not None and request.plan.holds:
            self._holding = request.plan
        elif request.flags & _DF and at_hand < length:
            # One chunk, whose end has not come yet: its data can go on as it is.
            self.pieces.append(self._replies.data(request, offset, length, done=False))
            self.can_fail = True
        else:
            self._converting = request

    def go_on(self, buffer: bytearray, at: int, end: int) -> int:
        """Deal with data that has come. Returns where it ends in this buffer."""
        count = min(self.left, end - at)
        if self._converting is not None:
            count = self._convert(buffer, at, count, self._converting)
        elif self._holding is not None:
            with memoryview(buffer) as view, view[at : at + count] as data:
                self._holding.hold(self._data_at, data)
            self._start = at + count
        self._data_at += count
        self.left -= count
        if not self.left:
            self._converting = self._holding = None
        return at + count

    def _convert(self, buffer: bytearray, at: int, count: int, request: Request) -> int:
        """Put data into chunks. Returns how much of it: whole blocks, until the last."""
        if count < self.left:
            count = whole_blocks(self._data_at, count)
        behind = at + count
        found = runs(buffer, at, behind, self._data_at)
        if request.flags & _DF and len(found) > 1:
            found = [Run(at, behind, False)]
        may_end = request.plan is None and count == self.left
        for start, stop, zeroes in found:
            done = may_end and stop == behind
            offset, length = self._data_at + start - at, stop - start
            header = self._replies.hole if zeroes else self._replies.data
            self.cut(start, start)
            self.pieces.append(header(request, offset, length, done=done))
            if zeroes:
                self._start = stop
        return count

    def abandon(self) -> int:
        """The rest of the data will not come. Returns how much of it the client was promised."""
        promised = self.left if self.mid_reply else 0
        self.left = 0
        self._converting = self._holding = None
        return promised
