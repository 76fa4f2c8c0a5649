"""gateway.upstream: extended headers, and block sizes that are only learnt."""

from __future__ import annotations

import struct

import pytest

from gateway.nbd.constants import Info
from gateway.nbd.pairing import (
    Acked,
    Contexts,
    Granted,
    ListExports,
    Open,
    QueryContexts,
    Refused,
    Unavailable,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.wire import BlockSizes
from tests import upstream_rig
from tests.support.fake_upstream import ALL_FEATURES, MIB, FakeUpstream, Link, Script
from tests.support.rawclient import Opt, Rep, Tf
from tests.upstream_rig import GO, UNKNOWN, UNSUPPORTED, Dial, Words, asked, ended

fake, closing, dial, words = (
    upstream_rig.fake,
    upstream_rig.closing,
    upstream_rig.dial,
    upstream_rig.words,
)

EXTENDED_HEADERS = 11
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
EXTENDED_MAGIC = 0x21E41C71
DISC = 2
SIZES = (512, 4096, 65536)


class Newer(Script):
    """Knows extended headers, and is quiet about block sizes unless it is asked."""

    knows_go = True
    knows_extended = True
    volunteers = False

    def option(self, link: Link, opt: int, data: bytes) -> bool:
        if opt == EXTENDED_HEADERS and self.knows_extended:
            link.structured = True
            self.reply(link, opt, Rep.ACK)
            return False
        return super().option(link, opt, data)

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        if not self.knows_go:
            self.reply(link, opt, Rep.ERR_UNSUP)
            return False
        (length,) = struct.unpack_from(">I", data)
        wanted = struct.unpack_from(f">{(len(data) - 6 - length) // 2}H", data, 6 + length)
        sizes, quiet = self.block_sizes, not self.volunteers and Info.BLOCK_SIZE not in wanted
        answer = Script(size=self.size, flags=self.flags, names=self.names)
        answer.block_sizes = None if quiet else sizes
        return answer.info(link, opt, data)

    def transmit(self, link: Link) -> None:
        """Nothing but the end is expected here."""
        if (EXTENDED_HEADERS, b"") not in link.options or not self.knows_extended:
            super().transmit(link)
            return
        header = EXTENDED_REQUEST.unpack(link.take(EXTENDED_REQUEST.size, inside=False))
        assert header[::2] == (EXTENDED_MAGIC, DISC, 0)
        link.end = "disc"


def learn(name: str = "", infos: tuple[int, ...] = ()) -> Open:
    return Open(name, infos, go=True, learn_sizes=True)


def infos_in(data: bytes) -> tuple[int, ...]:
    """What an INFO or GO asks for."""
    (length,) = struct.unpack_from(">I", data)
    (count,) = struct.unpack_from(">H", data, 4 + length)
    return struct.unpack_from(f">{count}H", data, 6 + length)


def opens(link: Link) -> list[tuple[int, tuple[int, ...]]]:
    return [(opt, infos_in(data)) for opt, data in link.options if opt in (Opt.INFO, Opt.GO)]


# ---------------------------------------------------------------- extended headers


async def test_extended_headers(fake: FakeUpstream, dial: Dial) -> None:
    fake.script = Newer()
    server = dial()
    assert await server.ask(UseExtendedHeaders()) == Acked()
    query = QueryContexts("", ("base:allocation",), select=True)
    assert isinstance(await server.ask(query), Contexts)
    assert isinstance(await server.ask(GO), Granted)
    (link,) = fake.links
    assert asked(link) == [EXTENDED_HEADERS, Opt.SET_META_CONTEXT, Opt.GO]
    await server.aclose()
    assert (await ended(fake)).end == "disc"


async def test_refused_extended_headers_change_nothing(fake: FakeUpstream, dial: Dial) -> None:
    fake.script = Newer(knows_extended=False)
    server = dial()
    assert await server.ask(UseExtendedHeaders()) == UNSUPPORTED
    assert await server.ask(UseStructuredReplies()) == Acked()
    assert isinstance(await server.ask(GO), Granted)
    await server.aclose()
    assert (await ended(fake)).end == "disc"
    assert fake.connects == 1


async def test_extended_after_structured(fake: FakeUpstream, dial: Dial) -> None:
    fake.script = Newer()
    server = dial()
    assert await server.ask(UseStructuredReplies()) == Acked()
    assert await server.ask(UseExtendedHeaders()) == Acked()
    assert isinstance(await server.ask(GO), Granted)
    await server.aclose()
    assert (await ended(fake)).end == "disc"


@pytest.mark.parametrize("go", [True, False])
async def test_export_name_is_no_fall_back_then(fake: FakeUpstream, dial: Dial, go: bool) -> None:
    """ "Once extended headers are successfully requested, a client MUST NOT use" it."""
    fake.script = Newer(knows_go=False)
    server = dial()
    await server.ask(UseExtendedHeaders())
    answer = await server.ask(Open("", (), go=go, learn_sizes=go))
    assert isinstance(answer, Refused)
    assert answer.kind == UNSUPPORTED.kind
    assert Opt.EXPORT_NAME not in asked(fake.links[0])
    await server.aclose()
    assert asked(await ended(fake))[-1] == Opt.ABORT


async def test_extended_headers_are_not_forgotten_by_dialling_again(
    fake: FakeUpstream, dial: Dial, words: Words
) -> None:
    """A client was promised them: a new connection would know nothing of them."""

    class Dies(Newer):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            link.hang_up()
            return False

    fake.queue = [Dies()]
    server = dial()
    assert await server.ask(UseExtendedHeaders()) == Acked()
    for question in (GO, ListExports(), UseExtendedHeaders(), UseStructuredReplies()):
        assert await server.ask(question) == Unavailable()
    assert fake.connects == 1
    assert "went away during the negotiation" in words.said()[-1][1]


async def test_server_that_falls_over_the_option_may_be_dialled_again(
    fake: FakeUpstream, dial: Dial
) -> None:
    """Nothing was promised."""

    class Falls(Script):
        def option(self, link: Link, opt: int, data: bytes) -> bool:
            link.hang_up()
            return False

    fake.queue = [Falls()]
    server = dial()
    assert await server.ask(UseExtendedHeaders()) == Unavailable()
    assert isinstance(await server.ask(GO), Granted)
    assert fake.connects == 2


async def test_ack_with_something_in_front_of_it(
    fake: FakeUpstream, dial: Dial, words: Words
) -> None:
    class Chats(Script):
        def option(self, link: Link, opt: int, data: bytes) -> bool:
            self.reply(link, opt, Rep.INFO, struct.pack(">HQH", 0, 1, 1))
            self.reply(link, opt, Rep.ACK)
            return False

    fake.script = Chats()
    assert await dial().ask(UseExtendedHeaders()) == Unavailable()
    assert "only an ACK" in words.warning


# ---------------------------------------------------------------- block sizes, learnt


@pytest.fixture
def quiet(fake: FakeUpstream) -> Newer:
    fake.script = script = Newer(block_sizes=SIZES)
    return script


@pytest.mark.usefixtures("quiet")
async def test_sizes_are_learnt_before_go_and_bind_nobody(fake: FakeUpstream, dial: Dial) -> None:
    answer = await dial().ask(learn(infos=(Info.NAME,)))
    assert answer == Granted(MIB, int(ALL_FEATURES & ~Tf.SEND_DF), learnt_sizes=BlockSizes(*SIZES))
    assert opens(fake.links[0]) == [(Opt.INFO, (Info.BLOCK_SIZE,)), (Opt.GO, (Info.NAME,))]


@pytest.mark.usefixtures("quiet")
async def test_nothing_is_learnt_unless_asked(fake: FakeUpstream, dial: Dial) -> None:
    answer = await dial().ask(GO)
    assert isinstance(answer, Granted)
    assert (answer.block_sizes, answer.learnt_sizes) == (None, None)
    assert asked(fake.links[0]) == [Opt.GO]


@pytest.mark.usefixtures("quiet")
async def test_sizes_that_the_client_asks_for_are_no_secret(fake: FakeUpstream, dial: Dial) -> None:
    answer = await dial().ask(learn(infos=(Info.BLOCK_SIZE,)))
    assert isinstance(answer, Granted)
    assert answer.block_sizes == BlockSizes(*SIZES)
    assert answer.learnt_sizes is None
    assert opens(fake.links[0]) == [(Opt.GO, (Info.BLOCK_SIZE,))]


@pytest.mark.parametrize("volunteers", [True, False])
async def test_one_info_is_enough(
    fake: FakeUpstream, dial: Dial, quiet: Newer, volunteers: bool
) -> None:
    """Also one of the client's own, and one that told without having been asked."""
    quiet.volunteers = volunteers
    server = dial()
    await server.ask(Open("", () if volunteers else (Info.BLOCK_SIZE,), go=False))
    answer = await server.ask(learn())
    assert isinstance(answer, Granted)
    assert (answer.block_sizes or answer.learnt_sizes) == BlockSizes(*SIZES)
    assert asked(fake.links[0]) == [Opt.INFO, Opt.GO]


async def test_export_without_sizes_is_asked_once(fake: FakeUpstream, dial: Dial) -> None:
    fake.script = Newer()
    server = dial()
    await server.ask(Open("", (Info.BLOCK_SIZE,), go=False))
    answer = await server.ask(learn())
    assert isinstance(answer, Granted)
    assert (answer.block_sizes, answer.learnt_sizes) == (None, None)
    assert asked(fake.links[0]) == [Opt.INFO, Opt.GO]


async def test_sizes_are_those_of_the_export(fake: FakeUpstream, dial: Dial, quiet: Newer) -> None:
    quiet.names = (b"a", b"b")
    server = dial()
    await server.ask(Open("a", (Info.BLOCK_SIZE,), go=False))
    assert isinstance(await server.ask(learn("b")), Granted)
    assert opens(fake.links[0]) == [
        (Opt.INFO, (Info.BLOCK_SIZE,)),
        (Opt.INFO, (Info.BLOCK_SIZE,)),
        (Opt.GO, ()),
    ]


async def test_names_that_clients_make_up_are_not_kept(
    fake: FakeUpstream, dial: Dial, quiet: Newer
) -> None:
    """A client may ask for thousands of them, 4096 bytes each."""
    quiet.names = None
    server = dial()
    for number in range(10):
        await server.ask(Open(f"{number}", (Info.BLOCK_SIZE,), go=False))
    quiet.names = (b"",)
    for number in range(10):
        assert await server.ask(learn(f"no {number}")) == UNKNOWN
    assert len(server._sizes) <= 1


async def test_refused_info_is_for_go_to_repeat(
    fake: FakeUpstream, dial: Dial, quiet: Newer
) -> None:
    """And once the export is there, its sizes are learnt."""
    server = dial()
    assert await server.ask(learn("later")) == UNKNOWN
    quiet.names = (b"later",)
    answer = await server.ask(learn("later"))
    assert isinstance(answer, Granted)
    assert answer.learnt_sizes == BlockSizes(*SIZES)
    assert fake.connects == 1


async def test_server_without_info_or_go(fake: FakeUpstream, dial: Dial, quiet: Newer) -> None:
    quiet.knows_go = False
    answer = await dial().ask(learn())
    assert answer == Granted(MIB, int(ALL_FEATURES))
    assert asked(fake.links[0]) == [Opt.INFO, Opt.GO, Opt.EXPORT_NAME]


async def test_server_that_insists_on_a_promise(fake: FakeUpstream, dial: Dial) -> None:
    """INFO promises nothing: then GO is asked with it, and the sizes are the client's as well."""

    class Insists(Newer):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            if Info.BLOCK_SIZE not in infos_in(data):
                self.reply(link, opt, Rep.ERR_BLOCK_SIZE_REQD)
                return False
            return super().info(link, opt, data)

    fake.script = Insists(block_sizes=SIZES)
    answer = await dial().ask(learn())
    assert isinstance(answer, Granted)
    assert answer.block_sizes == BlockSizes(*SIZES)
    assert opens(fake.links[0]) == [
        (Opt.INFO, (Info.BLOCK_SIZE,)),
        (Opt.GO, ()),
        (Opt.GO, (Info.BLOCK_SIZE,)),
    ]


@pytest.mark.parametrize("style", ["oldstyle", "newstyle"])
async def test_who_has_no_options_has_no_sizes(fake: FakeUpstream, dial: Dial, style: str) -> None:
    fake.script = Script(style=style)
    answer = await dial().ask(learn())
    assert answer == Granted(MIB, int(ALL_FEATURES))
    assert asked(fake.links[0]) == ([] if style == "oldstyle" else [Opt.EXPORT_NAME])


async def test_what_was_learnt_goes_with_the_connection(
    fake: FakeUpstream, dial: Dial, quiet: Newer
) -> None:
    """The server that comes back may be another one."""

    class Dies(Newer):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            super().info(link, opt, data)
            if opt == Opt.INFO:
                link.hang_up()
            return False

    fake.queue = [Dies(block_sizes=(1, 512, 512))]
    server = dial()
    assert await server.ask(learn()) == Unavailable()
    answer = await server.ask(learn())
    assert isinstance(answer, Granted)
    assert answer.learnt_sizes == BlockSizes(*SIZES)


@pytest.mark.parametrize("sizes", [(3, 512, 512), (1, 512, 511), (1, 4096, 512)])
async def test_sizes_that_cannot_be(
    fake: FakeUpstream, dial: Dial, words: Words, sizes: tuple[int, int, int]
) -> None:
    """A server that lies about what binds nobody is not to be trusted with the rest."""
    fake.script = Newer(block_sizes=sizes)
    assert await dial().ask(learn()) == Unavailable()
    assert "block size" in words.warning or "payload" in words.warning
