"""What a client negotiates is what the upstream has agreed to: question, answer, reply."""

from __future__ import annotations

import struct

import pytest

from gateway.errors import SessionEnd
from gateway.nbd.constants import Cmd, Error, Opt, Rep, TransmissionFlag
from gateway.nbd.haggling import ExportPolicy
from gateway.nbd.negotiation import Close, EnterTransmission, Send
from gateway.nbd.pairing import (
    Acked,
    Answer,
    Contexts,
    Granted,
    Listed,
    ListExports,
    Open,
    Refused,
    Terms,
    Unavailable,
    UseStructuredReplies,
)
from gateway.nbd.upgrades import Capabilities
from gateway.nbd.wire import BlockSizes, ListedExport
from tests.nbd.front import ALLOCATION, Front, say, willing
from tests.nbd.support import (
    ALL_FEATURES,
    MIB,
    Reply,
    Req,
    Tf,
    acked,
    all_cuts,
    info_block_size,
    info_data,
    info_export,
    info_text,
    listed,
    meta_data,
    option,
    read,
    text_of,
)
from tests.nbd.walker import Walker, verdicts

STRUCTURED = option(Opt.STRUCTURED_REPLY)
LIST = option(Opt.LIST)
GO = option(Opt.GO, info_data())
SET = option(Opt.SET_META_CONTEXT, meta_data("", ("base:allocation",)))
NO_DF = ALL_FEATURES & ~Tf.SEND_DF
REFUSALS = [one for one in Rep if one >= 1 << 31]


def terms_after(answer: Granted, *options: bytes, **more: object) -> Terms:
    front = Front(**more)  # type: ignore[arg-type]
    front.say(*options)
    front.upstream = answer
    front.say(GO)
    assert front.terms
    return front.terms


# -- structured replies


@pytest.mark.parametrize("answer", [*map(Refused, REFUSALS), Unavailable()])
def test_structured_replies_that_the_upstream_does_not_have_are_unsupported(
    answer: Answer,
) -> None:
    """(2e): and no meta contexts either, since those need them."""
    front = Front(answer)
    assert front.say(STRUCTURED + SET) == [
        Reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP),
        Reply(Opt.SET_META_CONTEXT, Rep.ERR_INVALID),
    ]
    assert front.questions == [UseStructuredReplies()]


def test_structured_replies_are_on_when_both_sides_want_them() -> None:
    terms = terms_after(Granted(MIB, ALL_FEATURES), STRUCTURED)
    assert terms.structured_replies
    assert terms.flags == ALL_FEATURES


def test_client_without_structured_replies_gets_an_upstream_without_them() -> None:
    """(2e, X7): so SEND_DF must be clear too."""
    front = Front()
    assert front.say(GO)[0] == Reply(Opt.GO, Rep.INFO, info_export(MIB, NO_DF))
    assert front.questions == [Open("", (), go=True)]
    assert front.terms == Terms("", MIB, NO_DF, upstream=Capabilities(int(ALL_FEATURES)))


# -- flags


@pytest.mark.parametrize("flags", [0, *(1 << bit for bit in range(16) if bit != 11), 0xFFFF])
def test_flags_are_the_upstreams_less_what_nobody_here_can_carry(flags: int) -> None:
    """(U3, X9): those of extensions go; FUA and CAN_MULTI_CONN are not made up."""
    carried = int(ALL_FEATURES | Tf.READ_ONLY | Tf.ROTATIONAL | Tf.CAN_MULTI_CONN)
    terms = terms_after(Granted(MIB, flags), STRUCTURED)
    assert terms.flags == flags & carried | Tf.HAS_FLAGS
    assert isinstance(terms.flags, TransmissionFlag)


def test_fast_zero_is_never_offered_without_write_zeroes() -> None:
    """ "MUST set this transmission flag to 0 if NBD_FLAG_SEND_WRITE_ZEROES is not set"."""
    flags = Tf.HAS_FLAGS | Tf.SEND_FAST_ZERO
    assert terms_after(Granted(MIB, flags)).flags == Tf.HAS_FLAGS


def test_read_only_policy_sets_the_flag_and_takes_all_that_writes() -> None:
    terms = terms_after(Granted(MIB, ALL_FEATURES), STRUCTURED, policy=ExportPolicy(read_only=True))
    assert terms.flags == (
        Tf.HAS_FLAGS | Tf.READ_ONLY | Tf.SEND_FLUSH | Tf.SEND_FUA | Tf.SEND_DF | Tf.SEND_CACHE
    )
    assert terms.read_only


def test_read_only_upstream_is_read_only_here() -> None:
    assert terms_after(Granted(MIB, int(Tf.HAS_FLAGS | Tf.READ_ONLY))).read_only
    assert not terms_after(Granted(MIB, int(Tf.HAS_FLAGS))).read_only


# -- opening


def opened(
    number: int, answer: Answer, infos: tuple[int, ...] = (), **more: object
) -> list[object]:
    return say([option(number, info_data("", infos))], answer, **more)


def test_go_is_info_plus_transmission() -> None:
    """(H8): the same set of information, then transmission without any zeroes."""
    infos = ((1, info_text(1, "canonical")), (2, info_text(2, "a disk")))
    answer = Granted(MIB, ALL_FEATURES, BlockSizes(512, 4096, MIB), infos)
    for asked in [(), (3,), (0, 1, 2, 3), (3, 1, 99)]:
        info = opened(Opt.INFO, answer, asked)
        *go, enter = opened(Opt.GO, answer, asked)
        assert isinstance(enter, EnterTransmission)
        assert [one._replace(option=Opt.GO) for one in info if isinstance(one, Reply)] == go


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
@pytest.mark.parametrize("asked", [(), (0,), (99,), (3,), (0, 1, 2, 3, 77)])
def test_information_is_all_that_the_upstream_said(number: int, asked: tuple[int, ...]) -> None:
    """(H8): it was asked what the client asked; the export comes first, and always."""
    others = ((2, info_text(2, "a disk")), (1, info_text(1, "canonical")), (77, b"\0\x4d?"))
    export = info_export(MIB, NO_DF)
    for answer, told in [
        (Granted(MIB, NO_DF), [export]),
        (Granted(MIB, NO_DF, None, others), [export, *(data for _, data in others)]),
        (
            Granted(MIB, NO_DF, BlockSizes(512, 4096, MIB), others[:1]),
            [export, info_block_size(512, 4096, MIB), others[0][1]],
        ),
    ]:
        front = Front(answer, policy=ExportPolicy(None))
        assert front.say(option(number, info_data("", asked)))[: len(told) + 1] == [
            *(Reply(number, Rep.INFO, one) for one in told),
            acked(number),
        ]
        assert front.questions == [Open("", asked, go=number == Opt.GO)]


def test_block_sizes_that_the_upstream_has_not_told_are_not_made_up() -> None:
    assert opened(Opt.INFO, Granted(0, 1), (3,)) == [
        Reply(Opt.INFO, Rep.INFO, info_export(0, 1)),
        acked(Opt.INFO),
    ]


def test_canonical_name_is_that_of_the_policy() -> None:
    answer = Granted(0, 1, None, ((1, info_text(1, "secret-path")),))
    said = opened(Opt.INFO, answer, (1,), policy=ExportPolicy("disk"))
    assert said[1] == Reply(Opt.INFO, Rep.INFO, info_text(1, "disk"))


@pytest.mark.parametrize("no_zeroes", [True, False])
@pytest.mark.parametrize("name", ["", "disk"])
def test_export_name_has_zeroes_unless_negotiated_away(no_zeroes: bool, name: str) -> None:
    """(H8)."""
    for pieces in all_cuts(option(Opt.EXPORT_NAME, name.encode())):
        front = Front(policy=ExportPolicy("disk"), no_zeroes=no_zeroes)
        answer = struct.pack(">QH", MIB, NO_DF) + bytes(0 if no_zeroes else 124)
        sent, enter = front.effects(*pieces)
        assert sent == Send(answer)
        served = Capabilities(int(ALL_FEATURES))
        assert enter == EnterTransmission(Terms(name, MIB, NO_DF, upstream=served))
        assert front.questions == [Open("disk", (), go=True)]


@pytest.mark.parametrize("kind", [*REFUSALS, (1 << 31) + 77])
@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_refusal_of_the_upstream_becomes_one_of_ours(number: int, kind: int) -> None:
    """(H9, H10, T3): no INFO before it, and never that TLS or block sizes are required."""
    passed = {Rep.ERR_SHUTDOWN, Rep.ERR_POLICY, Rep.ERR_PLATFORM, Rep.ERR_EXT_HEADER_REQD}
    expected = kind if kind in passed else Rep.ERR_UNKNOWN
    assert opened(number, Refused(kind, "text")) == [Reply(number, expected)]


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_missing_upstream_is_an_unknown_export_and_the_text_says_why(number: int) -> None:
    front = Front(Unavailable())
    (effect,) = front.effects(option(number, info_data()))
    assert "cannot be reached" in text_of(effect)
    assert "cannot be reached" in front.machine.refused


@pytest.mark.parametrize("answer", [*map(Refused, REFUSALS), Unavailable()])
def test_export_name_that_is_not_granted_ends_the_session(answer: Answer) -> None:
    front = Front(answer)
    assert front.say(option(Opt.EXPORT_NAME) + GO) == [Close(SessionEnd.REFUSED)]
    assert front.machine.refused


def test_failed_go_leaves_everything_open() -> None:
    """(CVE-2019-14851)."""
    answers = iter([Refused(Rep.ERR_UNKNOWN), Granted(1, 1), Granted(2, 1), Granted(3, 1)])
    front = Front(lambda _: next(answers), policy=ExportPolicy(None))
    for number, name in [(7, "no"), (6, "a"), (6, "b"), (7, "a")]:
        front.say(option(number, info_data(name)))
    assert front.terms == Terms("a", 3, Tf.HAS_FLAGS, upstream=Capabilities(1))


# -- names


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_only_the_configured_export_and_the_empty_name_exist(number: int) -> None:
    for name, known in [("", True), ("disk", True), ("Disk", False), ("disk ", False)]:
        front = Front(policy=ExportPolicy("disk"))
        said = front.say(option(number, info_data(name)))
        assert (said == [Reply(number, Rep.ERR_UNKNOWN)]) is not known
        assert front.questions == [Open("disk", (), go=number == Opt.GO)] * known


def test_unknown_export_and_one_the_upstream_refuses_sound_the_same() -> None:
    """(H10): names cannot be enumerated."""
    front = Front(Refused(Rep.ERR_UNKNOWN), policy=ExportPolicy("disk"))
    texts = {
        text_of(front.effects(option(Opt.INFO, info_data(name)))[0]) for name in ("disk", "other")
    }
    assert len(texts) == 1


@pytest.mark.parametrize("number", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_contexts_of_an_export_that_is_not_ours_are_unknown(number: int) -> None:
    front = Front()
    assert front.say(STRUCTURED + option(number, meta_data("other")))[1:] == [
        Reply(number, Rep.ERR_UNKNOWN)
    ]


# -- LIST


DISK, OTHER = ListedExport("disk", "a disk"), ListedExport("other", "")


@pytest.mark.parametrize(
    ("name", "answer", "names"),
    [
        (None, Listed((DISK, OTHER)), [DISK, OTHER]),
        (None, Listed(()), []),
        (None, Refused(Rep.ERR_UNSUP), [ListedExport("", "")]),
        ("disk", Listed((OTHER, DISK)), [DISK]),
        ("disk", Listed((OTHER,)), [ListedExport("disk", "")]),
        ("disk", Refused(Rep.ERR_POLICY), [ListedExport("disk", "")]),
        ("disk", Unavailable(), [ListedExport("disk", "")]),
        ("", Listed((DISK, OTHER)), [ListedExport("", "")]),
        ("", Refused(Rep.ERR_UNSUP), [ListedExport("", "")]),
    ],
)
def test_list_shows_what_may_be_opened(
    name: str | None, answer: Answer, names: list[ListedExport]
) -> None:
    """(2e): without an upstream that can list, the configured name only."""
    for pieces in all_cuts(LIST):
        front = Front(answer, policy=ExportPolicy(name))
        assert front.say(*pieces) == [
            *(Reply(Opt.LIST, Rep.SERVER, listed(*one)) for one in names),
            acked(Opt.LIST),
        ]
        assert front.questions == [ListExports()]


def test_list_of_a_missing_upstream_is_an_error_when_any_export_may_be_opened() -> None:
    assert say([LIST], Unavailable(), policy=ExportPolicy(None)) == [
        Reply(Opt.LIST, Rep.ERR_UNKNOWN)
    ]


@pytest.mark.parametrize("kind", [Rep.ERR_POLICY, Rep.ERR_PLATFORM, Rep.ERR_SHUTDOWN])
def test_list_that_the_upstream_refuses_is_refused_when_any_export_may_be_opened(kind: Rep) -> None:
    assert say([LIST], Refused(kind), policy=ExportPolicy(None)) == [Reply(Opt.LIST, kind)]


# -- meta contexts


@pytest.mark.parametrize("number", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("answer", "replies"),
    [
        (Contexts(()), [Rep.ACK]),
        (Contexts((ALLOCATION,)), [Rep.META_CONTEXT, Rep.ACK]),
        (Refused(Rep.ERR_UNSUP), [Rep.ACK]),
        (Refused(Rep.ERR_POLICY), [Rep.ACK]),
        (Acked(), [Rep.ACK]),
        (Refused(Rep.ERR_UNKNOWN), [Rep.ERR_UNKNOWN]),
        (Unavailable(), [Rep.ERR_UNKNOWN]),
    ],
)
def test_upstream_without_meta_contexts_has_none_to_select(
    number: int, answer: Answer, replies: list[Rep]
) -> None:
    """(2e): which is no error."""
    front = Front()
    front.say(STRUCTURED)
    front.upstream = answer
    said = front.say(option(number, meta_data("", ("base:",))))
    assert [(one.option, one.kind) for one in said if isinstance(one, Reply)] == [
        (number, kind) for kind in replies
    ]


def test_block_status_without_contexts_is_invalid() -> None:
    """(2e, X8): contexts of the upstream are not made up."""
    front = Front(lambda q: Refused(Rep.ERR_UNSUP) if "Contexts" in repr(q) else willing(q))
    front.say(STRUCTURED, SET, GO)
    assert front.terms
    relay = Walker(front.terms).requests([Req(Cmd.BLOCK_STATUS, 0, 512).pack()])
    assert verdicts(relay.client) == [(1, Error.EINVAL)]


# -- block sizes


def test_block_sizes_of_the_upstream_bind_a_client_that_did_not_ask_for_them() -> None:
    """(2e, U4): accepted, and enforced with NBD_EINVAL."""
    sizes = BlockSizes(512, 4096, 65536)
    terms = terms_after(Granted(MIB, ALL_FEATURES, sizes))
    assert terms.block_sizes == sizes
    requests = read(1, 512, 1) + read(0, 513, 2) + read(0, 65536 + 512, 3) + read(512, 512, 4)
    relay = Walker(terms).requests([requests])
    assert verdicts(relay.client) == [(cookie, Error.EINVAL) for cookie in (1, 2, 3)]
    assert [(one.offset, one.length) for one in relay.forwarded] == [(512, 512)]


def test_block_sizes_that_nobody_told_are_the_default_ones() -> None:
    assert terms_after(Granted(MIB, 1)).block_sizes == BlockSizes(1, 4096, 1 << 25)
