"""The server role for a client that knows only the oldstyle handshake."""

from __future__ import annotations

import struct

import pytest

from gateway.errors import SessionEnd
from gateway.nbd.constants import Rep
from gateway.nbd.negotiation import Ask, Close, EnterTransmission, Send
from gateway.nbd.oldstyle import OldstyleHaggling
from gateway.nbd.pairing import Granted, Open, Refused, Unavailable
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.upgrades import ALL_UPGRADES, NO_UPGRADES, Upgrade
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
