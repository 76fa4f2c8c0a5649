"""What goes to the client in a transmission phase: whole messages, one behind the other.

The upstream's replies mostly, read and walked here; whoever reads them need not be who can wait
until the client takes them.
"""

from __future__ import annotations

import trio

from gateway.buffers import Stream, arrange, send_pieces
from gateway.errors import ChannelClosed
from gateway.nbd.transmission import Piece, Transmission
from gateway.transport import Channel


class ReplyPath:
    """One session's way to its client. `stream` is where the upstream's replies come from.

    `begin` before a message, and `end` behind what was sent of it. Between the two, `take` replies
    and send them with `send` or `send_now`.
    """

    def __init__(self, client: Channel, upstream: Channel, transmission: Transmission) -> None:
        self.stream = Stream(upstream)
        self._client = client
        self._transmission = transmission
        # Held from the start of a message to its end, not always by one task; and for good if the
        # message is cut, for what came next would be taken for the rest of it.
        self._writer = trio.Semaphore(1, max_value=1)
        self._unsent: list[bytes | memoryview] = []  # of the replies that were taken last
        self._all_sent = trio.Event()
        self._taken = 0  # bytes of what was read from the upstream

    # -- messages

    @property
    def free(self) -> bool:
        """Whether no message is under way."""
        return bool(self._writer.value)

    async def begin(self) -> None:
        """Wait until no other message is under way."""
        if self._writer.value:
            self._writer.acquire_nowait()  # no turn of the loop when nobody else writes
        else:
            await self._writer.acquire()

    def end(self) -> None:
        """Let others send, unless more of this message is to follow."""
        if not self._transmission.mid_reply:
            self._writer.release()

    async def say(self, words: bytes) -> None:
        """Send whole messages of our own."""
        await self.begin()
        await self._client.send_all(words)
        self.end()

    async def say_pieces(self, pieces: list[Piece]) -> None:
        """Send whole messages of our own, in pieces."""
        await self.begin()
        await send_pieces(self._client, bytearray(), pieces)
        self.end()

    # -- replies

    def begin_now(self) -> bool:
        """Begin, or go on with what the last replies have begun. False: somebody is in the way."""
        if self._unsent:
            return False
        if not self._transmission.mid_reply:
            if not self._writer.value:
                return False
            self._writer.acquire_nowait()
        return True

    def take(self) -> int:
        """Read and walk what the upstream has sent: to be sent then. Returns how many bytes came.

        A message has to be begun. Raises ChannelClosed.
        """
        transmission, stream = self._transmission, self.stream
        self._taken = 0
        count = stream.read(at_least=transmission.wanted, probe=False)
        if count:
            self._taken, pieces = transmission.replies(stream.buffer, 0, stream.held)
            self._unsent = arrange(stream.buffer, pieces) if pieces else []
        return count

    async def send(self) -> None:
        """Send what was taken last, or what is left of that."""
        try:
            for unit in self._unsent:
                await self._client.send_all(unit)
        finally:  # what is walked is never walked again, also if the client did not get it
            self.stream.done_with(self._taken)
        # Not if it was cut: then nothing may follow.
        self._unsent = []
        self._all_sent.set()
        self._all_sent = trio.Event()
        self.end()

    def send_now(self) -> bool:
        """Send what was taken last, as far as it goes. False: there is some left, for `send`."""
        all_goes = True
        try:
            for index, unit in enumerate(self._unsent):
                sent = self._client.send_now(unit)
                if sent < len(unit):
                    self._unsent[: index + 1] = [memoryview(unit)[sent:]]
                    all_goes = False
                    break
        finally:
            if all_goes:
                self.stream.done_with(self._taken)
        if all_goes:
            self._unsent = []  # since it was taken nobody had a turn, so nobody waits for this
            self.end()
        return all_goes

    async def until_all_is_sent(self) -> None:
        """If others took replies and could not send them at once: these come first."""
        while self._unsent:  # they may do so again before this task has its turn
            await self._all_sent.wait()

    # -- ends

    def change_upstream(self, upstream: Channel) -> None:
        """Replies come from this one now. All that was taken is sent."""
        self.stream.give_back()  # half a message of the last one, perhaps
        self.stream = Stream(upstream)

    async def discard(self) -> None:
        """Read and check replies as before, for a client that is gone, until none is due."""
        transmission, stream = self._transmission, self.stream
        while not transmission.upstream_fault:
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
