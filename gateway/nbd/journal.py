"""What the upstream was sent and has not answered, kept to be sent again to the one after it.

Used with `--reconnect` only. The journal reads the stream of requests as it goes upstream, which is
ours and so in order, and keeps each request, payload included, until it is answered.

It also knows whether writes have been acknowledged that no flush has covered yet. These may be lost
with an upstream that dies, and a client must not be told by a later flush that they are safe:
proto.md, "Flag: NBD_CMD_FLUSH", "all write commands ... that have been completed".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gateway.nbd.constants import Cmd, CmdFlag
from gateway.nbd.framing import Framing
from gateway.nbd.in_flight import InFlight
from gateway.nbd.plans import ZEROES
from gateway.nbd.requests import CHANGES_DATA

_SLICE: Final = 1 << 20  # bytes of one entry that are copied out at a time
_FUA, _PAYLOAD_LEN = int(CmdFlag.FUA), int(CmdFlag.PAYLOAD_LEN)
_WRITE, _FLUSH = int(Cmd.WRITE), int(Cmd.FLUSH)


class _Entry:
    """One request: its bytes, and what they mean for durability."""

    __slots__ = ("count", "covers", "flushes", "number", "parts", "sent", "volatile")

    def __init__(self, number: int, kind: int, flags: int, covers: int) -> None:
        self.number = number  # in the order they were sent, which is not that of the cookies
        self.sent = False  # to the upstream of now, as far as it has come from the client
        self.parts: list[bytes | memoryview] = []  # a view is of zeroes that never change
        self.count = 0  # bytes in `parts`
        self.volatile = kind in CHANGES_DATA and not flags & _FUA
        self.flushes = kind == _FLUSH
        self.covers = covers  # completed writes, when this was sent

    def add(self, data: memoryview) -> None:
        self.parts.append(data if data.obj is ZEROES.obj else bytes(data))
        self.count += len(data)

    def slices(self) -> Iterator[bytes]:
        """All of it, also what is added meanwhile."""
        for part in self.parts:
            for at in range(0, len(part), _SLICE):
                yield bytes(part[at : at + _SLICE])


class Journal:
    """One session's. `record` before each send, `settle` after each walk of replies."""

    def __init__(self, framing: Framing, in_flight: InFlight) -> None:
        self._framing = framing
        self._in_flight = in_flight
        self._entries: dict[int, _Entry] = {}  # by our cookie, in the order they were sent
        self._sent = 0
        self._last: _Entry | None = None  # the one whose payload is under way
        self._left = 0  # of that payload
        self._live = True  # what is recorded is sent at once
        self._upstreams = 0  # counts `suspend`s, so that a resending knows that it is over
        self.settled = 0  # requests that were answered, ever
        self._completed = 0  # volatile writes that were answered
        self._covered = 0  # how many of these a successful flush came behind

    def record(self, data: memoryview) -> None:
        """Keep a copy of what goes upstream. A header is never cut; a payload may be."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                assert self._last is not None
                count = min(self._left, end - at)
                self._last.add(data[at : at + count])
                self._last.sent &= self._live  # else the upstream has not got it whole
                self._left -= count
                at += count
                continue
            _, flags, kind, cookie, _, length = self._framing.request.unpack_from(data, at)
            self._sent += 1
            entry = _Entry(self._sent, kind, flags, self._completed)
            entry.sent = self._live
            self._entries[cookie] = self._last = entry
            size = self._framing.request.size
            entry.add(data[at : at + size])
            at += size
            has_payload = flags & _PAYLOAD_LEN if self._framing.extended else kind == _WRITE
            self._left = length if has_payload else 0

    def settle(self) -> None:
        """Forget what has been answered."""
        waiting, failed = self._in_flight.requests, self._in_flight.failed
        for cookie in [one for one in self._entries if one not in waiting]:
            entry = self._entries.pop(cookie)
            self.settled += 1
            if entry.volatile:
                self._completed += 1  # also if it failed: a part may have been written
            elif entry.flushes and cookie not in failed:
                self._covered = max(self._covered, entry.covers)
            failed.discard(cookie)

    def take_loss(self) -> bool:
        """Whether completed writes may have gone with the upstream. From now on they have."""
        lost = self._completed > self._covered
        self._covered = self._completed
        return lost

    @property
    def open_at_upstream(self) -> frozenset[int]:
        """Cookies of what this upstream was sent and has not answered."""
        return frozenset(cookie for cookie, entry in self._entries.items() if entry.sent)

    def suspend(self) -> None:
        """From now on what is recorded waits for `again`, and an `again` under way ends."""
        self._live = False
        self._upstreams += 1

    def clear(self) -> None:
        """There will be no other upstream."""
        self._entries.clear()

    def forget(self, cookie: int) -> None:
        """It was answered here."""
        self._entries.pop(cookie, None)

    def again(self) -> Iterator[bytes]:
        """All that is not answered, in order, up to the last byte that has been recorded.

        More may be recorded, and settled, while this goes on. At its end, and until the caller
        waits for something, the new upstream has been sent all there is, and what is recorded from
        then on is to be sent at once; unless it was suspended meanwhile.
        """
        for one in self._entries.values():
            one.sent = False
        return self._again(self._upstreams)

    def _again(self, upstream: int) -> Iterator[bytes]:
        last = 0
        while upstream == self._upstreams:
            entry = next((one for one in self._entries.values() if one.number > last), None)
            if entry is None:
                self._live = True
                if self._left:
                    assert self._last is not None
                    self._last.sent = True  # what is still to come goes to this upstream as well
                return
            last, done = entry.number, 0
            for part in entry.slices():
                done += len(part)
                # As soon as somebody has begun to send its last bytes it may be done.
                entry.sent = done == entry.count and not (entry is self._last and self._left)
                yield part
                if upstream != self._upstreams:
                    return
