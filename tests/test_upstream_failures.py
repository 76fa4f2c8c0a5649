"""gateway.upstream: servers that are not there, that are no NBD servers, or that fall silent."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.nbd.pairing import (
    Acked,
    Granted,
    ListExports,
    Unavailable,
    UseStructuredReplies,
)
from tests import upstream_rig
from tests.support.fake_upstream import MIB, FakeUpstream, Link, Script
from tests.support.rawclient import (
    C_FIXED,
    CLISERV,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    Rep,
)
from tests.upstream_rig import GO, INFO, UNSUPPORTED, Dial, Words, ended

fake, closing, dial, words = (
    upstream_rig.fake,
    upstream_rig.closing,
    upstream_rig.dial,
    upstream_rig.words,
)


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

    monkeypatch.setattr(socket, "socket", none_left)
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
            said, send = bytearray(), link.send
            link.send = said.extend  # type: ignore[method-assign]
            super().option(link, opt, data)
            self.reply(link, opt, Rep.ACK)
            send(bytes(said))  # in one go: what comes later, the answer does not wait for
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
