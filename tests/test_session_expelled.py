"""gateway.session after a reload: who is expelled and how it is cut, and who notices nothing."""

from __future__ import annotations

import logging
import struct
import threading

import pytest
from trio.testing import wait_all_tasks_blocked

from gateway.access import ExportRules
from gateway.errors import Refusal
from tests import session_rig
from tests.session_rig import DISC, Front, Log, in_thread, over, read_works, rules
from tests.support.fake_upstream import MIB, FakeUpstream, Link, Script, pattern
from tests.support.rawclient import Cmd, Opt, RawClient, Rep, Request, info_data, option
from tests.test_session_access import objecting

fake, context, settings = session_rig.fake, session_rig.context, session_rig.settings
front, log = session_rig.front, session_rig.log

US, OTHERS = rules("cn=client"), rules("cn=somebody-else")
WRITES = (ExportRules("disk", read_write=US),)
READS = (ExportRules("disk", read_write=OTHERS, read_only=US),)
ELSEWHERE = (ExportRules("other", read_write=US),)
NOWHERE = (ExportRules("disk", read_write=OTHERS),)


def quiet(log: Log) -> bool:
    return not [one for one in log._caplog.records if one.levelno >= logging.WARNING]


async def opened(front: Front, fake: FakeUpstream, **given: object) -> RawClient:
    """In transmission on "disk", by these rules."""
    fake.script.names = (b"disk", b"other")
    front.rules(**given)
    client = await front.inside()
    await in_thread(client.go, b"disk")
    await in_thread(read_works, client)
    return client


# ---------------------------------------------------------------- in transmission


@pytest.mark.parametrize("reason", [Refusal.REVOKED, Refusal.UNKNOWN_CA])
async def test_revoked(front: Front, fake: FakeUpstream, log: Log, reason: Refusal) -> None:
    client = await opened(front, fake, exports=WRITES)
    front.sessions[0].recheck(objecting(front.keeper.trust, reason), keep=False)
    assert await over(front, client) == "close_notify"
    assert log.end == "client no longer allowed"
    assert log.closed["detail"].startswith(f"{reason}: CN=client sha256:")
    assert (await in_thread(fake.wait_end)).end == "disc"
    assert quiet(log)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({}, {"allow": OTHERS}, "CN=client sha256:"),
        ({}, {"deny": US}, "CN=client sha256:"),
        ({"exports": WRITES}, {"exports": WRITES, "deny": US}, "CN=client sha256:"),
        ({"exports": WRITES}, {"exports": READS}, "may not write to export 'disk'"),
        ({"exports": WRITES}, {"exports": NOWHERE}, "may not open anything here"),
        ({"exports": WRITES}, {"exports": ELSEWHERE}, "may not open export 'disk'"),
        ({"exports": READS}, {"exports": ELSEWHERE}, "may not open export 'disk'"),
        ({"exports": WRITES}, {}, "may not open export 'disk'"),  # and "" is another one
    ],
)
async def test_no_longer_allowed(
    front: Front,
    fake: FakeUpstream,
    log: Log,
    before: dict[str, object],
    after: dict[str, object],
    why: str,
) -> None:
    if not before:
        client = await front.opened()
    else:
        client = await opened(front, fake, **before)
    front.reload(**after)
    assert await over(front, client) == "close_notify"
    assert log.end == "client no longer allowed"
    assert log.closed["detail"].startswith("not_allowed: ")
    assert why in log.closed["detail"]
    assert quiet(log)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({}, {"allow": US, "deny": OTHERS}),
        ({"exports": WRITES}, {"exports": WRITES}),
        ({"exports": WRITES}, {"exports": (*ELSEWHERE, *WRITES)}),
        ({"exports": READS}, {"exports": READS}),
        ({"exports": READS}, {"exports": WRITES}),  # it was told read-only, and stays so
    ],
)
async def test_who_is_still_allowed_notices_nothing(
    front: Front,
    fake: FakeUpstream,
    log: Log,
    before: dict[str, object],
    after: dict[str, object],
) -> None:
    client = await (opened(front, fake, **before) if before else front.opened())
    for _ in range(3):
        front.reload(**after)
        await wait_all_tasks_blocked()
        await in_thread(read_works, client)
    client.send(DISC)
    await over(front, client)
    assert log.end == "client disconnected"
    assert quiet(log)


async def test_read_only_stays_read_only(front: Front, fake: FakeUpstream) -> None:
    client = await opened(front, fake, exports=READS)
    front.reload(exports=WRITES)
    client.send(Request(Cmd.WRITE, 0, 512, payload=bytes(512)).pack())
    assert (await in_thread(client.recv_exactly, 16))[7] == 1  # EPERM


async def test_what_the_upstream_keeps_from_all_is_no_loss(
    front: Front, fake: FakeUpstream
) -> None:
    """Read-only there: nothing was granted that a rule could take back."""
    fake.script.flags = 1 | 2
    client = await opened(front, fake, exports=WRITES)
    front.reload(exports=READS)
    await wait_all_tasks_blocked()
    await in_thread(read_works, client)


async def test_open_sessions_may_be_kept(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await opened(front, fake, exports=WRITES)
    front.sessions[0].recheck(objecting(front.keeper.trust), keep=True)
    await wait_all_tasks_blocked()
    await in_thread(read_works, client)
    (line,) = log.lines("stays, though no longer allowed (revoked: CN=client sha256:")
    assert line.levelno == logging.INFO
    client.send(DISC)
    await over(front, client)
    assert log.end == "client disconnected"


async def test_twice_and_after_the_end(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await opened(front, fake, exports=WRITES)
    for _ in range(2):
        front.reload(exports=NOWHERE)
    assert await over(front, client) == "close_notify"
    front.reload(exports=NOWHERE)
    assert log.end == "client no longer allowed"


# ---------------------------------------------------------------- in the middle of something


async def test_half_a_reply_is_not_followed_by_anything(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    """The client takes no bytes: the cut falls into the reply to a read."""
    fake.script = Script(size=64 * MIB, names=(b"disk",))
    client = await opened(front, fake, exports=WRITES)
    length = 32 * MIB
    client.send(Request(Cmd.READ, 0, length, cookie=9).pack())
    client.send(Request(Cmd.READ, 0, 512, cookie=10).pack())
    await in_thread(client.recv_exactly, 16)
    await wait_all_tasks_blocked()
    front.reload(exports=NOWHERE)
    rest = await in_thread(client.recv_to_end)
    assert len(rest) < length
    assert rest == pattern(0, len(rest))
    client.close()
    await front.ended()
    assert log.end == "client no longer allowed"
    assert quiet(log)


async def test_half_a_write_is_not_followed_by_anything(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    """Not even by NBD_CMD_DISC, which the server would take for data."""
    client = await opened(front, fake, exports=WRITES)
    client.send(Request(Cmd.WRITE, 0, 4096, payload=b"w" * 4096).pack()[:1000])
    link = fake.links[0]
    await in_thread(fake.wait, lambda: link.received.endswith(b"w" * 972), "the write")
    front.reload(exports=NOWHERE)
    assert await over(front, client) == "close_notify"
    assert (await in_thread(fake.wait_end)).end == "cut"
    assert [one.cmd for one in link.requests] == [Cmd.READ]
    assert quiet(log)


async def test_requests_that_are_in_flight(front: Front, fake: FakeUpstream, log: Log) -> None:
    """The server may still do them; the client is not told."""
    go_on = threading.Event()

    class Slow(Script):
        def requested(self, link: Link, request: Request) -> None:
            if request.cmd == Cmd.WRITE:
                go_on.wait(10)
            super().requested(link, request)

    fake.script = Slow()
    client = await opened(front, fake, exports=WRITES)
    client.send(Request(Cmd.WRITE, 0, 512, cookie=5, payload=bytes(512)).pack())
    await in_thread(fake.wait, lambda: len(fake.links[0].requests) == 2, "the write")
    front.reload(exports=NOWHERE)
    assert await in_thread(client.recv_to_end) == b""
    assert client.ended == "close_notify"
    client.close()
    go_on.set()
    await front.ended()
    assert (await in_thread(fake.wait_end)).end == "disc"
    assert log.end == "client no longer allowed"


# ---------------------------------------------------------------- in negotiation


@pytest.mark.parametrize("keep", [False, True])
async def test_who_only_negotiates_is_never_kept(
    front: Front, fake: FakeUpstream, log: Log, keep: bool
) -> None:
    """It would open now what it may not open any more."""
    front.rules(exports=(*WRITES, *ELSEWHERE))
    client = await front.inside()
    assert await in_thread(client.verdict, Opt.LIST) == Rep.ACK
    front.reload(keep=keep, exports=WRITES)
    assert await over(front, client) == "close_notify"
    assert log.end == "client no longer allowed"
    assert "may open less than before" in log.closed["detail"]
    assert quiet(log)


async def test_who_negotiates_and_loses_nothing_goes_on(front: Front, fake: FakeUpstream) -> None:
    fake.script.names = (b"disk", b"other")
    front.rules(exports=(*WRITES, *NOWHERE))
    client = await front.inside()
    front.reload(exports=(*WRITES, *ELSEWHERE))
    await wait_all_tasks_blocked()
    assert await in_thread(client.verdict, Opt.GO, info_data(b"other")) == Rep.ERR_UNKNOWN
    await in_thread(client.go, b"disk")
    await in_thread(read_works, client)


async def test_while_the_upstream_is_asked(front: Front, fake: FakeUpstream, log: Log) -> None:
    go_on = threading.Event()

    class Slow(Script):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            go_on.wait(10)
            return super().info(link, opt, data)

    fake.script = Slow()
    client = await front.inside()
    client.send(option(Opt.GO, info_data()))
    link = await in_thread(fake.wait_link)
    await in_thread(fake.wait, lambda: link.options, "the option")
    front.reload(allow=OTHERS)
    assert await over(front, client) == "close_notify"
    go_on.set()
    assert (await in_thread(fake.wait_end)).end in ("abort", "reset")
    assert log.end == "client no longer allowed"
    assert quiet(log)


async def test_who_may_open_nothing_stays_so(front: Front, fake: FakeUpstream, log: Log) -> None:
    """Until it comes again."""
    front.rules(allow=OTHERS)
    client = await front.inside()
    assert await in_thread(client.verdict, Opt.LIST) == Rep.ERR_POLICY
    front.reload(allow=US)
    front.reload(deny=US)
    await wait_all_tasks_blocked()
    assert await in_thread(client.verdict, Opt.LIST) == Rep.ERR_POLICY
    client.close()
    await front.ended()
    assert log.end == "client not allowed"


# ---------------------------------------------------------------- the others


async def test_reloads_under_load_fail_no_request(front: Front, fake: FakeUpstream) -> None:
    """Of those who may stay. One who may not is cut among them."""
    fake.script = Script(names=(b"disk", b"other"))
    front.rules(exports=(*WRITES, *ELSEWHERE))
    clients = [await opened(front, fake, exports=(*WRITES, *ELSEWHERE)) for _ in range(8)]
    victim = await front.inside()
    await in_thread(victim.go, b"other")
    stop = threading.Event()
    done: list[int] = []

    def work(client: RawClient) -> None:
        count = 0
        while not stop.is_set():
            batch = [Request(Cmd.READ, 4096 * i, 4096, cookie=i) for i in range(16)]
            client.send(b"".join(one.pack() for one in batch))
            for one in batch:
                head = client.recv_exactly(16)
                assert head == struct.pack(">IIQ", 0x67446698, 0, one.cookie)
                assert client.recv_exactly(4096) == pattern(one.offset, 4096)
            count += 1
        client.send(DISC)
        assert client.recv_to_end() == b""
        done.append(count)

    threads = [threading.Thread(target=work, args=(one,)) for one in clients]
    for one in threads:
        one.start()
    for _ in range(50):
        front.reload(exports=(*ELSEWHERE, *WRITES))
        await in_thread(lambda: None)
    front.reload(exports=WRITES)
    assert await in_thread(victim.recv_to_end) == b""
    stop.set()
    for one in threads:
        await in_thread(one.join)
    assert len(done) == len(clients)


@pytest.mark.parametrize("phase", ["raw", "greeted", "inside", "opened"])
async def test_expelled_for_whatever_reason(
    front: Front, fake: FakeUpstream, log: Log, phase: str
) -> None:
    """An address, say, about which the session knows nothing."""
    client = await getattr(front, phase)()
    front.sessions[0].expel("address_not_allowed: 192.0.2.1")
    await in_thread(client.recv_to_end)
    client.close()
    await front.ended()
    assert log.end == "client no longer allowed"
    assert log.closed["detail"] == "address_not_allowed: 192.0.2.1"
