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
