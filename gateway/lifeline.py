"""The way to an upstream that may be replaced by another: `--reconnect`.

A connection is replaced only when the upstream has closed it on both ways, or has said that it is
shutting down and answered all else. One that we would have to close could still find requests of
ours in its socket, and do them after the next one has done what came later.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Final, Protocol

import trio

from gateway.buffers import send_pieces
from gateway.errors import ChannelClosed, Stalled
from gateway.nbd.transmission import Piece, Transmission
from gateway.transport import Channel

# How often, and after which waits, to look whether one that sends nothing more takes nothing more.
_LOOKS: Final = 50
_LOOK_S: Final = 0.02


class Redial(Protocol):
    """How to get at an upstream that is like the first one."""

    async def __call__(self, *, progress: bool) -> Channel | None:
        """A channel in transmission, as negotiated before; None: there will be none.

        `progress`: the last one has answered something, or owed nothing: it was not in vain.
        """

    def resumed(self, requests: int, *, lost: bool) -> None:
        """For the log: so many are sent again; with `lost` completed writes may be gone."""


class Lifeline:
    """The upstream of one session in transmission. `channel` is closed by who made the first one.

    One task sends at a time, and one replaces the channel.
    """

    def __init__(self, channel: Channel, transmission: Transmission, redial: Redial) -> None:
        self.channel = channel
        self._transmission = transmission
        self._redial = redial
        self._up = True  # what is recorded is sent at once
        self._suspended = False  # nothing more is sent to this upstream
        self._hopeless = False  # what was sent may be done at any time
        self._answered = 0  # until this upstream came
        self._senders = 0
        self._nobody_sends = trio.Event()

    @property
    def up(self) -> bool:
        """Whether the upstream has been sent all there is, and may be sent more."""
        return self._up

    @property
    def sends(self) -> bool:
        """Whether somebody is in the middle of it."""
        return bool(self._senders)

    async def send(self, buffer: bytearray, pieces: Sequence[Piece]) -> None:
        """Send, or keep to be sent to the next upstream. Never raises ChannelClosed."""
        self._transmission.record(buffer, pieces)
        if not self._up:
            return
        self._senders += 1
        try:
            await send_pieces(self.channel, buffer, pieces)
        except ChannelClosed as closed:
            await self._cannot_send(closed)
        finally:
            self._left_off()

    async def send_again(self) -> None:
        """Send the new upstream what is not answered, and from then on what comes."""
        channel = self.channel
        try:
            for part in self._transmission.again():
                await channel.send_all(part)
            self._up = not self._suspended
        except ChannelClosed as closed:
            await self._cannot_send(closed)
        finally:
            self._left_off()

    async def _cannot_send(self, closed: ChannelClosed) -> None:
        self.suspend()
        if isinstance(closed, Stalled) or not await _is_closed(self.channel):
            self._hopeless = True
        self.channel.shutdown()  # the reader takes what is left, and meets the end

    def _left_off(self) -> None:
        self._senders -= 1
        if self._senders:
            return
        self._nobody_sends.set()
        transmission = self._transmission
        if self._suspended and transmission.upstream_leaves and transmission.upstream_has_left:
            self.channel.shutdown()  # nobody else would look: the reader waits for answers

    def suspend(self) -> None:
        """Send nothing more to this upstream, also nothing again."""
        if not self._suspended:
            self._up, self._suspended = False, True
            self._transmission.suspend()

    async def replace(self) -> bool:
        """After the upstream's end: dial the next one. False: there is none.

        Then have `send_again` run, and the replies read at the same time.
        """
        self.suspend()
        has_left = not self._senders and self._transmission.upstream_has_left
        if not (has_left or await _is_closed(self.channel)):
            self._hopeless = True
        if self._hopeless:
            return False
        self.channel.shutdown()  # whoever is still sending leaves off
        while self._senders:
            self._nobody_sends = trio.Event()
            await self._nobody_sends.wait()
        if self._hopeless:
            return False
        self.channel.close()
        transmission = self._transmission
        in_vain = transmission.in_flight and transmission.answered == self._answered
        channel = await self._redial(progress=not in_vain)
        if channel is None:
            return False
        channel.stall_s, channel.while_stuck = self.channel.stall_s, self.channel.while_stuck
        self.channel = channel
        lost = self._transmission.resume()
        self._answered = self._transmission.answered
        self._redial.resumed(self._transmission.in_flight, lost=lost)
        self._suspended = False
        self._senders += 1  # from now on
        return True


async def _is_closed(channel: Channel) -> bool:
    """Whether the other end of a Unix socket takes nothing more, after it has sent its last."""
    if channel.socket.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(channel.socket, 0)  # POLLHUP is always looked for: both ways are shut
    closed = select.POLLHUP | select.POLLERR
    for _ in range(_LOOKS):
        if any(events & closed for _, events in poll.poll(0)):
            return True
        await trio.sleep(_LOOK_S)
    return False
