"""gateway.gate: who gets in, who has to wait, and who makes room for whom."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from trio.testing import MockClock

from gateway.errors import Refusal
from gateway.gate import NEW_S, Entry, Gate, Refused, group_of, name_of
from gateway.identity import Identity
from gateway.limits import Limits
from gateway.places import Place, Places


class Rig:
    """The gates of some workers, and a clock that the test sets."""

    def __init__(self, *shares: int, **limits: float) -> None:
        self.now = 1000.0
        self.places = Places(shares)
        self.limits = dataclasses.replace(Limits(), **limits)  # type: ignore[arg-type]
        self.gates = [self.gate(index) for index in range(len(shares))]
        self.out: list[Entry] = []  # who was put out, in that order

    def gate(self, index: int) -> Gate:
        place = Place(self.places, index)
        place.open()
        return Gate(self.limits, place, lambda: self.now)

    def enter(self, host: str | None = "192.0.2.1", worker: int = 0) -> Entry:
        entry = self.gates[worker].enter(host)
        entry.evict = lambda: self.out.append(entry)
        return entry

    def refused(self, host: str, worker: int = 0) -> Refusal:
        with pytest.raises(Refused) as caught:
            self.gates[worker].enter(host)
        return caught.value.reason


async def waits(gate: Gate, listener: object = "l") -> bool:
    """Whether a client would have to: it is looked at without a wait."""
    with trio.move_on_after(0):
        return not await gate.wait_for_room(listener)
    return True


# ---------------------------------------------------------------- room


async def test_slots_are_of_proven_and_unproven_alike(mock_clock: MockClock) -> None:
    rig = Rig(2)
    (gate,) = rig.gates
    first, second = rig.enter(), rig.enter()
    assert not gate.has_room
    assert await waits(gate)
    second.close()
    second.close()  # once is enough, twice is no more
    assert gate.has_room
    assert not await waits(gate)
    third = rig.enter()
    assert await waits(gate)
    for one in (first, third):
        one.close()
    assert not await waits(gate)


async def test_who_has_proved_itself_makes_room_for_another_handshake(
    mock_clock: MockClock,
) -> None:
    rig = Rig(9, handshakes=2)
    (gate,) = rig.gates
    first, second = rig.enter(), rig.enter()
    assert await waits(gate)
    assert first.prove(Identity())
    assert not await waits(gate)
    rig.enter()
    assert await waits(gate)
    second.close()
    assert not await waits(gate)


async def test_handshakes_are_shared_out_and_never_none(mock_clock: MockClock) -> None:
    rig = Rig(9, 9, 9, handshakes=4)
    for gate, entry in [(gate, gate.enter(None)) for gate in rig.gates for _ in range(2)]:
        assert not gate.has_room
        assert entry.host is None
    rig = Rig(9, 9, handshakes=1)
    rig.enter()
    assert not rig.gates[0].has_room
    assert rig.gates[1].has_room


async def test_no_bound(mock_clock: MockClock) -> None:
    rig = Rig(600, handshakes=0, handshake_rate=0, clients_per_address=0, clients_per_identity=0)
    for _ in range(600):
        assert rig.enter().prove(Identity(psk="a"))
    assert not rig.gates[0].has_room


async def test_waiting_ends_when_there_is_room(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    rig = Rig(1)
    (gate,) = rig.gates
    entry = rig.enter()
    assert entry.prove(Identity())
    found: list[float] = []

    async def wait() -> None:
        while not await gate.wait_for_room("l"):
            pass
        found.append(trio.current_time())

    mock_clock.autojump_threshold = 0
    nursery.start_soon(wait)
    await trio.sleep(100)  # a proven client is never put out, however long others wait
    assert (found, rig.out) == ([], [])
    entry.close()
    await trio.sleep(0.01)
    assert found == [pytest.approx(100.0)]


async def test_with_others_it_says_that_it_is_full(mock_clock: MockClock) -> None:
    """Of slots or of handshakes: it is not waited for then."""
    rig = Rig(9, 9, handshakes=4)
    first, second = rig.gates
    rig.enter()
    assert first.others_first
    for _ in range(3):
        assert rig.enter(worker=1).prove(Identity())
    assert not first.others_first
    assert second.others_first  # it has three, and the other has room and one
    entry = rig.enter()
    assert not first.has_room
    assert first.others_first
    assert not second.others_first  # the other has two, but no room for another handshake
    entry.close()
    assert second.others_first


# ---------------------------------------------------------------- who makes room


async def test_the_oldest_goes_when_it_is_no_longer_new(mock_clock: MockClock) -> None:
    rig = Rig(2)
    (gate,) = rig.gates
    oldest = rig.enter("192.0.2.1")
    mock_clock.jump(NEW_S / 2)
    younger = rig.enter("192.0.2.2")
    mock_clock.jump(NEW_S / 2 - 0.01)
    assert await waits(gate)
    mock_clock.jump(0.02)
    assert not await waits(gate)
    newest = rig.enter("192.0.2.3")
    assert rig.out == [oldest]
    assert not oldest.is_open
    oldest.close()  # as its session ends
    assert await waits(gate)
    assert younger.prove(Identity())
    assert newest.prove(Identity())
    mock_clock.jump(1000)
    assert await waits(gate)


async def test_who_is_put_out_proves_nothing_any_more(mock_clock: MockClock) -> None:
    """Its place is another's already, though its session may be about to find out who it is."""
    rig = Rig(1, clients_per_identity=1)
    one = rig.enter()
    mock_clock.jump(2)
    other = rig.enter()
    assert rig.out == [one]
    assert not one.prove(Identity(psk="a"))
    assert other.prove(Identity(psk="a"))


async def test_a_flood_pushes_itself_out(mock_clock: MockClock) -> None:
    """The address with most of them makes room, and not who has been here for longest."""
    rig = Rig(6)
    good = rig.enter("198.51.100.7")
    flood = [rig.enter("192.0.2.1") for _ in range(5)]
    mock_clock.jump(2)
    for number in range(3):
        rig.enter("192.0.2.1")
        assert rig.out == flood[: number + 1]
    assert good.prove(Identity())


async def test_the_longer_somebody_waits_the_sooner_it_is_their_turn(
    mock_clock: MockClock,
) -> None:
    """Two and a half thousand silent clients are through in ten seconds; and at once it is as
    before when nobody waits."""
    rig = Rig(100, handshake_rate=0)
    (gate,) = rig.gates
    mock_clock.autojump_threshold = 0
    for number in range(2500):
        while not await gate.wait_for_room("l"):
            pass
        rig.enter(f"2001:db8:{number:x}::1")
    assert trio.current_time() < 10
    gate.nobody_waits("another")
    mock_clock.autojump_threshold = 1e9
    mock_clock.jump(0.2)
    assert not await waits(gate)
    gate.nobody_waits("l")
    assert await waits(gate)


async def test_nobody_is_put_out_for_who_is_refused(mock_clock: MockClock) -> None:
    rig = Rig(2, handshake_rate=1, clients_per_address=2)
    rig.enter("192.0.2.1")
    rig.enter("192.0.2.1")
    mock_clock.jump(60)
    assert not await waits(rig.gates[0])
    for _ in range(5):
        assert rig.refused("192.0.2.1") is Refusal.HANDSHAKE_RATE
    assert rig.out == []


# ---------------------------------------------------------------- by address


async def test_of_one_address_with_all_workers(mock_clock: MockClock) -> None:
    rig = Rig(9, 9, clients_per_address=2)
    first, _ = rig.enter("192.0.2.1"), rig.enter("::ffff:192.0.2.1", worker=1)
    for worker in (0, 1):
        assert rig.refused("192.0.2.1", worker) is Refusal.TOO_MANY_CLIENTS
    rig.enter("192.0.2.2")
    first.close()
    rig.enter("192.0.2.1", worker=1)
    assert rig.refused("192.0.2.1") is Refusal.TOO_MANY_CLIENTS
    for _ in range(5):
        rig.enter(None)  # a Unix socket has no addresses


async def test_of_a_dead_worker_nothing_is_counted(mock_clock: MockClock) -> None:
    rig = Rig(9, 9, clients_per_address=2, clients_per_identity=2)
    for _ in range(2):
        assert rig.enter("192.0.2.1").prove(Identity(psk="a"))
    assert rig.refused("192.0.2.1", 1) is Refusal.TOO_MANY_CLIENTS
    rig.places.clear(0)
    rig.gates[0] = rig.gate(0)
    for worker in (0, 1):
        assert rig.enter("192.0.2.1", worker).prove(Identity(psk="a"))
    for worker in (0, 1):
        assert rig.refused("192.0.2.1", worker) is Refusal.TOO_MANY_CLIENTS


async def test_silent_ones_of_an_address_keep_their_neighbours_out_for_a_moment_only(
    mock_clock: MockClock,
) -> None:
    rig = Rig(9, clients_per_address=2)
    proven, silent = rig.enter(), rig.enter()
    assert proven.prove(Identity())
    mock_clock.jump(NEW_S - 0.1)
    assert rig.refused("192.0.2.1") is Refusal.TOO_MANY_CLIENTS
    mock_clock.jump(0.2)
    neighbour = rig.enter()
    assert rig.out == [silent]
    assert neighbour.prove(Identity())
    mock_clock.jump(60)
    assert rig.refused("192.0.2.1") is Refusal.TOO_MANY_CLIENTS


async def test_rate_of_an_address(mock_clock: MockClock) -> None:
    rig = Rig(100, 100, handshake_rate=2, handshakes=0)
    for worker in (0, 1, 0, 1):
        rig.enter("2001:db8::1", worker)
    assert rig.refused("2001:db8::1") is Refusal.HANDSHAKE_RATE
    # All of a /64 is one address: whoever has one of them has all.
    assert rig.refused("2001:db8::ffff:2", 1) is Refusal.HANDSHAKE_RATE
    rig.enter("2001:db8:0:1::1")
    rig.enter(None)
    rig.now += 0.5
    rig.enter("2001:db8::2", 1)
    assert rig.refused("2001:db8::1") is Refusal.HANDSHAKE_RATE


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%lo", True),
        ("::ffff:192.0.2.1", "::fffe:192.0.2.1", False),
        ("::1", "0.0.0.0", False),
    ],
)
def test_what_is_one_address(one: str, other: str, same: bool) -> None:
    assert (group_of(one) == group_of(other)) is same


# ---------------------------------------------------------------- by identity


async def test_of_one_identity_with_all_workers(mock_clock: MockClock) -> None:
    rig = Rig(9, 9, clients_per_identity=2)
    alice, bob = Identity(spki="a1"), Identity(spki="b0")
    first = rig.enter()
    assert first.prove(alice)
    assert rig.enter(worker=1).prove(dataclasses.replace(alice, common_name="renewed"))
    late = rig.enter(worker=1)
    assert not late.prove(alice)
    assert not late.proven
    assert rig.enter(worker=1).prove(bob)
    late.close()
    first.close()
    assert rig.enter().prove(alice)
    assert not rig.enter().prove(alice)


async def test_anonymous_clients_are_not_one_identity(mock_clock: MockClock) -> None:
    rig = Rig(9, clients_per_identity=1)
    for _ in range(5):
        assert rig.enter().prove(Identity())


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (Identity(), b""),
        (Identity(spki="ab", psk="x", uid=0), b"key ab"),
        (Identity(psk="vm1", uid=0), b"psk vm1"),
        (Identity(psk=""), b"psk "),
        (Identity(psk="d\u00efsk"), "psk d\u00efsk".encode()),
        (Identity(uid=0, gid=0), b"uid 0"),
    ],
)
def test_who_is_one(identity: Identity, name: bytes) -> None:
    assert name_of(identity) == name
