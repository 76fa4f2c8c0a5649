"""The front for clients of the oldstyle handshake: one question, one greeting or none."""

from __future__ import annotations

import struct

from gateway.nbd.negotiation import Ask, Close, EnterTransmission, Send
from gateway.nbd.oldstyle import OldstyleHaggling
from gateway.nbd.pairing import Granted, Open
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.transmission import Transmission
from gateway.nbd.upgrades import Upgrade
from tests.fuzz.source import Source, require
from tests.fuzz.targets import answers

_POLICIES = tuple(
    ExportPolicy("disk", read_only=read_only, upgrades=upgrades, replaceable=replaceable)
    for read_only in (False, True)
    for upgrades in (frozenset[Upgrade](), frozenset(Upgrade), frozenset({Upgrade.FUA}))
    for replaceable in (False, True)
)


def oldstyle(data: bytes) -> object:
    """One client of the oldstyle handshake, and the bytes that its upstream answers."""
    source = Source(data)
    policy = source.pick(_POLICIES)
    machine = OldstyleHaggling(policy)
    when = source.u8() % 8
    if when == 0:
        machine.shutdown()
    effects = machine.begin()
    if when == 0:
        require(len(effects) == 1 and isinstance(effects[0], Close), "served", effects)
        return effects
    (ask,) = effects
    require(isinstance(ask, Ask), "no question", ask)
    assert isinstance(ask, Ask)
    learn = Upgrade.BLOCK_SIZE in policy.upgrades
    require(ask.question == Open("disk", (), go=True, learn_sizes=learn), "another", ask)
    answer = answers.answer(ask.question, source)
    if when == 1:
        machine.shutdown()
    effects = machine.answer(answer)
    require(machine.rest() == b"", "bytes of nobody")
    if when == 1 or not isinstance(answer, Granted):
        require(len(effects) == 1 and isinstance(effects[0], Close), "served", effects)
        return effects
    send, enter = effects
    assert isinstance(send, Send)
    assert isinstance(enter, EnterTransmission)
    magics = b"NBDMAGIC" + bytes.fromhex("0000420281861253")
    size, flags = struct.unpack(">QI", send.data[16:28])
    require(send.data == magics + send.data[16:28] + bytes(124), "another greeting", send)
    require(size == answer.size and flags == int(enter.terms.flags), "not what it is", enter)
    require(flags & 1 and flags < 1 << 16, "odd flags", hex(flags))
    require(not policy.read_only or flags & 2, "may be written", hex(flags))
    require(not answer.flags & 2 or flags & 2, "may be written", hex(flags))
    require(not flags & 0x80, "DF without chunks", hex(flags))
    Transmission(enter.terms, resumable=policy.replaceable)
    return effects
