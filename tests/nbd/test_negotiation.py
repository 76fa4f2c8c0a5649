"""The server role until TLS: greeting, client flags, and haggling in plaintext (FORCEDTLS)."""

from __future__ import annotations

import struct

import pytest

from gateway.errors import PeerError, SessionEnd
from gateway.nbd.constants import Opt, Rep
from gateway.nbd.haggling import ExportPolicy, Haggling
from gateway.nbd.negotiation import (
    BEFORE_TLS,
    MAX_OPTION_SKIP,
    Allowance,
    Close,
    Effect,
    Greeted,
    Greeting,
    Option,
    Options,
    PlainHaggling,
    Send,
    StartTLS,
    refusal,
)
from tests.nbd.support import (
    Reply,
    acked,
    all_cuts,
    info_data,
    meta_data,
    option,
    said,
    text_of,
)

FIXED, NO_ZEROES = 1, 2
SOME_OPTIONS = {
    Opt.LIST: b"",
    Opt.INFO: info_data("disk", (3,)),
    Opt.GO: info_data("disk", (3,)),
    Opt.STRUCTURED_REPLY: b"",
    Opt.LIST_META_CONTEXT: meta_data("disk", ("base:",)),
    Opt.SET_META_CONTEXT: meta_data("disk", ("base:allocation",)),
    Opt.PEEK_EXPORT: b"?",
    Opt.EXTENDED_HEADERS: b"",
    0: b"",
    77: b"unknown",
    2**32 - 1: b"unknown",
}


def haggle(*pieces: bytes) -> list[Effect]:
    machine = PlainHaggling()
    return [effect for piece in pieces for effect in machine.receive(piece)]


def collect(options: Options, pieces: list[bytes], found: list[Option]) -> None:
    for piece in pieces:
        options.inbox.append(piece)
        while (one := options.next()) is not None:
            found.append(one)


# -- the greeting


def test_hello_is_18_bytes_with_fixed_newstyle_and_no_other_flag_than_the_two() -> None:
    """(H1)."""
    assert Greeting.hello() == b"NBDMAGICIHAVEOPT\0\x03"


@pytest.mark.parametrize("tls_required", [True, False])
@pytest.mark.parametrize("flags", [FIXED, FIXED | NO_ZEROES])
def test_client_flags_are_read_at_every_cut(flags: int, tls_required: bool) -> None:
    for pieces in all_cuts(struct.pack(">I", flags)):
        machine = Greeting(tls_required=tls_required)
        effects = [effect for piece in pieces for effect in machine.receive(piece)]
        assert effects == [Greeted(no_zeroes=bool(flags & NO_ZEROES))]
        assert machine.rest() == b""


def test_bytes_behind_the_client_flags_are_for_the_next_machine() -> None:
    for pieces in all_cuts(struct.pack(">I", FIXED) + option(Opt.LIST)):
        machine, effects, later = Greeting(tls_required=True), [], b""
        for piece in pieces:
            if effects:
                later += piece
            else:
                effects = machine.receive(piece)
        assert effects == [Greeted(no_zeroes=False)]
        assert machine.rest() + later == option(Opt.LIST)


@pytest.mark.parametrize("tls_required", [True, False])
@pytest.mark.parametrize("bit", range(2, 32))
def test_client_flag_that_was_not_offered_ends_the_session(bit: int, tls_required: bool) -> None:
    """(H2)."""
    for pieces in all_cuts(struct.pack(">I", FIXED | 1 << bit)):
        machine = Greeting(tls_required=tls_required)
        with pytest.raises(PeerError, match=r"^client: unknown client flags"):
            [machine.receive(piece) for piece in pieces]


@pytest.mark.parametrize("flags", [0, NO_ZEROES])
def test_client_without_fixed_newstyle_cannot_have_tls(flags: int) -> None:
    """(H2): such a client means NOTLS, which a listener that requires TLS does not offer."""
    with pytest.raises(PeerError, match="fixed newstyle"):
        Greeting(tls_required=True).receive(struct.pack(">I", flags))
    effects = Greeting(tls_required=False).receive(struct.pack(">I", flags))
    assert effects == [Greeted(no_zeroes=bool(flags))]


# -- options


@pytest.mark.parametrize("number", SOME_OPTIONS)
def test_every_option_before_tls_is_told_that_tls_is_required(number: int) -> None:
    """(T1, H3): unknown options too, and the payload is consumed, so the next one parses."""
    request = option(number, SOME_OPTIONS[number])
    for pieces in all_cuts(request + option(Opt.STARTTLS)):
        assert said(haggle(*pieces)) == [
            Reply(number, Rep.ERR_TLS_REQD),
            acked(Opt.STARTTLS),
            StartTLS(),
        ]


def test_refusals_name_the_remedy() -> None:
    (effect,) = haggle(option(Opt.LIST))
    assert "nbds://" in text_of(effect)


def test_every_option_is_answered_in_order_and_nothing_is_served() -> None:
    requests = [option(number, data) for number, data in SOME_OPTIONS.items()]
    assert said(haggle(b"".join(requests * 2))) == 2 * [
        Reply(number, Rep.ERR_TLS_REQD) for number in SOME_OPTIONS
    ]


def test_starttls_is_acknowledged_before_tls_begins() -> None:
    """(T2): one ordered list, so that ACK comes first."""
    for pieces in all_cuts(option(Opt.STARTTLS)):
        assert said(haggle(*pieces)) == [acked(Opt.STARTTLS), StartTLS()]


def test_bytes_behind_starttls_end_the_session() -> None:
    """(T4): plaintext that is parked here would pass for decrypted data."""
    for behind in (b"\0", b"\x16\x03\x01", option(Opt.STRUCTURED_REPLY)):
        for before in (b"", option(Opt.LIST)):
            with pytest.raises(PeerError, match=r"^client: bytes behind NBD_OPT_STARTTLS"):
                haggle(before + option(Opt.STARTTLS) + behind)


def test_bytes_behind_starttls_end_the_session_at_every_cut_before_its_end() -> None:
    """(T4)."""
    raw = option(Opt.STARTTLS)
    for at in range(1, len(raw)):
        machine = PlainHaggling()
        assert machine.receive(raw[:at]) == []
        with pytest.raises(PeerError, match="bytes behind NBD_OPT_STARTTLS"):
            machine.receive(raw[at:] + b"\x16")


def test_plaintext_fed_after_starttls_is_a_bug_of_ours() -> None:
    """(T2): there is no way on in plaintext."""
    machine = PlainHaggling()
    machine.receive(option(Opt.STARTTLS))
    with pytest.raises(AssertionError):
        machine.receive(option(Opt.LIST))


@pytest.mark.parametrize("data", [b"\0", b"x" * 300])
def test_starttls_with_data_is_invalid_and_the_next_one_works(data: bytes) -> None:
    """(H6)."""
    for pieces in all_cuts(option(Opt.STARTTLS, data) + option(Opt.STARTTLS)):
        assert said(haggle(*pieces)) == [
            Reply(Opt.STARTTLS, Rep.ERR_INVALID),
            acked(Opt.STARTTLS),
            StartTLS(),
        ]


@pytest.mark.parametrize("name", ["", "disk", "n" * 5000])
def test_export_name_before_tls_ends_the_session(name: str) -> None:
    """(T1): it has no error reply."""
    for pieces in all_cuts(option(Opt.EXPORT_NAME, name.encode()[:40])):
        assert haggle(*pieces) == [Close(SessionEnd.PLAINTEXT_CLIENT)]
    assert haggle(option(Opt.EXPORT_NAME, name.encode())) == [Close(SessionEnd.PLAINTEXT_CLIENT)]


@pytest.mark.parametrize("data", [b"", b"for whatever reason"])
def test_abort_is_acknowledged_and_its_data_ignored(data: bytes) -> None:
    """(H6)."""
    for pieces in all_cuts(option(Opt.ABORT, data)):
        assert said(haggle(*pieces)) == [acked(Opt.ABORT), Close(SessionEnd.ABORTED)]


def test_nothing_behind_abort_is_answered() -> None:
    effects = haggle(option(Opt.ABORT) + option(Opt.LIST) + b"no option at all")
    assert said(effects) == [acked(Opt.ABORT), Close(SessionEnd.ABORTED)]


def test_client_that_leaves_after_a_refusal_was_one_without_tls() -> None:
    machine = PlainHaggling()
    assert machine.end is SessionEnd.ABORTED
    machine.receive(option(Opt.GO, info_data()))
    assert machine.end is SessionEnd.PLAINTEXT_CLIENT
    assert machine.receive(option(Opt.ABORT))[-1] == Close(SessionEnd.PLAINTEXT_CLIENT)


# -- framing


@pytest.mark.parametrize("magic", [b"NBDMAGIC", bytes(8), b"\x16\x03\x01\x02\0\x01\0\x01"])
def test_wrong_option_magic_ends_the_session(magic: bytes) -> None:
    for pieces in all_cuts(magic + option(Opt.LIST)[8:]):
        with pytest.raises(PeerError, match=r"^client: option magic"):
            haggle(*pieces)


@pytest.mark.parametrize("length", [MAX_OPTION_SKIP + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("number", [Opt.INFO, Opt.STARTTLS, Opt.ABORT, 77])
def test_option_of_more_than_32_mib_ends_the_session_on_its_header(
    number: int, length: int
) -> None:
    with pytest.raises(PeerError, match=f"^client: option {int(number)} of {length} bytes"):
        haggle(option(number, length=length))


def test_option_of_32_mib_is_skipped_without_being_stored() -> None:
    """(H3, CVE-2017-15119): the largest that is no attack."""
    machine = PlainHaggling(Allowance(9, 2 * MAX_OPTION_SKIP))
    piece = bytes(1 << 20)
    assert machine.receive(option(Opt.INFO, length=MAX_OPTION_SKIP)) == []
    for _ in range(MAX_OPTION_SKIP // len(piece) - 1):
        assert machine.receive(piece) == []
        assert len(machine._options.inbox) == 0
    effects = machine.receive(piece[1:] + b"\0" + option(Opt.STARTTLS))
    assert said(effects) == [Reply(Opt.INFO, Rep.ERR_TLS_REQD), acked(Opt.STARTTLS), StartTLS()]


def test_no_option_data_is_stored_before_tls() -> None:
    machine = PlainHaggling()
    machine.receive(option(Opt.GO, length=5000))
    for _ in range(4999):
        assert machine.receive(b"x") == []
        assert len(machine._options.inbox) == 0
    assert said(machine.receive(b"x")) == [Reply(Opt.GO, Rep.ERR_TLS_REQD)]


def test_options_up_to_the_limit_keep_their_data_and_longer_ones_do_not() -> None:
    for pieces in all_cuts(option(7, b"1234") + option(8, b"12345") + option(9)):
        found: list[Option] = []
        collect(Options(max_data=4, allowance=Allowance(3, 57)), pieces, found)
        assert found == [Option(7, 4, b"1234"), Option(8, 5, b""), Option(9, 0, b"")]


def test_options_are_bounded_in_number() -> None:
    """(H12): a server may cut off what it believes to be a denial of service."""
    for pieces in all_cuts(option(1) + option(2, b"data") + option(3)):
        found: list[Option] = []
        with pytest.raises(PeerError, match="too many options"):
            collect(Options(max_data=4, allowance=Allowance(2, 99)), pieces, found)
        assert [one.number for one in found] == [1, 2]


def test_options_before_tls_are_few() -> None:
    machine = PlainHaggling()
    assert len(machine.receive(option(Opt.LIST) * BEFORE_TLS.options)) == BEFORE_TLS.options
    with pytest.raises(PeerError, match="too many options"):
        machine.receive(option(Opt.STARTTLS))


def test_options_are_bounded_in_bytes() -> None:
    """Headers count; an option that is one byte too long is not waited for."""
    exact = 16 + 4 + 16 + 5
    for pieces in all_cuts(option(7, b"1234") + option(8, b"12345")):
        found: list[Option] = []
        collect(Options(4, Allowance(9, exact)), pieces, found)
        assert [one.number for one in found] == [7, 8]
    for pieces in all_cuts(option(7, b"1234") + option(8, length=6)):
        found = []
        with pytest.raises(PeerError, match="too many bytes of options"):
            collect(Options(4, Allowance(9, exact)), pieces, found)
        assert [one.number for one in found] == [7]


def test_options_before_tls_are_short() -> None:
    machine = PlainHaggling()
    with pytest.raises(PeerError, match="too many bytes"):
        machine.receive(option(Opt.GO, length=BEFORE_TLS.octets - 15))
    machine = PlainHaggling(Allowance(1, 16))
    assert said(machine.receive(option(Opt.STARTTLS))) == [acked(Opt.STARTTLS), StartTLS()]
    machine = PlainHaggling(Allowance(1, 15))
    with pytest.raises(PeerError, match="too many bytes"):
        machine.receive(option(Opt.STARTTLS))


def test_refusal_echoes_the_option_and_is_one_write() -> None:
    """(H3, H14)."""
    effect = refusal(Option(77, 3, b"abc"), Rep.ERR_POLICY, "no")
    assert effect == Send(Reply(77, Rep.ERR_POLICY, b"no").pack())


# -- shutdown


def test_shutdown_refuses_every_option_but_abort() -> None:
    """(H12)."""
    for pieces in all_cuts(option(Opt.LIST) + option(Opt.STARTTLS) + option(Opt.ABORT)):
        machine = PlainHaggling()
        machine.shutdown()
        effects = [effect for piece in pieces for effect in machine.receive(piece)]
        assert said(effects) == [
            Reply(Opt.LIST, Rep.ERR_SHUTDOWN),
            Reply(Opt.STARTTLS, Rep.ERR_SHUTDOWN),
            acked(Opt.ABORT),
            Close(SessionEnd.ABORTED),
        ]


def test_shutdown_in_the_middle_of_an_option_meets_that_option() -> None:
    raw = option(Opt.STARTTLS)
    for at in range(len(raw)):
        machine = PlainHaggling()
        assert machine.receive(raw[:at]) == []
        machine.shutdown()
        assert said(machine.receive(raw[at:])) == [Reply(Opt.STARTTLS, Rep.ERR_SHUTDOWN)]


def test_export_name_during_shutdown_still_ends_the_session() -> None:
    machine = PlainHaggling()
    machine.shutdown()
    (effect,) = machine.receive(option(Opt.EXPORT_NAME))
    assert isinstance(effect, Close)


# -- what survives STARTTLS


def test_nothing_said_in_plaintext_is_known_inside_tls() -> None:
    """(T5, CVE-2021-3716): structured replies asked for in plaintext are not on inside TLS."""
    plain = PlainHaggling()
    before = option(Opt.STRUCTURED_REPLY) + option(Opt.SET_META_CONTEXT, meta_data("", ("base:",)))
    assert said(plain.receive(before)) == [
        Reply(Opt.STRUCTURED_REPLY, Rep.ERR_TLS_REQD),
        Reply(Opt.SET_META_CONTEXT, Rep.ERR_TLS_REQD),
    ]
    plain.receive(option(Opt.STARTTLS))
    inside = Haggling(ExportPolicy(), tls=True, no_zeroes=True)
    effects = inside.receive(option(Opt.SET_META_CONTEXT, meta_data("", ("base:",))))
    assert said(effects) == [Reply(Opt.SET_META_CONTEXT, Rep.ERR_INVALID)]
