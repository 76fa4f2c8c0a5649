"""gateway.nbd: how many requests, and how many bytes of them, one upstream may owe an answer to."""

from __future__ import annotations

import pytest

from gateway.nbd.constants import Cmd, CmdFlag, TransmissionFlag
from gateway.nbd.pairing import Granted
from gateway.nbd.policy import ExportPolicy, Replies, agree
from gateway.nbd.transmission import InFlightLimits, Transmission
from gateway.nbd.upgrades import Capabilities
from gateway.nbd.wire import BlockSizes
from tests.nbd.resuming import Line
from tests.nbd.support import (
    ALL_FEATURES,
    DONE,
    MIB,
    Req,
    data_chunk,
    read,
    request,
    simple,
    terms,
    write,
)

FUA, DF = int(CmdFlag.FUA), int(CmdFlag.DF)
BOTH = pytest.mark.parametrize("resumable", [False, True])


class Walk:
    """The client's side only: what has gone through, and what waits."""

    def __init__(
        self, limits: InFlightLimits, *, resumable: bool = False, given: object = None
    ) -> None:
        self.machine = Transmission(
            given or terms(1 << 40),  # type: ignore[arg-type]
            limits=limits,
            resumable=resumable,
        )
        self.rest = bytearray()

    def asks(self, *requests: bytes) -> int:
        """Returns how many are in flight then."""
        self.rest += b"".join(requests)
        while True:
            at, _ = self.machine.requests(self.rest, 0, len(self.rest))
            del self.rest[:at]
            if not self.machine.crowded or self.machine.full:
                break
        while self.machine.follow_ups_due and not self.machine.mid_request:
            if not self.machine.take_follow_ups():
                break
        return self.machine.in_flight

    def says(self, raw: bytes) -> int:
        buffer = bytearray(raw)
        at, _ = self.machine.replies(buffer, 0, len(buffer))
        assert at == len(raw)
        assert not self.machine.upstream_fault
        return self.asks()


# ---------------------------------------------------------------- requests


@BOTH
@pytest.mark.parametrize("kind", [Cmd.READ, Cmd.WRITE, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE])
def test_no_more_requests_than_may_be(kind: Cmd, resumable: bool) -> None:
    walk = Walk(InFlightLimits(3, MIB), resumable=resumable)
    assert walk.asks(*(request(kind, cookie=n).pack() for n in range(7))) == 3
    assert walk.machine.crowded
    assert walk.machine.full
    data = bytes(512) if kind == Cmd.READ else b""
    for n in range(1, 5):
        assert walk.says(simple(n, 0, data)) == 3
    assert walk.machine.crowded == bool(walk.rest)
    for left, n in zip((2, 1, 0), (5, 6, 7), strict=True):
        assert walk.says(simple(n, 0, data)) == left
    assert not walk.machine.crowded
    assert not walk.rest


@BOTH
def test_full_with_small_ones_of_the_greatest_length(resumable: bool) -> None:
    """As many as may be, each of an equal share: exactly within both bounds."""
    walk = Walk(InFlightLimits(4, 4096), resumable=resumable)
    assert walk.asks(*(read(0, 1024, n) for n in range(5))) == 4
    assert walk.says(simple(2, 0, bytes(1024))) == 4


def test_goodbye_is_read_whatever_is_in_flight() -> None:
    walk = Walk(InFlightLimits(1, MIB))
    walk.asks(read(0, 1, 1), Req(Cmd.DISC).pack())
    assert walk.machine.client_done


def test_fault_waits_for_its_turn() -> None:
    walk = Walk(InFlightLimits(1, MIB))
    walk.asks(read(0, 1, 1), read(1, 1, 2), bytes(28))
    assert not walk.machine.client_fault
    walk.says(simple(1, 0, b"x"))
    assert walk.machine.client_fault


@pytest.mark.parametrize("payload", [b"x" * 10, b""])
def test_write_is_left_where_it_is_with_its_payload(payload: bytes) -> None:
    walk = Walk(InFlightLimits(1, MIB))
    raw = write(0, b"0123456789", 2)
    walk.asks(read(0, 1, 1), raw[: 28 + len(payload)])
    assert walk.rest == raw[: 28 + len(payload)]
    assert not walk.machine.mid_payload


# ---------------------------------------------------------------- bytes


@BOTH
@pytest.mark.parametrize("flags", [0, FUA])
def test_no_more_bytes_than_may_be(flags: int, resumable: bool) -> None:
    """FUA on a READ means nothing, and counts for nothing."""
    walk = Walk(InFlightLimits(100, MIB), resumable=resumable)
    big = MIB // 2
    assert walk.asks(*(read(0, big, n, flags) for n in range(5))) == 2
    assert walk.machine.full
    assert walk.says(simple(1, 0, bytes(big))) == 2
    assert walk.says(simple(3, 0, bytes(big))) == 2
    assert walk.says(simple(2, 0, bytes(big))) == 2
    assert walk.says(simple(4, 0, bytes(big))) == 1
    assert not walk.rest


@BOTH
@pytest.mark.parametrize("flags", [0, FUA])
def test_writes_count_as_reads_do(flags: int, resumable: bool) -> None:
    walk = Walk(InFlightLimits(100, MIB), resumable=resumable)
    raw = [write(0, bytes(400_000), n, flags) for n in range(4)]
    assert walk.asks(*raw) == 2
    assert walk.asks(read(0, 1, 9)) == 2, "in the order of the client"
    assert walk.says(simple(2)) == 2


@BOTH
def test_one_request_is_always_let_through(resumable: bool) -> None:
    walk = Walk(InFlightLimits(100, 1000), resumable=resumable)
    assert walk.asks(read(0, MIB, 1), read(0, MIB, 2)) == 1
    assert walk.says(simple(1, 0, bytes(MIB))) == 1
    assert walk.says(simple(2, 0, bytes(MIB))) == 0


@BOTH
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_small_ones_beside_large_ones_are_counted(
    order: tuple[int, int], apart: bool, resumable: bool
) -> None:
    walk = Walk(InFlightLimits(1024, MIB), resumable=resumable)
    large, small = [read(0, MIB - 2048, 1)], [read(0, 1024, 10 + n) for n in range(6)]
    groups = (small, large)
    for group in order:  # at once, or one after the other
        raw = groups[group]
        walk.asks(*raw) if apart else walk.rest.extend(b"".join(raw))
    walk.asks()
    lengths = [one.length for one in walk.machine._in_flight.requests.values()]
    assert sum(lengths) <= MIB
    assert len(lengths) == (3 if order == (1, 0) else 6)


@pytest.mark.parametrize("kind", [Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES])
def test_length_without_bytes_is_free(kind: Cmd) -> None:
    walk = Walk(InFlightLimits(100, 1000))
    raw = [Req(kind, 0, 1 << 30, n).pack() for n in range(9)]
    assert walk.asks(*raw, read(0, 1000, 9)) == 10


def test_bytes_of_what_is_taken_apart() -> None:
    """However long one request is: its parts wait for each other."""
    below = Capabilities(ALL_FEATURES, True, BlockSizes(1, 512, 64 << 10))
    given = terms(1 << 40, structured=True, upstream=below, split=True)
    line = Line(given, InFlightLimits(1000, 256 << 10))
    line.asks(*(read(n << 30, 16 * MIB, n) for n in range(8)))
    assert 0 < sum(one.length for one in line.forwarded) <= 256 << 10
    seen = 0
    for _ in range(20):
        (one, *_) = line.forwarded[seen:]
        seen += 1
        line.says(data_chunk(one.cookie, one.offset, bytes(one.length), flags=DONE))
        waiting = line.machine._in_flight.requests.values()
        assert sum(each.length for each in waiting) <= 256 << 10
    assert len(line.forwarded) > 20, "and they go on"


def test_reads_that_are_held_go_on_one_by_one() -> None:
    below = Capabilities(ALL_FEATURES & ~TransmissionFlag.SEND_DF, True, BlockSizes(1, 512, 4096))
    given = terms(1 << 40, structured=True, upstream=below, split=True)
    line = Line(given, InFlightLimits(1000, 4096))
    line.asks(*(read(n << 20, 40960, n, DF) for n in range(3)))
    done = 0
    while line.machine.in_flight:
        one = line.forwarded[done]
        done += 1
        line.says(data_chunk(one.cookie, one.offset, bytes(one.length), flags=DONE))
    assert done == 30
    assert line.machine.idle


# ---------------------------------------------------------------- what the client is told for it


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("replaceable", [False, True])
def test_several_connections_are_not_one_where_upstreams_are_replaced(
    read_only: bool, replaceable: bool
) -> None:
    """A flush on one of them would say nothing of what another one has lost."""
    policy = ExportPolicy("", read_only, replaceable=replaceable)
    granted = Granted(MIB, int(ALL_FEATURES | TransmissionFlag.CAN_MULTI_CONN))
    replies = Replies(structured=True, extended=False, chunks_below=True)
    agreed = agree(policy, granted, name="", replies=replies, contexts=())
    told = bool(agreed.flags & TransmissionFlag.CAN_MULTI_CONN)
    assert told == (read_only or not replaceable)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (BlockSizes(1, 4096, 0xFFFFFFFF), 32 * MIB),
        (BlockSizes(512, 4096, 64 * MIB), 32 * MIB),
        (BlockSizes(512, 4096, MIB), MIB),
        (BlockSizes(1, 64 * MIB, 128 * MIB), 32 * MIB),
    ],
)
def test_payload_that_would_have_to_be_kept_has_a_bound(sizes: BlockSizes, told: int) -> None:
    granted = Granted(1 << 40, int(ALL_FEATURES), block_sizes=sizes)
    replies = Replies(structured=False, extended=False, chunks_below=False)
    for replaceable in (False, True):
        policy = ExportPolicy("", replaceable=replaceable)
        agreed = agree(policy, granted, name="", replies=replies, contexts=())
        assert agreed.block_sizes.maximum == (told if replaceable else sizes.maximum)
        assert agreed.block_sizes.preferred <= agreed.block_sizes.maximum


def test_answers_are_counted() -> None:
    line = Line(terms()).asks(read(0, 1, 1), read(1, 1, 2))
    assert line.machine.answered == 0
    line.says(simple(2, 0, b"x")).resumes()
    assert line.machine.answered == 1
