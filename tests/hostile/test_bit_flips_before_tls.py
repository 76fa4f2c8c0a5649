"""A client's words before TLS with any bit the other way round, or cut off anywhere.

In memory: the machines take every one of them, fault by fault, and nothing that a client could get
wrong brings it further than STARTTLS does.
"""

from __future__ import annotations

import dataclasses

from gateway.errors import PeerError
from gateway.nbd.negotiation import (
    Close,
    Effect,
    Greeted,
    Greeting,
    PlainHaggling,
    Send,
    StartTLS,
)
from tests.hostile.replay import flipped
from tests.support.rawclient import (
    OPTION,
    OPTION_REPLY,
    REP_MAGIC,
    Info,
    Opt,
    Rep,
    info_data,
    meta_data,
    option,
)

FLAGS = b"\0\0\0\3"
OPTIONS = (
    option(Opt.LIST)
    + option(Opt.STRUCTURED_REPLY)
    + option(Opt.SET_META_CONTEXT, meta_data(b"disk", [b"base:allocation"]))
    + option(Opt.INFO, info_data(b"disk", [Info.BLOCK_SIZE]))
    + option(Opt.GO, info_data(b"disk", [Info.BLOCK_SIZE]))
    + option(Opt.STARTTLS)
)
SAID = FLAGS + OPTIONS


@dataclasses.dataclass
class Outcome:
    greeted: Greeted | None = None
    effects: list[Effect] = dataclasses.field(default_factory=list)
    fault: PeerError | None = None

    @property
    def replies(self) -> list[tuple[int, int]]:
        """(option, kind) of all that was said."""
        found = []
        for effect in self.effects:
            if isinstance(effect, Send):
                magic, number, kind, length = OPTION_REPLY.unpack_from(effect.data)
                assert magic == REP_MAGIC
                assert length == len(effect.data) - OPTION_REPLY.size
                found.append((number, kind))
        return found

    @property
    def tls(self) -> bool:
        return StartTLS() in self.effects


def play(said: bytes, step: int) -> Outcome:
    """As a session does it: greeting, then haggling, until TLS begins or the session ends."""
    outcome, greeting = Outcome(), Greeting(tls_required=True)
    machine: PlainHaggling | None = None
    for at in range(0, len(said), step):
        data = said[at : at + step]
        try:
            if machine is None:
                for effect in greeting.receive(data):
                    assert isinstance(effect, Greeted)
                    outcome.greeted, machine = effect, PlainHaggling()
                if machine is None:
                    continue
                data = greeting.rest()
            outcome.effects += machine.receive(data)
        except PeerError as fault:
            outcome.fault = fault
            break
        if outcome.effects and isinstance(outcome.effects[-1], (StartTLS, Close)):
            break
        assert len(machine._options.inbox) < OPTION.size, "plaintext is not stored"
    check(outcome)
    return outcome


def check(outcome: Outcome) -> None:
    """Whatever was said: all that is granted in plaintext is TLS, in so many words."""
    assert outcome.fault is None or outcome.fault.side == "client"
    assert outcome.greeted or not outcome.effects
    for effect in outcome.effects[:-1]:
        assert isinstance(effect, Send), "something behind the end"
    granted = [(number, kind) for number, kind in outcome.replies if kind < 1 << 31]
    assert granted in ([], [(Opt.STARTTLS, Rep.ACK)], [(Opt.ABORT, Rep.ACK)])
    assert outcome.tls == (granted == [(Opt.STARTTLS, Rep.ACK)])
    if outcome.tls:
        assert outcome.effects[-2] == Send(
            OPTION_REPLY.pack(REP_MAGIC, Opt.STARTTLS, Rep.ACK, 0)
        ), "ACK first, TLS second"


def test_the_recording_itself() -> None:
    outcome = play(SAID, 1)
    assert outcome.greeted == Greeted(no_zeroes=True)
    refused = [kind for _, kind in outcome.replies[:-1]]
    assert refused == [Rep.ERR_TLS_REQD] * 5
    assert outcome.tls


def test_every_truncation() -> None:
    whole = play(SAID, 1)
    for count in range(len(SAID)):
        for step in (1, 1 << 20):
            outcome = play(SAID[:count], step)
            assert outcome.fault is None, "what has come so far is right"
            assert outcome.effects == whole.effects[: len(outcome.effects)]
            assert not outcome.tls


def test_every_bit() -> None:
    for bit in range(len(SAID) * 8):
        said = flipped(SAID, bit)
        one, other = play(said, 1), play(said, 1 << 20)
        assert one.greeted == other.greeted
        # All at once, the bytes behind a STARTTLS that came about are seen with it.
        if other.fault is None:
            assert one.effects == other.effects
        if bit < 32:  # the client's flags
            fixed = bit != 31
            assert (one.greeted is not None) == (fixed and bit >= 30)


def test_starttls_out_of_another_option() -> None:
    """Two bits make a STARTTLS of a LIST: then the options behind it end the session."""
    said = FLAGS + option(Opt.STARTTLS) + OPTIONS
    outcome = play(said, 1 << 20)
    assert outcome.fault is not None
    assert not outcome.tls
