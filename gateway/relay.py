"""The data plane: two pumps over two channels, one session's transmission phase.

A pump waits without a buffer, borrows one when bytes have come, moves as many as there are, lets
`Transmission` walk them, and sends the result in one go. Knows no flags, certificates or options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from gateway.errors import ChannelClosed, PeerError, SessionEnd
from gateway.nbd.transmission import Piece, Transmission
from gateway.transport import RECORD, Channel

BUFFER_SIZE: Final = 256 << 10  # bytes; more brought nothing, less costs system calls in bulk
_KEPT_BUFFERS: Final = 16  # idle buffers kept for the next borrower, in all
_SMALL: Final = 64  # leftovers up to here are copied out, so that their buffer can go back

DISC_TIMEOUT_S: Final = 30.0  # how long requests may stay unanswered after the client's DISC
LOST_TIMEOUT_S: Final = 30.0  # how long a client may stay once its upstream is gone
FINISH_TIMEOUT_S: Final = 5.0  # for what the upstream still sends to a client that is gone
LAST_WORD_TIMEOUT_S: Final = 1.0  # for NBD_CMD_DISC to the upstream

_free_buffers: list[bytearray] = []


def _borrow(size: int) -> bytearray:
    if size <= BUFFER_SIZE:
        return _free_buffers.pop() if _free_buffers else bytearray(BUFFER_SIZE)
    return bytearray(size)


def _give_back(buffer: bytearray) -> None:
    if len(buffer) == BUFFER_SIZE and len(_free_buffers) < _KEPT_BUFFERS:
        _free_buffers.append(buffer)


class _Stream:
    """What one pump has read and not yet done with: at most one unfinished message.

    Holds a borrowed buffer only while `held` bytes are in it; a few leftover bytes are kept apart.
    """

    def __init__(self, channel: Channel, first: bytes = b"") -> None:
        self.channel = channel
        self.buffer = bytearray()
        self.held = 0
        self._small = first

    def read(self, *, at_least: int = 0, probe: bool) -> int:
        """Read what has arrived behind what is held. Returns how many bytes came."""
        if not self.buffer:
            self.load(at_least)
        elif len(self.buffer) < at_least:
            larger = _borrow(at_least)
            larger[: self.held] = memoryview(self.buffer)[: self.held]
            _give_back(self.buffer)
            self.buffer = larger
        with memoryview(self.buffer) as view:
            count = self.channel.fill(view[self.held :], probe=probe)
        self.held += count
        return count

    def load(self, at_least: int = 0) -> None:
        """Have a buffer, with what is held in it."""
        if not self.buffer:
            self.buffer = _borrow(at_least)
            self.held = len(self._small)
            self.buffer[: self.held] = self._small
            self._small = b""

    @property
    def has_leftovers(self) -> bool:
        return bool(self._small or self.held)

    @property
    def full(self) -> bool:
        return self.held == len(self.buffer)

    def done_with(self, count: int) -> None:
        """Drop the first `count` bytes, and the buffer if what is left is next to nothing."""
        left = self.held - count
        if left > _SMALL and not count:
            return
        if left <= _SMALL:
            self._small = bytes(self.buffer[count : self.held])
            self.give_back()
        else:
            self.buffer[:left] = self.buffer[count : self.held]
            self.held = left

    def give_back(self) -> None:
        if self.buffer:
            _give_back(self.buffer)
        self.buffer, self.held = bytearray(), 0


class Relay:
    """One session's transmission phase. `run` it once; neither channel is closed by it."""

    def __init__(self, client: Channel, upstream: Channel, transmission: Transmission) -> None:
        self._client = client
        self._upstream = upstream
        self._transmission = transmission
        # Each is held from the start of a message to its end:
        self._client_writer = trio.Lock()
        self._upstream_writer = trio.Lock()
        self._follow_ups = trio.Event()
        self._room = trio.Event()  # the upstream has answered something
        self._nursery: trio.Nursery | None = None
        self._sends_follow_ups = False
        self._upstream_gone = trio.Event()
        self._upstream_clean = True  # at a message boundary, as far as the upstream has seen
        self._scope = trio.CancelScope()
        self._end = SessionEnd.SHUTDOWN
        self.detail = ""
        self._shutting_down = False
        self._left = False
        self._replies = _Stream(upstream)

    async def run(self, first: bytes = b"") -> SessionEnd:
        """Serve until the client disconnects, a side fails, or `shutdown` has done its work.

        `first` are bytes of the client that came behind its last option. The upstream is sent
        NBD_CMD_DISC if it is at a message boundary; then close the client, and then this with
        `aclose`. Why a side failed is in `detail`.
        proto.md, "Terminating the transmission phase".
        """
        requests = _Stream(self._client, first)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._until_it_ends, self._pump_replies, self._replies)
                    await self._until_it_ends(self._pump_requests, requests)
                    nursery.cancel_scope.cancel()
        finally:
            requests.give_back()
            await self._take_leave()
        return self._end

    async def aclose(self) -> None:
        """After `run` and after the client was closed: take what the upstream still answers.

        Some servers do not survive a connection that is closed under their replies: nbdkit 1.32
        aborts, and all its clients with it. Ends with the last reply, or after FINISH_TIMEOUT_S;
        cancelled, after LAST_WORD_TIMEOUT_S.
        """
        try:
            with trio.move_on_after(FINISH_TIMEOUT_S):
                await self._discard_replies()
        except trio.Cancelled:
            deadline = trio.current_time() + LAST_WORD_TIMEOUT_S
            with trio.CancelScope(shield=True, deadline=deadline):
                await self._discard_replies()
            raise
        finally:
            self._replies.give_back()

    async def _until_it_ends(
        self, pump: Callable[[_Stream], Awaitable[None]], stream: _Stream
    ) -> None:
        """Run a pump. What is to be expected of a client is no exception further out."""
        try:
            await pump(stream)
        except PeerError as fault:
            self._end, self.detail = SessionEnd.CLIENT_BROKE_PROTOCOL, fault.what
            self._scope.cancel()
        except ChannelClosed as closed:
            if not self._upstream_gone.is_set():  # else it leaves because it was told so
                self._end, self.detail = SessionEnd.CLIENT_LEFT, str(closed)
            self._scope.cancel()

    def shutdown(self) -> None:
        """Answer NBD_ESHUTDOWN from now on; end once nothing is in flight any more."""
        self._transmission.shutdown()
        self._shutting_down = True
        self._end_if_idle()

    # -- client to upstream

    async def _pump_requests(self, stream: _Stream) -> None:
        transmission, client = self._transmission, stream.channel
        look_first = stream.has_leftovers
        while True:
            if not look_first:
                await client.readable()
            if stream.read(probe=transmission.in_flight > 1) or look_first:
                look_first = False
                await self._forward(stream)
                while transmission.crowded:
                    if transmission.full:
                        self._room = trio.Event()
                        await self._room.wait()
                    stream.load()
                    await self._forward(stream)
                if transmission.upstream_ends and transmission.idle:
                    await self._take_leave()
                    self._upstream.shutdown()  # the other pump ends the session
                if transmission.client_fault:
                    raise transmission.client_fault
                if transmission.client_done:
                    return await self._client_done(SessionEnd.DISCONNECTED)
                self._end_if_idle()
            else:
                stream.done_with(0)  # nothing but half a record: no reason to hold a buffer
            if client.eof:
                return await self._client_done(SessionEnd.CLIENT_LEFT)

    async def _forward(self, stream: _Stream) -> None:
        """Walk what is held, send it upstream, and answer what is answered here."""
        transmission = self._transmission
        was_open = transmission.mid_request
        consumed, pieces = transmission.requests(stream.buffer, 0, stream.held)
        if transmission.mid_payload and not stream.full:
            # A header without its payload: it is worth a system call to send both in one go.
            # If the client is gone, what is walked goes on, and the next read meets the error.
            with contextlib.suppress(ChannelClosed):
                stream.read(probe=True)
            consumed, more = transmission.requests(stream.buffer, consumed, stream.held)
            pieces += more
        if pieces and not self._upstream_gone.is_set():
            if not was_open:
                await _begin(self._upstream_writer)
            try:
                await self._send_upstream(stream.buffer, pieces)
            finally:
                if not transmission.mid_request:
                    self._upstream_writer.release()
        stream.done_with(consumed)
        if transmission.follow_ups_due:
            self._wake_follow_ups()
        if replies := transmission.take_local_replies():
            async with self._client_writer:
                await self._client.send_all(replies)

    async def _send_upstream(self, buffer: bytearray, pieces: Sequence[Piece]) -> None:
        """Whole messages, or up to where the payload of the last is still to come."""
        self._upstream_clean = False
        try:
            await send_pieces(self._upstream, buffer, pieces)
        except ChannelClosed:
            # It may have left answers behind: the other pump reads them, up to its EOF.
            self._upstream.shutdown()
            await self._upstream_gone.wait()
        else:
            self._upstream_clean = not self._transmission.mid_request

    def _wake_follow_ups(self) -> None:
        """Either pump may have made requests of our own; a task of its own sends them, for a pump
        that waits for the upstream to take bytes would not take the upstream's."""
        self._follow_ups.set()
        if not self._sends_follow_ups:
            assert self._nursery is not None
            self._sends_follow_ups = True
            self._nursery.start_soon(self._send_follow_ups)

    async def _send_follow_ups(self) -> None:
        transmission, nothing = self._transmission, bytearray()
        while not self._upstream_gone.is_set():
            await self._follow_ups.wait()
            self._follow_ups = trio.Event()
            while transmission.follow_ups_due and not self._upstream_gone.is_set():
                async with self._upstream_writer:
                    await self._send_upstream(nothing, transmission.take_follow_ups())

    async def _client_done(self, end: SessionEnd) -> None:
        """The client will send no more. Let what is in flight be answered, for a while."""
        self._end = SessionEnd.UPSTREAM_LOST if self._upstream_gone.is_set() else end
        if self._end is SessionEnd.CLIENT_LEFT and self._client.truncated:
            self.detail = "connection cut without an end of TLS"
        if self._idle or self._transmission.mid_payload:
            return
        self._shutting_down = True
        with trio.move_on_after(DISC_TIMEOUT_S):
            await trio.sleep_forever()  # ended by _end_if_idle

    @property
    def _idle(self) -> bool:
        """Whether every request is answered, and the answers are out of our hands."""
        return self._transmission.idle and not self._client_writer.locked()

    def _end_if_idle(self) -> None:
        if self._shutting_down and self._idle and not self._transmission.mid_payload:
            self._scope.cancel()

    # -- upstream to client

    async def _pump_replies(self, stream: _Stream) -> None:
        transmission = self._transmission
        while True:
            await stream.channel.readable()
            try:
                count = stream.read(at_least=transmission.wanted, probe=False)
            except ChannelClosed as closed:
                self.detail = str(closed)
                break
            if count:
                await self._return(stream)
                if transmission.upstream_fault:
                    self.detail = transmission.upstream_fault.what
                    break
                if transmission.upstream_ends and transmission.idle:
                    self.detail = "it is shutting down"
                    await self._take_leave()
                    break
            else:
                stream.done_with(0)
            self._end_if_idle()
            if stream.channel.eof:
                break
        await self._lose_upstream()

    async def _return(self, stream: _Stream) -> None:
        """Walk what is held and send it to the client, whole messages or held open."""
        transmission = self._transmission
        was_open = transmission.mid_reply
        consumed, pieces = transmission.replies(stream.buffer, 0, stream.held)
        if transmission.follow_ups_due:
            self._wake_follow_ups()
        self._room.set()
        try:
            if pieces:
                if not was_open:
                    await _begin(self._client_writer)
                await send_pieces(self._client, stream.buffer, pieces)
                if not transmission.mid_reply:
                    self._client_writer.release()
        finally:  # what is walked is never walked again, also if the client did not get it
            stream.done_with(consumed)

    async def _lose_upstream(self) -> None:
        """Tell the client that there is no upstream any more, and let it go in peace."""
        self._end = SessionEnd.UPSTREAM_LOST
        self._upstream_clean = False
        self._upstream.shutdown()  # wakes the other pump if it is sending
        was_open = self._transmission.mid_reply
        last_words = self._transmission.lose_upstream()
        self._upstream_gone.set()
        self._room.set()
        if last_words is None:
            self._scope.cancel()  # a promised payload will not come: only hanging up is left
            return
        with trio.move_on_after(LOST_TIMEOUT_S):
            if not was_open:
                await _begin(self._client_writer)
            for words in last_words:
                await self._client.send_all(words)
            self._client_writer.release()
            self._end_if_idle()
            await trio.sleep_forever()  # ended by the other pump
        self._scope.cancel()

    # -- the end

    async def _take_leave(self) -> None:
        """NBD_CMD_DISC for the upstream, unless it would take that for data."""
        if self._left or not self._upstream_clean or self._transmission.mid_request:
            return
        self._left = True
        with trio.CancelScope(deadline=trio.current_time() + LAST_WORD_TIMEOUT_S, shield=True):
            try:
                await self._upstream.send_all(self._transmission.disconnect_request())
            except ChannelClosed:
                pass  # it went first

    async def _discard_replies(self) -> None:
        """Read and check replies as before, for a client that is gone, until none is due."""
        transmission, stream = self._transmission, self._replies
        while not (self._upstream_gone.is_set() or transmission.upstream_fault):
            due = transmission.in_flight - transmission.mid_request  # that one is never answered
            if not due and not transmission.mid_reply:
                break
            await stream.channel.readable()
            try:
                stream.read(at_least=transmission.wanted, probe=False)
            except ChannelClosed:
                break
            consumed, _ = transmission.replies(stream.buffer, 0, stream.held)
            stream.done_with(consumed)
            if stream.channel.eof:
                break


async def _begin(writer: trio.Lock) -> None:
    try:
        writer.acquire_nowait()  # no turn of the loop when nobody else writes
    except trio.WouldBlock:
        await writer.acquire()


async def send_pieces(channel: Channel, buffer: bytearray, pieces: Sequence[Piece]) -> None:
    """Send pieces of a buffer and others in as few calls as it takes. Raises ChannelClosed.

    Small pieces are put together; what is large is sent from where it is, but for up to a TLS
    record at its ends.
    """
    small: list[memoryview] = []
    count = 0
    with memoryview(buffer) as view:
        for piece in pieces:
            data = view[piece[0] : piece[1]] if isinstance(piece, tuple) else memoryview(piece)
            if len(pieces) == 1:
                await channel.send_all(data)
            elif len(data) <= 2 * RECORD:
                small.append(data)
                count += len(data)
            else:
                head = -count % RECORD if count else 0
                tail = (len(data) - head) % RECORD
                if count:
                    await channel.send_all(b"".join([*small, data[:head]]))
                await channel.send_all(data[head : len(data) - tail])
                small, count = [data[len(data) - tail :]], tail
            if count >= BUFFER_SIZE:
                await channel.send_all(b"".join(small))
                small, count = [], 0
        if count:
            await channel.send_all(b"".join(small))
        small.clear()
