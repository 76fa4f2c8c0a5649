"""gateway.session: one client from accept to close, its upstream, and its deadline."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import re
import socket
import struct
from pathlib import Path

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.nbd.haggling import Haggling
from gateway.nbd.handshake import Handshake
from gateway.nbd.negotiation import Greeting, PlainHaggling
from gateway.nbd.upgrades import ALL_UPGRADES, NO_UPGRADES, Upgrade
from gateway.nbd.wire import option_reply
from gateway.upstream import Upstream
from tests import session_rig
from tests.session_rig import DISC, Front, Log, in_thread, over, read_works
from tests.support.fake_upstream import FakeUpstream, Script, pattern
from tests.support.rawclient import (
    Cmd,
    Err,
    Info,
    Opt,
    Rep,
    Request,
    Tf,
    info_data,
    option,
    tls_context,
)

fake, context, settings = session_rig.fake, session_rig.context, session_rig.settings
front, log = session_rig.front, session_rig.log


# ---------------------------------------------------------------- good sessions


async def test_from_accept_to_disconnect(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.opened()
    await in_thread(read_works, client)
    client.send(DISC)
    assert await over(front, client) == "close_notify"
    assert log.end == "client disconnected"
    assert log.closed["detail"] is None
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_line_at_the_opening(front: Front, log: Log) -> None:
    await front.opened()
    (record,) = log.lines(": open: ")
    assert record.levelno == logging.INFO
    assert re.fullmatch(
        r"\[1\] 127\.0\.0\.1:\d+: open: export '', 1048576 bytes, read-write, "
        r"CN=client sha256:[0-9a-f]{16}, TLSv1\.3 TLS_\w+",
        record.getMessage(),
    )


async def test_bytes_are_counted_above_tls(front: Front, log: Log) -> None:
    client = await front.opened()
    for _ in range(10):
        await in_thread(read_works, client)
    client.send(DISC)
    await over(front, client)
    haggled = 16 + 6, 20 + 12 + 20
    assert int(log.closed["received"]) == haggled[0] + 11 * 28
    assert int(log.closed["sent"]) == haggled[1] + 10 * (16 + 512)


async def test_first_request_comes_with_the_last_option(front: Front) -> None:
    client = await front.inside()
    asked = Request(Cmd.READ, 0, 512, cookie=5)
    client.send(option(Opt.GO, info_data()) + asked.pack() + DISC[:10])
    replies = await in_thread(client.replies, Opt.GO)
    assert replies[-1].type == Rep.ACK
    assert (await in_thread(client.recv_exactly, 16 + 512))[16:] == pattern(0, 512)
    client.send(DISC[10:])
    await over(front, client)


@pytest.mark.parametrize("opt", [Opt.INFO, Opt.GO])
async def test_replies_to_one_option_come_in_one_record(front: Front, opt: Opt) -> None:
    client = await front.inside()
    client.send(option(opt, info_data()))
    raw = await in_thread(client.recv_some)  # never more than one record
    assert raw.endswith(option_reply(opt, Rep.ACK))
    assert len(raw) == 20 + 12 + 20


async def test_nothing_of_the_negotiation_is_kept(front: Front) -> None:
    """An open disk may be idle for months, and there may be thousands of them."""
    kinds = {Greeting, PlainHaggling, Haggling, Upstream, Handshake}

    def alive() -> set[int]:
        gc.collect()
        return {id(one) for one in gc.get_objects() if type(one) in kinds}

    await front.opened()
    before = alive()
    await front.inside()
    assert alive() - before  # they can be found
    before = alive()
    await front.opened()
    assert not alive() - before


async def test_socket_options(front: Front) -> None:
    await front.raw()
    sock = front.sessions[0]._channel.socket
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


async def test_read_only(front: Front, fake: FakeUpstream, log: Log) -> None:
    front.settings = dataclasses.replace(front.settings, read_only=True)
    client = await front.inside()
    export = await in_thread(client.go)
    assert export.flags & Tf.READ_ONLY
    client.send(Request(Cmd.WRITE, 0, 512, payload=bytes(512)).pack())
    _, error, _ = struct.unpack(">IIQ", await in_thread(client.recv_exactly, 16))
    assert error == Err.EPERM
    assert ", read-only, " in log.lines(": open: ")[0].getMessage()
    assert not fake.links[0].requests


async def test_without_tls(front: Front, log: Log) -> None:
    """On the same port, in the clear: for loopback, as --tls off has it."""
    front.switch_tls_off()
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) in (Rep.ERR_POLICY, Rep.ERR_UNSUP)
    await in_thread(client.go)
    await in_thread(read_works, client)
    client.send(DISC)
    assert await over(front, client) == "fin"
    assert "anonymous, no TLS" in log.lines(": open: ")[0].getMessage()


async def test_export_of_another_name(front: Front, fake: FakeUpstream, log: Log) -> None:
    """Any other name than ours is unknown, and nobody is asked about it."""
    front.settings = dataclasses.replace(front.settings, export="disk")
    fake.script.names = (b"disk",)
    client = await front.inside()
    assert await in_thread(client.verdict, Opt.GO, info_data(b"other")) == Rep.ERR_UNKNOWN
    assert fake.connects == 0
    await in_thread(client.go, b"disk")
    assert fake.links[0].export == b"disk"
    client.send(DISC)
    await over(front, client)


async def test_name_of_an_export_stays_on_its_line(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    front.settings = dataclasses.replace(front.settings, export=None)
    fake.script.names = None
    client = await front.inside()
    await in_thread(client.go, b"a\nINFO [9] forged" + 200 * b"x")
    (record,) = log.lines(": open: ")
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 400
    assert fake.links[0].export == b"a\nINFO [9] forged" + 200 * b"x"


@pytest.mark.parametrize("upgrades", [ALL_UPGRADES, NO_UPGRADES])
async def test_upgrades_are_those_of_the_settings(
    front: Front, fake: FakeUpstream, upgrades: frozenset[Upgrade]
) -> None:
    front.settings = dataclasses.replace(front.settings, upgrades=upgrades)
    below = Tf.HAS_FLAGS | Tf.SEND_FLUSH
    fake.script = Script(structured=False, flags=below, block_sizes=(1, 512, 4096))
    client = await front.inside()
    verdict = await in_thread(client.verdict, Opt.STRUCTURED_REPLY)
    export = await in_thread(lambda: client.go(infos=[Info.BLOCK_SIZE]))
    if upgrades:
        zeroes = Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO
        assert verdict == Rep.ACK
        assert export.flags == below | zeroes | Tf.SEND_FUA | Tf.SEND_DF
        assert export.block_sizes == (1, 512, 1 << 25)
    else:
        assert verdict == Rep.ERR_UNSUP
        assert export.flags == below
        assert export.block_sizes == (1, 512, 4096)


# ---------------------------------------------------------------- the upstream


async def test_upstream_is_dialled_after_tls_and_identity_only(
    front: Front, fake: FakeUpstream, pki: Path
) -> None:
    client = await front.greeted()
    for opt in (Opt.LIST, Opt.INFO, Opt.GO, Opt.STRUCTURED_REPLY):
        assert await in_thread(client.verdict, opt) == Rep.ERR_TLS_REQD
    client.close()
    client = await front.greeted()
    await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
    assert "ALERT" in await over(front, client)
    await front.inside()
    assert fake.connects == 0


async def test_upstream_that_is_not_there(front: Front, fake: FakeUpstream, log: Log) -> None:
    """Each option is refused in words, and works as soon as the upstream is there."""
    front.settings = dataclasses.replace(front.settings, socket=str(fake.path) + "-later")
    client = await front.inside()
    for _ in range(2):
        *_, last = await in_thread(client.ask, Opt.GO, info_data())
        assert last.failed
        assert b"cannot be reached" in last.data
    warnings = [one for one in log.lines("upstream unavailable") if one.levelno > logging.DEBUG]
    assert len(warnings) == 1
    assert warnings[0].getMessage().startswith("[1] 127.0.0.1:")
    os.rename(fake.path, str(fake.path) + "-later")
    await in_thread(client.go)
    await in_thread(read_works, client)


async def test_upstream_dies(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.opened()
    fake.links[0].hang_up()
    client.send(Request(Cmd.READ, 0, 512, cookie=3).pack())
    assert await in_thread(client.recv_exactly, 16) == struct.pack(
        ">IIQ", 0x67446698, Err.ESHUTDOWN, 3
    )
    client.send(DISC)
    assert await over(front, client) == "close_notify"
    assert log.end == "upstream lost"


# ---------------------------------------------------------------- the deadline


@pytest.mark.parametrize("phase", ["raw", "greeted", "STARTTLS", "inside", "ask"])
async def test_one_deadline_from_accept_to_go(
    front: Front, fake: FakeUpstream, log: Log, mock_clock: MockClock, phase: str
) -> None:
    """However far a client has come, and whatever it says meanwhile."""
    match phase:
        case "raw":
            client = await front.raw()
        case "inside" | "ask":
            client = await front.inside()
        case _:
            client = await front.greeted()
    if phase == "STARTTLS":
        assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    for _ in range(9):
        mock_clock.jump(1.1)
        if phase == "ask":
            assert await in_thread(client.verdict, Opt.LIST) == Rep.ACK
        else:
            await wait_all_tasks_blocked()
        assert not log.lines(": closed: ")
    mock_clock.jump(0.2)
    await in_thread(client.recv_to_end)
    client.close()
    await front.ended()
    assert log.end == "handshake timeout"
    assert fake.connects == (phase == "ask")


async def test_no_deadline_after_go(front: Front, log: Log, mock_clock: MockClock) -> None:
    """Idle disks are normal."""
    client = await front.opened()
    mock_clock.jump(1_000_000)
    await wait_all_tasks_blocked()
    await in_thread(read_works, client)
    client.send(DISC)
    await over(front, client)


async def test_client_that_trickles(front: Front, log: Log, mock_clock: MockClock) -> None:
    """A byte now and then buys no time."""
    client = await front.greeted()
    for byte in option(Opt.LIST, bytes(100))[:10]:
        mock_clock.jump(1.01)
        client.try_send(bytes([byte]))
        await wait_all_tasks_blocked()
    await in_thread(client.recv_to_end)
    client.close()
    await front.ended()
    assert log.end == "handshake timeout"


# ---------------------------------------------------------------- making room


async def test_who_has_proved_nothing_may_be_put_out(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert not front.sessions[0].proven
    front.sessions[0].evict()
    await over(front, client)
    assert log.end == "handshake timeout"
    assert log.closed["detail"] == "timeout: others wait for its place"


async def test_who_is_inside_tls_is_safe(front: Front) -> None:
    await front.inside()
    await front.opened()
    front.switch_tls_off()
    await front.greeted()
    await wait_all_tasks_blocked()
    assert all(one.proven for one in front.sessions)
