"""When a session may wait in the kernel by itself, and what it leaves to others: all in our hands.

The clock of turns is a fake; the peers of the relay are scripted. Those that are quick enough to
answer in the middle of a turn are in `test_relay_turns`.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway import buffers as pool
from gateway import relay, turns
from gateway.errors import SessionEnd
from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Terms
from gateway.nbd.upgrades import Capabilities
from gateway.turns import Attention, Luck
from tests import relay_rig
from tests.relay_rig import (
    BOTH_STYLES,
    DISC,
    FEATURES,
    MIB,
    READ_ONLY,
    Lane,
    Peer,
    Rig,
    reads,
    write,
)
from tests.support.fake_upstream import DONE, data_chunk, pattern, simple
from tests.support.rawclient import SIMPLE, Cmd, Ct, Err, Request

lane = relay_rig.lane  # the fixture

AT_ONCE = 180_000  # bytes that a peer can send at once
ROOM = 64 << 10  # of a socket that is full before that, in bytes
WOKEN_TOGETHER = pytest.mark.parametrize("attempt", range(6))  # which runs first is luck


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    return clock


def test_attention_is_undivided_once_nobody_else_was_busy_for_a_while(clock: Clock) -> None:
    attention, one, other = Attention(), object(), object()
    assert not attention.undivided(one)
    clock.now += 0.049
    assert not attention.undivided(one)
    clock.now += 0.002
    assert attention.undivided(one)
    assert not attention.undivided(other)
    assert not attention.undivided(one)
    clock.now += 0.051
    assert attention.undivided(one)


def test_two_busy_sessions_never_have_it(clock: Clock) -> None:
    attention, one, other = Attention(), object(), object()
    for _ in range(100):
        clock.now += 0.01
        assert not attention.undivided(one)
        assert not attention.undivided(one)
        clock.now += 0.03
        assert not attention.undivided(other)


def test_a_session_that_is_over_is_not_remembered(clock: Clock) -> None:
    attention, one = Attention(), object()
    attention.undivided(one)
    attention.forget(object())
    clock.now += 1
    assert attention.undivided(one)
    attention.forget(one)
    assert not attention.undivided(one)


def test_luck_leaves_looks_out_after_misses_in_a_row() -> None:
    luck, pauses = Luck(), []
    for _ in range(8):
        pauses.append(0)
        while not luck.worth_it():
            pauses[-1] += 1
        luck.found(False)
    assert pauses == [0, 0, 0, 8, 16, 32, 64, 64]


def test_one_hit_makes_up_for_all_misses() -> None:
    luck = Luck()
    for _ in range(10):
        luck.found(False)
    while not luck.worth_it():
        pass
    luck.found(True)
    for _ in range(2):
        assert luck.worth_it()
        luck.found(False)
    assert luck.worth_it()


# ---------------------------------------------------------------- what is handed over


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The buffers that are borrowed and not given back."""
    out: set[int] = set()
    borrow, give_back = pool._borrow, pool._give_back

    def counted(size: int) -> bytearray:
        buffer = borrow(size)
        assert id(buffer) not in out, "lent twice"
        out.add(id(buffer))
        return buffer

    def counted_back(buffer: bytearray) -> None:
        out.remove(id(buffer))
        give_back(buffer)

    monkeypatch.setattr(pool, "_borrow", counted)
    monkeypatch.setattr(pool, "_give_back", counted_back)
    return out


def narrow(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)


def answer(request: Request, *, structured: bool) -> bytes:
    data = pattern(request.offset, request.length)
    if structured:
        return data_chunk(request.cookie, request.offset, data, flags=DONE)
    return simple(request.cookie, 0, data)


async def one_handed_over(lane: Lane, *, structured: bool = False) -> tuple[Rig, Request]:
    """A session whose client has begun to get the only reply, and does not read on."""
    rig = await lane(structured=structured)
    narrow(rig.near[0].socket)
    (one,) = reads(1, AT_ONCE)
    await rig.client.ask(one)
    seen = await rig.upstream.request()
    await rig.upstream.send(answer(seen, structured=structured))
    await wait_all_tasks_blocked()
    assert rig.near[1].bytes_read > rig.near[0].bytes_written > 0
    return rig, one


@BOTH_STYLES
@pytest.mark.parametrize("how", ["disc", "eof", "shutdown"])
async def test_the_end_waits_for_what_is_handed_over_and_no_longer(
    lane: Lane, structured: bool, how: str
) -> None:
    rig, one = await one_handed_over(lane, structured=structured)
    if how == "disc":
        await rig.client.send(DISC)
    elif how == "eof":
        rig.client.leave()
    else:
        rig.relay.shutdown()
    await wait_all_tasks_blocked()
    assert rig.end is None
    await rig.client.read_reply(one, structured=structured)
    assert await rig.client.to_end() == b""
    assert await rig.upstream.to_end() == DISC
    ends = {"disc": SessionEnd.DISCONNECTED, "eof": SessionEnd.CLIENT_LEFT}
    assert await rig.ended() is ends.get(how, SessionEnd.SHUTDOWN)


async def test_upstream_that_shuts_down_is_left_though_its_last_reply_was_handed_over(
    lane: Lane,
) -> None:
    rig = await lane()
    narrow(rig.near[0].socket)
    asked = [*reads(1, AT_ONCE), Request(Cmd.FLUSH, cookie=1)]
    await rig.client.ask(*asked)
    first, second = [await rig.upstream.request() for _ in asked]
    await rig.upstream.send(answer(first, structured=False) + simple(second.cookie, Err.ESHUTDOWN))
    await wait_all_tasks_blocked()
    assert await rig.client.reply(asked) == (asked[0].cookie, 0)
    assert await rig.client.reply(asked) == (1, Err.ESHUTDOWN)
    assert await rig.upstream.to_end() == DISC
    await rig.client.send(DISC)
    assert await rig.ended() is SessionEnd.UPSTREAM_LOST


@BOTH_STYLES
async def test_lost_upstream_is_told_behind_what_is_handed_over(
    lane: Lane, structured: bool
) -> None:
    rig, one = await one_handed_over(lane, structured=structured)
    flush = Request(Cmd.FLUSH, cookie=1)
    await rig.client.ask(flush)
    await rig.upstream.request()
    rig.upstream.channel.close()
    await wait_all_tasks_blocked()
    await rig.client.read_reply(one, structured=structured)
    if structured:
        assert (await rig.client.chunk())[:3] == (DONE, Ct.ERROR, 1)
    else:
        assert await rig.client.reply([flush]) == (1, Err.ESHUTDOWN)
    await rig.client.send(DISC)
    assert await rig.ended() is SessionEnd.UPSTREAM_LOST


async def test_requests_go_on_while_replies_are_handed_over(
    lane: Lane, nursery: trio.Nursery
) -> None:
    rig, one = await one_handed_over(lane)
    more = [write(MIB, 2), Request(Cmd.FLUSH, cookie=3)]
    nursery.start_soon(rig.client.ask, *more)
    seen = [await rig.upstream.request() for _ in more]
    assert seen[0].payload == more[0].payload
    await rig.upstream.answer_all(seen)
    await rig.client.read_reply(one, structured=False)
    assert [await rig.client.reply(more) for _ in more] == [(2, 0), (3, 0)]


# ---------------------------------------------------------------- while it looks

Looks = list[Callable[[], None]]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """What peers do while the relay looks: the first of it in the first look from now on."""
    acts: Looks = []
    look = relay.look

    def looked(*args: Any) -> tuple[bool, bool]:
        if acts:
            acts.pop(0)()
        return look(*args)

    monkeypatch.setattr(relay, "look", looked)
    return acts


def sends(peer: Peer, data: bytes) -> None:
    assert peer.channel.send_now(data) == len(data)


async def turn_at(lane: Lane, asked: list[Request], **how: Any) -> tuple[Rig, list[Request]]:
    """A session with requests in flight, and what the upstream saw of them."""
    rig = await lane(**how)
    await rig.client.ask(*asked)
    return rig, [await rig.upstream.request() for _ in asked]


ONLY_TURNS = pytest.mark.parametrize("lane", ["turns"], indirect=True)


@ONLY_TURNS
@BOTH_STYLES
async def test_refusal_while_half_a_reply_is_out(
    lane: Lane, meanwhile: Looks, structured: bool
) -> None:
    """Both come in one look; the refusal waits for the other half, which is another task's."""
    rig, seen = await turn_at(lane, reads(1, 9000), structured=structured, flags=READ_ONLY)
    message = answer(seen[0], structured=structured)
    refused, late = write(512, 77), Request(Cmd.READ, 0, 512, 78)

    def both() -> None:
        sends(rig.upstream, message[:5000])
        sends(rig.client, refused.pack() + late.pack())

    meanwhile += [both]
    await rig.client.ask(Request(Cmd.FLUSH, cookie=5))
    for cmd in (Cmd.FLUSH, Cmd.READ):
        assert (await rig.upstream.request()).cmd == cmd
    await wait_all_tasks_blocked()
    assert not meanwhile
    await rig.upstream.send(message[5000:])
    await rig.client.read_reply(reads(1, 9000)[0], structured=structured)
    if structured:
        assert (await rig.client.chunk())[:3] == (DONE, Ct.ERROR, 77)
    else:
        assert await rig.client.reply([refused]) == (77, Err.EPERM)


@ONLY_TURNS
@pytest.mark.parametrize("end", ["vanishes", "disc", "nonsense"])
async def test_client_that_ends_while_a_reply_comes(
    lane: Lane, meanwhile: Looks, lent: set[int], end: str
) -> None:
    """In one look. The upstream is left in order, and nothing stays borrowed."""
    rig, seen = await turn_at(lane, reads(2, 9000))

    def both() -> None:
        sends(rig.upstream, answer(seen[0], structured=False))
        if end == "vanishes":
            rig.client.channel.close()
        else:
            sends(rig.client, DISC if end == "disc" else bytes(28))

    meanwhile += [both]
    await rig.client.ask(Request(Cmd.FLUSH, cookie=5))
    seen.append(await rig.upstream.request())
    await wait_all_tasks_blocked()
    assert not meanwhile
    if end == "disc":
        assert rig.upstream.has_nothing()
    await rig.upstream.answer_all(seen[1:])
    assert await rig.upstream.to_end() == DISC
    ends = {"vanishes": SessionEnd.CLIENT_LEFT, "disc": SessionEnd.DISCONNECTED}
    assert await rig.ended() is ends.get(end, SessionEnd.CLIENT_BROKE_PROTOCOL)
    assert not lent


@ONLY_TURNS
async def test_turn_that_waits_holds_no_empty_buffer(
    lane: Lane, meanwhile: Looks, lent: set[int]
) -> None:
    """A client has said goodbye, and the upstream takes its time."""
    rig, seen = await turn_at(lane, reads(2, 512))

    def both() -> None:
        sends(rig.upstream, answer(seen[0], structured=False))
        sends(rig.client, DISC)

    meanwhile += [both]
    await rig.client.ask(Request(Cmd.FLUSH, cookie=5))
    seen.append(await rig.upstream.request())
    await wait_all_tasks_blocked()
    assert not meanwhile
    assert not lent
    await rig.upstream.answer_all(seen[1:])
    assert await rig.ended() is SessionEnd.DISCONNECTED


# ---------------------------------------------------------------- nothing behind what was cut

# A deadline is looked at behind the sockets: tasks that these have woken still run until they wait.
# So when one task is cut in the middle of a message, another may be about to send the next.


def cut_now(rig: Rig, full: Peer, *sends: tuple[Peer, bytes]) -> bytes:
    """The session's deadline is over. Its peers have just sent something, and `full` has read a
    bit, so that there is room for more, but not so much that who waits for it is told.

    Returns what was read.
    """
    got = b"".join(full.channel.socket.recv(ROOM // 4) for _ in range(5))
    for peer, data in sends:
        assert peer.channel.send_now(data) == len(data)
    rig.scope.deadline = -math.inf
    return got


@WOKEN_TOGETHER
@pytest.mark.parametrize("length", [AT_ONCE, MIB], ids=["whole", "half"])
async def test_no_reply_behind_one_that_was_cut(lane: Lane, length: int, attempt: int) -> None:
    """Neither the next one, nor what comes later of the same."""
    rig = await lane()
    narrow(rig.near[0].socket)
    asked = reads(2, length)
    await rig.client.ask(*asked)
    message = b""
    for _ in asked:
        message += answer(await rig.upstream.request(), structured=False)
    await rig.upstream.send(message[: SIMPLE.size + AT_ONCE])
    await wait_all_tasks_blocked()
    behind = message[SIMPLE.size + AT_ONCE :][:30_000]
    got = cut_now(rig, rig.client, (rig.upstream, behind))
    got += await rig.client.to_end()
    assert got[: SIMPLE.size] == simple(asked[0].cookie)
    assert got[SIMPLE.size :] == message[SIMPLE.size : len(got)]
    assert len(got) <= SIMPLE.size + AT_ONCE


@WOKEN_TOGETHER
async def test_no_local_reply_behind_a_reply_that_was_cut(lane: Lane, attempt: int) -> None:
    rig = await lane(flags=READ_ONLY)
    narrow(rig.near[0].socket)
    (one,) = reads(1, AT_ONCE)
    await rig.client.ask(one)
    seen = await rig.upstream.request()
    message = answer(seen, structured=False)
    await rig.upstream.send(message)
    await wait_all_tasks_blocked()
    got = cut_now(rig, rig.client, (rig.client, write(512, 77).pack()))
    got += await rig.client.to_end()
    assert len(got) < len(message)
    assert got[SIMPLE.size :] == pattern(0, AT_ONCE)[: len(got) - SIMPLE.size]


@WOKEN_TOGETHER
async def test_no_request_behind_a_follow_up_that_was_cut(lane: Lane, attempt: int) -> None:
    """The upstream would take it for the rest of the payload, and write it to the disk."""
    poor = int(TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH)
    rig = await lane(terms=Terms("", 1 << 40, FEATURES, upstream=Capabilities(poor), split=True))
    narrow(rig.near[1].socket)
    await rig.client.ask(Request(Cmd.WRITE_ZEROES, 0, 8 * MIB, 1))
    await wait_all_tasks_blocked()
    got = cut_now(rig, rig.upstream, (rig.client, write(4096, 2).pack()))
    await wait_all_tasks_blocked()
    rig.upstream.leave()  # or its answers would be waited for
    got += await rig.upstream.to_end()
    assert len(got) < 8 * MIB
    assert not got[28:].strip(b"\0")
