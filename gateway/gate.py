"""Who gets in, by counts and rate: a worker's own gate. What rules say of whom is not known here.

A client is let in by `enter` with nothing but an address; from then on it is unproven, until it has
proved who it is and that it may open something. What each one takes up (its place, its entry under
its address and its identity) is in one `Entry`, and given back by that one's `close`.

When there is no room, an unproven client that is no longer new makes room for who waits: that of
the address with most of them, and of those the oldest. So a flood from one address pushes itself
out, and one from many cannot keep others out: the longer somebody waits, the sooner an unproven
client is no longer new. Who has proved itself is never put out.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from gateway.errors import Refusal
from gateway.identity import Identity
from gateway.limits import Limits
from gateway.places import Place
from gateway.tables import Column

# For how long an unproven client is safe from being put out: first, and at the least. A handshake
# takes five round trips. It is halved for each NEW_S that somebody waits: with 50 unproven clients
# at a time, 2500 silent ones in front of a good one are through in ten seconds.
NEW_S: Final = 1.5
_LEAST_NEW_S: Final = 0.1
_CLOSE_S: Final = 0.001  # to a moment that is as good as come: sums of floats are not exact


class Refused(Exception):
    """A client that does not get in."""

    def __init__(self, reason: Refusal, what: str) -> None:
        super().__init__(what)
        self.reason = reason


class Entry:
    """One client that was let in. `close` it on every path."""

    __slots__ = ("_cells", "_gate", "came", "evict", "group", "host", "is_open", "proven")

    def __init__(self, gate: Gate, host: str | None, group: bytes | None) -> None:
        self._gate = gate
        self._cells: list[tuple[Column, int]] = []  # of it in the tables
        self.host = host  # the client's IP address; None on a Unix socket
        self.group = group  # of addresses that count as one
        self.came = trio.current_time()
        self.evict: Callable[[], None] = lambda: None  # ends its session
        self.is_open = True
        self.proven = False

    def prove(self, identity: Identity) -> bool:
        """It is this client, and it may open something. False: too many of this identity are here,
        and it stays unproven."""
        return self._gate._prove(self, identity)

    def counts_in(self, column: Column, name: bytes, most: int) -> bool:
        """Whether it is one of `most` clients of that name. Until it is closed."""
        cell = column.add(name, most)
        if cell is None:
            return False
        self._cells.append((column, cell))
        return True

    def close(self) -> None:
        """It is gone. Idempotent."""
        if not self.is_open:
            return
        self.is_open = False
        for column, cell in self._cells:
            column.remove(cell)
        self._gate._close(self)


class Gate:
    """One worker's gate; its numbers by address and identity are those of all workers."""

    def __init__(
        self, limits: Limits, place: Place, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` has to be the same in all processes."""
        self._limits = limits
        self._place = place
        self._clock = clock
        self._clients = 0
        # A part of them for each worker, as with places.
        self._handshakes = math.ceil(limits.handshakes / place.workers) or math.inf
        self._unproven: dict[Entry, None] = {}  # in the order in which they came
        self._waiting: dict[object, float] = {}  # since when somebody waits, by listener
        self._changed = trio.lowlevel.ParkingLot()
        self.is_shut = False

    def shut(self) -> None:
        """Let nobody in for now; they wait in the queue, and other workers take them."""
        self.is_shut = True
        self._say()

    def reopen(self) -> None:
        """Let clients in again."""
        self.is_shut = False
        self._say()

    # -- room

    @property
    def has_room(self) -> bool:
        """Whether one more may come in without another's being put out."""
        room = self._clients < self._place.limit and len(self._unproven) < self._handshakes
        return room and not self.is_shut

    @property
    def others_first(self) -> bool:
        """Whether a client that waits should be left to another worker for a while."""
        return self._place.others_first()

    async def wait_for_room(self, listener: object) -> bool:
        """Until there is room, or somebody to be put out; for NEW_S at most.

        Returns whether there is. The caller lets a client in at once, or none: that of another
        listener may be next.
        """
        if self.has_room:
            return True
        if self.is_shut:
            with trio.move_on_after(NEW_S):
                await self._changed.park()
            return False
        now = trio.current_time()
        self._waiting.setdefault(listener, now)
        wait_s = NEW_S
        if (oldest := next(iter(self._unproven), None)) is not None:
            wait_s = min(wait_s, oldest.came + self._new_s(now) - now)
        if wait_s < _CLOSE_S:
            return True
        with trio.move_on_after(wait_s):
            await self._changed.park()
        return False

    def nobody_waits(self, listener: object) -> None:
        """Its queue is empty."""
        self._waiting.pop(listener, None)

    def _new_s(self, now: float) -> float:
        waited_s = now - min(self._waiting.values(), default=now)
        halvings = min(int(waited_s / NEW_S), 16)
        return max(_LEAST_NEW_S, NEW_S / (1 << halvings))

    def _make_room(self) -> None:
        """Put out the oldest of the address that has most of those that are no longer new."""
        now = trio.current_time()
        had = Counter(entry.group for entry in self._unproven)
        until = now - self._new_s(now) + _CLOSE_S
        old = [entry for entry in self._unproven if entry.came <= until]
        # The first of those with the most; whoever is there, should the clock have gone wrong.
        self._put_out(max(old or self._unproven, key=lambda entry: had[entry.group]))

    def _put_out(self, entry: Entry) -> None:
        """Its place is free at once, though its session takes a moment to end."""
        entry.evict()
        entry.close()

    # -- one client

    def enter(self, host: str | None) -> Entry:
        """Let in a client of this address; None: it has none. Only after `wait_for_room`.

        Nobody is put out for one that is refused. Raises Refused.
        """
        group = None if host is None else group_of(host)
        entry = Entry(self, host, group)
        if group is not None:
            self._look_at(entry, group)
        if not self.has_room:
            self._make_room()
        self._clients += 1
        self._unproven[entry] = None
        self._say()
        return entry

    def _look_at(self, entry: Entry, group: bytes) -> None:
        """Raises Refused."""
        rate, most = self._limits.handshake_rate, self._limits.clients_per_address
        if rate and not self._place.rates.admits(
            group, rate=rate, burst=max(1.0, 2 * rate), now=self._clock()
        ):
            raise Refused(Refusal.HANDSHAKE_RATE, f"more than {rate:g} a second of its address")
        if not most or entry.counts_in(self._place.addresses, group, most):
            return
        # One of its own that proves nothing keeps none of its own out.
        mine = next((one for one in self._unproven if one.group == group), None)
        if mine is not None and entry.came - mine.came >= NEW_S:
            self._put_out(mine)
            if entry.counts_in(self._place.addresses, group, most):
                return
        raise Refused(Refusal.TOO_MANY_CLIENTS, f"{most} of its address are here")

    def _prove(self, entry: Entry, identity: Identity) -> bool:
        most, name = self._limits.clients_per_identity, name_of(identity)
        if not entry.is_open:
            return False
        if most and name and not entry.counts_in(self._place.identities, name, most):
            return False
        entry.proven = True
        self._unproven.pop(entry, None)
        self._say()
        return True

    def _close(self, entry: Entry) -> None:
        self._unproven.pop(entry, None)
        self._clients -= 1
        self._say()

    def _say(self) -> None:
        """To the other workers, and to those here who wait."""
        self._place.count(self._clients if self.has_room else self._place.limit)
        if self.has_room:
            self._changed.unpark_all()


def group_of(host: str) -> bytes:
    """The addresses that count as one: an IPv4 address, or the /64 of an IPv6 one, since whoever
    has one of these has all of them."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # A socket for both families shows an IPv4 client as ::ffff:192.0.2.1.
        return ip.packed[:8] if ip.ipv4_mapped is None else ip.ipv4_mapped.packed
    return ip.packed


def name_of(identity: Identity) -> bytes:
    """Who counts as one: the holder of a key or a pre-shared key, or a user of this machine.

    Not the certificate: whoever may have two of them for one key has it twice. Empty for anonymous
    clients.
    """
    if identity.spki:
        return b"key " + identity.spki.encode()
    if identity.psk is not None:
        return b"psk " + identity.psk.encode()
    return b"" if identity.uid is None else b"uid %d" % identity.uid
