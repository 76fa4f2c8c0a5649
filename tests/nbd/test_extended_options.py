"""NBD_OPT_EXTENDED_HEADERS, and structured replies for an upstream that has none."""

from __future__ import annotations

import pytest

from gateway.errors import SessionEnd
from gateway.nbd.constants import Info, Opt, Rep
from gateway.nbd.handshake import Handshake
from gateway.nbd.negotiation import Close
from gateway.nbd.pairing import (
    Acked,
    Answer,
    Granted,
    ListExports,
    Open,
    QueryContexts,
    Question,
    Refused,
    Unavailable,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.upgrades import ALL_UPGRADES, Upgrade
from tests.nbd.front import ALLOCATION, Front, willing
from tests.nbd.support import (
    ALL_FEATURES,
    MIB,
    Reply,
    Tf,
    acked,
    all_cuts,
    context,
    info_data,
    info_export,
    listed,
    meta_data,
    option,
    option_reply,
)

EXTENDED = option(Opt.EXTENDED_HEADERS)
STRUCTURED = option(Opt.STRUCTURED_REPLY)
SET = option(Opt.SET_META_CONTEXT, meta_data("", ("base:allocation",)))
LIST_CONTEXTS = option(Opt.LIST_META_CONTEXT, meta_data("", ()))
GO = option(Opt.GO, info_data())
UPGRADED = ExportPolicy(upgrades=ALL_UPGRADES)


def poor(question: Question) -> Answer:
    """Knows none of the newer options."""
    match question:
        case UseStructuredReplies() | UseExtendedHeaders() | ListExports() | QueryContexts():
            return Refused(Rep.ERR_UNSUP)
        case Open():
            return Granted(MIB, int(Tf.HAS_FLAGS))


# -- extended headers


def test_extended_headers_are_on_when_the_upstream_has_them() -> None:
    for pieces in all_cuts(EXTENDED + SET + GO):
        front = Front()
        front.say(*pieces)
        assert front.questions[0] == UseExtendedHeaders()
        assert front.terms
        assert front.terms.extended_headers
        assert not front.terms.structured_replies
        assert not front.terms.served.structured_replies
        assert front.terms.contexts == (ALLOCATION,)
        assert front.terms.flags & Tf.SEND_DF


@pytest.mark.parametrize("answer", [Refused(Rep.ERR_UNSUP), Refused(Rep.ERR_POLICY), Unavailable()])
def test_and_unsupported_when_it_has_not(answer: Answer) -> None:
    assert Front(answer).say(EXTENDED) == [Reply(Opt.EXTENDED_HEADERS, Rep.ERR_UNSUP)]


def test_they_take_precedence_over_structured_replies() -> None:
    front = Front()
    assert front.say(STRUCTURED + EXTENDED) == [
        acked(Opt.STRUCTURED_REPLY),
        acked(Opt.EXTENDED_HEADERS),
    ]
    front.say(GO)
    assert front.terms
    assert (front.terms.structured_replies, front.terms.extended_headers) == (False, True)
    assert not front.terms.served.structured_replies


def test_what_is_no_longer_possible_then() -> None:
    front = Front()
    front.say(EXTENDED)
    assert front.say(STRUCTURED) == [Reply(Opt.STRUCTURED_REPLY, Rep.ERR_EXT_HEADER_REQD)]
    assert front.say(EXTENDED) == [Reply(Opt.EXTENDED_HEADERS, Rep.ERR_INVALID)]
    assert front.effects(option(Opt.EXPORT_NAME)) == [Close(SessionEnd.REFUSED)]
    assert front.questions == [UseExtendedHeaders()]


def test_data_is_invalid() -> None:
    assert Front().say(option(Opt.EXTENDED_HEADERS, b"x")) == [
        Reply(Opt.EXTENDED_HEADERS, Rep.ERR_INVALID)
    ]


@pytest.mark.parametrize("raw", [GO, SET, LIST_CONTEXTS])
def test_upstream_that_requires_them_says_so(raw: bytes) -> None:
    front = Front()
    front.say(STRUCTURED)
    front.upstream = Refused(Rep.ERR_EXT_HEADER_REQD)
    (reply,) = front.say(raw)
    assert isinstance(reply, Reply)
    assert reply.kind == Rep.ERR_EXT_HEADER_REQD


def test_go_is_never_unsupported() -> None:
    front = Front()
    front.say(EXTENDED)
    front.upstream = Refused(Rep.ERR_UNSUP)
    assert front.say(GO) == [Reply(Opt.GO, Rep.ERR_UNKNOWN)]


@pytest.mark.parametrize(
    ("kind", "expected"), [(Rep.ACK, Acked()), (Rep.ERR_UNSUP, Refused(Rep.ERR_UNSUP))]
)
def test_towards_the_upstream(kind: int, expected: Answer) -> None:
    handshake = Handshake()
    handshake.receive(b"NBDMAGICIHAVEOPT\0\3")
    assert handshake.extended_headers() == EXTENDED
    assert handshake.receive(option_reply(Opt.EXTENDED_HEADERS, kind)) == expected


def test_what_goes_on_as_before() -> None:
    front = Front()
    front.say(EXTENDED)
    assert front.say(option(Opt.LIST)) == [
        Reply(Opt.LIST, Rep.SERVER, listed("")),
        acked(Opt.LIST),
    ]
    assert front.say(option(99)) == [Reply(99, Rep.ERR_UNSUP)]
    assert front.say(option(Opt.STRUCTURED_REPLY, b"x")) == [
        Reply(Opt.STRUCTURED_REPLY, Rep.ERR_INVALID)
    ]
    assert front.say(option(Opt.ABORT)) == [acked(Opt.ABORT), Close(SessionEnd.ABORTED)]


def test_second_time_is_invalid_and_the_first_stands() -> None:
    """(H7)."""
    front = Front()
    front.say(EXTENDED + EXTENDED + option(Opt.EXTENDED_HEADERS, b"x") + GO)
    assert front.terms
    assert front.terms.extended_headers
    assert front.questions.count(UseExtendedHeaders()) == 1


@pytest.mark.parametrize("answer", [Refused(Rep.ERR_UNSUP), Unavailable()])
def test_after_a_refusal_structured_replies_are_there_as_before(answer: Answer) -> None:
    """And whoever asks again, perhaps of an upstream that is there now, may get them."""
    front = Front(answer)
    front.say(EXTENDED)
    front.upstream = willing
    assert front.say(STRUCTURED) == [acked(Opt.STRUCTURED_REPLY)]
    assert front.say(EXTENDED) == [acked(Opt.EXTENDED_HEADERS)]


def test_refusal_leaves_structured_replies_on() -> None:
    front = Front(lambda asked: willing(asked) if asked != UseExtendedHeaders() else Refused(1))
    front.say(STRUCTURED + EXTENDED + GO)
    assert front.terms
    assert (front.terms.structured_replies, front.terms.extended_headers) == (True, False)
    assert front.terms.served.structured_replies


def test_contexts_that_were_set_before_are_still_set() -> None:
    front = Front()
    front.say(STRUCTURED + SET + EXTENDED + GO)
    assert front.terms
    assert front.terms.contexts == (ALLOCATION,)


def test_shutdown_refuses_them() -> None:
    """(H12)."""
    front = Front()
    front.machine.shutdown()
    assert front.say(EXTENDED) == [Reply(Opt.EXTENDED_HEADERS, Rep.ERR_SHUTDOWN)]
    assert front.questions == []


@pytest.mark.parametrize("first", [b"", STRUCTURED])
def test_upstream_that_comes_without_structured_replies_can_have_them(first: bytes) -> None:
    """The upgrade of one thing is not in the way of the other."""
    front = Front(
        lambda asked: Acked() if asked == UseExtendedHeaders() else poor(asked), policy=UPGRADED
    )
    front.say(first, EXTENDED, SET, GO)
    assert QueryContexts("", ("base:allocation",), select=True) in front.questions
    assert front.terms
    assert (front.terms.structured_replies, front.terms.extended_headers) == (False, True)


@pytest.mark.parametrize(
    ("before", "told"),
    [(b"", False), (SET, True), (SET + option(Opt.SET_META_CONTEXT, b""), False)],
)
def test_filters_are_told_of_in_go_if_there_is_something_to_filter(
    before: bytes, told: bool
) -> None:
    flags = int(ALL_FEATURES | Tf.BLOCK_STATUS_PAYLOAD)
    front = Front(
        lambda asked: Granted(MIB, flags) if isinstance(asked, Open) else willing(asked),
        policy=ExportPolicy(None),
    )
    front.say(EXTENDED, before)
    for name in ("", "other"):
        info = option(Opt.INFO, info_data(name))
        assert front.say(info)[0] == Reply(Opt.INFO, Rep.INFO, info_export(MIB, flags))
    expected = flags if told else flags & ~Tf.BLOCK_STATUS_PAYLOAD
    assert front.say(GO)[0] == Reply(Opt.GO, Rep.INFO, info_export(MIB, expected))


def test_filters_are_not_for_the_contexts_of_another_export() -> None:
    flags = int(ALL_FEATURES | Tf.BLOCK_STATUS_PAYLOAD)
    front = Front(
        lambda asked: Granted(MIB, flags) if isinstance(asked, Open) else willing(asked),
        policy=ExportPolicy(None),
    )
    front.say(EXTENDED, SET, option(Opt.GO, info_data("other")))
    assert front.terms
    assert front.terms.contexts == ()
    assert not front.terms.flags & Tf.BLOCK_STATUS_PAYLOAD


# -- structured replies that the gateway makes


def test_structured_replies_are_acked_for_an_upstream_without() -> None:
    front = Front(poor, policy=UPGRADED)
    assert front.say(STRUCTURED) == [acked(Opt.STRUCTURED_REPLY)]
    front.say(GO)
    assert front.terms
    assert front.terms.structured_replies
    assert not front.terms.served.structured_replies
    assert front.terms.flags & Tf.SEND_DF


def test_not_so_without_the_upgrade_or_without_an_upstream() -> None:
    without = ExportPolicy(upgrades=ALL_UPGRADES - {Upgrade.STRUCTURED_REPLIES})
    for front in (Front(poor, policy=without), Front(Unavailable(), policy=UPGRADED)):
        assert front.say(STRUCTURED) == [Reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP)]


def test_there_are_no_meta_contexts_then() -> None:
    front = Front(poor, policy=UPGRADED)
    front.say(STRUCTURED)
    assert front.say(LIST_CONTEXTS) == [acked(Opt.LIST_META_CONTEXT)]
    assert front.say(SET) == [acked(Opt.SET_META_CONTEXT)]
    assert front.questions == [UseStructuredReplies()]
    named = option(Opt.SET_META_CONTEXT, meta_data("no", ("base:",)))
    assert front.say(named) == [Reply(Opt.SET_META_CONTEXT, Rep.ERR_UNKNOWN)]
    front.say(GO)
    assert front.terms
    assert front.terms.contexts == ()


@pytest.mark.parametrize("number", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
@pytest.mark.parametrize("data", [b"", meta_data("", ("q" * 4097,)), meta_data() + b"\0"])
def test_malformed_query_is_invalid_also_where_nobody_would_be_asked(
    number: int, data: bytes
) -> None:
    """(H11)."""
    front = Front(poor, policy=UPGRADED)
    front.say(STRUCTURED)
    assert front.say(option(number, data)) == [Reply(number, Rep.ERR_INVALID)]


def test_second_structured_reply_is_invalid_whoever_makes_them() -> None:
    """(H7)."""
    front = Front(poor, policy=UPGRADED)
    assert front.say(STRUCTURED + STRUCTURED) == [
        acked(Opt.STRUCTURED_REPLY),
        Reply(Opt.STRUCTURED_REPLY, Rep.ERR_INVALID),
    ]


@pytest.mark.parametrize("flags", [int(Tf.HAS_FLAGS), int(Tf.HAS_FLAGS | Tf.SEND_DF)])
@pytest.mark.parametrize("upgrades", [UPGRADED.upgrades, frozenset({Upgrade.FUA})])
def test_unfragmented_reads_of_an_upstream_with_chunks_of_its_own(
    flags: int, upgrades: frozenset[Upgrade]
) -> None:
    """(2e): the gateway puts them together, unless it may not."""
    front = Front(
        lambda asked: Granted(MIB, flags) if isinstance(asked, Open) else willing(asked),
        policy=ExportPolicy(upgrades=upgrades),
    )
    front.say(STRUCTURED, GO)
    assert front.terms
    told = flags & Tf.SEND_DF or Upgrade.STRUCTURED_REPLIES in upgrades
    assert bool(front.terms.flags & Tf.SEND_DF) == bool(told)
    assert front.terms.served.flags == flags
    assert front.terms.served.structured_replies


def test_upstreams_own_are_used_when_it_has_them() -> None:
    front = Front(willing, policy=UPGRADED)
    front.say(STRUCTURED)
    assert front.say(SET) == [
        Reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, context(*ALLOCATION)),
        acked(Opt.SET_META_CONTEXT),
    ]


# -- block sizes that are only learnt


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (GO, Open("", (), go=True, learn_sizes=True)),
        (option(Opt.EXPORT_NAME), Open("", (), go=True, learn_sizes=True)),
        (option(Opt.INFO, info_data()), Open("", (), go=False)),
        (option(Opt.GO, info_data("", (Info.BLOCK_SIZE,))), Open("", (Info.BLOCK_SIZE,), go=True)),
    ],
)
def test_sizes_are_learnt_where_nobody_asked(raw: bytes, expected: Open) -> None:
    front = Front(Granted(MIB, ALL_FEATURES), policy=UPGRADED)
    front.effects(raw)
    assert front.questions == [expected]
