"""A client's options inside TLS with any bit the other way round, or cut off anywhere.

In memory. What it opens is what it has asked for and may open, read-only where it has to be, of the
size that the upstream said, and with nothing that was not agreed on.
"""

from __future__ import annotations

import struct

import pytest

from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Acked, Open, UseExtendedHeaders, UseStructuredReplies
from gateway.nbd.policy import Export, ExportPolicy
from tests.hostile.extended import EXTENDED_HEADERS
from tests.hostile.replay import Below, Outcome, flipped, haggle, no_accident
from tests.support.fake_upstream import MIB, Script
from tests.support.rawclient import (
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    Info,
    Opt,
    Rep,
    Request,
    info_data,
    meta_data,
    option,
)

SIZE = 7 * MIB
CONTEXT = b"base:allocation"
SAID = (
    option(Opt.STRUCTURED_REPLY)
    + option(Opt.LIST)
    + option(Opt.LIST_META_CONTEXT, meta_data(b"disk"))
    + option(Opt.SET_META_CONTEXT, meta_data(b"disk", [CONTEXT]))
    + option(Opt.INFO, info_data(b"disk", [Info.BLOCK_SIZE, Info.NAME]))
    + option(Opt.GO, info_data(b"disk", [Info.BLOCK_SIZE]))
)
OLD = option(Opt.EXPORT_NAME, b"disk")
EXTENDED = option(EXTENDED_HEADERS) + SAID[OPTION.size :]
BEHIND = Request(0, 0, 512).pack()  # the first words of the transmission phase

# Names one bit away from "disk" are exports of the upstream, too, and some are offered.
POLICIES = {
    "one": ExportPolicy("disk", read_only=True),
    "any": ExportPolicy(None, read_only=True),
    "table": ExportPolicy(table=(Export("disk", read_only=True), Export("dirk"), Export("eisk"))),
}


def meant(policy: ExportPolicy, name: bytes) -> tuple[bytes, bool] | None:
    """What may be opened by this name, and whether read-only: said here once more."""
    if policy is POLICIES["one"]:
        return (b"disk", True) if name in (b"", b"disk") else None
    if policy is POLICIES["table"]:
        return (name, name == b"disk") if name in (b"disk", b"dirk", b"eisk") else None
    return name, True


class Anything(Script):
    """Has every export there is, writable, and extended headers."""

    def option(self, link: object, opt: int, data: bytes) -> bool:
        if opt == EXTENDED_HEADERS:
            link.structured = True  # type: ignore[attr-defined]
            self.reply(link, opt, Rep.ACK)  # type: ignore[arg-type]
            return False
        return super().option(link, opt, data)  # type: ignore[arg-type]


def upstream() -> Below:
    return Below(Anything(size=SIZE, names=None, block_sizes=(512, 4096, MIB)), no_accident)


def play(policy: ExportPolicy, said: bytes, step: int = 1 << 16) -> Outcome:
    below = upstream()
    outcome = haggle(policy, said, below, step)
    check(policy, said, below, outcome)
    return outcome


def asked_name(said: bytes) -> tuple[int, bytes]:
    """The last whole option, and the name in it, by the test's own reading."""
    last, at = (0, b""), 0
    while at + OPTION.size <= len(said):
        _, number, length = OPTION.unpack_from(said, at)
        at += OPTION.size
        data = said[at : at + length]
        if len(data) < length:
            break
        at += length
        last = number, data
    number, data = last
    if number == Opt.EXPORT_NAME:
        return number, data
    if number in (Opt.INFO, Opt.GO):
        (count,) = struct.unpack_from(">I", data)
        return number, data[4 : 4 + count]
    return number, b""


def check(policy: ExportPolicy, said: bytes, below: Below, outcome: Outcome) -> None:
    for question, _ in below.answers:
        if isinstance(question, Open):
            assert meant(policy, question.name.encode()), "asked for what is not to be opened"
    terms = outcome.terms
    if terms is None:
        assert below.export is None, "opened behind the client's back"
        return
    number, name = asked_name(said[: len(said) - len(outcome.rest)])
    assert number in (Opt.GO, Opt.EXPORT_NAME), "nothing else is the end of the haggling"
    export = meant(policy, name)
    assert export is not None, "opened what is not to be opened"
    assert terms.export == name.decode()
    assert (below.export, terms.read_only) == export
    assert terms.size == SIZE
    acked = {type(question) for question, answer in below.answers if answer == Acked()}
    assert not terms.structured_replies or UseStructuredReplies in acked
    assert not terms.extended_headers or UseExtendedHeaders in acked
    assert not (terms.structured_replies and terms.extended_headers)
    if terms.contexts:
        assert [one.name for one in terms.contexts] == [CONTEXT.decode()]
        assert terms.structured_replies or terms.extended_headers
    told(outcome, number, terms.size, int(terms.flags))


def told(outcome: Outcome, number: int, size: int, flags: int) -> None:
    """The client was told what the session then goes by."""
    if number == Opt.EXPORT_NAME:
        assert outcome.sent[-10:] == struct.pack(">QH", size, flags)
        return
    ack = OPTION_REPLY.pack(REP_MAGIC, Opt.GO, Rep.ACK, 0)
    assert outcome.sent.endswith(ack)
    body = struct.pack(">HQH", Info.EXPORT, size, flags)
    assert OPTION_REPLY.pack(REP_MAGIC, Opt.GO, Rep.INFO, len(body)) + body in outcome.sent
    assert flags & TransmissionFlag.HAS_FLAGS


WAYS = {"go": SAID, "export_name": OLD, "extended": EXTENDED}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_bit(policy: ExportPolicy, way: bytes) -> None:
    granted = 0
    for bit in range(len(way) * 8):
        granted += play(policy, flipped(way, bit) + BEHIND).terms is not None
    assert granted, "some flips do no harm, and those are what this is about"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_truncation(policy: ExportPolicy, way: bytes) -> None:
    whole = play(policy, way + BEHIND)
    assert whole.terms is not None
    assert whole.terms.read_only
    assert whole.rest == BEHIND
    for count in range(len(way)):
        outcome = play(policy, way[:count], 1 + count % 3)
        assert outcome.fault is None, "what has come so far is right"
        assert outcome.close is None
        assert outcome.terms is None
        assert whole.sent.startswith(outcome.sent)
