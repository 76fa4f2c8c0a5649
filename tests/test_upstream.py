"""gateway.upstream: dialling servers of each style, what is asked of them, and how they fail."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

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
    Unavailable,
    UseStructuredReplies,
)
from gateway.nbd.wire import BlockSizes, ListedExport, disconnect_request
from gateway.upstream import Upstream
from tests.support.fake_upstream import ALL_FEATURES, MIB, FakeUpstream, Link, Script
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    CLISERV,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    Opt,
    Rep,
    Tf,
)

LOG = logging.LoggerAdapter(logging.getLogger("gateway.session"), {})
UNSUPPORTED = Refused(OurRep.ERR_UNSUP)
UNKNOWN = Refused(OurRep.ERR_UNKNOWN)
GO = Open("", (), go=True)
INFO = Open("", (), go=False)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


Dial = Callable[..., Upstream]


@pytest.fixture
async def closing() -> AsyncExitStack:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def dial(tmp_path: Path, closing: AsyncExitStack) -> Dial:
    """Upstreams of the fake, which are closed at the end."""

    def dial(
        path: Path | None = None, *, oldstyle_name: str = "", timeout_s: float = 10.0
    ) -> Upstream:
        path = path or tmp_path / "up"
        made = Upstream(str(path), LOG, oldstyle_name=oldstyle_name, timeout_s=timeout_s)
        closing.push_async_callback(made.aclose)
        return made

    return dial


async def ended(fake: FakeUpstream, index: int = -1) -> Link:
    return await trio.to_thread.run_sync(fake.wait_end, index)


def asked(link: Link) -> list[int]:
    return [opt for opt, _ in link.options]


class Words:
    """What was said of an upstream that cannot be used."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.DEBUG)

    def said(self) -> list[tuple[int, str]]:
        prefix = "upstream unavailable: "
        found = [(one.levelno, one.getMessage()) for one in self._caplog.records]
        return [(level, text[len(prefix) :]) for level, text in found if text.startswith(prefix)]

    @property
    def warning(self) -> str:
        """The one that there is."""
        ((level, text),) = self.said()
        assert level == logging.WARNING
        assert text.isprintable()
        return text


@pytest.fixture
def words(caplog: pytest.LogCaptureFixture) -> Words:
    return Words(caplog)


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
    for question, option in ((INFO, Opt.INFO), (GO, Opt.GO)):
        server = dial()
        answer = await server.ask(question)
        assert isinstance(answer, Granted)
        assert answer.block_sizes == BlockSizes(512, 4096, MIB)
        assert asked(fake.links[-1]) == [option, option]


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
    "question", [UseStructuredReplies(), ListExports(), QueryContexts("", (), select=True)]
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


# ---------------------------------------------------------------- failures, in words


async def test_no_socket(dial: Dial, tmp_path: Path, words: Words) -> None:
    assert await dial(tmp_path / "nowhere").ask(GO) == Unavailable()
    assert words.warning == f"{tmp_path}/nowhere: no such socket: is the NBD server running?"


async def test_nobody_listens(dial: Dial, tmp_path: Path, words: Words) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    assert await dial(tmp_path / "left").ask(GO) == Unavailable()
    assert "connection refused: nobody listens" in words.warning


async def test_no_socket_but_a_file(dial: Dial, tmp_path: Path, words: Words) -> None:
    (tmp_path / "file").touch()
    assert await dial(tmp_path / "file").ask(GO) == Unavailable()
    assert words.warning.startswith(f"{tmp_path}/file: ")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Not root for a moment, since root may open every socket."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


async def test_no_permission(dial: Dial, words: Words) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "up")
        with FakeUpstream(path):
            os.chmod(path, 0)
            with as_nobody():
                assert await dial(path).ask(GO) == Unavailable()
    assert words.warning == (
        f"{path}: permission denied: the gateway's user may not open this socket"
    )


@pytest.mark.parametrize(
    ("first", "complaint"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not an NBD server"),
        (b"NBDMAGIX", "not an NBD server"),
        (struct.pack(">QQH", NBDMAGIC, 0x1234, 0), "unexpected version of the NBD protocol"),
        (b"", "closed during the handshake, before a greeting"),
        (b"NBDMAGIC", "closed during the handshake"),
        (struct.pack(">QQQ", NBDMAGIC, CLISERV, MIB), "closed during the handshake"),
        (struct.pack(">QQQI124x", NBDMAGIC, CLISERV, 1 << 63, 1), "size"),
    ],
)
async def test_strange_greetings(
    fake: FakeUpstream, dial: Dial, words: Words, first: bytes, complaint: str
) -> None:
    class Strange(Script):
        def serve(self, link: Link) -> None:
            link.send(first)

    fake.script = Strange()
    assert await dial().ask(GO) == Unavailable()
    assert complaint in words.warning


async def test_close_in_the_middle_of_an_answer(
    fake: FakeUpstream, dial: Dial, words: Words
) -> None:
    whole = GREETING.size + 20 + 12 + 20
    for cut in (GREETING.size, GREETING.size + 1, whole - 1):
        fake.script.cut_after = cut
        assert await dial().ask(GO) == Unavailable()
    for _, text in words.said():  # perhaps with "(Broken pipe)"
        assert text.startswith("upstream: closed during the handshake")
        assert "before a greeting" not in text


@pytest.mark.parametrize("after", [0, GREETING.size], ids=["no greeting", "no answer"])
async def test_silence(
    fake: FakeUpstream, dial: Dial, words: Words, mock_clock: MockClock, after: int
) -> None:
    class Silent(Script):
        def serve(self, link: Link) -> None:
            link.send(GREETING.pack(NBDMAGIC, IHAVEOPT, C_FIXED)[:after])
            link.take_to_end()

    fake.script = Silent()
    server = dial(timeout_s=5.0)
    async with trio.open_nursery() as nursery:
        answers = []

        async def ask() -> None:
            answers.append(await server.ask(GO))

        nursery.start_soon(ask)
        await trio.to_thread.run_sync(fake.wait_link)
        await wait_all_tasks_blocked()
        mock_clock.jump(4.9)
        await wait_all_tasks_blocked()
        assert not answers
        mock_clock.jump(0.2)
    assert answers == [Unavailable()]
    assert words.warning == f"{fake.path} did not answer within 5 s"
    assert (await ended(fake)).end is not None


async def test_full_backlog_is_waited_for(
    dial: Dial, tmp_path: Path, mock_clock: MockClock
) -> None:
    """On a Unix socket that is an error and not a wait; then it is served all the same."""
    path = tmp_path / "busy"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        server = dial(path, timeout_s=5.0)
        answers = []

        async def ask() -> None:
            answers.append(await server.ask(ListExports()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            for _ in range(10):
                mock_clock.jump(0.1)
                await wait_all_tasks_blocked()
            assert not answers
            listener.accept()[0].close()
            mock_clock.jump(0.1)
            await wait_all_tasks_blocked()
            accepted, _ = listener.accept()
            accepted.sendall(struct.pack(">QQQI124x", NBDMAGIC, CLISERV, MIB, 1))
        accepted.close()
        assert answers == [UNSUPPORTED]


async def test_out_of_descriptors(
    dial: Dial, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(upstream.socket, "socket", none_left)
    assert await dial().ask(GO) == Unavailable()
    assert words.warning.endswith(": Too many open files")


async def test_each_failure_is_a_warning_once(dial: Dial, tmp_path: Path, words: Words) -> None:
    """Clients ask INFO, then GO, then with another name: one warning is enough."""
    server = dial(tmp_path / "nowhere")
    for question in (ListExports(), INFO, GO):
        assert await server.ask(question) == Unavailable()
    assert [level for level, _ in words.said()] == [logging.WARNING, logging.DEBUG, logging.DEBUG]


async def test_server_that_comes_back_is_used_again(
    dial: Dial, tmp_path: Path, words: Words
) -> None:
    server = dial()
    assert await server.ask(INFO) == Unavailable()
    with FakeUpstream(tmp_path / "up"):
        assert isinstance(await server.ask(GO), Granted)


async def test_what_was_agreed_is_not_forgotten_by_dialling_again(
    fake: FakeUpstream, dial: Dial, words: Words
) -> None:
    """A client was promised structured replies: a new connection would know nothing of them."""

    class Dies(Script):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            link.hang_up()
            return False

    fake.queue = [Dies()]
    server = dial()
    assert await server.ask(UseStructuredReplies()) == Acked()
    assert await server.ask(INFO) == Unavailable()
    assert await server.ask(GO) == Unavailable()
    assert fake.connects == 1
    assert "went away during the negotiation" in words.said()[-1][1]


async def test_bytes_that_nobody_asked_for(fake: FakeUpstream, dial: Dial, words: Words) -> None:
    class Talks(Script):
        def option(self, link: Link, opt: int, data: bytes) -> bool:
            super().option(link, opt, data)
            self.reply(link, opt, Rep.ACK)
            return False

    fake.script = Talks()
    assert await dial().ask(INFO) == Unavailable()
    assert "bytes that nobody asked for" in words.warning


async def test_cancelled_question_leaves_nothing_open(fake: FakeUpstream, dial: Dial) -> None:
    class Silent(Script):
        def option(self, link: Link, opt: int, data: bytes) -> bool:
            link.take_to_end()
            return False

    fake.script = Silent()
    server = dial()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.ask, GO)
        link = await trio.to_thread.run_sync(fake.wait_link)
        await trio.to_thread.run_sync(fake.wait, lambda: link.options, "the option")
        nursery.cancel_scope.cancel()
    await server.aclose()
    await ended(fake)


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
    dial: Dial, tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.aclose)
            await wait_all_tasks_blocked()
            mock_clock.jump(1.1)
        assert channel.socket.fileno() == -1
        accepted.close()


async def test_upstream_that_left_first(fake: FakeUpstream, dial: Dial) -> None:
    server = dial()
    await server.ask(GO)
    fake.links[0].hang_up()
    await ended(fake)
    await server.aclose()
