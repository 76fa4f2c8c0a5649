"""The client role towards an upstream of any style: greeting, questions, answers, and lies."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import pytest

from gateway.errors import PeerError
from gateway.nbd.constants import Opt, Rep
from gateway.nbd.handshake import (
    MAX_REPLIES,
    MAX_REPLY_BYTES,
    MAX_REPLY_DATA,
    Greeted,
    Handshake,
    Style,
)
from gateway.nbd.pairing import Acked, Answer, Contexts, Granted, Listed, Refused
from gateway.nbd.wire import BlockSizes, ListedExport, MetaContext
from tests.nbd.support import (
    MIB,
    all_cuts,
    context,
    info_block_size,
    info_data,
    info_export,
    info_text,
    listed,
    meta_data,
    option,
    option_reply,
)

FIXED, NO_ZEROES, HAS_FLAGS = 1, 2, 1


def newstyle(flags: int = FIXED | NO_ZEROES) -> bytes:
    return b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)


def oldstyle(size: int = MIB, flags: int = HAS_FLAGS) -> bytes:
    return b"NBDMAGIC" + struct.pack(">QQI124x", 0x00420281861253, size, flags)


def feed(machine: Handshake, pieces: Iterable[bytes]) -> Greeted | Answer | None:
    """The last piece, and no other, may complete the answer."""
    result = None
    for piece in pieces:
        assert result is None, "an answer before its last byte"
        result = machine.receive(piece)
    return result


def greeted(flags: int = FIXED | NO_ZEROES) -> Handshake:
    machine = Handshake()
    assert machine.receive(newstyle(flags)) is not None
    return machine


def answer(ask: Callable[[Handshake], bytes], raw: bytes) -> Greeted | Answer | None:
    """The answer to one question, which has to be the same at every cut."""
    results = []
    for pieces in all_cuts(raw) if len(raw) < 300 else [[raw]]:
        machine = greeted()
        ask(machine)
        results.append(feed(machine, pieces))
    assert all(result == results[0] for result in results)
    return results[0]


def fault(ask: Callable[[Handshake], bytes], raw: bytes) -> str:
    """What is wrong with these bytes, which has to be found at every cut."""
    faults = set()
    for pieces in all_cuts(raw) if len(raw) < 300 else [[raw]]:
        machine = greeted()
        ask(machine)
        with pytest.raises(PeerError) as caught:
            [machine.receive(piece) for piece in pieces]
        assert caught.value.side == "upstream"
        faults.add(caught.value.what)
    (one,) = faults
    return one


# -- the greeting (U1)


@pytest.mark.parametrize(
    ("flags", "style", "reply"),
    [
        (FIXED | NO_ZEROES, Style.FIXED_NEWSTYLE, 3),
        (FIXED, Style.FIXED_NEWSTYLE, 1),
        (NO_ZEROES, Style.NEWSTYLE, 2),
        (0, Style.NEWSTYLE, 0),
        (0xFFFF, Style.FIXED_NEWSTYLE, 3),
        (0x8000, Style.NEWSTYLE, 0),
    ],
)
def test_newstyle_is_told_and_only_known_flags_are_answered(
    flags: int, style: Style, reply: int
) -> None:
    """(U1, U2): unknown handshake flags are ignored."""
    for pieces in all_cuts(newstyle(flags)):
        machine = Handshake()
        assert machine.style is None
        assert feed(machine, pieces) == Greeted(style, struct.pack(">I", reply), None)
        assert machine.style is style


def test_oldstyle_is_one_export_in_152_bytes() -> None:
    """(U1): handshake flags in the upper half are none of ours."""
    raw = oldstyle(4711, 0xFFFF0000 | 0b100111)
    assert len(raw) == 152
    for pieces in all_cuts(raw):
        machine = Handshake()
        assert feed(machine, pieces) == Greeted(Style.OLDSTYLE, b"", Granted(4711, 0b100111))


def test_oldstyle_reserved_bytes_need_not_be_zero() -> None:
    raw = oldstyle()[:28] + b"\xff" * 124
    assert Handshake().receive(raw) == Greeted(Style.OLDSTYLE, b"", Granted(MIB, HAS_FLAGS))


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 400", b"\0", b"NBDMAGIX"])
def test_other_servers_are_known_at_their_first_wrong_byte(raw: bytes) -> None:
    machine, right = Handshake(), b"NBDMAGIC"
    common = next(at for at in range(len(raw)) if raw[at] != right[at])
    for at in range(common):
        assert machine.receive(raw[at : at + 1]) is None
    with pytest.raises(PeerError, match=r"^upstream: not an NBD server"):
        machine.receive(raw[common : common + 1])


@pytest.mark.parametrize("magic", [0, 0x49484156454F5055, 0x3E889045565A9])
def test_unexpected_version_is_told_from_no_nbd_at_all(magic: int) -> None:
    for pieces in all_cuts(b"NBDMAGIC" + struct.pack(">Q", magic)):
        with pytest.raises(PeerError, match="unexpected version of the NBD protocol"):
            feed(Handshake(), pieces)


@pytest.mark.parametrize("raw", [newstyle() + b"\0", oldstyle() + b"\0"])
def test_bytes_behind_the_greeting_are_against_the_lock_step(raw: bytes) -> None:
    with pytest.raises(PeerError, match="nobody asked for"):
        Handshake().receive(raw)


def test_bytes_without_a_question_are_against_the_lock_step() -> None:
    with pytest.raises(PeerError, match="nobody asked for"):
        greeted().receive(b"\0")


def test_close_before_a_greeting_is_told_from_one_after() -> None:
    machine = Handshake()
    assert "before a greeting" in str(machine.closed())
    for raw in newstyle():
        machine.receive(bytes([raw]))
        assert machine.closed().what == "closed during the handshake"
        assert machine.closed().side == "upstream"


# -- what is asked


@pytest.mark.parametrize(
    ("ask", "raw"),
    [
        (Handshake.structured_reply, option(Opt.STRUCTURED_REPLY)),
        (Handshake.extended_headers, option(Opt.EXTENDED_HEADERS)),
        (Handshake.starttls, option(Opt.STARTTLS)),
        (Handshake.list_exports, option(Opt.LIST)),
        (Handshake.abort, option(Opt.ABORT)),
        (lambda m: m.info("ü", (3, 1)), option(Opt.INFO, info_data("ü", (3, 1)))),
        (lambda m: m.go("", ()), option(Opt.GO, info_data())),
        (
            lambda m: m.list_meta_context("ü", ("base:", "")),
            option(Opt.LIST_META_CONTEXT, meta_data("ü", ("base:", ""))),
        ),
        (
            lambda m: m.set_meta_context("", ()),
            option(Opt.SET_META_CONTEXT, meta_data()),
        ),
        (lambda m: m.export_name("ü"), option(Opt.EXPORT_NAME, "ü".encode())),
    ],
)
def test_question_is_one_option(ask: Callable[[Handshake], bytes], raw: bytes) -> None:
    assert ask(greeted()) == raw


@pytest.mark.parametrize("raw", [b"", newstyle(0), newstyle(NO_ZEROES), oldstyle()])
def test_options_are_only_for_fixed_newstyle(raw: bytes) -> None:
    """(U2)."""
    machine = Handshake()
    feed(machine, [raw] if raw else [])
    with pytest.raises(AssertionError):
        machine.structured_reply()


# -- what is answered


@pytest.mark.parametrize(
    "ask",
    [
        Handshake.structured_reply,
        Handshake.extended_headers,
        Handshake.starttls,
        Handshake.abort,
    ],
)
def test_ack_alone_is_an_answer(ask: Callable[[Handshake], bytes]) -> None:
    number = struct.unpack_from(">I", ask(greeted()), 8)[0]
    assert answer(ask, option_reply(number, Rep.ACK)) == Acked()
    assert "only an ACK" in fault(
        ask, option_reply(number, Rep.INFO, info_export(1)) + option_reply(number, Rep.ACK)
    )


def test_exports_are_listed_in_the_upstreams_order() -> None:
    raw = b"".join(
        option_reply(Opt.LIST, Rep.SERVER, listed(*one))
        for one in [("b", "ü"), ("", ""), ("a", "")]
    )
    assert answer(Handshake.list_exports, raw + option_reply(Opt.LIST, Rep.ACK)) == Listed(
        (ListedExport("b", "ü"), ListedExport("", ""), ListedExport("a", ""))
    )


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_export_is_described_in_any_order_with_types_unknown_left_as_they_are(number: int) -> None:
    """(U3): unknown INFO types are no error."""
    infos = [
        info_text(2, "a disk"),
        b"\0\x4d\xff\0",
        info_block_size(512, 4096, 2**32 - 1),
        info_export(4711, 0x8001),
        info_text(1, "ü"),
    ]
    raw = b"".join(option_reply(number, Rep.INFO, one) for one in infos)
    ask = Handshake.info if number == Opt.INFO else Handshake.go
    assert answer(lambda m: ask(m, "", (3,)), raw + option_reply(number, Rep.ACK)) == Granted(
        4711,
        0x8001,
        BlockSizes(512, 4096, 2**32 - 1),
        ((2, infos[0]), (0x4D, infos[1]), (1, infos[4])),
    )


@pytest.mark.parametrize("number", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_contexts_are_answered_in_the_upstreams_order(number: int) -> None:
    raw = option_reply(number, Rep.META_CONTEXT, context(2**32 - 1, "x:"))
    raw += option_reply(number, Rep.META_CONTEXT, context(0, "base:allocation"))
    listing = number == Opt.LIST_META_CONTEXT
    ask = Handshake.list_meta_context if listing else Handshake.set_meta_context
    assert answer(lambda m: ask(m, "", ()), raw + option_reply(number, Rep.ACK)) == Contexts(
        (MetaContext(2**32 - 1, "x:"), MetaContext(0, "base:allocation"))
    )


@pytest.mark.parametrize("kind", [Rep.ERR_UNSUP, Rep.ERR_SHUTDOWN, (1 << 31) + 77])
@pytest.mark.parametrize("before", [b"", option_reply(Opt.LIST, Rep.SERVER, listed("a"))])
def test_error_is_an_answer_whatever_came_before_it(kind: int, before: bytes) -> None:
    raw = before + option_reply(Opt.LIST, kind, b"because \xff")
    assert answer(Handshake.list_exports, raw) == Refused(kind, "because \N{REPLACEMENT CHARACTER}")


def test_error_text_is_cut_to_the_length_of_a_string() -> None:
    result = answer(Handshake.list_exports, option_reply(Opt.LIST, Rep.ERR_POLICY, b"x" * 5000))
    assert result == Refused(Rep.ERR_POLICY, "x" * 4096)


@pytest.mark.parametrize("flags", [NO_ZEROES, 0])
@pytest.mark.parametrize("fixed", [FIXED, 0])
def test_export_name_is_answered_with_the_zeroes_that_were_negotiated(
    flags: int, fixed: int
) -> None:
    raw = struct.pack(">QH", 4711, 0x13) + bytes(0 if flags else 124)
    for pieces in all_cuts(raw):
        machine = greeted(flags | fixed)
        machine.export_name("disk")
        assert feed(machine, pieces) == Granted(4711, 0x13)


def test_one_answer_after_the_other() -> None:
    machine = greeted()
    machine.list_exports()
    raw = option_reply(Opt.LIST, Rep.SERVER, listed("a")) + option_reply(Opt.LIST, Rep.ACK)
    assert machine.receive(raw) == Listed((ListedExport("a", ""),))
    machine.structured_reply()
    assert machine.receive(option_reply(Opt.STRUCTURED_REPLY, Rep.ACK)) == Acked()
    machine.go("", ())
    assert machine.receive(option_reply(Opt.GO, Rep.ERR_UNSUP)) == Refused(Rep.ERR_UNSUP)
    machine.export_name("")
    assert machine.receive(struct.pack(">QH", 1, 1)) == Granted(1, 1)


@pytest.mark.parametrize("flags", [0, 0xFFFE])
def test_flags_count_for_nothing_without_has_flags(flags: int) -> None:
    """(U3)."""
    info = option_reply(Opt.GO, Rep.INFO, info_export(1, flags)) + option_reply(Opt.GO, Rep.ACK)
    assert answer(lambda m: m.go("", ()), info) == Granted(1, 0)
    assert answer(lambda m: m.export_name(""), struct.pack(">QH", 1, flags)) == Granted(1, 0)
    assert Handshake().receive(oldstyle(1, flags)) == Greeted(Style.OLDSTYLE, b"", Granted(1, 0))


# -- what is no answer (U5)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"NBDMAGIC" + bytes(12), "magic"),
        (option_reply(Opt.INFO, Rep.ACK), "a reply to option 6"),
        (option_reply(Opt.LIST, Rep.ACK) + b"\0", "nobody asked for"),
        (option_reply(Opt.LIST, Rep.ERR_UNSUP) + b"\0", "nobody asked for"),
        (option_reply(Opt.LIST, 77) + option_reply(Opt.LIST, Rep.ACK), "reply type 0x4d"),
        (option_reply(Opt.LIST, Rep.SERVER) + option_reply(Opt.LIST, Rep.ACK), "shorter"),
        (
            option_reply(Opt.LIST, Rep.SERVER, listed(b"\xff")) + option_reply(Opt.LIST, Rep.ACK),
            "UTF-8",
        ),
        (struct.pack(">QIII", 0x3E889045565A9, 3, 2, MAX_REPLY_DATA + 1), "option reply of 8197"),
        (struct.pack(">QIII", 0x3E889045565A9, 3, 2, 2**32 - 1), "option reply of 4294967295"),
    ],
)
def test_list_with_a_broken_answer(raw: bytes, what: str) -> None:
    if "nobody" in what:  # depends on the last cut: one byte later it is a byte of the next answer
        machine = greeted()
        machine.list_exports()
        with pytest.raises(PeerError, match=what):
            machine.receive(raw)
    else:
        assert what in fault(Handshake.list_exports, raw)


@pytest.mark.parametrize(
    ("infos", "what"),
    [
        ([], "no NBD_INFO_EXPORT"),
        ([info_text(1, "x")], "no NBD_INFO_EXPORT"),
        ([b""], "without a type"),
        ([b"\0"], "without a type"),
        ([info_export(2**63)], "size 0x8000000000000000"),
        ([info_export(2**64 - 1)], "size 0xffffffffffffffff"),
        ([info_export(1) + b"\0"], "of 13 bytes"),
        ([info_export(1)[:-1]], "of 11 bytes"),
        ([info_export(1), info_block_size(3, 512, 512)], "minimum block size 3"),
        ([info_export(1), info_block_size(1, 512, 511)], "maximum payload"),
        ([info_export(1), info_block_size(1, 512, 512)[:-1]], "of 13 bytes"),
        ([info_export(1), info_text(1, "\0")], "NUL"),
        ([info_export(1), b"\0\x02\xff"], "UTF-8"),
    ],
)
@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_export_with_a_broken_description(number: int, infos: list[bytes], what: str) -> None:
    """(CVE-2023-5215)."""
    raw = b"".join(option_reply(number, Rep.INFO, one) for one in infos)
    ask = Handshake.info if number == Opt.INFO else Handshake.go
    assert what in fault(lambda m: ask(m, "", ()), raw + option_reply(number, Rep.ACK))


@pytest.mark.parametrize("size", [2**63, 2**64 - 1])
def test_export_size_that_is_a_negative_offset_is_refused_in_every_style(size: int) -> None:
    assert "size" in fault(lambda m: m.export_name(""), struct.pack(">QH", size, 1))
    with pytest.raises(PeerError, match=r"^upstream: export size"):
        Handshake().receive(oldstyle(size))


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0", *(b"\0\0\0\1" + one for one in (b"a:\0", b"\xff:", b"", b"a", b":a"))]
)
def test_context_that_is_malformed(data: bytes) -> None:
    raw = option_reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, data)
    fault(lambda m: m.set_meta_context("", ()), raw + option_reply(Opt.SET_META_CONTEXT, Rep.ACK))


def test_one_id_for_two_contexts_is_wrong_in_a_selection_and_means_nothing_in_a_list() -> None:
    """(H11)."""

    def replies(number: int) -> bytes:
        one = option_reply(number, Rep.META_CONTEXT, context(0, "base:allocation"))
        return one + one + option_reply(number, Rep.ACK)

    raw = replies(Opt.SET_META_CONTEXT)
    assert "one id" in fault(lambda m: m.set_meta_context("", ()), raw)
    raw = replies(Opt.LIST_META_CONTEXT)
    assert isinstance(answer(lambda m: m.list_meta_context("", ()), raw), Contexts)


# -- bounds


def test_longest_legal_reply_is_taken() -> None:
    data = listed("n" * 4096, "d" * 4096)
    assert len(data) == MAX_REPLY_DATA
    raw = option_reply(Opt.LIST, Rep.SERVER, data) + option_reply(Opt.LIST, Rep.ACK)
    assert answer(Handshake.list_exports, raw) == Listed((ListedExport("n" * 4096, "d" * 4096),))


def test_replies_to_one_option_are_bounded_in_number_and_bytes() -> None:
    small = option_reply(Opt.LIST, Rep.SERVER, listed(""))
    large = option_reply(Opt.LIST, Rep.SERVER, listed("n" * 4096, "d" * 4096))
    for one, most in [(small, MAX_REPLIES), (large, MAX_REPLY_BYTES // MAX_REPLY_DATA)]:
        machine = greeted()
        machine.list_exports()
        assert machine.receive(one * most) is None
        with pytest.raises(PeerError, match="too many replies"):
            machine.receive(one)


def test_bounds_are_for_each_option_anew() -> None:
    machine = greeted()
    large = option_reply(Opt.LIST, Rep.SERVER, listed("n" * 4096, "d" * 4096))
    raw = large * (MAX_REPLY_BYTES // MAX_REPLY_DATA) + option_reply(Opt.LIST, Rep.ACK)
    for _ in range(2):
        machine.list_exports()
        assert isinstance(machine.receive(raw), Listed)
