"""Upgrades through the real relay: over sockets, with both pumps and the follow-ups at work.

The upstream, the client's eyes and the book of what a client is entitled to are those of the model
tests of the machine, in `nbd.masked`. Here the bytes go through small socket buffers, which are
full now and then in each direction.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway import buffers as pool
from gateway.errors import ChannelClosed, SessionEnd
from gateway.nbd.constants import Cmd, Error
from gateway.nbd.wire import BlockSizes
from tests.nbd.masked import some
from tests.nbd.masked.book import Book
from tests.nbd.masked.eyes import Eyes
from tests.nbd.masked.frames import FUA, PAYLOAD_LEN, Ask, Style
from tests.nbd.masked.session import FIRST_COOKIE, examples, first_disk
from tests.nbd.masked.setups import EVERYTHING, Mask, Setup, Tf
from tests.nbd.masked.upstream import NO_FAULTS, Faults, MaskedUpstream
from tests.relay_rig import Lane, Rig, lane, vanish

__all__ = ["lane"]

KIB, MIB = 1 << 10, 1 << 20
POOR = int(Tf.HAS_FLAGS | Tf.SEND_FLUSH)


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The buffers that are borrowed and not given back."""
    out: set[int] = set()
    borrow, give_back = pool._borrow, pool._give_back

    def counted(size: int) -> bytearray:
        buffer = borrow(size)
        out.add(id(buffer))
        return buffer

    def counted_back(buffer: bytearray) -> None:
        out.remove(id(buffer))
        give_back(buffer)

    monkeypatch.setattr(pool, "_borrow", counted)
    monkeypatch.setattr(pool, "_give_back", counted_back)
    return out


async def quietly(task: Callable[[], Awaitable[None]]) -> None:
    """What may be cut off at any moment."""
    with contextlib.suppress(ChannelClosed, trio.ClosedResourceError):
        await task()


def cut(rig: Rig) -> None:
    rig.scope.cancel()


class Live:
    """A relay between a client that has these requests to send, and a masked upstream."""

    def __init__(
        self,
        rig: Rig,
        setup: Setup,
        asks: list[Ask],
        rng: random.Random,
        *,
        faults: Faults = NO_FAULTS,
        serial: bool = False,
        window: int = 8,
    ) -> None:
        self.rig = rig
        self.rng = rng
        disk = first_disk(setup.mask.size, rng)
        self.book = Book(setup, disk)
        self.upstream = MaskedUpstream(setup, rng, faults, disk=disk, heard=self.book.heard)
        terms = setup.terms
        self.eyes = Eyes(
            setup.above,
            max_payload=terms.block_sizes.maximum,
            ids=frozenset(one.id for one in terms.contexts),
        )
        self.asks = [one._replace(cookie=FIRST_COOKIE + n) for n, one in enumerate(asks)]
        self.extended = setup.above is Style.EXTENDED
        self.simple = setup.above is Style.SIMPLE
        self.pieces = rng.choice([(50, 700, 5000), (1 << 20,), (512, 540)])
        self.serial = serial  # the upstream reads on only when it has answered
        self.window = window
        self.last_words = NEVER  # after so many bytes the upstream is gone
        self.waits = True  # the client, for its replies, with its last word
        self.says_goodbye = True
        self._answered = trio.Event()
        self._asked = trio.Event()

    # -- the client

    async def send(self) -> None:
        """All requests, no more than `window` at a time, and then goodbye."""
        for ask in self.asks:
            while len(self.book.unanswered) >= self.window:
                await self._answer()
            self.book.judged(self.book.begin(ask))
            self.eyes.expect(ask)
            raw = ask.pack(extended=self.extended)
            while raw:
                count = self.rng.choice(self.pieces)
                await self.rig.client.send(raw[:count])
                raw = raw[count:]
                await trio.lowlevel.checkpoint()
        while self.waits and self.book.unanswered:
            await self._answer()
        if not self.says_goodbye:
            return
        await self.rig.client.send(Ask(Cmd.DISC).pack(extended=self.extended))

    async def _answer(self) -> None:
        self._answered = trio.Event()
        await self._answered.wait()

    async def listen(self) -> None:
        """Read all replies, up to the end."""
        while raw := await self.rig.client.channel.receive(self.rng.choice([100, 4096, 1 << 16])):
            for outcome in self.eyes.feed(raw):
                self.book.finished(outcome)
            self._answered.set()

    # -- the upstream

    async def serve(self) -> None:
        """Read requests and answer them, the one beside the other or in turns."""
        async with trio.open_nursery() as nursery:
            if not self.serial:
                nursery.start_soon(self._speak_on)
            while raw := await self.rig.upstream.channel.receive(self.rng.choice([100, 1 << 16])):
                if self.book.lost:
                    continue
                self.upstream.hear(raw)
                self._asked.set()
                if self.serial:
                    await self._speak()
            nursery.cancel_scope.cancel()

    async def _speak_on(self) -> None:
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            await self._speak()

    async def _speak(self) -> None:
        while self.upstream.waiting:
            if self.rng.random() < 0.3:
                self.upstream.work()
                await trio.lowlevel.checkpoint()
            message = self.upstream.speak()
            self.book.ending = self.upstream.closing
            if self.last_words <= len(message):
                self.book.lost = True
                await self.rig.upstream.send(message[: self.last_words])
                self.rig.upstream.channel.shutdown()
                await trio.sleep_forever()
            self.last_words -= len(message)
            await self.rig.upstream.send(message)

    async def run(self, end: SessionEnd = SessionEnd.DISCONNECTED) -> None:
        async with trio.open_nursery() as nursery:
            for task in (self.listen, self.serve, self.send):
                nursery.start_soon(task)
        assert await self.rig.ended() is end
        self.check()

    def check(self) -> None:
        assert not self.eyes.mid_message
        assert not self.book.unanswered
        assert self.upstream.over, "the upstream was told goodbye"
        self.book.check_disk(self.upstream.disk)


NEVER = 1 << 62
FAULTS = [NO_FAULTS, Faults(0.1), Faults(bad=((4096, 4608, 5), (8192, 8704, 28)))]


async def _live(lane: Lane, seed: int, faults: Faults | None = None) -> Live:
    rng = random.Random(seed)
    setup = some.setup(rng.randrange(1 << 32))
    rig = await lane(terms=setup.terms, buffers=rng.choice([0, 4096]), tls=rng.random() < 0.3)
    return Live(
        rig,
        setup,
        some.asks(setup, some.random_specs(rng, rng.choice([5, 30]))),
        rng,
        faults=faults or rng.choice(FAULTS),
        serial=rng.random() < 0.3,
        window=rng.choice([1, 8, 30]),
    )


@pytest.mark.parametrize("seed", range(examples(40)))
async def test_same_disk_and_same_answers(lane: Lane, seed: int) -> None:
    live = await _live(lane, seed)
    await live.run()


@pytest.mark.parametrize("seed", range(examples(40)))
async def test_upstream_is_lost(lane: Lane, seed: int) -> None:
    """Each request has one answer, unless the client cannot be told: then its connection ends."""
    live = await _live(lane, seed)
    live.book.unsure = True
    live.last_words = live.rng.choice([live.rng.randrange(100), live.rng.randrange(20_000)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(quietly, live.send)
        nursery.start_soon(quietly, live.serve)
        await live.listen()
        end = await live.rig.ended()
        nursery.cancel_scope.cancel()
    assert (end is SessionEnd.UPSTREAM_LOST) is live.book.lost
    if live.book.unanswered:
        assert live.simple
        assert live.eyes.mid_message


@pytest.mark.parametrize("seed", range(examples(30)))
async def test_upstream_shuts_down(lane: Lane, seed: int) -> None:
    """It has answered ESHUTDOWN: it is told goodbye, and the client that there is no more."""
    live = await _live(lane, seed, Faults(shutdown_odds=0.1))
    live.book.unsure = True
    async with trio.open_nursery() as nursery:
        for task in (live.listen, live.serve, live.send):
            nursery.start_soon(task)
    end = await live.rig.ended()
    assert end is (SessionEnd.UPSTREAM_LOST if live.book.ending else SessionEnd.DISCONNECTED)
    live.check()


# ---------------------------------------------------------------- all sockets full

_SIZES = BlockSizes(1, 4096, 64 * KIB)
_RICH = EVERYTHING & ~(Tf.SEND_WRITE_ZEROES | Tf.SEND_FUA | Tf.SEND_DF)
LARGE = {
    "simple": Setup(Mask(4 * MIB, POOR, Style.SIMPLE, _SIZES), Style.SIMPLE),
    "converted": Setup(Mask(4 * MIB, POOR, Style.SIMPLE, _SIZES), Style.STRUCTURED),
    "structured": Setup(Mask(4 * MIB, _RICH, Style.STRUCTURED, _SIZES), Style.STRUCTURED),
    "extended": Setup(Mask(4 * MIB, _RICH, Style.EXTENDED, _SIZES), Style.EXTENDED),
}


def _large_asks(setup: Setup, count: int) -> list[Ask]:
    """Of 300 kB each: zeroes, writes, reads; each in five parts."""
    asks = []
    extended = setup.above is Style.EXTENDED
    for n in range(count):
        offset, length = n % 7 * 300 * KIB, 300 * KIB + n
        payload = bytes([n + 1]) * length
        asks += [
            Ask(Cmd.WRITE_ZEROES, offset, length, FUA),
            Ask(Cmd.WRITE, offset, length, FUA | (PAYLOAD_LEN if extended else 0), payload),
            Ask(Cmd.READ, offset // 2, length),
        ]
    return asks


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("serial", [False, True], ids=["at once", "in turns"])
@pytest.mark.parametrize("kind", LARGE)
async def test_large_requests_of_all_kinds_cross(
    lane: Lane, kind: str, serial: bool, tls: bool
) -> None:
    """Through tiny buffers, all in flight at a time, the upstream perhaps one after the other."""
    setup = LARGE[kind]
    rig = await lane(terms=setup.terms, buffers=4096, tls=tls)
    asks, rng = _large_asks(setup, 5), random.Random(kind)
    await Live(rig, setup, asks, rng, serial=serial, window=NEVER).run()


@pytest.mark.parametrize("kind", LARGE)
async def test_client_that_reads_nothing_holds_up_its_own_replies_only(
    lane: Lane, kind: str
) -> None:
    """Follow-ups go on, in one direction, while the other is full; and all comes in the end."""
    setup = LARGE[kind]
    rig = await lane(terms=setup.terms, buffers=4096)
    asks = [Ask(Cmd.READ, 0, 2 * MIB), Ask(Cmd.WRITE_ZEROES, 2 * MIB, 2 * MIB)]
    live = Live(rig, setup, asks, random.Random(1), window=NEVER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.serve)
        nursery.start_soon(live.send)
        await wait_all_tasks_blocked()
        zeroes = [op for op in live.upstream.ops if op.ask.kind == Cmd.WRITE]
        assert zeroes, "the zeroes have begun"
        await live.listen()
    assert await rig.ended() is SessionEnd.DISCONNECTED
    live.check()


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("kind", LARGE)
async def test_goodbye_waits_for_plans(lane: Lane, kind: str) -> None:
    """NBD_CMD_DISC right behind the requests: "The server MUST handle all outstanding requests"."""
    setup = LARGE[kind]
    rig = await lane(terms=setup.terms, buffers=4096)
    asks = _large_asks(setup, 2)
    live = Live(rig, setup, asks, random.Random(2), window=NEVER)
    live.waits = False
    await live.run()


@pytest.mark.parametrize("kind", LARGE)
async def test_shutdown_waits_for_plans(lane: Lane, kind: str) -> None:
    setup = LARGE[kind]
    rig = await lane(terms=setup.terms)
    asks = [Ask(Cmd.WRITE_ZEROES, 0, 2 * MIB, FUA), Ask(Cmd.READ, 0, MIB)]
    live = Live(rig, setup, asks, random.Random(3))
    live.says_goodbye = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.send)
        await wait_all_tasks_blocked()
        rig.relay.shutdown()
        await wait_all_tasks_blocked()
        assert rig.end is None
        late = Ask(Cmd.FLUSH, cookie=5)
        live.eyes.expect(late)
        live.book.begin(late).refusals = frozenset({Error.ESHUTDOWN})
        await rig.client.send(late.pack(extended=live.extended))
        await wait_all_tasks_blocked()
        nursery.start_soon(live.listen)
        nursery.start_soon(live.serve)
    assert await rig.ended() is SessionEnd.SHUTDOWN
    live.check()


@pytest.mark.parametrize("how", [vanish, cut], ids=["client vanishes", "cancelled"])
@pytest.mark.parametrize("seed", range(12))
async def test_sudden_end_leaves_nothing_behind(
    lane: Lane,
    lent: set[int],
    autojump_clock: MockClock,
    seed: int,
    how: Callable[[Rig], None],
) -> None:
    """No buffer; and in the upstream's eyes no half of a request with something else behind it."""
    rng = random.Random(seed)
    setup = LARGE[rng.choice(list(LARGE))]
    rig = await lane(terms=setup.terms, buffers=rng.choice([0, 4096]))
    live = Live(rig, setup, _large_asks(setup, 3), rng, window=rng.choice([3, NEVER]))
    live.serial = rng.random() < 0.3

    async def end() -> None:
        for _ in range(rng.randrange(400)):
            await trio.lowlevel.checkpoint()
        how(rig)

    async with trio.open_nursery() as nursery:
        for task in (live.send, live.listen, end):
            nursery.start_soon(quietly, task)
        await quietly(live.serve)  # to the end of what is sent
        nursery.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    assert not lent
