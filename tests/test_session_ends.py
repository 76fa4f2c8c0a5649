"""gateway.session: each reason for an end, what is logged of it, and that nothing stays."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from gateway.certs import init
from tests import session_rig
from tests.session_rig import DISC, Front, Log, in_thread, over, read_works
from tests.support.fake_upstream import FakeUpstream, Link, Script
from tests.support.rawclient import (
    SIMPLE,
    SIMPLE_MAGIC,
    Cmd,
    Opt,
    PeerClosedError,
    Rep,
    Request,
    client_hello,
    info_data,
    option,
    tls_context,
)

fake, context, settings = session_rig.fake, session_rig.context, session_rig.settings
front, log = session_rig.front, session_rig.log


# ---------------------------------------------------------------- other ends


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_probe(front: Front, log: Log, how: str) -> None:
    """A load balancer's health check: connects and leaves. Not worth a line for everybody.

    It leaves without having read our greeting, so its kernel sends RST.
    """
    client = await front.raw()
    if how == "FIN":
        await in_thread(client.recv_exactly, 18)
    client.close()
    await front.ended()
    assert log.end == "probe"
    assert log.closed["detail"] == "probe: it sent nothing"


async def test_client_leaves_in_the_greeting(front: Front, log: Log) -> None:
    client = await front.raw()
    client.send(b"\0\0")
    client.close()
    await front.ended()
    assert log.end == "client left without a word"


async def test_client_leaves_before_tls(front: Front, log: Log) -> None:
    client = await front.greeted()
    client.close()
    await front.ended()
    assert log.end == "client left without a word"
    assert log.closed["detail"] == "eof_before_hello: it left before it asked for TLS"


async def test_client_leaves_behind_starttls(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    client.close()
    await front.ended()
    assert log.end == "TLS handshake failed"
    assert log.closed["detail"] == "eof_before_hello: it left before it began TLS"


async def test_client_leaves_inside_the_handshake(front: Front, log: Log, pki: Path) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    client.send(client_hello(tls_context(pki))[:40])
    client.close()
    await front.ended()
    assert log.end == "TLS handshake failed"
    assert log.closed["detail"].startswith("eof: ")


async def test_client_leaves_inside_tls(front: Front, log: Log) -> None:
    client = await front.inside()
    client.close()
    await front.ended()
    assert log.end == "client left without a word"


async def test_client_leaves_since_its_export_is_unknown(front: Front, log: Log) -> None:
    client = await front.inside()
    assert await in_thread(client.verdict, Opt.GO, info_data(b"other")) == Rep.ERR_UNKNOWN
    client.close()
    await front.ended()
    assert log.end == "client left without a word"
    assert "'other'" in log.closed["detail"]


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_client_leaves_in_transmission(
    front: Front, fake: FakeUpstream, log: Log, how: str
) -> None:
    client = await front.opened()
    await in_thread(read_works, client)
    client.reset() if how == "RST" else client.close()
    await front.ended()
    assert log.end == "client left without a word"
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_client_vanishes_with_requests_in_flight(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    """Its upstream can still answer them: some servers do not survive it otherwise."""
    go_on = threading.Event()

    class Slow(Script):
        def requested(self, link: Link, request: Request) -> None:
            go_on.wait(10)
            super().requested(link, request)

    fake.script = Slow()
    client = await front.opened()
    client.send(b"".join(Request(Cmd.READ, 0, 100_000, cookie).pack() for cookie in range(8)))
    await in_thread(fake.wait, lambda: fake.links[0].requests, "the requests")
    client.reset()
    await wait_all_tasks_blocked()
    go_on.set()
    await front.ended()
    assert (await in_thread(fake.wait_end)).end == "disc"
    assert len(fake.links[0].requests) == 9
    assert log.end == "client left without a word"


@pytest.mark.parametrize("inside", [False, True], ids=["plaintext", "TLS"])
async def test_client_aborts(front: Front, log: Log, inside: bool) -> None:
    client = await (front.inside() if inside else front.greeted())
    assert await in_thread(client.verdict, Opt.ABORT) == Rep.ACK
    assert await over(front, client) == ("close_notify" if inside else "fin")
    assert log.end == "client aborted the negotiation"


async def test_plaintext_client(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.GO, info_data()) == Rep.ERR_TLS_REQD
    client.close()
    await front.ended()
    assert log.end == "plaintext client"
    assert log.closed["detail"] == "plaintext_client: it asked for an export without TLS"


async def test_plaintext_client_of_the_old_option(front: Front, log: Log) -> None:
    client = await front.greeted()
    client.send(option(Opt.EXPORT_NAME))
    await over(front, client)
    assert log.end == "plaintext client"


async def test_export_name_has_no_other_no(front: Front, log: Log) -> None:
    client = await front.inside()
    client.send(option(Opt.EXPORT_NAME, b"other"))
    assert await over(front, client) == "close_notify"
    assert log.end == "export refused"
    assert "'other'" in log.closed["detail"]


async def test_client_breaks_the_protocol(front: Front, fake: FakeUpstream, log: Log) -> None:
    client = await front.greeted()
    client.send(b"garbage, and more of it")
    await over(front, client)
    assert log.end == "client broke the protocol"
    assert "magic" in log.closed["detail"]


async def test_client_breaks_the_protocol_in_transmission(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    client = await front.opened()
    client.send(Request(Cmd.READ, 0, 512).pack(magic=0x12345678))
    assert await over(front, client) == "close_notify"
    assert log.end == "client broke the protocol"
    assert log.closed["detail"] == "request magic 0x12345678"
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_tls_fails(front: Front, pki: Path, log: Log, tmp_path: Path) -> None:
    client = await front.greeted()
    await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
    assert "ALERT" in await over(front, client)
    assert log.end == "TLS handshake failed"
    assert log.closed["detail"] == "no_client_cert: it has no client certificate"


async def test_client_of_another_ca(front: Front, log: Log, pki: Path, tmp_path: Path) -> None:
    init(tmp_path / "other")
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.load_verify_locations(pki / "ca-cert.pem")
    other = tmp_path / "other"
    theirs.load_cert_chain(other / "client-cert.pem", other / "client-key.pem")
    client = await front.greeted()
    await in_thread(client.start_tls, theirs)
    assert "ALERT" in await over(front, client)
    assert log.closed["detail"] == "unknown_ca: its certificate is of another CA"


async def test_plaintext_instead_of_tls(front: Front, log: Log) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    client.send(option(Opt.GO, info_data()))
    await in_thread(client.recv_to_end)  # an alert
    client.close()
    await front.ended()
    assert log.closed["detail"].startswith("not_tls: ")


@pytest.mark.expects_error_log
async def test_bug_costs_one_client_only(
    front: Front, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def receive(*_: object) -> None:
        raise RuntimeError("a bug")

    other = await front.opened()
    client = await front.inside()
    with monkeypatch.context() as patch:
        patch.setattr("gateway.client_handshake.Haggling.receive", receive)
        client.send(option(Opt.LIST))
        assert await in_thread(client.recv_to_end) == b""
        client.close()
        while not log.lines(": closed: "):
            await wait_all_tasks_blocked()
    assert log.end == "bug in the gateway"
    assert log.closed["number"] == "2"
    (record,) = [one for one in log.lines("bug: dropping") if one.levelno == logging.ERROR]
    assert record.exc_info
    await in_thread(read_works, other)


# ---------------------------------------------------------------- shutdown and cancellation


@pytest.mark.parametrize("inside", [False, True], ids=["plaintext", "TLS"])
async def test_shutdown_of_a_negotiation(
    front: Front, log: Log, fake: FakeUpstream, inside: bool
) -> None:
    client = await (front.inside() if inside else front.greeted())
    front.sessions[0].shutdown()
    options = [Opt.LIST, Opt.GO] if inside else [Opt.STARTTLS, Opt.LIST]
    for opt in options:
        data = info_data() if opt == Opt.GO else b""
        assert await in_thread(client.verdict, opt, data) == Rep.ERR_SHUTDOWN
    assert await in_thread(client.verdict, Opt.ABORT) == Rep.ACK
    await over(front, client)
    assert fake.connects == 0


async def test_shutdown_before_the_greeting(front: Front, log: Log) -> None:
    client = await front.raw()
    front.sessions[0].shutdown()
    await in_thread(client.greet)
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ERR_SHUTDOWN


async def test_shutdown_during_the_tls_handshake(front: Front, log: Log, pki: Path) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    await wait_all_tasks_blocked()
    front.sessions[0].shutdown()
    await in_thread(client.wrap, tls_context(pki))
    assert await in_thread(client.verdict, Opt.GO, info_data()) == Rep.ERR_SHUTDOWN


async def test_shutdown_in_transmission(front: Front, log: Log, fake: FakeUpstream) -> None:
    client = await front.opened()
    front.sessions[0].shutdown()
    assert await over(front, client) == "close_notify"
    assert log.end == "gateway shut down"
    assert (await in_thread(fake.wait_end)).end == "disc"


async def test_shutdown_while_the_upstream_is_asked(
    front: Front, log: Log, fake: FakeUpstream
) -> None:
    """The answer of the upstream is still given, and then there is nothing in flight."""
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
    front.sessions[0].shutdown()
    go_on.set()
    replies = await in_thread(client.replies, Opt.GO)
    if replies[-1].type == Rep.ACK:
        assert await over(front, client) == "close_notify"
        assert log.end == "gateway shut down"
    else:
        assert replies[-1].type == Rep.ERR_SHUTDOWN
    await front.ended() if replies[-1].type == Rep.ACK else client.close()


@pytest.mark.parametrize("how", ["cut by the gateway", "cut by the upstream"])
async def test_reply_that_is_cut_has_no_clean_end(
    front: Front, fake: FakeUpstream, log: Log, how: str
) -> None:
    """What the client has of it ends with a whole TLS record: TLS could be ended behind that."""

    class Half(Script):
        def requested(self, link: Link, request: Request) -> None:
            link.send(SIMPLE.pack(SIMPLE_MAGIC, 0, request.cookie) + bytes(100))
            if how == "cut by the upstream":
                link.hang_up()

    fake.script = Half(structured=False)
    client = await front.opened()
    client.send(Request(Cmd.READ, 0, 512).pack())
    await in_thread(client.recv_exactly, SIMPLE.size + 100)
    if how == "cut by the gateway":
        front.scope.cancel()
    assert await over(front, client) == "fin"


async def test_cancelled_session_closes_everything(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    client = await front.opened()
    client.send(Request(Cmd.WRITE, 0, 512, payload=bytes(512)).pack()[:100])
    link = fake.links[0]
    await in_thread(fake.wait, lambda: len(link.received) >= 72, "the write")
    front.scope.cancel()
    assert await over(front, client) == "close_notify"
    assert (await in_thread(fake.wait_end)).end == "cut"
    assert log.end == "gateway shut down"


async def test_nothing_stays_open(front: Front, fake: FakeUpstream, pki: Path) -> None:
    """Of sessions that ended in many ways."""

    def sockets() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            try:
                found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
            except FileNotFoundError:
                pass
        return found

    async def round_of_clients() -> None:
        (await front.raw()).close()
        (await front.greeted()).reset()
        client = await front.greeted()
        assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
        client.reset()
        client = await front.greeted()
        await in_thread(client.start_tls, tls_context(pki, with_certificate=False))
        with pytest.raises(PeerClosedError):
            await in_thread(client.recv_exactly, 1)
        client.close()
        (await front.inside()).reset()
        client = await front.inside()
        await in_thread(client.ask, Opt.LIST)
        client.close()
        (await front.opened()).reset()
        client = await front.opened()
        client.send(DISC)
        await in_thread(client.recv_to_end)
        client.close()
        await front.ended()
        for index in range(len(fake.links)):
            await in_thread(fake.wait_end, index)
        await in_thread(fake.reset)

    await round_of_clients()
    before = sockets()
    for _ in range(3):
        await round_of_clients()
    assert sockets() == before
