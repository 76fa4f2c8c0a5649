"""NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: what is selected, and for how long."""

from __future__ import annotations

import struct

import pytest

from gateway.nbd.constants import Opt, Rep
from gateway.nbd.haggling import ExportPolicy
from gateway.nbd.negotiation import MAX_OPTION_DATA
from gateway.nbd.pairing import (
    Contexts,
    Granted,
    QueryContexts,
    Refused,
    Unavailable,
    UseStructuredReplies,
)
from gateway.nbd.wire import MetaContext
from tests.nbd.front import ALLOCATION, Front
from tests.nbd.support import (
    ALL_FEATURES,
    MIB,
    Reply,
    acked,
    context,
    info_data,
    meta_data,
    option,
    string,
)

STRUCTURED = option(Opt.STRUCTURED_REPLY)
GO = option(Opt.GO, info_data())
SET = option(Opt.SET_META_CONTEXT, meta_data("", ("base:allocation",)))


def test_selecting_needs_structured_replies_first() -> None:
    """(H11)."""
    front = Front()
    raw = option(Opt.SET_META_CONTEXT, meta_data("", ("base:",)))
    assert front.say(raw) == [Reply(Opt.SET_META_CONTEXT, Rep.ERR_INVALID)]
    front.upstream = Refused(Rep.ERR_UNSUP)
    assert front.say(STRUCTURED + raw)[1:] == [Reply(Opt.SET_META_CONTEXT, Rep.ERR_INVALID)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Contexts((ALLOCATION,)), Rep.META_CONTEXT),
        (Refused(Rep.ERR_INVALID), Rep.ERR_INVALID),
        (Refused(Rep.ERR_UNSUP), Rep.ACK),
    ],
)
def test_listing_without_them_is_for_the_upstream_to_refuse(
    answer: Contexts | Refused, expected: int
) -> None:
    """ "SHOULD NOT be requested", and the server "MAY send NBD_REP_ERR_INVALID"."""
    first = Front(answer).say(option(Opt.LIST_META_CONTEXT, meta_data("", ())))[0]
    assert isinstance(first, Reply)
    assert first.kind == expected


def contexts_after(*options: bytes, upstream: object = None) -> tuple[MetaContext, ...]:
    """The contexts of the terms, when these options came between two that always work."""
    front = Front(policy=ExportPolicy(None))
    front.say(STRUCTURED, SET)
    if upstream is not None:
        front.upstream = upstream  # type: ignore[assignment]
    front.say(*options)
    if front.terms is None:
        front.upstream = Granted(MIB, ALL_FEATURES)
        front.say(GO)
    assert front.terms
    return front.terms.contexts


def test_contexts_that_were_set_are_in_the_terms() -> None:
    assert contexts_after() == (ALLOCATION,)
    assert contexts_after(option(Opt.EXPORT_NAME)) == (ALLOCATION,)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="no data"),
        pytest.param(meta_data("", ("base:", "q" * 4097)), id="no string"),
        pytest.param(bytes(MAX_OPTION_DATA + 1), id="too much data"),
    ],
)
def test_set_that_fails_has_cleared_what_was_set_before(data: bytes) -> None:
    """(H11) "replaces all previously-set metadata contexts (including when this command fails)"."""
    assert contexts_after(option(Opt.SET_META_CONTEXT, data)) == ()


@pytest.mark.parametrize(
    "answer",
    [Refused(Rep.ERR_UNKNOWN), Refused(Rep.ERR_TOO_BIG), Unavailable(), Contexts(())],
)
def test_set_that_the_upstream_does_not_grant_has_cleared_what_was_set_before(
    answer: object,
) -> None:
    """(H11)."""
    assert contexts_after(SET, upstream=answer) == ()


def test_set_for_an_export_that_is_not_ours_has_cleared_what_was_set_before() -> None:
    front = Front()
    front.say(STRUCTURED, SET)
    assert front.say(option(Opt.SET_META_CONTEXT, meta_data("other", ("base:",)))) == [
        Reply(Opt.SET_META_CONTEXT, Rep.ERR_UNKNOWN)
    ]
    front.say(GO)
    assert front.terms
    assert front.terms.contexts == ()


def test_last_set_wins() -> None:
    other = MetaContext(9, "qemu:dirty-bitmap:b0")
    assert contexts_after(SET, upstream=Contexts((other,))) == (other,)


def test_listing_leaves_what_was_set() -> None:
    query = option(Opt.LIST_META_CONTEXT, meta_data("x", ("qemu:",)))
    assert contexts_after(query, upstream=Contexts(())) == (ALLOCATION,)


def test_contexts_are_for_the_export_they_were_set_for() -> None:
    """(H11): they die when GO names another."""
    assert contexts_after(option(Opt.GO, info_data("other"))) == ()
    assert contexts_after(option(Opt.INFO, info_data("other"))) == (ALLOCATION,)


def test_context_ids_in_a_list_are_zero_and_in_a_set_those_of_the_upstream() -> None:
    """(H11)."""
    front = Front()
    front.say(STRUCTURED)
    front.upstream = Contexts((ALLOCATION, MetaContext(2**32 - 1, "qemu:dirty-bitmap:b0")))
    for number, ids in ((Opt.LIST_META_CONTEXT, (0, 0)), (Opt.SET_META_CONTEXT, (7, 2**32 - 1))):
        assert front.say(option(number, meta_data("", ("base:",)))) == [
            Reply(number, Rep.META_CONTEXT, context(ids[0], "base:allocation")),
            Reply(number, Rep.META_CONTEXT, context(ids[1], "qemu:dirty-bitmap:b0")),
            acked(number),
        ]


def test_queries_go_to_the_upstream_as_they_are() -> None:
    """(H11): unknown namespaces are for the upstream to ignore."""
    front = Front(policy=ExportPolicy("disk"))
    queries = ("base:", "x-mine:ü", "no colon", "")
    front.say(STRUCTURED)
    front.say(option(Opt.LIST_META_CONTEXT, meta_data("", queries)))
    front.say(option(Opt.SET_META_CONTEXT, meta_data("disk", ())))
    assert front.questions[1:] == [
        QueryContexts("disk", queries, select=False),
        QueryContexts("disk", (), select=True),
    ]


@pytest.mark.parametrize("number", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        string(""),
        string("") + struct.pack(">I", 1),
        string("") + struct.pack(">I", 2) + string("base:"),
        string("") + struct.pack(">I", 1) + string("base:", length=6),
        string("") + struct.pack(">I", 1) + string("base:", length=2**32 - 1),
        string("") + struct.pack(">I", 2**32 - 1),
        meta_data("", ("base:",)) + b"\0",
        meta_data("", (b"base:\0",)),
        meta_data("", ("q" * 4097,)),
    ],
)
def test_malformed_meta_query_is_invalid(number: int, data: bytes) -> None:
    """(H11)."""
    front = Front()
    front.say(STRUCTURED)
    assert front.say(option(number, data)) == [Reply(number, Rep.ERR_INVALID)]
    assert front.questions == [UseStructuredReplies()]
