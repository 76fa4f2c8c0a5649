"""A relay whose upstream may go and come back, between scripted peers over real sockets."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import relay
from gateway.errors import SessionEnd
from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import InFlightLimits, Transmission
from gateway.relay import Relay
from gateway.transport import Channel, look
from gateway.turns import Luck, attention
from tests.relay_rig import FEATURES, PLENTY, STALL_S, Peer


class Dock:
    """The `Redial` of a relay: waits until the test has another upstream for it."""

    def __init__(self) -> None:
        self.dialled = 0
        self.progress: list[bool] = []  # whether the one before has answered anything
        self.said: list[tuple[int, bool]] = []  # how many requests are sent again; lost writes
        self._arrivals, self._next = trio.open_memory_channel[Channel | None](math.inf)

    async def __call__(self, *, progress: bool) -> Channel | None:
        self.dialled += 1
        self.progress.append(progress)
        return await self._next.receive()

    def resumed(self, requests: int, *, lost: bool) -> None:
        self.said.append((requests, lost))

    def arrives(self, channel: Channel | None) -> None:
        self._arrivals.send_nowait(channel)


def pair(buffers: int = 0) -> tuple[Channel, Channel]:
    sockets = socket.socketpair()
    for sock in sockets if buffers else ():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
    return Channel(sockets[0]), Channel(sockets[1])


class Rig:
    """A relay at work. `upstream` is the newest of `upstreams`."""

    def __init__(self, terms: Terms, *, buffers: int, eager: bool) -> None:
        self.dock = Dock()
        self.scope = trio.CancelScope()
        self.end: SessionEnd | None = None
        self.near: list[Channel] = []  # ours, the client's first
        self.upstreams: list[Peer] = []
        self._terms, self._buffers = terms, buffers
        self.structured = terms.structured_replies
        self._eager = Eager() if eager else None
        self._ended = trio.Event()
        near, far = pair(buffers)
        self.near.append(near)
        self.client = Peer(far)
        self._dock_at(self._new_upstream())

    @property
    def upstream(self) -> Peer:
        return self.upstreams[-1]

    def _new_upstream(self) -> Channel:
        near, far = pair(self._buffers)
        self.near.append(near)
        self.upstreams.append(Peer(far))
        return near

    def _dock_at(self, channel: Channel) -> None:
        if self._eager is not None:
            self._eager.look_at(channel)

    def comes_back(self) -> Peer:
        """There is another upstream to be dialled."""
        channel = self._new_upstream()
        self._dock_at(channel)
        self.dock.arrives(channel)
        return self.upstream

    def is_over(self) -> None:
        """There will be no other upstream."""
        self.dock.arrives(None)

    def dies(self) -> None:
        """The upstream closes its socket."""
        self.upstream.channel.close()

    async def serve(
        self, *, limits: InFlightLimits, idle_s: float, stall_s: float, first: bytes
    ) -> None:
        client, upstream = self.near
        client.stall_s = upstream.stall_s = stall_s
        transmission = Transmission(self._terms, limits=limits, resumable=True)
        self.relay = Relay(client, upstream, transmission, redial=self.dock, idle_s=idle_s)
        if self._eager is not None:
            self._eager.start(self.relay, client)
        try:
            with self.scope:
                self.end = await self.relay.run(first)
        finally:
            client.shutdown()
            try:
                with trio.CancelScope(shield=self.scope.cancelled_caught):
                    await self.relay.aclose()
            finally:
                self.relay.upstream.shutdown()  # an `Eager` has a duplicate of it
                self.relay.upstream.close()
                self._ended.set()

    async def run(self, **how: object) -> None:
        """Serve, and close everything at the end of the test: the far ends first."""
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(lambda: self.serve(**how))  # type: ignore[arg-type]
                await trio.sleep_forever()
            finally:
                self.client.channel.close()
                for one in self.upstreams:
                    one.channel.close()
                self.dock.arrives(None)
                with trio.CancelScope(shield=True):
                    await self._ended.wait()
                for channel in self.near:
                    channel.close()
                if self._eager is not None:
                    self._eager.close()

    async def ended(self) -> SessionEnd:
        """The end; no upstream is left open then."""
        await self._ended.wait()
        dialled = self.near[1 : 2 + len(self.dock.said)]
        assert all(one.socket.fileno() < 0 for one in dialled), "a channel left open"
        assert self.end is not None
        return self.end

    async def settled(self) -> None:
        await wait_all_tasks_blocked()


class Eager:
    """Wakes the request pump for what comes from the upstream of now: see `relay_rig.Eager`."""

    def __init__(self) -> None:
        self._seconds: list[socket.socket] = []  # the reply pump waits for the first

    def look_at(self, upstream: Channel) -> None:
        self._upstream, self._upstream_readable = upstream, upstream.readable
        self._seconds.append(upstream.socket.dup())
        readable = upstream.readable

        async def after_the_other() -> None:
            while True:
                stands_back = self._takes_replies()
                await readable()
                if not stands_back:
                    return
                for _ in range(5):
                    await trio.lowlevel.checkpoint()
                if any(look(upstream, upstream, 0.0)):
                    return

        upstream.readable = after_the_other  # type: ignore[method-assign]

    def start(self, one: Relay, client: Channel) -> None:
        self._relay, self._client = one, client
        self._client_readable = client.readable
        client.readable = self._either  # type: ignore[method-assign]

    def close(self) -> None:
        for second in self._seconds:
            second.close()

    def _takes_replies(self) -> bool:
        one = self._relay
        free = one._transmission.mid_reply or one._replies.free
        return not (one._replies._unsent or one._upstream_over) and free

    async def _either(self) -> None:
        if not (self._client._drained and self._takes_replies()):
            await self._client_readable()
            return
        async with trio.open_nursery() as nursery:

            async def also() -> None:
                await trio.lowlevel.wait_readable(self._seconds[-1])
                nursery.cancel_scope.cancel()

            nursery.start_soon(also)
            await self._client_readable()
            nursery.cancel_scope.cancel()


Lane = Callable[..., Awaitable[Rig]]


@pytest.fixture(params=["two-pumps", "turns"])
async def lane(
    nursery: trio.Nursery, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Lane:
    """Sets relays up and starts them: each with two pumps, and with every turn taken."""
    turns = request.param == "turns"
    monkeypatch.setattr(attention, "undivided", lambda _: turns)
    monkeypatch.setattr(Luck, "worth_it", lambda _: True)
    monkeypatch.setattr(relay, "LOOK_S", 0.0)  # the peers are tasks: nothing comes meanwhile
    monkeypatch.setattr(relay, "TURN_S", STALL_S)  # no turn is cut short

    async def watch() -> None:
        await trio.sleep(STALL_S)
        raise AssertionError("stalled")

    async def lane(
        *,
        structured: bool = False,
        size: int = 1 << 40,
        flags: TransmissionFlag = FEATURES,
        buffers: int = 0,
        terms: Terms | None = None,
        limits: InFlightLimits = PLENTY,
        idle_s: float = math.inf,
        stall_s: float = math.inf,
        first: bytes = b"",
    ) -> Rig:
        terms = terms or Terms("", size, flags, structured_replies=structured)
        rig = Rig(terms, buffers=buffers, eager=turns)
        nursery.start_soon(
            lambda: rig.run(limits=limits, idle_s=idle_s, stall_s=stall_s, first=first)
        )
        await wait_all_tasks_blocked()
        return rig

    if not isinstance(trio.lowlevel.current_clock(), MockClock):
        nursery.start_soon(watch)
    return lane
