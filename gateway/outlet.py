"""What goes upstream in a transmission phase: whole messages, one behind the other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import trio

from gateway.buffers import send_pieces
from gateway.errors import ChannelClosed
from gateway.lifeline import Lifeline, Redial
from gateway.nbd.transmission import Piece, Transmission
from gateway.transport import Channel

LAST_WORD_TIMEOUT_S: Final = 1.0  # for NBD_CMD_DISC to the upstream


class Outlet:
    """One session's way to its upstream, which may be replaced if there is a `redial`.

    `begin` before a message and `end` behind what was sent of it: a message that is not whole keeps
    the others out, also those of another task.
    """

    def __init__(
        self, channel: Channel, transmission: Transmission, redial: Redial | None = None
    ) -> None:
        self.channel = channel
        self.gone = trio.Event()  # there is no upstream any more, and there will be none
        self.has_left = False  # the upstream was told that we go
        self._transmission = transmission
        self._lifeline = None if redial is None else Lifeline(channel, transmission, redial)
        self._writer = trio.Semaphore(1, max_value=1)
        self._clean = True  # at a message boundary, as far as the upstream has seen
        self._bows_out = False  # it may be told that we go, once it owes nothing
        self._follow_ups = trio.Event()
        self._sends_follow_ups = False

    @property
    def replaceable(self) -> bool:
        """Whether there may be another upstream after this one."""
        return self._lifeline is not None

    # -- messages

    async def begin(self) -> None:
        """Wait until no other message is under way."""
        if self._writer.value:
            self._writer.acquire_nowait()  # no turn of the loop when nobody else writes
        else:
            await self._writer.acquire()

    def end(self) -> None:
        """Let others send, unless a payload is to follow."""
        if not self._transmission.mid_request:
            self._writer.release()

    async def send(self, buffer: bytearray, pieces: Sequence[Piece]) -> None:
        """Send whole messages, or up to where the payload of the last is still to come.

        If the upstream is lost meanwhile, this returns when that is known to all.
        """
        self._clean = False
        if self._lifeline is not None:
            await self._lifeline.send(buffer, pieces)
            self._clean = not self._transmission.mid_request
            return
        try:
            await send_pieces(self.channel, buffer, pieces)
        except ChannelClosed:
            # It may have left answers behind: the reader of these meets the end.
            self.channel.shutdown()
            await self.gone.wait()
        else:
            self._clean = not self._transmission.mid_request

    def wake_follow_ups(self, nursery: trio.Nursery) -> None:
        """There are requests of our own. A task of its own sends them, for whoever reads replies
        must not wait until the upstream takes bytes."""
        self._follow_ups.set()
        if not self._sends_follow_ups:
            self._sends_follow_ups = True
            nursery.start_soon(self._send_follow_ups)

    async def _send_follow_ups(self) -> None:
        transmission, nothing = self._transmission, bytearray()
        while not self.gone.is_set():
            await self._follow_ups.wait()
            self._follow_ups = trio.Event()
            while transmission.follow_ups_due and not self.gone.is_set():
                await self.begin()
                await self.send(nothing, transmission.take_follow_ups())
                self._writer.release()  # these are whole, whatever is walked meanwhile

    # -- ends

    def lose(self) -> None:
        """The upstream is gone for good. Whoever is sending to it leaves off."""
        self._clean = False
        self.channel.shutdown()
        self.gone.set()

    async def take_leave(self) -> None:
        """Send NBD_CMD_DISC, once, unless the upstream would take that for data."""
        if self.has_left or not self._may_take_leave:
            return
        self.has_left = True
        with (
            trio.CancelScope(deadline=trio.current_time() + LAST_WORD_TIMEOUT_S, shield=True),
            contextlib.suppress(ChannelClosed),  # it went first
        ):
            await self.channel.send_all(self._transmission.disconnect_request())

    @property
    def _may_take_leave(self) -> bool:
        is_up = self._lifeline is None or self._lifeline.up
        return self._clean and is_up and not self._transmission.mid_request

    # -- another upstream

    def hold_back(self) -> bool:
        """The upstream refuses what it is sent: send it no more. Returns whether that was all, and
        it is left then."""
        lifeline = self._lifeline
        assert lifeline is not None
        # From the first refusal on nothing is begun any more, so a boundary stays one.
        self._bows_out = self._may_take_leave or (self._bows_out and not lifeline.up)
        lifeline.suspend()
        if lifeline.sends or not self._transmission.upstream_has_left:
            return False
        if self._bows_out:
            self._bows_out = False
            with contextlib.suppress(ChannelClosed):
                self.channel.send_now(self._transmission.disconnect_request())
        return True

    async def replace(self, nursery: trio.Nursery) -> bool:
        """After the upstream's end: have another one, and send it what is not answered.

        False: there is none.
        """
        if self._lifeline is None or not await self._lifeline.replace():
            return False
        self.channel, self._bows_out = self._lifeline.channel, False
        nursery.start_soon(self._lifeline.send_again)
        return True
