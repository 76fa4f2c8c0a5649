"""One whole negotiation in memory: the bytes of both sides, to be said again with a fault in them.

No sockets, no TLS, no clock. The client's bytes are given; the upstream is a `Script` that answers
what the gateway really asks, and an accident may befall its words on their way.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

from gateway.errors import PeerError
from gateway.nbd.constants import Rep
from gateway.nbd.haggling import Haggling
from gateway.nbd.handshake import MAX_REPLY_DATA, Greeted, Handshake, Style
from gateway.nbd.negotiation import MAX_OPTION_DATA, Ask, Close, Effect, EnterTransmission, Send
from gateway.nbd.pairing import (
    Answer,
    ListExports,
    Open,
    QueryContexts,
    Question,
    Refused,
    Terms,
    Unavailable,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.policy import ExportPolicy
from tests.support.fake_upstream import Link, LinkEndedError, Script
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    CLISERV,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    Opt,
)

Accident = Callable[[int, bytes], bytes]  # where in all its words these stand, and the words


def no_accident(at: int, words: bytes) -> bytes:
    return words


def flip(bit: int) -> Accident:
    """This bit of all its words is the other way round."""
    place, mask = bit // 8, 0x80 >> bit % 8

    def befall(at: int, words: bytes) -> bytes:
        if not at <= place < at + len(words):
            return words
        spoilt = bytearray(words)
        spoilt[place - at] ^= mask
        return bytes(spoilt)

    return befall


def cut(count: int) -> Accident:
    """Nothing comes behind so many bytes."""
    return lambda at, words: words[: max(0, count - at)]


def flipped(raw: bytes, bit: int) -> bytes:
    return flip(bit)(0, raw)


class Wire(Link):
    """A link without a socket: what the script says is kept."""

    def __init__(self) -> None:
        super().__init__(0, None, None)  # type: ignore[arg-type]
        self.words = bytearray()

    def _send(self, data: bytes) -> None:
        self.words += data
        self.sent += len(data)


class Below:
    """The upstream, as `gateway.upstream` asks it, and what has become of it.

    `said` is all that came from it, the accident included.
    """

    def __init__(self, script: Script, accident: Accident) -> None:
        self.said = bytearray()
        self.faults: list[PeerError] = []
        self.answers: list[tuple[Question, Answer]] = []
        self._script = script
        self._accident = accident
        self._link = Wire()
        self._handshake: Handshake | None = None
        self._gone = False
        self._oldstyle: Answer | None = None

    @property
    def export(self) -> bytes | None:
        """What was opened there."""
        return self._link.export

    def ask(self, question: Question) -> Answer:
        answer: Answer = Unavailable()
        if not self._gone:
            try:
                answer = self._answer(question)
            except PeerError as fault:
                self.faults.append(fault)
                self._gone = True
        assert all(fault.side == "upstream" for fault in self.faults)
        self.answers.append((question, answer))
        return answer

    def _answer(self, question: Question) -> Answer:
        if self._handshake is None:
            self._handshake = Handshake()
            self._greet(self._handshake)
        if self._oldstyle is not None:
            return self._oldstyle if isinstance(question, Open) else Refused(Rep.ERR_UNSUP)
        hand = self._handshake
        if hand.style is not Style.FIXED_NEWSTYLE and not isinstance(question, Open):
            return Refused(Rep.ERR_UNSUP)
        match question:
            case UseStructuredReplies():
                return self._exchange(hand.structured_reply())
            case UseExtendedHeaders():
                return self._exchange(hand.extended_headers())
            case ListExports():
                return self._exchange(hand.list_exports())
            case QueryContexts(name, queries, select):
                option = hand.set_meta_context if select else hand.list_meta_context
                return self._exchange(option(name, queries))
            case Open(name, infos, go):
                if hand.style is Style.FIXED_NEWSTYLE:
                    return self._exchange((hand.go if go else hand.info)(name, infos))
                return self._exchange(hand.export_name(name))

    def _greet(self, hand: Handshake) -> None:
        script = self._script
        if script.style == "oldstyle":
            words = struct.pack(">QQQI124x", NBDMAGIC, CLISERV, script.size, script.flags)
        else:
            offered = C_FIXED | C_NO_ZEROES if script.style == "fixed" else 0
            words = GREETING.pack(NBDMAGIC, IHAVEOPT, offered)
        greeted = self._hear(words)
        assert isinstance(greeted, Greeted)
        self._oldstyle = greeted.export
        if greeted.reply:
            (self._link.client_flags,) = struct.unpack(">I", greeted.reply)

    def _exchange(self, option: bytes) -> Answer:
        magic, number, length = OPTION.unpack_from(option)
        data = option[OPTION.size :]
        assert magic == IHAVEOPT
        assert length == len(data)
        self._link.words.clear()
        try:
            if number == Opt.EXPORT_NAME:
                self._script.export_name(self._link, data)
            else:
                self._script.option(self._link, number, data)
        except LinkEndedError:
            pass  # its way to say no
        answer = self._hear(bytes(self._link.words))
        assert not isinstance(answer, Greeted)
        return answer

    def _hear(self, words: bytes) -> Greeted | Answer:
        assert self._handshake is not None
        words = self._accident(len(self.said), words)
        self.said += words
        result = self._handshake.receive(words)
        assert len(self._handshake._inbox) <= 20 + MAX_REPLY_DATA
        if result is None:  # what it waits for will not come
            raise self._handshake.closed()
        return result


@dataclasses.dataclass
class Outcome:
    """What a client was told, and where it has got to."""

    sent: bytes = b""
    terms: Terms | None = None
    close: Close | None = None
    fault: PeerError | None = None
    rest: bytes = b""


def haggle(policy: ExportPolicy, said: bytes, below: Below, step: int = 1 << 16) -> Outcome:
    """The client's bytes inside TLS, so many at a time, up to the end of the negotiation."""
    machine = Haggling(policy, tls=True, no_zeroes=True)
    outcome = Outcome()
    for at in range(0, len(said), step):
        try:
            effects = machine.receive(said[at : at + step])
            while effects:
                effect = effects.pop(0)
                if isinstance(effect, Ask):
                    assert not effects
                    effects = machine.answer(below.ask(effect.question))
                    continue
                _note(outcome, effect)
        except PeerError as fault:
            outcome.fault = fault
        assert outcome.fault is None or outcome.fault.side == "client"
        assert len(machine._options.inbox) <= OPTION.size + MAX_OPTION_DATA
        if outcome.terms or outcome.close or outcome.fault:
            outcome.rest = machine.rest() + said[at + step :]
            break
    return outcome


def _note(outcome: Outcome, effect: Effect) -> None:
    assert outcome.terms is None, "something behind the end of the negotiation"
    assert outcome.close is None, "something behind the end of the session"
    match effect:
        case Send(data):
            outcome.sent += data
        case EnterTransmission(terms):
            outcome.terms = terms
        case Close():
            outcome.close = effect
        case _:
            raise AssertionError(effect)
