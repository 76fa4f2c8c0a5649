"""gateway.upstream: servers of each style, what is asked of them, and how they are left."""

from __future__ import annotations

import logging
import socket
import struct
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway import upstream
from gateway.nbd.constants import Info, TransmissionFlag
from gateway.nbd.constants import Rep as OurRep
from gateway.nbd.pairing import (
    Acked,
    Contexts,
    Granted,
    Listed,
    ListExports,
    Open,
    QueryContexts,
    Refused,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.wire import BlockSizes, ListedExport, disconnect_request
from gateway.transport import Channel
from tests import upstream_rig
from tests.support.fake_upstream import ALL_FEATURES, MIB, FakeUpstream, Link, Script
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    CLISERV,
    NBDMAGIC,
    Opt,
    Rep,
    Tf,
    info_data,
    option,
)
from tests.upstream_rig import GO, INFO, UNKNOWN, UNSUPPORTED, Dial, asked, ended

fake, closing, dial, words = (
    upstream_rig.fake,
    upstream_rig.closing,
    upstream_rig.dial,
    upstream_rig.words,
)


# ---------------------------------------------------------------- fixed newstyle


async def test_nothing_is_dialled_before_the_first_question(fake: FakeUpstream, dial: Dial) -> None:
    server = dial()
    await wait_all_tasks_blocked()
    assert fake.connects == 0
    await server.aclose()
    assert fake.connects == 0


async def test_go(fake: FakeUpstream, dial: Dial) -> None:
    fake.script.block_sizes = (512, 4096, MIB)
    answer = await dial().ask(Open("", (Info.BLOCK_SIZE,), go=True))
    assert answer == Granted(MIB, int(ALL_FEATURES & ~Tf.SEND_DF), BlockSizes(512, 4096, MIB))
    (link,) = fake.links
    assert link.options == [(Opt.GO, struct.pack(">IHH", 0, 1, Info.BLOCK_SIZE))]
    assert link.client_flags == C_FIXED | C_NO_ZEROES


async def test_all_questions_on_one_connection(fake: FakeUpstream, dial: Dial) -> None:
    server = dial()
    fake.script.names = (b"", b"disk")
    assert await server.ask(UseStructuredReplies()) == Acked()
    assert await server.ask(ListExports()) == Listed(
        (ListedExport("", ""), ListedExport("disk", ""))
    )
    query = ("base:allocation",)
    listed = await server.ask(QueryContexts("disk", query, select=False))
    chosen = await server.ask(QueryContexts("disk", query, select=True))
    assert isinstance(listed, Contexts)
    assert isinstance(chosen, Contexts)
    assert [one.name for one in listed.contexts] == [one.name for one in chosen.contexts]
    assert isinstance(await server.ask(Open("disk", (), go=False)), Granted)
    assert isinstance(await server.ask(Open("disk", (), go=True)), Granted)
    (link,) = fake.links
    assert asked(link) == [
        *(Opt.STRUCTURED_REPLY, Opt.LIST, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT),
        *(Opt.INFO, Opt.GO),
    ]


async def test_refusals_are_handed_on(
    fake: FakeUpstream, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    """And the upstream's own words go to the log only, in a form that is fit for it."""

    class Policy(Script):
        def option(self, link: Link, opt: int, data: bytes) -> bool:
            self.reply(link, opt, Rep.ERR_POLICY, b"not\ntoday\x1b[2J")
            return False

    caplog.set_level(logging.DEBUG)
    fake.script = Policy()
    answer = await dial().ask(GO)
    assert isinstance(answer, Refused)
    assert answer.kind == OurRep.ERR_POLICY
    (line,) = [one.getMessage() for one in caplog.records if "refuses" in one.getMessage()]
    assert "NBD_REP_ERR_POLICY" in line
    assert line.isprintable()
    assert fake.connects == 1


async def test_first_option_goes_with_the_client_flags(
    fake: FakeUpstream, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one segment, so that the upstream is woken once."""
    sent: list[bytes] = []

    class Recorded(Channel):
        def send_now(self, data: bytes | bytearray | memoryview) -> int:
            sent.append(bytes(data))
            return super().send_now(data)

    monkeypatch.setattr(upstream, "Channel", Recorded)
    server = dial()
    await server.ask(ListExports())
    await server.ask(GO)
    flags = struct.pack(">I", C_FIXED | C_NO_ZEROES)
    assert sent == [flags + option(Opt.LIST), option(Opt.GO, info_data())]


async def test_unknown_export_leaves_the_connection_usable(fake: FakeUpstream, dial: Dial) -> None:
    fake.script.names = (b"disk",)
    server = dial()
    answer = await server.ask(GO)
    assert isinstance(answer, Refused)
    assert answer.kind == OurRep.ERR_UNKNOWN
    assert isinstance(await server.ask(Open("disk", (), go=True)), Granted)
    assert fake.connects == 1


class BlockSizesRequired(Script):
    """For who will not promise to keep to them there is no export."""

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        if not data.endswith(struct.pack(">H", Info.BLOCK_SIZE)):
            self.reply(link, opt, Rep.ERR_BLOCK_SIZE_REQD)
            return False
        return super().info(link, opt, data)


async def test_block_sizes_are_promised_only_if_they_have_to_be(
    fake: FakeUpstream, dial: Dial
) -> None:
    fake.script = BlockSizesRequired(block_sizes=(512, 4096, MIB))
    for question, opt in ((INFO, Opt.INFO), (GO, Opt.GO)):
        server = dial()
        answer = await server.ask(question)
        assert isinstance(answer, Granted)
        assert answer.block_sizes == BlockSizes(512, 4096, MIB)
        assert asked(fake.links[-1]) == [opt, opt]


async def test_block_sizes_are_asked_for_twice_at_most(fake: FakeUpstream, dial: Dial) -> None:
    class Never(Script):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            self.reply(link, opt, Rep.ERR_BLOCK_SIZE_REQD)
            return False

    fake.script = Never()
    for infos in ((), (Info.BLOCK_SIZE,)):
        answer = await dial().ask(Open("", infos, go=True))
        assert isinstance(answer, Refused)
        assert answer.kind == OurRep.ERR_BLOCK_SIZE_REQD
        assert len(asked(fake.links[-1])) <= 2


# ---------------------------------------------------------------- without NBD_OPT_GO


class NoGo(Script):
    """Fixed newstyle from before NBD_OPT_GO."""

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        self.reply(link, opt, Rep.ERR_UNSUP)
        return False


@pytest.mark.parametrize("question", [GO, INFO])
async def test_export_name_is_the_fall_back(fake: FakeUpstream, dial: Dial, question: Open) -> None:
    """On the same connection. An INFO so opens the export for the GO that follows."""
    fake.script = NoGo()
    server = dial()
    granted = Granted(MIB, int(ALL_FEATURES))
    assert await server.ask(question) == granted
    assert await server.ask(GO) == granted
    (link,) = fake.links
    first = Opt.GO if question.go else Opt.INFO
    assert asked(link) == [first, Opt.EXPORT_NAME]


async def test_closing_is_how_export_name_says_no(fake: FakeUpstream, dial: Dial) -> None:
    """Then the next question begins on a connection of its own."""
    fake.script = NoGo(names=(b"disk",))
    server = dial()
    assert await server.ask(GO) == UNKNOWN
    assert isinstance(await server.ask(Open("disk", (), go=True)), Granted)
    assert [asked(link) for link in fake.links] == 2 * [[Opt.GO, Opt.EXPORT_NAME]]


async def test_another_export_needs_another_connection(fake: FakeUpstream, dial: Dial) -> None:
    """Once the first is in transmission, which it leaves with DISC or by closing."""
    fake.script = NoGo(names=None)
    server = dial()
    assert isinstance(await server.ask(Open("a", (), go=False)), Granted)
    assert isinstance(await server.ask(Open("b", (), go=True)), Granted)
    assert [link.export for link in fake.links] == [b"a", b"b"]
    assert (await ended(fake, 0)).end in ("disc", "eof")


# ---------------------------------------------------------------- newstyle and oldstyle


@pytest.mark.parametrize(
    "question",
    [
        UseStructuredReplies(),
        UseExtendedHeaders(),
        ListExports(),
        QueryContexts("", (), select=True),
    ],
)
@pytest.mark.parametrize("style", ["oldstyle", "newstyle"])
async def test_no_options_are_asked_of_who_has_none(
    fake: FakeUpstream, dial: Dial, style: str, question: ListExports
) -> None:
    fake.script = Script(style=style)
    server = dial()
    assert await server.ask(question) == UNSUPPORTED
    assert isinstance(await server.ask(GO), Granted)
    assert fake.connects == 1


async def test_newstyle(fake: FakeUpstream, dial: Dial) -> None:
    fake.script = Script(style="newstyle", names=(b"disk",))
    server = dial()
    answer = await server.ask(Open("disk", (Info.BLOCK_SIZE,), go=True))
    assert answer == Granted(MIB, int(ALL_FEATURES))
    (link,) = fake.links
    assert link.client_flags == 0
    assert link.options == [(Opt.EXPORT_NAME, b"disk")]


async def test_newstyle_that_does_not_know_the_export(fake: FakeUpstream, dial: Dial) -> None:
    fake.script = Script(style="newstyle", names=(b"disk",))
    server = dial()
    assert await server.ask(GO) == UNKNOWN
    assert isinstance(await server.ask(Open("disk", (), go=True)), Granted)
    assert fake.connects == 2


async def test_oldstyle_has_one_export_of_the_name_that_we_give_it(
    fake: FakeUpstream, dial: Dial
) -> None:
    fake.script = Script(style="oldstyle", flags=Tf.HAS_FLAGS | Tf.READ_ONLY)
    server = dial(oldstyle_name="disk")
    granted = Granted(MIB, int(TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY))
    assert await server.ask(Open("disk", (), go=False)) == granted
    assert fake.connects == 1
    assert await server.ask(GO) == UNKNOWN
    assert await server.ask(Open("disk", (), go=True)) == granted


# ---------------------------------------------------------------- leaving


async def test_leaves_the_negotiation_with_abort(fake: FakeUpstream, dial: Dial) -> None:
    server = dial()
    await server.ask(ListExports())
    await server.aclose()
    link = await ended(fake)
    assert asked(link) == [Opt.LIST, Opt.ABORT]
    assert link.end in ("abort", "reset")  # its answer is not waited for
    await server.aclose()


@pytest.mark.parametrize("style", ["fixed", "newstyle", "oldstyle"])
async def test_leaves_an_export_with_disc(fake: FakeUpstream, dial: Dial, style: str) -> None:
    fake.script = Script(style=style)
    server = dial()
    await server.ask(GO)
    await server.aclose()
    assert (await ended(fake)).end == "disc"


async def test_leaves_newstyle_by_closing(fake: FakeUpstream, dial: Dial) -> None:
    """It has no ABORT."""
    fake.script = Script(style="newstyle")
    server = dial()
    await server.ask(ListExports())
    await server.aclose()
    assert (await ended(fake)).end == "eof"


async def test_last_word_is_the_takers(fake: FakeUpstream, dial: Dial) -> None:
    server = dial()
    await server.ask(GO)
    channel = server.take_channel()
    await channel.send_all(disconnect_request())
    await server.aclose()
    assert (await ended(fake)).end == "disc"
    assert channel.socket.fileno() == -1


async def test_taken_channel_is_closed_without_a_word(fake: FakeUpstream, dial: Dial) -> None:
    """The relay may have left in the middle of a message."""
    server = dial()
    await server.ask(GO)
    server.take_channel()
    await server.aclose()
    assert (await ended(fake)).end == "eof"


async def test_close_does_not_wait_for_who_does_not_read(
    dial: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "SEND_BUFFER", 4096)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "deaf"))
        listener.listen()
        server = dial(tmp_path / "deaf")

        async def ask() -> None:
            await server.ask(UseStructuredReplies())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            accepted, _ = listener.accept()
            accepted.sendall(struct.pack(">QQQI124x", NBDMAGIC, CLISERV, MIB, 1))
        channel = server._channel
        assert channel is not None
        while True:
            try:
                channel.socket.send(bytes(1000))
            except BlockingIOError:
                break
        await server.aclose()
        assert channel.socket.fileno() == -1
        accepted.close()


async def test_upstream_that_left_first(fake: FakeUpstream, dial: Dial) -> None:
    server = dial()
    await server.ask(GO)
    fake.links[0].hang_up()
    await ended(fake)
    await server.aclose()
