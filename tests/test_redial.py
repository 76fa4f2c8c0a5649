"""gateway.redial: another upstream is dialled, until there is one that is as the first one was."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from gateway.nbd.constants import Info
from gateway.nbd.constants import Rep as OurRep
from gateway.nbd.pairing import (
    Acked,
    Contexts,
    Granted,
    Open,
    QueryContexts,
    Question,
    Refused,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.redial import Redialler
from gateway.transport import Channel
from gateway.upstream import Upstream
from tests import upstream_rig
from tests.session_rig import in_thread
from tests.support.fake_upstream import (
    ALL_FEATURES,
    MIB,
    FakeUpstream,
    Link,
    LinkEndedError,
    Script,
)
from tests.support.rawclient import Cmd, Opt, Rep, Request, Tf
from tests.upstream_rig import LOG

fake = upstream_rig.fake  # the fixture
GO = Open("", (int(Info.BLOCK_SIZE),), go=True)
SELECT = QueryContexts("", ("base:allocation", "qemu:dirty-bitmap:b0"), True)
ALL: tuple[Question, ...] = (UseStructuredReplies(), SELECT, GO)
SIZES = (512, 4096, MIB)
READ = Request(Cmd.READ, 0, 512, 9)


class Rig:
    """An upstream in transmission, that is lost, and who dials the next."""

    def __init__(self, fake: FakeUpstream) -> None:
        self.fake = fake
        self.attempts = 0

    def _dial(self, *, quiet: bool = True) -> Upstream:
        self.attempts += quiet
        path = str(self.fake.path)
        return Upstream(path, LOG, oldstyle_name="", timeout_s=self.timeout_s, quiet=quiet)

    async def loses(
        self, questions: Sequence[Question] = ALL, *, within_s: float = 10.0, timeout_s: float = 5.0
    ) -> Redialler:
        self.timeout_s = timeout_s
        first = self._dial(quiet=False)
        for question in questions:
            await first.ask(question)
        first.take_channel().close()
        return Redialler(self._dial, first.agreed, LOG, within_s=within_s)


@pytest.fixture
def rig(fake: FakeUpstream) -> Rig:
    fake.script = Script(block_sizes=SIZES)
    return Rig(fake)


async def serves(channel: Channel | None) -> None:
    """It is in transmission, and answers."""
    assert channel is not None
    with trio.fail_after(5):
        await channel.send_all(READ.pack())
        assert await channel.receive()
    channel.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


# ---------------------------------------------------------------- back as it was


async def test_asks_what_the_first_one_was_asked(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    again = await rig.loses()
    channel = await again(progress=True)
    again.resumed(3, lost=True)
    await serves(channel)
    first, second = [await in_thread(rig.fake.wait_link, index) for index in (0, 1)]
    assert second.options == first.options
    assert [opt for opt, _ in second.options] == [
        Opt.STRUCTURED_REPLY,
        Opt.SET_META_CONTEXT,
        Opt.GO,
    ]
    assert rig.attempts == 1
    lost, back, unflushed = warnings(caplog)
    assert lost == "upstream lost: dialling it anew, for 10 s"
    assert back.startswith("upstream is back after 0.")
    assert back.endswith(" s; 3 requests sent again")
    assert unflushed == "writes before that had not been flushed: the next flush fails"


@pytest.mark.parametrize("style", ["oldstyle", "newstyle", "fixed"])
async def test_any_dialect(rig: Rig, style: str) -> None:
    rig.fake.script = Script(style=style)
    again = await rig.loses((GO,))
    await serves(await again(progress=True))


async def test_what_was_only_looked_at_is_not_asked_again(rig: Rig) -> None:
    other = QueryContexts("", (), False)
    info = Open("", (), go=False)
    again = await rig.loses((info, UseStructuredReplies(), other, SELECT, info, GO))
    await serves(await again(progress=True))
    link = await in_thread(rig.fake.wait_link, 1)
    assert [opt for opt, _ in link.options] == [Opt.STRUCTURED_REPLY, Opt.SET_META_CONTEXT, Opt.GO]


async def test_contexts_of_another_export_are_not_asked_for(rig: Rig) -> None:
    rig.fake.script = Script(names=(b"", b"other"))
    elsewhere = QueryContexts("other", ("base:allocation",), True)
    again = await rig.loses((UseStructuredReplies(), elsewhere, GO))
    await serves(await again(progress=True))
    link = await in_thread(rig.fake.wait_link, 1)
    assert [opt for opt, _ in link.options] == [Opt.STRUCTURED_REPLY, Opt.GO]


async def test_contexts_that_were_refused_may_be_refused_again(rig: Rig) -> None:
    class NoContexts(Script):
        def meta(self, link: Link, opt: int, data: bytes) -> None:
            self.reply(link, opt, Rep.ERR_UNSUP)

    rig.fake.script = NoContexts()
    again = await rig.loses()
    await serves(await again(progress=True))


async def test_what_was_agreed_on_twice_is_asked_in_the_order_of_the_last(
    fake: FakeUpstream,
) -> None:
    """A selection before the headers that it needs would be refused."""
    upstream = Upstream(str(fake.path), LOG, oldstyle_name="", timeout_s=5)
    upstream._note(SELECT, Refused(int(OurRep.ERR_EXT_HEADER_REQD)))
    upstream._note(UseExtendedHeaders(), Acked())
    upstream._note(SELECT, Contexts(()))
    upstream._note(GO, Granted(1, 1))
    upstream._opened = ("", Granted(1, 1))
    assert [question for question, _ in upstream.agreed] == [UseExtendedHeaders(), SELECT, GO]


# ---------------------------------------------------------------- back otherwise


class Other(Script):
    """Contexts with other ids."""

    def meta(self, link: Link, opt: int, data: bytes) -> None:
        for number, name in enumerate(self.contexts):
            self.reply(link, opt, Rep.META_CONTEXT, struct.pack(">I", 7 + number) + name)
        self.reply(link, opt, Rep.ACK)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(size=2 * MIB), f"it has {2 * MIB} bytes where it had {MIB}"),
        (Script(size=MIB - 512), f"it has {MIB - 512} bytes where it had {MIB}"),
        (Script(flags=ALL_FEATURES | Tf.READ_ONLY), "its flags are 0x"),
        (Script(flags=ALL_FEATURES & ~Tf.SEND_FLUSH), "its flags are 0x"),
        (Script(block_sizes=(4096, 4096, MIB)), "its block sizes are not what they were"),
        (Script(block_sizes=None), "its block sizes are not what they were"),
        (Script(contexts=(b"base:allocation",)), "its meta contexts are not what they were"),
        (Other(), "its meta contexts are not what they were"),
    ],
)
async def test_changed(
    rig: Rig, caplog: pytest.LogCaptureFixture, script: Script, words: str
) -> None:
    """Given up at once: a client would be told lies."""
    again = await rig.loses()
    if script.block_sizes is None and script.contexts == Script.contexts and "sizes" not in words:
        script.block_sizes = SIZES
    rig.fake.script = script
    assert await again(progress=True) is None
    assert f"upstream is back, but {words}" in warnings(caplog)[-1]
    assert warnings(caplog)[-1].endswith(": giving it up")
    assert rig.attempts == 1
    link = await in_thread(rig.fake.wait_end, 1)
    assert link.end in ("abort", "disc", "eof", "reset")


async def test_infos_may_change(rig: Rig) -> None:
    class Talkative(Script):
        def infos(self, link: Link) -> list[bytes]:
            return [*super().infos(link), struct.pack(">H", Info.DESCRIPTION) + b"new words"]

    again = await rig.loses()
    rig.fake.script = Talkative(block_sizes=SIZES)
    await serves(await again(progress=True))


# ---------------------------------------------------------------- not back yet


class Early(Script):
    """Each attempt fails in another way, as with a server that is starting."""

    block_sizes = SIZES

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def serve(self, link: Link) -> None:
        if self.phase == "hangs up":
            raise LinkEndedError
        if self.phase == "is silent":
            link.take_to_end()
            return
        if self.phase == "says nonsense":
            link.send(bytes(152))
            link.take_to_end()
            return
        super().serve(link)

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        if self.phase == "does not know the export":
            self.reply(link, opt, Rep.ERR_UNKNOWN)
            return False
        if self.phase == "hangs up late":
            raise LinkEndedError
        return super().info(link, opt, data)

    def option(self, link: Link, opt: int, data: bytes) -> bool:
        if self.phase == "refuses all":
            self.reply(link, opt, Rep.ERR_SHUTDOWN)
            return False
        return super().option(link, opt, data)


EARLY = [
    "hangs up",
    "is silent",
    "says nonsense",
    "does not know the export",
    "hangs up late",
    "refuses all",
]


@pytest.mark.parametrize("phase", EARLY)
async def test_starts_slowly(rig: Rig, phase: str) -> None:
    again = await rig.loses(timeout_s=1.0)  # for the third, which is as slow as this machine
    rig.fake.queue = [Early(phase), Early(phase)]
    await serves(await again(progress=True))
    assert rig.attempts == 3


async def test_is_not_there_at_first(rig: Rig, tmp_path: Path) -> None:
    again = await rig.loses()
    away = tmp_path / "elsewhere"
    os.rename(rig.fake.path, away)
    async with trio.open_nursery() as nursery:

        async def come_back() -> None:
            while rig.attempts < 4:  # noqa: ASYNC110  (a counter in code that is not the test's)
                await trio.sleep(0.01)
            os.rename(away, rig.fake.path)

        nursery.start_soon(come_back)
        await serves(await again(progress=True))
    assert rig.attempts >= 4


@pytest.mark.parametrize("phase", EARLY)
async def test_never_back(rig: Rig, phase: str, caplog: pytest.LogCaptureFixture) -> None:
    again = await rig.loses(within_s=0.5, timeout_s=0.2)
    rig.fake.script = Early(phase)
    with trio.fail_after(5):
        assert await again(progress=True) is None
    last = warnings(caplog)[-1]
    assert last == "upstream did not come back within 0.5 s: giving it up"
    assert len(warnings(caplog)) == 2, "no warning for each attempt"
    for index in range(1, len(rig.fake.links)):
        await in_thread(rig.fake.wait_end, index)


async def test_waits_between_attempts(rig: Rig, tmp_path: Path) -> None:
    """Not too long, and not without a pause."""
    again = await rig.loses(within_s=1.0)
    os.rename(rig.fake.path, tmp_path / "elsewhere")
    assert await again(progress=True) is None
    assert 3 <= rig.attempts <= 20
    os.rename(tmp_path / "elsewhere", rig.fake.path)


async def test_cancelled_in_the_middle(rig: Rig) -> None:
    again = await rig.loses()
    rig.fake.script = Early("is silent")
    with trio.move_on_after(0.1):
        await again(progress=True)
    link = await in_thread(rig.fake.wait_end, 1)
    assert link.end in ("eof", "cut")


# ---------------------------------------------------------------- back, but of no use


async def test_gone_again_and_again_without_an_answer(rig: Rig) -> None:
    """It has no more time than one that stays away, and is not dialled without a pause."""
    again = await rig.loses(within_s=0.6)
    with trio.fail_after(5):
        while (channel := await again(progress=False)) is not None:
            channel.close()
    assert 2 <= rig.attempts <= 20


async def test_each_answer_gives_it_its_time_again(rig: Rig) -> None:
    again = await rig.loses(within_s=0.3)
    end = trio.current_time() + 0.8
    while trio.current_time() < end:
        channel = await again(progress=True)
        assert channel is not None
        channel.close()
        await trio.sleep(0.05)


async def test_loss_long_after_the_last_begins_anew(rig: Rig) -> None:
    again = await rig.loses(within_s=0.2)
    for _ in range(3):
        channel = await again(progress=False)
        assert channel is not None, "it was there for longer than that"
        await trio.sleep(0.3)
        channel.close()
