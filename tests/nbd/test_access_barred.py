"""A client that is known and may open nothing: every option is answered, and nobody is asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import PeerError, SessionEnd
from gateway.nbd.constants import Opt, Rep
from gateway.nbd.negotiation import (
    BEFORE_TLS,
    MAX_OPTION_SKIP,
    TLS_TOO_EARLY,
    Allowance,
    Ask,
    Barred,
    Close,
    Effect,
    EnterTransmission,
    Greeting,
    Send,
    joined,
)
from gateway.nbd.pairing import ListExports
from tests.nbd.support import (
    Reply,
    acked,
    all_cuts,
    info_data,
    meta_data,
    option,
    said,
    string,
    text_of,
)

TEXT = "CN=vm1 may not open anything here"
OPTIONS = [
    option(Opt.LIST),
    option(Opt.STARTTLS),
    option(Opt.INFO, info_data("disk")),
    option(Opt.GO, info_data("disk")),
    option(Opt.STRUCTURED_REPLY),
    option(Opt.EXTENDED_HEADERS),
    option(Opt.LIST_META_CONTEXT, meta_data("disk")),
    option(Opt.SET_META_CONTEXT, meta_data("disk", ("base:allocation",))),
    option(Opt.PEEK_EXPORT),
    option(77, b"data"),
]


def haggle(*pieces: bytes, shutdown: bool = False) -> list[Effect]:
    machine = Barred(TEXT)
    if shutdown:
        machine.shutdown()
    return [effect for piece in pieces for effect in machine.receive(piece)]


def number_of(raw: bytes) -> int:
    return int.from_bytes(raw[8:12], "big")


@pytest.mark.parametrize("raw", OPTIONS)
def test_every_option_is_against_the_policy(raw: bytes) -> None:
    for pieces in all_cuts(raw + option(Opt.ABORT)):
        effects = haggle(*pieces)
        assert said(effects) == [
            Reply(number_of(raw), Rep.ERR_POLICY),
            acked(Opt.ABORT),
            Close(SessionEnd.NOT_ALLOWED),
        ]
        assert text_of(effects[0]) == TEXT


@pytest.mark.parametrize(
    "raw",
    [
        option(Opt.LIST, b"data"),
        option(Opt.STARTTLS, b"data"),
        option(Opt.GO, string("disk", length=2**32 - 1)),
        option(Opt.GO),
        option(Opt.SET_META_CONTEXT, b"\xff" * 40),
    ],
)
def test_what_is_wrong_with_an_option_is_not_looked_at(raw: bytes) -> None:
    assert said(haggle(raw)) == [Reply(number_of(raw), Rep.ERR_POLICY)]


@pytest.mark.parametrize("name", [b"", b"disk", b"\xff", b"n" * 5000])
@pytest.mark.parametrize("shutdown", [False, True])
def test_export_name_closes(name: bytes, shutdown: bool) -> None:
    effects = haggle(option(Opt.EXPORT_NAME, name) + option(Opt.LIST), shutdown=shutdown)
    assert effects == [Close(SessionEnd.NOT_ALLOWED)]


def test_nothing_behind_abort_is_answered() -> None:
    effects = haggle(option(Opt.ABORT, b"why") + option(Opt.LIST) + b"no option at all")
    assert said(effects) == [acked(Opt.ABORT), Close(SessionEnd.NOT_ALLOWED)]


def test_no_option_data_is_stored() -> None:
    """(CVE-2017-15119): whatever is in it."""
    piece = bytes(1 << 16)
    length = BEFORE_TLS.octets - len(piece)
    machine = Barred(TEXT)
    assert machine.receive(option(Opt.GO, length=length)) == []
    for _ in range(length // len(piece) - 1):
        assert machine.receive(piece) == []
        assert len(machine._options.inbox) == 0
    assert said(machine.receive(piece)) == [Reply(Opt.GO, Rep.ERR_POLICY)]
    with pytest.raises(PeerError, match="too many bytes"):
        machine.receive(option(Opt.GO, length=len(piece) - 31))
    with pytest.raises(PeerError, match="bytes"):
        Barred(TEXT).receive(option(Opt.GO, length=MAX_OPTION_SKIP + 1))
    with pytest.raises(PeerError, match="too many options"):
        Barred(TEXT, Allowance(1, 99)).receive(2 * option(Opt.GO))


def test_options_are_few() -> None:
    machine = Barred(TEXT)
    assert len(machine.receive(option(Opt.LIST) * BEFORE_TLS.options)) == BEFORE_TLS.options
    with pytest.raises(PeerError, match="too many options"):
        machine.receive(option(Opt.LIST))


def test_what_is_no_option_ends_the_session() -> None:
    with pytest.raises(PeerError, match="option magic"):
        haggle(bytes(16))


def test_shutdown_goes_first() -> None:
    effects = haggle(option(Opt.LIST) + option(Opt.ABORT), shutdown=True)
    assert said(effects) == [
        Reply(Opt.LIST, Rep.ERR_SHUTDOWN),
        acked(Opt.ABORT),
        Close(SessionEnd.NOT_ALLOWED),
    ]


@given(
    options=st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=60)), max_size=BEFORE_TLS.options
    ),
    shutdown=st.booleans(),
)
def test_nobody_is_ever_asked(options: list[tuple[int, bytes]], shutdown: bool) -> None:
    effects = haggle(*(option(*one) for one in options), shutdown=shutdown)
    assert not any(isinstance(one, Ask | EnterTransmission) for one in effects)
    refused = Rep.ERR_SHUTDOWN if shutdown else Rep.ERR_POLICY
    for one in said(effects):
        assert isinstance(one, Close) or (
            isinstance(one, Reply) and one.kind in (refused, Rep.ACK) and not one.data
        )


# -- a client that has not understood how TLS begins here


def greet(pieces: list[bytes]) -> None:
    greeting = Greeting(tls_required=True)
    for piece in pieces:
        assert greeting.receive(piece) == []


@pytest.mark.parametrize("record", [b"\x16\x03\x01\x02\0\x01", b"\x16\x03\x03\0\x7a\x01"])
def test_tls_from_the_first_byte_is_told_apart(record: bytes) -> None:
    for pieces in all_cuts(record):
        with pytest.raises(PeerError, match=f"^client: {TLS_TOO_EARLY}$"):
            greet(pieces)


# -- what a shell does with effects


def test_only_neighbours_are_joined() -> None:
    one, two, three = Send(b"one"), Send(b"two"), Send(b"three")
    ask = Ask(ListExports())
    assert list(joined([])) == []
    assert list(joined([one])) == [one]
    assert list(joined([one, two, ask])) == [Send(b"onetwo"), ask]
    assert list(joined([ask, one, two, ask, three])) == [ask, Send(b"onetwo"), ask, three]
