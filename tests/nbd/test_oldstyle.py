"""The server role for a client that knows only the oldstyle handshake."""

from __future__ import annotations

import struct

import pytest

from gateway.errors import SessionEnd
from gateway.nbd.constants import Rep
from gateway.nbd.negotiation import Ask, Close, EnterTransmission, Send
from gateway.nbd.oldstyle import OldstyleHaggling
from gateway.nbd.pairing import Granted, Open, Refused, Terms, Unavailable
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.upgrades import ALL_UPGRADES, NO_UPGRADES, Upgrade
from gateway.nbd.wire import BlockSizes
from tests.nbd.support import ALL_FEATURES, MIB, Tf


@pytest.mark.parametrize("upgrades", [ALL_UPGRADES, NO_UPGRADES])
def test_all_is_said_at_once(upgrades: frozenset[Upgrade]) -> None:
    """proto.md, "Oldstyle negotiation"."""
    machine = OldstyleHaggling(ExportPolicy("disk", upgrades=upgrades))
    learn = bool(upgrades)
    assert machine.begin() == [Ask(Open("disk", (), go=True, learn_sizes=learn))]
    send, enter = machine.answer(Granted(MIB, int(ALL_FEATURES)))
    flags = ALL_FEATURES & ~Tf.SEND_DF
    magics = (0x4E42444D41474943, 0x00420281861253)
    assert send == Send(struct.pack(">QQQI", *magics, MIB, flags) + bytes(124))
    assert isinstance(enter, EnterTransmission)
    assert (enter.terms.export, enter.terms.size, enter.terms.flags) == ("disk", MIB, flags)
    assert not enter.terms.structured_replies
    assert machine.rest() == b""
    assert machine.refused == ""


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Refused(Rep.ERR_UNKNOWN), "the NBD server refuses"),
        (Unavailable(), "the NBD server behind cannot be reached"),
    ],
)
def test_closing_is_the_only_no(answer: Refused | Unavailable, why: str) -> None:
    machine = OldstyleHaggling(ExportPolicy())
    machine.begin()
    assert machine.answer(answer) == [Close(SessionEnd.REFUSED)]
    assert machine.refused == f"export '': {why}"


def test_no_greeting_after_shutdown() -> None:
    machine = OldstyleHaggling(ExportPolicy())
    machine.begin()
    machine.shutdown()
    assert machine.answer(Granted(MIB, 1)) == [Close(SessionEnd.SHUTDOWN)]


def test_nobody_is_asked_after_shutdown() -> None:
    machine = OldstyleHaggling(ExportPolicy())
    machine.shutdown()
    assert machine.begin() == [Close(SessionEnd.SHUTDOWN)]


def greeting(answer: Granted, policy: ExportPolicy) -> tuple[int, int, Terms]:
    """Size and flags as a client reads them, and the terms."""
    machine = OldstyleHaggling(policy)
    machine.begin()
    send, enter = machine.answer(answer)
    assert isinstance(send, Send)
    assert isinstance(enter, EnterTransmission)
    assert len(send.data) == 152
    return *struct.unpack_from(">QI", send.data, 16), enter.terms


def test_poor_server_looks_richer_to_an_oldstyle_client_too() -> None:
    poor = int(Tf.HAS_FLAGS | Tf.SEND_FLUSH)
    zeroes = Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO
    learnt = BlockSizes(512, 4096, 65536)
    answer = Granted(2**63 - 1, poor, learnt_sizes=learnt)
    size, flags, terms = greeting(answer, ExportPolicy(upgrades=ALL_UPGRADES))
    assert size == 2**63 - 1
    assert flags == poor | zeroes | Tf.SEND_FUA
    assert terms.split
    assert terms.served.block_sizes == learnt
    assert terms.block_sizes == BlockSizes(1, 4096, 32 * MIB)  # it was told none
    assert greeting(answer, ExportPolicy())[1] == poor


def test_features_that_were_not_negotiated_are_not_told() -> None:
    """(X7): there are no options, so only simple replies. The upper half are handshake flags."""
    for upgrades in (ALL_UPGRADES, NO_UPGRADES):
        _, flags, terms = greeting(Granted(MIB, 0xFFFF), ExportPolicy(upgrades=upgrades))
        assert not flags & (Tf.SEND_DF | Tf.BLOCK_STATUS_PAYLOAD)
        assert flags < 1 << 16
        negotiated = (terms.structured_replies, terms.extended_headers, terms.contexts)
        assert negotiated == (False, False, ())
        assert not terms.served.structured_replies


def test_read_only_policy_is_told() -> None:
    _, flags, terms = greeting(
        Granted(MIB, int(ALL_FEATURES)), ExportPolicy(read_only=True, upgrades=ALL_UPGRADES)
    )
    assert flags & Tf.READ_ONLY
    assert not flags & (Tf.SEND_TRIM | Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO)
    assert terms.read_only


def test_export_has_to_have_a_name() -> None:
    with pytest.raises(AssertionError):
        OldstyleHaggling(ExportPolicy(None))
