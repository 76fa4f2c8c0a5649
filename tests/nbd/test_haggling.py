"""Option haggling inside TLS: which options are served, and how each of them is refused."""

from __future__ import annotations

import pytest

from gateway.errors import PeerError, SessionEnd
from gateway.nbd.constants import MAX_STRING, Opt, Rep
from gateway.nbd.haggling import ExportPolicy, Haggling
from gateway.nbd.negotiation import (
    INSIDE_TLS,
    MAX_OPTION_DATA,
    MAX_OPTION_SKIP,
    Allowance,
    Ask,
    Close,
    EnterTransmission,
)
from gateway.nbd.pairing import (
    Acked,
    Open,
    Refused,
    UseStructuredReplies,
)
from tests.nbd.front import ALLOCATION, Front, say
from tests.nbd.support import (
    ALL_FEATURES,
    MIB,
    OPTIONS_WITHOUT_DATA,
    Reply,
    acked,
    all_cuts,
    context,
    info_data,
    info_export,
    listed,
    meta_data,
    option,
    said,
    string,
    text_of,
)

STRUCTURED = option(Opt.STRUCTURED_REPLY)
GO = option(Opt.GO, info_data())
SET = option(Opt.SET_META_CONTEXT, meta_data("", ("base:allocation",)))
ABORTED = [acked(Opt.ABORT), Close(SessionEnd.ABORTED)]
BAD_STRINGS = [b"n" * (MAX_STRING + 1), b"a\0b", b"\xff", b"\xed\xa0\x80"]


# -- framing and unknown options


@pytest.mark.parametrize("number", [0, Opt.PEEK_EXPORT, 12, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", b"data"])
def test_unknown_option_is_unsupported_and_its_data_consumed(number: int, data: bytes) -> None:
    """(H3)."""
    for pieces in all_cuts(option(number, data) + option(Opt.ABORT)):
        assert say(pieces) == [Reply(number, Rep.ERR_UNSUP), *ABORTED]


@pytest.mark.parametrize("number", [12, 2**32 - 1])
def test_unknown_option_with_much_data_is_unsupported_too(number: int) -> None:
    """(H3) "MUST reply to them with NBD_REP_ERR_UNSUP"."""
    assert say([option(number, bytes(MAX_OPTION_DATA + 1)), STRUCTURED]) == [
        Reply(number, Rep.ERR_UNSUP),
        acked(Opt.STRUCTURED_REPLY),
    ]


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_option_with_more_data_than_is_stored_is_too_big_and_skipped(number: int) -> None:
    for length in (MAX_OPTION_DATA + 1, MAX_OPTION_SKIP):
        raw = option(number, bytes(length)) + option(Opt.ABORT)
        assert say([raw[:70000], raw[70000:]]) == [Reply(number, Rep.ERR_TOO_BIG), *ABORTED]


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_option_with_as_much_data_as_is_stored_is_served(number: int) -> None:
    data = info_data("", [99] * ((MAX_OPTION_DATA - 6) // 2))
    assert len(data) == MAX_OPTION_DATA
    front = Front()
    assert front.say(option(number, data))[1] == acked(number)
    assert front.questions == [Open("", (99,), go=number == Opt.GO)]


def test_option_beyond_the_skip_limit_ends_the_session() -> None:
    with pytest.raises(PeerError, match="client"):
        say([option(Opt.GO, length=MAX_OPTION_SKIP + 1)])


def test_wrong_option_magic_ends_the_session() -> None:
    with pytest.raises(PeerError, match=r"^client: option magic"):
        say([b"IHAVEOPX" + option(Opt.LIST)[8:]])


def test_options_are_many_but_not_without_end() -> None:
    front = Front()
    for _ in range(INSIDE_TLS.options):
        assert front.say(option(99)) == [Reply(99, Rep.ERR_UNSUP)]
    with pytest.raises(PeerError, match="too many options"):
        front.say(option(99))


def test_options_inside_tls_are_bounded_in_bytes_too() -> None:
    assert INSIDE_TLS.octets > MAX_OPTION_SKIP + 16
    machine = Haggling(ExportPolicy(), Allowance(9, 40), tls=True, no_zeroes=True)
    assert said(machine.receive(option(99, b"12345678"))) == [Reply(99, Rep.ERR_UNSUP)]
    with pytest.raises(PeerError, match="too many bytes of options"):
        machine.receive(option(99, b"1"))


def test_pipelined_options_are_answered_in_order() -> None:
    """(H4): tolerated inside TLS; none overtakes one that waits for the upstream."""
    raw = STRUCTURED + SET + option(99) + option(Opt.LIST) + GO
    for pieces in all_cuts(raw):
        front = Front()
        assert front.say(*pieces)[:-1] == [
            acked(Opt.STRUCTURED_REPLY),
            Reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, context(*ALLOCATION)),
            acked(Opt.SET_META_CONTEXT),
            Reply(99, Rep.ERR_UNSUP),
            Reply(Opt.LIST, Rep.SERVER, listed("")),
            acked(Opt.LIST),
            Reply(Opt.GO, Rep.INFO, info_export(MIB, ALL_FEATURES)),
            acked(Opt.GO),
        ]


def test_nothing_is_parsed_while_a_question_is_open() -> None:
    machine = Haggling(ExportPolicy(), tls=True, no_zeroes=True)
    assert machine.receive(STRUCTURED + b"no option") == [Ask(UseStructuredReplies())]
    assert machine.receive(b" either way") == []
    with pytest.raises(PeerError, match="option magic"):
        machine.answer(Acked())


def test_answer_to_no_question_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError, match="not asked for"):
        Haggling(ExportPolicy(), tls=True, no_zeroes=True).answer(Acked())


def test_bytes_behind_the_last_option_belong_to_the_transmission_phase() -> None:
    for pieces in all_cuts(GO + b"\x25\x60\x95\x13 and more"):
        front, later = Front(), b""
        for piece in pieces:
            if front.terms:
                later += piece
            else:
                front.say(piece)
        assert front.terms
        assert front.machine.rest() + later == b"\x25\x60\x95\x13 and more"
        assert front.machine.rest() == b""


# -- options without data


@pytest.mark.parametrize("number", OPTIONS_WITHOUT_DATA)
@pytest.mark.parametrize("length", [1, 7, MAX_OPTION_DATA, MAX_OPTION_DATA + 1])
def test_option_that_takes_no_data_is_invalid_with_data(number: int, length: int) -> None:
    """(H6): and the session stays in step."""
    raw = option(number, bytes(length)) + option(Opt.ABORT)
    for pieces in all_cuts(raw) if length < 9 else [[raw]]:
        assert say(pieces) == [Reply(number, Rep.ERR_INVALID), *ABORTED]


def test_abort_is_acknowledged_whatever_its_data() -> None:
    """(H6)."""
    for data in (b"", b"reason", bytes(MAX_OPTION_DATA + 1)):
        assert say([option(Opt.ABORT, data) + GO]) == ABORTED


def test_second_structured_reply_is_invalid_and_the_first_stands() -> None:
    """(H7)."""
    front = Front()
    assert front.say(STRUCTURED + STRUCTURED + GO)[:2] == [
        acked(Opt.STRUCTURED_REPLY),
        Reply(Opt.STRUCTURED_REPLY, Rep.ERR_INVALID),
    ]
    assert front.terms
    assert front.terms.structured_replies
    assert front.questions.count(UseStructuredReplies()) == 1


def test_structured_reply_may_be_asked_for_again_after_a_refusal() -> None:
    answers = iter([Refused(Rep.ERR_UNSUP), Acked()])
    assert say([STRUCTURED + STRUCTURED], lambda _: next(answers)) == [
        Reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP),
        acked(Opt.STRUCTURED_REPLY),
    ]


# -- TLS


def test_starttls_inside_tls_is_invalid() -> None:
    """(T3)."""
    for pieces in all_cuts(option(Opt.STARTTLS) + option(Opt.ABORT)):
        assert say(pieces) == [Reply(Opt.STARTTLS, Rep.ERR_INVALID), *ABORTED]


def test_starttls_where_tls_is_off_is_against_the_policy() -> None:
    """(T3) "NOTLS mode"."""
    for pieces in all_cuts(option(Opt.STARTTLS) + option(Opt.ABORT)):
        assert say(pieces, tls=False) == [Reply(Opt.STARTTLS, Rep.ERR_POLICY), *ABORTED]


@pytest.mark.parametrize("tls", [True, False])
def test_tls_required_is_never_said_here(tls: bool) -> None:
    """(T3): not even when the upstream says it to us."""
    for number in range(13):
        front = Front(Refused(Rep.ERR_TLS_REQD), tls=tls)
        replies = front.say(option(number, info_data()))
        assert Rep.ERR_TLS_REQD not in [one.kind for one in replies if isinstance(one, Reply)]


# -- the data of options (H5)


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
@pytest.mark.parametrize("length", [0, 1, 6, 7, 4096, 4097, 2**31, 2**32 - 1])
def test_name_length_that_does_not_fit_the_option_is_invalid(number: int, length: int) -> None:
    """(CVE-2022-26495): and one such option does no harm to the next."""
    data = string("disk5", length=length) + bytes(2)
    for pieces in all_cuts(option(number, data) + option(Opt.ABORT)):
        assert say(pieces) == [Reply(number, Rep.ERR_INVALID), *ABORTED]


@pytest.mark.parametrize("name", BAD_STRINGS)
@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_name_that_is_no_string_is_invalid(number: int, name: bytes) -> None:
    meta = number in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT)
    front = Front(policy=ExportPolicy(None))
    front.say(STRUCTURED)
    data = meta_data(name) if meta else info_data(name)
    assert front.say(option(number, data)) == [Reply(number, Rep.ERR_INVALID)]
    assert front.questions == [UseStructuredReplies()]


@pytest.mark.parametrize("name", [*BAD_STRINGS, b"n" * (MAX_OPTION_DATA + 1)])
def test_export_name_that_is_no_string_ends_the_session(name: bytes) -> None:
    front = Front(policy=ExportPolicy(None))
    assert front.say(option(Opt.EXPORT_NAME, name) + GO) == [Close(SessionEnd.REFUSED)]
    assert front.questions == []


@pytest.mark.parametrize("name", ["", "disk", "n" * 257, "n" * MAX_STRING, "\x1b[31m ü"])
def test_name_of_legal_length_goes_to_the_upstream(name: str) -> None:
    """(CVE-2017-15118)."""
    front = Front(policy=ExportPolicy(None))
    front.say(option(Opt.INFO, info_data(name)), option(Opt.EXPORT_NAME, name.encode()))
    assert front.questions == [Open(name, (), go=False), Open(name, (), go=True)]
    assert front.terms
    assert front.terms.export == name


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_info_that_is_asked_for_twice_is_asked_of_the_upstream_once_at_most(number: int) -> None:
    """ "The client MUST NOT include any information request in the list more than once", and
    towards the upstream that client is the gateway.
    """
    front = Front()
    front.say(option(number, info_data("", (3, 1, 3, 3))))
    for question in front.questions:
        assert isinstance(question, Open)
        assert len(set(question.infos)) == len(question.infos)


def test_infos_are_asked_of_the_upstream_as_the_client_asked_them() -> None:
    front = Front()
    front.say(option(Opt.INFO, info_data("", (3, 99))) + option(Opt.GO, info_data("", (1,))))
    assert front.questions == [Open("", (3, 99), go=False), Open("", (1,), go=True)]


# -- shutdown (H12)


def test_shutdown_refuses_every_option_but_abort() -> None:
    raw = b"".join(option(number, info_data()) for number in (3, 5, 6, 7, 8, 9, 10, 77))
    for pieces in all_cuts(raw + option(Opt.ABORT)):
        front = Front()
        front.machine.shutdown()
        refused = [Reply(number, Rep.ERR_SHUTDOWN) for number in (3, 5, 6, 7, 8, 9, 10, 77)]
        assert front.say(*pieces) == [*refused, *ABORTED]
        assert front.questions == []


def test_shutdown_ends_a_session_that_asks_with_export_name() -> None:
    front = Front()
    front.machine.shutdown()
    assert front.say(option(Opt.EXPORT_NAME)) == [Close(SessionEnd.SHUTDOWN)]
    assert front.questions == []


def test_shutdown_during_a_question_lets_its_answer_through() -> None:
    machine = Haggling(ExportPolicy(), tls=True, no_zeroes=True)
    machine.receive(STRUCTURED + GO)
    machine.shutdown()
    assert said(machine.answer(Acked())) == [
        acked(Opt.STRUCTURED_REPLY),
        Reply(Opt.GO, Rep.ERR_SHUTDOWN),
    ]


# -- what may be displayed (H13, H14)


def test_error_texts_are_never_a_peers_bytes() -> None:
    """(H13)."""
    evil = "\x1b[31m evil\n"
    front = Front(Refused(Rep.ERR_POLICY, evil))
    effects = front.effects(
        option(Opt.INFO, info_data(evil)),
        option(Opt.GO, info_data("")),
        option(Opt.INFO, info_data(evil.encode() + b"\xff")),
    )
    assert len(effects) == 3
    for effect in effects:
        assert "evil" not in text_of(effect)
    assert "evil" not in front.machine.refused.replace(repr(evil), "")


def test_refused_export_is_kept_for_the_log_in_short() -> None:
    front = Front(policy=ExportPolicy("disk"))
    front.say(option(Opt.GO, info_data("\n" * 4000)))
    assert len(front.machine.refused) < 400
    assert front.machine.refused.isprintable()


def test_every_reply_is_one_write() -> None:
    """(H14): header and data together, since some clients do not read twice."""
    front = Front()
    effects = front.effects(STRUCTURED + option(Opt.LIST) + option(Opt.GO, info_data("", (3,))))
    assert all(isinstance(one, Reply) for one in said(effects)[:-1])
    assert isinstance(effects[-1], EnterTransmission)
