"""Buffers of the data plane, borrowed while bytes are in them, and what is sent out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.nbd.transmission import Piece
from gateway.transport import RECORD, Channel

BUFFER_SIZE: Final = 512 << 10  # bytes; less costs system calls and wake-ups in bulk
_KEPT_BUFFERS: Final = 16  # idle buffers kept for the next borrower, in all
_SMALL: Final = 64  # leftovers up to here are copied out, so that their buffer can go back

_NONE: Final = bytearray()

_free_buffers: list[bytearray] = []


def _borrow(size: int) -> bytearray:
    if size <= BUFFER_SIZE:
        return _free_buffers.pop() if _free_buffers else bytearray(BUFFER_SIZE)
    return bytearray(size)


def _give_back(buffer: bytearray) -> None:
    if len(buffer) == BUFFER_SIZE and len(_free_buffers) < _KEPT_BUFFERS:
        _free_buffers.append(buffer)


class Stream:
    """What one pump has read and not yet done with: at most one unfinished message.

    Holds a borrowed buffer only while `held` bytes are in it, or while it `keeps`; a few leftover
    bytes are kept apart.
    """

    def __init__(self, channel: Channel, first: bytes = b"") -> None:
        self.channel = channel
        self.buffer = _NONE
        self.held = 0
        self._view = memoryview(_NONE)
        self._keeps = False
        self._small = first

    def read(self, *, at_least: int = 0, probe: bool) -> int:
        """Read what has arrived behind what is held. Returns how many bytes came."""
        if not self.buffer:
            self.load(at_least)
        elif len(self.buffer) < at_least:
            larger = _borrow(at_least)
            larger[: self.held] = self._view[: self.held]
            _give_back(self.buffer)
            self.buffer, self._view = larger, memoryview(larger)
        held = self.held
        count = self.channel.fill(self._view[held:] if held else self._view, probe=probe)
        self.held = held + count
        return count

    def load(self, at_least: int = 0) -> None:
        """Have a buffer, with what is held in it."""
        if not self.buffer:
            self.buffer = _borrow(at_least)
            self._view = memoryview(self.buffer)
            if self._small:
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
        if not left and self._keeps:
            self.held = 0
        elif left <= _SMALL:
            self._small = bytes(self._view[count : self.held])
            self.give_back()
        elif count:
            self.buffer[:left] = self.buffer[count : self.held]
            self.held = left

    def keep(self, keeps: bool) -> None:
        """Whether to hold a buffer while there is nothing in it: for a while of many reads."""
        self._keeps = keeps
        if not keeps and self.buffer and not self.held:
            self.give_back()

    def give_back(self) -> None:
        """Have no buffer. What is held is gone."""
        if self.buffer:
            _give_back(self.buffer)
            self.buffer, self._view, self.held = _NONE, memoryview(_NONE), 0


def arrange(buffer: bytearray, pieces: Sequence[Piece]) -> list[bytes | memoryview]:
    """Pieces of a buffer and others, put together so that few calls send them.

    Small pieces are joined; what is large stays where it is, but for up to a TLS record at its
    ends. Not to be used once the buffer is somebody else's.
    """
    view = memoryview(buffer)
    if len(pieces) == 1:
        (piece,) = pieces
        return [view[piece[0] : piece[1]] if isinstance(piece, tuple) else memoryview(piece)]
    units: list[bytes | memoryview] = []
    small: list[memoryview] = []
    count = 0
    for piece in pieces:
        data = view[piece[0] : piece[1]] if isinstance(piece, tuple) else memoryview(piece)
        if len(data) <= 2 * RECORD:
            small.append(data)
            count += len(data)
        else:
            head = -count % RECORD if count else 0
            tail = (len(data) - head) % RECORD
            if count:
                units.append(b"".join([*small, data[:head]]))
            units.append(data[head : len(data) - tail])
            small, count = [data[len(data) - tail :]], tail
        if count >= BUFFER_SIZE:
            units.append(b"".join(small))
            small, count = [], 0
    if count:
        units.append(b"".join(small))
    return units


async def send_pieces(channel: Channel, buffer: bytearray, pieces: Sequence[Piece]) -> None:
    """Send pieces of a buffer and others in as few calls as it takes. Raises ChannelClosed."""
    for unit in arrange(buffer, pieces):
        sent = channel.send_now(unit)
        if sent < len(unit):
            await channel.send_all(memoryview(unit)[sent:])
