"""gateway.session for clients that know only the oldstyle handshake, and what upgrades they get."""

from __future__ import annotations

import dataclasses
import logging
import socket
import struct
import threading

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.access import Rules
from gateway.nbd.upgrades import NO_UPGRADES
from gateway.session import Session
from gateway.settings import Settings
from gateway.trust import Keeper, Trust
from tests import session_rig
from tests.session_rig import DISC, Front, Log, in_thread, over, read_works
from tests.support.fake_upstream import ALL_FEATURES, MIB, FakeUpstream, Link, Script, pattern
from tests.support.rawclient import (
    CLISERV,
    NBDMAGIC,
    TIMEOUT_S,
    Cmd,
    Err,
    Opt,
    RawClient,
    Rep,
    Request,
    Tf,
    option,
)

fake, context = session_rig.fake, session_rig.context
front, log = session_rig.front, session_rig.log

STYLES = ["fixed", "newstyle", "oldstyle"]
GREETING = struct.Struct(">QQQI124s")
NO_DF = ALL_FEATURES & ~Tf.SEND_DF


@pytest.fixture
def settings(fake: FakeUpstream) -> Settings:
    return Settings(str(fake.path), None, oldstyle=True)


@pytest.fixture(autouse=True)
def plain(front: Front) -> None:
    front.switch_tls_off()


class Held(Script):
    """Does not greet before it is told to."""

    def __init__(self, **changes: object) -> None:
        super().__init__(**changes)
        self.go_on = threading.Event()

    def serve(self, link: Link) -> None:
        self.go_on.wait(2 * TIMEOUT_S)  # longer than a client waits
        super().serve(link)


def greeting(client: RawClient) -> tuple[int, int]:
    """Size and flags, as proto.md, "Oldstyle negotiation" draws them."""
    magic, version, size, flags, zeroes = GREETING.unpack(client.recv_exactly(GREETING.size))
    assert (magic, version) == (NBDMAGIC, CLISERV)
    assert zeroes == bytes(124)
    return size, flags


async def opened(front: Front) -> tuple[RawClient, int]:
    """A client in transmission, and the flags that it was told."""
    client = await front.raw()
    size, flags = await in_thread(greeting, client)
    assert size == MIB
    return client, flags


@pytest.mark.parametrize("style", STYLES)
async def test_from_accept_to_disconnect(
    front: Front, fake: FakeUpstream, log: Log, style: str
) -> None:
    """Old to new, and old to old."""
    fake.script = Script(style=style)
    client, flags = await opened(front)
    assert flags == NO_DF
    await in_thread(read_works, client)
    client.send(DISC)
    assert await over(front, client) == "fin"
    assert log.end == "client disconnected"
    assert log.closed["detail"] is None
    assert (int(log.closed["received"]), int(log.closed["sent"])) == (56, 152 + 16 + 512)
    (record,) = log.lines(": open: ")
    assert "export '', 1048576 bytes, read-write, anonymous, no TLS" in record.getMessage()
    assert (await in_thread(fake.wait_end)).end == "disc"
    assert fake.connects == 1


@pytest.mark.parametrize("name", ["", "disk"])
async def test_export_is_the_configured_one(front: Front, fake: FakeUpstream, name: str) -> None:
    front.settings = dataclasses.replace(front.settings, export=name)
    fake.script.names = (b"other", name.encode())
    await opened(front)
    assert fake.links[0].export == name.encode()


async def test_requests_that_do_not_wait_for_the_greeting(front: Front, fake: FakeUpstream) -> None:
    """They are the first of the transmission phase, in one piece or not."""
    fake.script = held = Held()
    client = await front.raw()
    asked = Request(Cmd.READ, 1024, 512, cookie=5).pack()
    client.send(asked + asked[:10])
    await in_thread(fake.wait_link)
    held.go_on.set()
    assert await in_thread(greeting, client) == (MIB, NO_DF)
    client.send(asked[10:])
    for _ in range(2):
        assert (await in_thread(client.recv_exactly, 16 + 512))[16:] == pattern(1024, 512)


async def test_read_only(front: Front, fake: FakeUpstream, log: Log) -> None:
    front.settings = dataclasses.replace(front.settings, read_only=True)
    client, flags = await opened(front)
    assert flags & Tf.READ_ONLY
    client.send(Request(Cmd.WRITE, 0, 512, payload=bytes(512)).pack())
    _, error, _ = struct.unpack(">IIQ", await in_thread(client.recv_exactly, 16))
    assert error == Err.EPERM
    await in_thread(read_works, client)


async def test_client_that_speaks_newstyle(front: Front, log: Log) -> None:
    """Its flags and its option are no request."""
    client, _ = await opened(front)
    client.send(struct.pack(">I", 3) + option(Opt.LIST) + bytes(8))
    await over(front, client)
    assert log.end == "client broke the protocol"
    assert log.closed["detail"] == "request magic 0x00000003"


# ---------------------------------------------------------------- upgrades


@pytest.mark.parametrize("style", STYLES)
async def test_zeroes_and_fua_are_added(front: Front, fake: FakeUpstream, style: str) -> None:
    below = Tf.HAS_FLAGS | Tf.SEND_FLUSH
    fake.script = Script(style=style, flags=below)
    client, flags = await opened(front)
    assert flags == below | Tf.SEND_FUA | Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO
    client.send(Request(Cmd.WRITE_ZEROES, 4096, 8192, cookie=1, flags=1).pack())
    _, error, cookie = struct.unpack(">IIQ", await in_thread(client.recv_exactly, 16))
    assert (error, cookie) == (0, 1)
    (written, flushed) = fake.links[0].requests
    assert (written.cmd, written.offset, written.payload) == (Cmd.WRITE, 4096, bytes(8192))
    assert (written.flags, flushed.cmd) == (0, Cmd.FLUSH)


async def test_nothing_is_added_if_not_wanted(front: Front, fake: FakeUpstream) -> None:
    front.settings = dataclasses.replace(front.settings, upgrades=NO_UPGRADES)
    below = Tf.HAS_FLAGS | Tf.SEND_FLUSH
    fake.script.flags = below
    fake.script.block_sizes = None
    _, flags = await opened(front)
    assert flags == below
    assert [opt for opt, _ in fake.links[0].options] == [Opt.GO]


async def test_block_sizes_are_learnt(front: Front, fake: FakeUpstream) -> None:
    """For a client that cannot even be told of them."""

    class Quiet(Script):
        def infos(self, link: Link) -> list[bytes]:
            info = link.options[-1][0] == Opt.INFO
            return super().infos(link)[: 1 + info]

    fake.script = Quiet(block_sizes=(1, 512, 4096))
    client, _ = await opened(front)
    client.send(Request(Cmd.READ, 512, 10_000, cookie=1).pack())
    assert (await in_thread(client.recv_exactly, 16 + 10_000))[16:] == pattern(512, 10_000)
    assert [opt for opt, _ in fake.links[0].options] == [Opt.INFO, Opt.GO]
    assert [one.length for one in fake.links[0].requests] == [4096, 4096, 10_000 - 8192]


# ---------------------------------------------------------------- closing is the only "no"


async def test_refusal(front: Front, fake: FakeUpstream, log: Log) -> None:
    class Policy(Script):
        def option(self, link: Link, opt: int, data: bytes) -> bool:
            self.reply(link, opt, Rep.ERR_POLICY, b"not\ntoday")
            return False

    fake.script = Policy()
    assert await over(front, await front.raw()) == "fin"
    assert log.end == "export refused"
    assert log.closed["detail"] == "export '': the NBD server refuses"
    assert (await in_thread(fake.wait_end)).end in ("abort", "reset")


async def test_upstream_that_is_not_there(front: Front, fake: FakeUpstream, log: Log) -> None:
    front.settings = dataclasses.replace(front.settings, socket=str(fake.path) + "-nowhere")
    assert await over(front, await front.raw()) == "fin"
    assert log.end == "export refused"
    assert log.closed["detail"] == "export '': the NBD server behind cannot be reached"
    (warning,) = log.lines("upstream unavailable: ")
    assert warning.levelno == logging.WARNING
    assert "no such socket" in warning.getMessage()


async def test_upstream_that_is_silent(
    front: Front, fake: FakeUpstream, log: Log, mock_clock: MockClock
) -> None:
    """It has half the time that the whole handshake may take, whatever the client says."""

    class Silent(Script):
        def serve(self, link: Link) -> None:
            link.take_to_end()

    fake.script = Silent()
    client = await front.raw()
    client.send(Request(Cmd.READ, 0, 512).pack())
    await in_thread(fake.wait_link)
    await wait_all_tasks_blocked()
    mock_clock.jump(4.9)
    await wait_all_tasks_blocked()
    assert not log.lines(": closed: ")
    mock_clock.jump(0.2)
    assert (await in_thread(client.recv_to_end)) == b""
    client.close()
    await front.ended()
    assert log.end == "export refused"
    assert "cannot be reached" in log.closed["detail"]
    assert "did not answer within 5 s" in log.lines("upstream unavailable: ")[0].getMessage()
    assert (await in_thread(fake.wait_end)).end in ("eof", "reset")


async def test_deadline_holds(
    front: Front, fake: FakeUpstream, log: Log, mock_clock: MockClock
) -> None:
    """Even if the clock jumps past both at once."""
    fake.script = held = Held()
    client = await front.raw()
    await in_thread(fake.wait_link)
    await wait_all_tasks_blocked()
    mock_clock.jump(10.1)
    await over(front, client)
    assert log.end == "handshake timeout"
    held.go_on.set()
    await in_thread(fake.wait_end)


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_client_leaves_with_the_greeting(
    front: Front, fake: FakeUpstream, log: Log, how: str
) -> None:
    client, _ = await opened(front)
    client.reset() if how == "RST" else client.close()
    await front.ended()
    assert log.end == "client left without a word"
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_client_leaves_before_the_greeting(front: Front, log: Log) -> None:
    """Which is then written to nobody, or refused by its kernel."""
    (await front.raw()).reset()
    await front.ended()
    assert log.end in ("client left without a word", "probe")


@pytest.mark.parametrize("style", STYLES)
async def test_shutdown_while_the_upstream_is_awaited(
    front: Front, fake: FakeUpstream, log: Log, mock_clock: MockClock, style: str
) -> None:
    """There is nothing to say to the client but the end, and none to wait for. No time passes."""
    fake.script = held = Held(style=style)
    client = await front.raw()
    await in_thread(fake.wait_link)
    await wait_all_tasks_blocked()
    front.sessions[0].shutdown()
    assert await over(front, client) == "fin"
    assert log.end == "gateway shut down"
    held.go_on.set()
    await in_thread(fake.wait_end)


async def test_shutdown_in_transmission(front: Front, log: Log, fake: FakeUpstream) -> None:
    client, _ = await opened(front)
    front.sessions[0].shutdown()
    assert await over(front, client) == "fin"
    assert log.end == "gateway shut down"
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_shutdown_before_the_session_runs(settings: Settings, fake: FakeUpstream) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        session = Session(ours, "a client", "1", settings, Keeper(Trust(None, Rules())))
        session.shutdown()
        await session.run()
        assert theirs.recv(1) == b""
    assert fake.connects == 0


async def test_cancelled_while_the_upstream_is_awaited(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    fake.script = held = Held()
    client = await front.raw()
    await in_thread(fake.wait_link)
    await wait_all_tasks_blocked()
    front.scope.cancel()
    assert await over(front, client) == "fin"
    assert log.end == "gateway shut down"
    held.go_on.set()
    await in_thread(fake.wait_end)
