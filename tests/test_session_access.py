"""gateway.session and rules: who may open what, and what is said to whom. No dialling before."""

from __future__ import annotations

import dataclasses
import os
import ssl
import struct
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.access import ExportRules
from gateway.errors import Refusal
from gateway.identity import Identity
from gateway.nbd.constants import Opt as AnyOpt
from gateway.settings import Settings
from gateway.trust import Trust
from tests import session_rig
from tests.session_rig import Front, Log, in_thread, over, read_works, rules
from tests.support.fake_upstream import FakeUpstream
from tests.support.rawclient import (
    Cmd,
    Err,
    Opt,
    RawClient,
    Rep,
    Request,
    Tf,
    info_data,
    meta_data,
    option,
    tls_context,
)

fake, context, settings = session_rig.fake, session_rig.context, session_rig.settings
front, log = session_rig.front, session_rig.log

US, OTHERS = rules("cn=client"), rules("cn=somebody-else")
BARRED = r"CN=client sha256:\w{16} may not open anything here"
OPTIONS = [
    (Opt.LIST, b""),
    (Opt.STRUCTURED_REPLY, b""),
    (AnyOpt.EXTENDED_HEADERS, b""),
    (Opt.INFO, info_data()),
    (Opt.GO, info_data()),
    (Opt.LIST_META_CONTEXT, meta_data()),
    (Opt.STARTTLS, b""),
]


def exports(*read_write: str, read_only: tuple[str, ...] = ()) -> tuple[ExportRules, ...]:
    """Tables of our client's, and one that is not."""
    return (
        *(ExportRules(name, read_write=US) for name in read_write),
        *(ExportRules(name, read_write=OTHERS, read_only=US) for name in read_only),
        ExportRules("secret", read_write=OTHERS),
    )


def names(client: RawClient) -> list[bytes]:
    *given, last = client.ask(Opt.LIST)
    assert last.type == Rep.ACK
    return [one.data[4:] for one in given]


# ---------------------------------------------------------------- may open nothing


@pytest.mark.parametrize(
    "given",
    [
        {"allow": OTHERS},
        {"deny": US},
        {"allow": US, "deny": US},
        {"exports": exports()},
        {"exports": exports("disk"), "deny": US},
    ],
    ids=["not allowed", "denied", "allowed and denied", "no table", "table and denied"],
)
async def test_every_option_is_refused_in_words(
    front: Front, fake: FakeUpstream, log: Log, given: dict[str, object]
) -> None:
    front.rules(**given)
    client = await front.inside()
    for number, data in OPTIONS:
        (reply,) = await in_thread(client.ask, number, data)
        assert reply.type == Rep.ERR_POLICY
        assert reply.data.decode().startswith("CN=client sha256:")
        assert reply.data.decode().endswith(" may not open anything here")
    assert await in_thread(client.verdict, Opt.ABORT) == Rep.ACK
    assert await over(front, client) == "close_notify"
    assert log.end == "client not allowed"
    assert log.closed["detail"].startswith("not_allowed: CN=client sha256:")
    assert fake.connects == 0


@pytest.mark.parametrize("how", ["EXPORT_NAME", "FIN", "RST", "timeout", "evicted"])
async def test_however_it_leaves_it_was_not_allowed(
    front: Front, fake: FakeUpstream, log: Log, how: str, mock_clock: MockClock
) -> None:
    front.rules(allow=OTHERS)
    client = await front.inside()
    if how == "RST":
        client.send(8 * option(Opt.LIST))
    else:
        assert await in_thread(client.verdict, Opt.LIST) == Rep.ERR_POLICY
    match how:
        case "EXPORT_NAME":
            client.send(option(Opt.EXPORT_NAME))
            assert await over(front, client) == "close_notify"
        case "FIN":
            client.close()
        case "RST":
            client.reset()
        case "timeout":
            mock_clock.jump(10.1)
            assert await over(front, client) == "close_notify"
        case "evicted":
            mock_clock.jump(2)
            assert not front.sessions[0].proven
            front.sessions[0].evict()
            assert await over(front, client) != "close_notify"  # its place is wanted now
    await front.ended()
    assert log.end == "client not allowed"
    assert log.closed["detail"].startswith("not_allowed: ")
    assert fake.connects == 0


async def test_who_may_open_nothing_has_no_right_to_a_place(front: Front) -> None:
    front.rules(allow=OTHERS)
    await front.inside()
    assert not front.sessions[0].proven
    front.rules(allow=US)
    await front.inside()
    assert front.sessions[1].proven
    front.switch_tls_off()
    front.rules(allow=US)
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.LIST) == Rep.ERR_POLICY
    assert not front.sessions[2].proven


async def test_shutdown_reaches_it_too(front: Front, log: Log) -> None:
    front.rules(allow=OTHERS)
    client = await front.inside()
    assert await in_thread(client.verdict, Opt.LIST) == Rep.ERR_POLICY
    front.sessions[0].shutdown()
    assert await in_thread(client.verdict, Opt.LIST) == Rep.ERR_SHUTDOWN
    client.close()
    await front.ended()
    assert log.end == "client not allowed"


async def test_shutdown_before_it_is_known(front: Front, pki: Path) -> None:
    front.rules(allow=OTHERS)
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    await wait_all_tasks_blocked()
    front.sessions[0].shutdown()
    await in_thread(client.wrap, tls_context(pki))
    assert await in_thread(client.verdict, Opt.LIST) == Rep.ERR_SHUTDOWN


# ---------------------------------------------------------------- tables


async def test_each_client_sees_its_own_exports(front: Front, fake: FakeUpstream, log: Log) -> None:
    fake.script.names = (b"secret", b"b", b"unlisted", b"a")
    front.rules(exports=exports("a", read_only=("b",)))
    client = await front.inside()
    assert await in_thread(names, client) == [b"a", b"b"]
    for name in (b"secret", b"unlisted", b"", b"A"):
        (reply,) = await in_thread(client.ask, Opt.GO, info_data(name))
        assert reply.type == Rep.ERR_UNKNOWN
        assert reply.data == b"no such export here, or it is not yours to open"
    assert fake.connects == 1  # for the list
    assert not [one for one, _ in fake.links[0].options if one != Opt.LIST]
    export = await in_thread(client.go, b"a")
    assert not export.flags & Tf.READ_ONLY
    assert fake.links[0].export == b"a"
    await in_thread(read_works, client)


@pytest.mark.parametrize("name", [b"secret", b"nowhere"])
async def test_what_is_not_its_own_dials_nobody(
    front: Front, fake: FakeUpstream, log: Log, name: bytes
) -> None:
    """Not allowed and not there: the same code, the same text, the same way."""
    fake.script.names = None
    front.rules(exports=exports("a"))
    client = await front.inside()
    for number in (Opt.INFO, Opt.GO):
        (reply,) = await in_thread(client.ask, number, info_data(name))
        assert (reply.type, reply.data) == (
            Rep.ERR_UNKNOWN,
            b"no such export here, or it is not yours to open",
        )
    client.send(option(Opt.EXPORT_NAME, name))
    assert await over(front, client) == "close_notify"
    assert log.end == "export refused"
    assert log.closed["detail"] is not None
    assert fake.connects == 0


async def test_one_may_write_what_another_may_only_read(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    fake.script.names = (b"disk",)
    front.rules(exports=exports(read_only=("disk",)))
    reader = await front.inside()
    export = await in_thread(reader.go, b"disk")
    assert export.flags & Tf.READ_ONLY
    assert not export.flags & (Tf.SEND_TRIM | Tf.SEND_WRITE_ZEROES)
    for command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
        payload = bytes(512) if command == Cmd.WRITE else b""
        reader.send(Request(command, 0, 512, payload=payload).pack())
        _, error, _ = struct.unpack(">IIQ", await in_thread(reader.recv_exactly, 16))
        assert error == Err.EPERM
    await in_thread(read_works, reader)
    assert [one.cmd for one in fake.links[0].requests] == [Cmd.READ]
    front.rules(exports=exports("disk"))
    writer = await front.inside()
    assert not (await in_thread(writer.go, b"disk")).flags & Tf.READ_ONLY
    writer.send(Request(Cmd.WRITE, 0, 512, cookie=3, payload=bytes(512)).pack())
    assert await in_thread(writer.recv_exactly, 16) == struct.pack(">IIQ", 0x67446698, 0, 3)
    lines = [one.getMessage() for one in log.lines(": open: ")]
    assert ", read-only, CN=client" in lines[0]
    assert ", read-write, CN=client" in lines[1]


async def test_read_only_for_all_is_for_all(front: Front, fake: FakeUpstream) -> None:
    fake.script.names = (b"a", b"b")
    front.settings = dataclasses.replace(front.settings, read_only=True)
    front.rules(exports=exports("a", "b"))
    client = await front.inside()
    assert (await in_thread(client.go, b"b")).flags & Tf.READ_ONLY


@pytest.mark.parametrize("asked", [b"", b"disk"])
@pytest.mark.parametrize("read_only", [False, True])
async def test_the_only_table_is_also_the_empty_name(
    front: Front, fake: FakeUpstream, asked: bytes, read_only: bool
) -> None:
    fake.script.names = (b"disk",)
    table = ExportRules("disk", read_write=() if read_only else US, read_only=US)
    front.rules(exports=(table,))
    client = await front.inside()
    assert await in_thread(names, client) == [b"disk"]
    assert bool((await in_thread(client.go, asked)).flags & Tf.READ_ONLY) is read_only
    assert fake.links[0].export == b"disk"


@pytest.mark.parametrize("tables", [1, 2])
async def test_oldstyle_upstream_has_no_name_but_ours(
    front: Front, fake: FakeUpstream, tables: int
) -> None:
    """Its one export is that of the only table; with more it is the one that is called ""."""
    fake.script.style = "oldstyle"
    both = (ExportRules("disk", read_write=US), ExportRules("", read_write=US))
    front.rules(exports=both[:tables])
    client = await front.inside()
    own, other = (b"disk", b"else") if tables == 1 else (b"", b"disk")
    assert await in_thread(client.verdict, Opt.INFO, info_data(other)) == Rep.ERR_UNKNOWN
    await in_thread(client.go, own)
    await in_thread(read_works, client)


# ---------------------------------------------------------------- Unix sockets


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("mine", [False, True])
async def test_user_of_the_other_end(
    settings: Settings, context: ssl.SSLContext, fake: FakeUpstream, pki: Path, log: Log,
    tmp_path: Path, nursery: trio.Nursery, tls: bool, mine: bool,
) -> None:  # fmt: skip
    """Said by the kernel. On TCP nobody has one."""
    front = Front(settings, context if tls else None, pki, unix=tmp_path / "front")
    nursery.start_soon(front.serve)
    uid = os.getuid() if mine else os.getuid() + 1
    front.rules(allow=rules(f"uid={uid}"))
    client = await (front.inside() if tls else front.greeted())
    if mine:
        await in_thread(client.go)
        await in_thread(read_works, client)
        (line,) = log.lines(": open: ")
        assert f" uid:{uid}, " in line.getMessage()
        assert ("CN=client" in line.getMessage()) is tls
    else:
        (reply,) = await in_thread(client.ask, Opt.GO, info_data())
        assert reply.type == Rep.ERR_POLICY
        assert f"uid:{os.getuid()} may not open" in reply.data.decode()
    client.close()
    await front.ended()
    front.scope.cancel()
    await wait_all_tasks_blocked()
    front.close()
    assert fake.connects == mine


async def test_nobody_has_a_user_on_tcp(front: Front, fake: FakeUpstream) -> None:
    front.switch_tls_off()
    front.rules(allow=rules(f"uid={os.getuid()}"))
    client = await front.greeted()
    (reply,) = await in_thread(client.ask, Opt.GO, info_data())
    assert (reply.type, reply.data) == (
        Rep.ERR_POLICY,
        b"anonymous may not open anything here",
    )
    assert fake.connects == 0


async def test_oldstyle_client_that_is_not_allowed(
    front: Front, fake: FakeUpstream, log: Log
) -> None:
    """There is no word for it."""
    front.settings = dataclasses.replace(front.settings, tls=None, oldstyle=True)
    front.switch_tls_off()
    front.rules(allow=rules("uid=0"))
    assert await over(front, await front.raw()) == "fin"
    assert log.end == "client not allowed"
    assert log.closed["detail"] == "not_allowed: anonymous may not open anything here"
    assert fake.connects == 0


# ---------------------------------------------------------------- what is loaded meanwhile


@dataclasses.dataclass(frozen=True)
class Objecting(Trust):
    """Has something against everybody."""

    reason: Refusal = Refusal.REVOKED

    def objection(self, identity: Identity) -> Refusal | None:
        return self.reason


def objecting(trust: Trust, reason: Refusal = Refusal.REVOKED) -> Objecting:
    return Objecting(trust.context, trust.rules, b"", reason)


async def test_set_that_is_loaded_during_the_handshake_counts(
    front: Front, fake: FakeUpstream, log: Log, pki: Path
) -> None:
    """Nobody asked about a client that was not known yet."""
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    before = front.keeper.trust

    def identify(self: Trust, sock: ssl.SSLSocket) -> Identity:
        front.keeper.replace(objecting(before))
        return Trust.identify(before, sock)

    slow = type("Slow", (Trust,), {"identify": identify})
    front.keeper.replace(slow(before.context, before.rules))
    await in_thread(client.wrap, tls_context(pki))
    assert await over(front, client) == "close_notify"
    assert log.end == "TLS handshake failed"
    assert log.closed["detail"].startswith("revoked: CN=client sha256:")
    assert fake.connects == 0


async def test_rules_that_are_loaded_during_the_handshake_count(
    front: Front, fake: FakeUpstream, pki: Path
) -> None:
    client = await front.greeted()
    assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    await wait_all_tasks_blocked()
    front.reload(allow=OTHERS)
    await in_thread(client.wrap, tls_context(pki))
    assert await in_thread(client.verdict, Opt.GO, info_data()) == Rep.ERR_POLICY
    assert fake.connects == 0


@pytest.mark.parametrize("phase", ["raw", "greeted", "STARTTLS"])
async def test_who_is_not_known_yet_notices_nothing(front: Front, pki: Path, phase: str) -> None:
    client = await (front.raw() if phase == "raw" else front.greeted())
    if phase == "STARTTLS":
        assert await in_thread(client.verdict, Opt.STARTTLS) == Rep.ACK
    front.sessions[0].recheck(objecting(front.keeper.trust), keep=False)
    await wait_all_tasks_blocked()
    if phase == "raw":
        await in_thread(client.greet)
    if phase == "STARTTLS":
        await in_thread(client.wrap, tls_context(pki))
    else:
        await in_thread(client.start_tls, tls_context(pki))
    await in_thread(client.go)
    await in_thread(read_works, client)
