"""An upstream's handshake with any bit the other way round, or cut off anywhere.

In memory. A client is told what the upstream said, or that there is none; nothing becomes writable
that is not, and nothing is on that the upstream has not acknowledged.
"""

from __future__ import annotations

import struct

import pytest

from gateway.nbd.pairing import Acked, Unavailable, UseExtendedHeaders, UseStructuredReplies
from gateway.nbd.policy import ExportPolicy
from tests.hostile.extended import EXTENDED_HEADERS
from tests.hostile.replay import Accident, Below, Outcome, cut, flip, haggle, no_accident
from tests.hostile.test_bit_flips_inside_tls import Anything
from tests.support.fake_upstream import ALL_FEATURES, MIB
from tests.support.rawclient import (
    OPTION_REPLY,
    REP_MAGIC,
    Info,
    Opt,
    Rep,
    Tf,
    info_data,
    meta_data,
    option,
)

SIZE = 7 * MIB
READ_ONLY = ALL_FEATURES | Tf.READ_ONLY
ASKS = (
    option(Opt.LIST)
    + option(Opt.LIST_META_CONTEXT, meta_data(b"disk"))
    + option(Opt.SET_META_CONTEXT, meta_data(b"disk", [b"base:allocation"]))
    + option(Opt.INFO, info_data(b"disk", [Info.BLOCK_SIZE]))
    + option(Opt.GO, info_data(b"disk", [Info.BLOCK_SIZE]))
)
SAID = {
    "fixed": option(Opt.STRUCTURED_REPLY) + ASKS,
    "extended": option(EXTENDED_HEADERS) + ASKS,
    "newstyle": option(Opt.GO, info_data(b"disk")),
    "oldstyle": option(Opt.GO, info_data(b"disk")),
    "export_name": option(Opt.EXPORT_NAME, b"disk"),
}
STYLES = {"extended": "fixed", "export_name": "fixed"}
ANY = ExportPolicy(None)  # read-only is what the upstream says, if it does


def play(kind: str, accident: Accident, policy: ExportPolicy = ANY) -> tuple[Outcome, Below]:
    script = Anything(
        style=STYLES.get(kind, kind),
        size=SIZE,
        flags=READ_ONLY,
        names=None,
        block_sizes=(512, 4096, MIB),
    )
    below = Below(script, accident)
    outcome = haggle(policy, SAID[kind], below)
    check(outcome, below, policy)
    return outcome, below


def check(outcome: Outcome, below: Below, policy: ExportPolicy) -> None:
    assert outcome.fault is None, "it is not the client's fault"
    if below.faults:
        lost = [isinstance(answer, Unavailable) for _, answer in below.answers]
        assert lost == sorted(lost), "an upstream that was given up is asked no more"
        assert lost[-1]
    terms = outcome.terms
    if terms is None:
        return
    assert not below.faults
    assert terms.export == "disk"
    if below.export is not None:  # an oldstyle upstream has no names
        assert below.export == b"disk"
    acked = {type(question) for question, answer in below.answers if answer == Acked()}
    assert terms.structured_replies == (UseStructuredReplies in acked)
    assert terms.extended_headers == (UseExtendedHeaders in acked)
    size, flags = said_last(bytes(below.said))
    assert terms.size == size < 1 << 63
    if flags & Tf.HAS_FLAGS or policy.read_only:
        assert terms.read_only == (policy.read_only or bool(flags & Tf.READ_ONLY))
    told = terms.flags & ~(Tf.HAS_FLAGS | Tf.READ_ONLY)
    assert not told & ~flags, "a feature that the upstream has not"
    assert flags & Tf.HAS_FLAGS or not told


def said_last(said: bytes) -> tuple[int, int]:
    """Size and flags, out of the upstream's last words, by the test's own reading."""
    if said[8:16] == b"\0\0\x42\x02\x81\x86\x12\x53":
        size, flags = struct.unpack_from(">QI", said, 16)
        return size, flags & 0xFFFF
    if said[-20:] == OPTION_REPLY.pack(REP_MAGIC, Opt.GO, Rep.ACK, 0):
        at = 0
        found = (0, 0)
        head = OPTION_REPLY.pack(REP_MAGIC, Opt.GO, Rep.INFO, 12)
        while (at := said.find(head, at)) >= 0:
            at += len(head)
            kind, size, flags = struct.unpack_from(">HQH", said, at)
            found = (size, flags) if kind == Info.EXPORT else found
        return found
    zeroes = 0 if len(said) == 28 or len(said) < 100 else 124
    size, flags = struct.unpack_from(">QH", said, len(said) - 10 - zeroes)
    return size, flags


@pytest.mark.parametrize("kind", SAID)
def test_every_bit(kind: str) -> None:
    outcome, below = play(kind, no_accident)
    assert outcome.terms is not None
    assert outcome.terms.read_only
    ends: dict[bool, int] = {True: 0, False: 0}
    for bit in range(len(below.said) * 8):
        spoilt, _ = play(kind, flip(bit))
        ends[spoilt.terms is not None] += 1
    assert ends[False], "no fault was found out"


@pytest.mark.parametrize("kind", SAID)
def test_what_is_opened_read_only(kind: str) -> None:
    """It is, whatever the upstream's last words are."""
    _, below = play(kind, no_accident)
    end = len(below.said) * 8
    for bit in range(max(0, end - 100 * 8), end):
        outcome, _ = play(kind, flip(bit), ExportPolicy("disk", read_only=True))
        assert outcome.terms is None or outcome.terms.read_only


@pytest.mark.parametrize("kind", SAID)
def test_every_truncation(kind: str) -> None:
    _, below = play(kind, no_accident)
    for count in range(len(below.said)):
        outcome, spoilt = play(kind, cut(count))
        assert outcome.terms is None
        assert spoilt.faults
