"""The data plane: two pumps over two channels, one session's transmission phase.

A pump waits without a buffer, borrows one when bytes have come, moves as many as there are, lets
`Transmission` walk them, and sends the result in one go, by an `Outlet` or a `ReplyPath`. When to
move what, and when it is over, is decided here. Knows no flags, certificates or options.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVarTuple

import trio

from gateway.buffers import Stream
from gateway.errors import ChannelClosed, PeerError, SessionEnd
from gateway.lifeline import Redial
from gateway.nbd.transmission import Transmission
from gateway.outlet import LAST_WORD_TIMEOUT_S, Outlet
from gateway.reply_path import ReplyPath
from gateway.transport import Channel, look
from gateway.turns import LOOK_S, MANY, OTHERS, TURN_S, Luck, attention

Args = TypeVarTuple("Args")

DISC_TIMEOUT_S: Final = 30.0  # how long requests may stay unanswered after the client's DISC
GONE_S: Final = 1.0  # how often to look, where nobody reads the client, whether it is there
LOST_TIMEOUT_S: Final = 30.0  # how long a client may stay once its upstream is gone
FINISH_TIMEOUT_S: Final = 5.0  # for what the upstream still sends to a client that is gone


class Relay:
    """One session's transmission phase. `run` it once; neither channel is closed by it."""

    def __init__(
        self,
        client: Channel,
        upstream: Channel,
        transmission: Transmission,
        *,
        redial: Redial | None = None,
        idle_s: float = math.inf,
    ) -> None:
        """With `redial` the upstream may be replaced, and the transmission has to be resumable.

        `idle_s`: how long a client may ask for nothing.
        """
        self._client = client
        upstream.while_stuck = self._leave_if_client_is_gone
        self._transmission = transmission
        self._outlet = Outlet(upstream, transmission, redial)
        self._idle_s = idle_s
        self._replies = ReplyPath(client, upstream, transmission)
        self._room = trio.Event()  # the upstream has answered something
        self._nursery: trio.Nursery | None = None
        self._luck = (Luck(), Luck())  # with requests in flight, and without
        self._scope = trio.CancelScope()
        self._end = SessionEnd.SHUTDOWN
        self.detail = ""
        self._shutting_down = False
        self._upstream_over = False  # it will send no more, or nothing that is of use

    async def run(self, first: bytes = b"") -> SessionEnd:
        """Serve until the client disconnects, a side fails, or `shutdown` has done its work.

        `first` are bytes of the client that came behind its last option. The upstream is sent
        NBD_CMD_DISC if it is at a message boundary; then close the client, and then this with
        `aclose`. Why a side failed is in `detail`.
        proto.md, "Terminating the transmission phase".
        """
        requests = Stream(self._client, first)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._until_it_ends, self._pump_replies)
                    await self._until_it_ends(self._pump_requests, requests)
                    nursery.cancel_scope.cancel()
        finally:
            attention.forget(self)
            requests.give_back()
            await self._outlet.take_leave()
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
            self._replies.stream.give_back()

    @property
    def left_whole(self) -> bool:
        """After `run`: whether all that the client was sent are whole messages."""
        return self._replies.free

    @property
    def upstream(self) -> Channel:
        """The upstream's channel as it is now: another one than at first if it was replaced."""
        return self._outlet.channel

    async def _until_it_ends(self, pump: Callable[[*Args], Awaitable[None]], *args: *Args) -> None:
        """Run a pump. What is to be expected of a client is no exception further out."""
        try:
            await pump(*args)
        except PeerError as fault:
            self._end, self.detail = SessionEnd.CLIENT_BROKE_PROTOCOL, fault.what
            self._scope.cancel()
        except ChannelClosed as closed:
            if not self._outlet.gone.is_set():  # else it leaves because it was told so
                self._end, self.detail = SessionEnd.CLIENT_LEFT, str(closed)
            self._scope.cancel()

    def shutdown(self) -> None:
        """Answer NBD_ESHUTDOWN from now on; end once nothing is in flight any more."""
        self._transmission.shutdown()
        self._shutting_down = True
        self._end_if_idle()

    # -- client to upstream

    async def _pump_requests(self, stream: Stream) -> None:
        ended = False
        if stream.has_leftovers:
            ended = await self._take_requests(stream, anyway=True)
        while not ended:
            await self._until_client_asks()
            alone = attention.undivided(self)
            if not alone:
                await self._let_others_go_first()
            ended = await self._take_requests(stream)
            if alone and not ended:
                stream.keep(True)
                self._replies.stream.keep(True)
                try:
                    ended = await self._take_turn(stream)
                finally:
                    stream.keep(False)
                    self._replies.stream.keep(False)

    async def _until_client_asks(self) -> None:
        if self._idle_s == math.inf:
            await self._client.readable()
            return
        while True:
            with trio.move_on_after(self._idle_s):
                await self._client.readable()
                return
            if self._idle:
                self._end = SessionEnd.IDLE
                self._scope.cancel()

    async def _let_others_go_first(self) -> None:
        """What has come will not be all that comes, and to move two at a time costs little more
        than to move one."""
        if self._transmission.in_flight >= MANY:
            for _ in range(OTHERS):
                await trio.lowlevel.checkpoint()

    async def _take_requests(self, stream: Stream, *, anyway: bool = False) -> bool:
        """Move what the client has sent. True: it will send no more, and all is done about it."""
        transmission, client = self._transmission, self._client
        if stream.read(probe=transmission.in_flight > 1) or anyway:
            await self._forward(stream)
            while transmission.crowded:
                if transmission.full:
                    await self._wait_for_room()
                stream.load()
                await self._forward(stream)
            await self._leave_if_upstream_ends()
            if transmission.client_fault:
                raise transmission.client_fault
            if transmission.client_done:
                await self._client_done(SessionEnd.DISCONNECTED)
                return True
            self._end_if_idle()
        else:
            stream.done_with(0)  # nothing but half a record: no reason to hold a buffer
        if client.eof:
            await self._client_done(SessionEnd.CLIENT_LEFT)
            return True
        return False

    async def _wait_for_room(self) -> None:
        """Until the upstream has answered something. Nobody reads the client meanwhile, so nobody
        else would notice that it has gone."""
        self._room = trio.Event()
        hopeless_from = trio.current_time() + DISC_TIMEOUT_S
        while True:
            with trio.move_on_after(min(GONE_S, DISC_TIMEOUT_S)):
                await self._room.wait()
                return
            self._leave_if_client_is_gone()
            if trio.current_time() >= hopeless_from and self._client.hung_up:
                self._leave_unanswered()

    def _leave_if_client_is_gone(self) -> None:
        """Called where nobody reads the client. What is passed on may still be done."""
        if self._client.gone:
            self._leave_unanswered()

    def _leave_unanswered(self) -> None:
        self._end, self.detail = SessionEnd.CLIENT_LEFT, "its requests are not answered"
        self._scope.cancel()

    async def _take_turn(self, requests: Stream) -> bool:
        """Do the work of both pumps for TURN_S, or until nothing comes for LOOK_S.

        Returns as `_take_requests` does. Whatever is not plain sailing is left to the pump whose
        task it is: it finds its socket readable.
        """
        end = time.perf_counter() + TURN_S
        while not self._upstream_over and time.perf_counter() < end:
            luck = self._luck[self._transmission.idle]
            if not luck.worth_it():
                break
            from_client, from_upstream = look(self._client, self._outlet.channel, LOOK_S)
            luck.found(from_client or from_upstream)
            if from_upstream:
                if not self._return_at_once():
                    break
                await self._leave_if_upstream_ends()
                self._end_if_idle()
            if from_client:
                if await self._take_requests(requests):
                    return True
            elif not from_upstream:
                break
            if self._transmission.follow_ups_due:
                break  # these are sent by a task of their own
        return False

    async def _forward(self, stream: Stream) -> None:
        """Walk what is held, send it upstream, and answer what is answered here."""
        transmission, outlet = self._transmission, self._outlet
        was_open = holds = transmission.mid_request
        if outlet.replaceable and not (was_open or outlet.gone.is_set()):
            # What is walked has to be on its way before the upstream can be replaced.
            await outlet.begin()
            holds = True
        consumed, pieces = transmission.requests(stream.buffer, 0, stream.held)
        if transmission.mid_payload and not stream.full:
            # A header without its payload: it is worth a system call to send both in one go.
            # If the client is gone, what is walked goes on, and the next read meets the error.
            with contextlib.suppress(ChannelClosed):
                stream.read(probe=True)
            consumed, more = transmission.requests(stream.buffer, consumed, stream.held)
            pieces += more
        if pieces and not outlet.gone.is_set():
            if not holds:
                await outlet.begin()
            await outlet.send(stream.buffer, pieces)
            outlet.end()
        elif holds and not was_open:
            outlet.end()
        stream.done_with(consumed)
        if transmission.follow_ups_due:
            self._wake_follow_ups()
        if replies := transmission.take_local_replies():
            await self._replies.say(replies)

    def _wake_follow_ups(self) -> None:
        """Either pump may have made requests of our own."""
        assert self._nursery is not None
        self._outlet.wake_follow_ups(self._nursery)

    async def _client_done(self, end: SessionEnd) -> None:
        """The client will send no more. Let what is in flight be answered, for a while.

        Not if nobody is there to take the answers: what TLS does not end is cut, on both ways.
        """
        outlet = self._outlet
        gone = outlet.gone.is_set() or (self._upstream_over and not outlet.replaceable)
        left = outlet.has_left and self._transmission.upstream_ends
        self._end = SessionEnd.UPSTREAM_LOST if gone or left else end
        if self._end is SessionEnd.CLIENT_LEFT and self._client.truncated:
            self.detail = "connection cut without an end of TLS"
        has_left = end is SessionEnd.CLIENT_LEFT
        if self._idle or self._transmission.mid_payload or (has_left and self._client.truncated):
            return
        self._shutting_down = True
        self._replies.stream.keep(False)  # this may be in a turn, and take long
        with trio.move_on_after(DISC_TIMEOUT_S):
            while not (has_left and self._client.gone):  # noqa: ASYNC110  (nobody else looks)
                await trio.sleep(GONE_S)  # ended by _end_if_idle

    @property
    def _idle(self) -> bool:
        """Whether every request is answered, and the answers are out of our hands."""
        return self._transmission.idle and self._replies.free

    def _end_if_idle(self) -> None:
        if self._shutting_down and self._idle and not self._transmission.mid_payload:
            self._scope.cancel()

    # -- upstream to client

    async def _pump_replies(self) -> None:
        await self._pump_replies_of(self._outlet.channel)
        while await self._replace_upstream():
            await self._pump_replies_of(self._outlet.channel)
        await self._lose_upstream()

    async def _pump_replies_of(self, upstream: Channel) -> None:
        """Up to the end of this upstream."""
        replies = self._replies
        while not self._upstream_over:
            await upstream.readable()
            if not attention.undivided(self):
                await self._let_others_go_first()
            await replies.until_all_is_sent()  # the other pump may have taken some
            if self._upstream_over:
                break
            if not self._transmission.mid_reply:
                await replies.begin()
            self._take_replies(upstream)
            await self._send_replies()
        await replies.until_all_is_sent()

    def _take_replies(self, upstream: Channel) -> None:
        """Take what the upstream has sent, and look what it means for the session."""
        transmission = self._transmission
        try:
            count = self._replies.take()
        except ChannelClosed as closed:
            self.detail, self._upstream_over = str(closed), True
            return
        if count:
            if transmission.follow_ups_due:
                self._wake_follow_ups()
            self._room.set()
            if transmission.upstream_fault:
                self.detail, self._upstream_over = transmission.upstream_fault.what, True
        if upstream.eof:
            self._upstream_over = True
        if transmission.upstream_leaves and self._outlet.hold_back():
            self._upstream_over = True

    async def _send_replies(self) -> None:
        """Send what was taken last, and look whether that was all."""
        await self._replies.send()
        if not self._upstream_over:
            await self._leave_if_upstream_ends()
        self._end_if_idle()

    def _return_at_once(self) -> bool:
        """Do what the other pump does, if that needs no waiting. False: it has to go on."""
        upstream = self._outlet.channel
        if self._upstream_over or not self._replies.begin_now():
            return False
        self._take_replies(upstream)
        handed_over = not self._replies.send_now()
        if handed_over:
            assert self._nursery is not None
            self._nursery.start_soon(self._until_it_ends, self._send_replies)
        if self._upstream_over and not upstream.eof:
            upstream.shutdown()  # wakes the other pump, as an end of file does
        return not (handed_over or self._upstream_over)

    async def _leave_if_upstream_ends(self) -> None:
        """It has said so; once nothing is in flight it is to be left in peace."""
        if self._transmission.upstream_ends and self._transmission.idle:
            self.detail = "it is shutting down"
            await self._outlet.take_leave()
            self._outlet.channel.shutdown()  # which ends the session

    async def _replace_upstream(self) -> bool:
        """Go on with another upstream, if there is one."""
        assert self._nursery is not None
        if self._transmission.upstream_fault or not await self._outlet.replace(self._nursery):
            return False
        self._replies.change_upstream(self._outlet.channel)
        self._upstream_over = False
        self.detail = ""
        _, pieces = self._transmission.replies(bytearray(), 0, 0)
        if pieces:
            await self._replies.say_pieces(pieces)
        if self._transmission.follow_ups_due:
            self._wake_follow_ups()
        self._room.set()
        self._end_if_idle()
        return True

    async def _lose_upstream(self) -> None:
        """Tell the client that there is no upstream any more, and let it go in peace."""
        self._end = SessionEnd.UPSTREAM_LOST
        was_open = self._transmission.mid_reply
        last_words = self._transmission.lose_upstream()
        self._outlet.lose()
        self._room.set()
        if last_words is None:
            self._scope.cancel()  # a promised payload will not come: only hanging up is left
            return
        with trio.move_on_after(LOST_TIMEOUT_S):
            if not was_open:
                await self._replies.begin()
            for words in last_words:
                await self._client.send_all(words)
            self._replies.end()
            self._end_if_idle()
            await trio.sleep_forever()  # ended by the other pump
        self._scope.cancel()

    # -- the end

    async def _discard_replies(self) -> None:
        if not self._upstream_over:
            await self._replies.discard()
