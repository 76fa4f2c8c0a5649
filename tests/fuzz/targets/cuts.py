"""The same bytes whole and in pieces: whatever the network does to a stream changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from gateway.errors import PeerError
from gateway.nbd.haggling import Haggling
from gateway.nbd.handshake import Greeted, Handshake
from gateway.nbd.negotiation import (
    Allowance,
    Ask,
    Barred,
    Effect,
    Greeting,
    PlainHaggling,
    Send,
)
from gateway.nbd.pairing import (
    Acked,
    Answer,
    Contexts,
    Granted,
    Listed,
    ListExports,
    Open,
    QueryContexts,
    Question,
)
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.transmission import InFlightLimits
from gateway.nbd.wire import BlockSizes, ListedExport, MetaContext
from tests.fuzz.model.entries import merged
from tests.fuzz.source import Source, require
from tests.fuzz.targets import options
from tests.fuzz.targets.line import Line
from tests.fuzz.targets.setups import read_setup
from tests.fuzz.targets.transmission import Play

_ALLOWANCE = Allowance(40, 1 << 20)
_STEPS = 60


def cuts(data: bytes) -> object:
    """One machine twice."""
    source = Source(data)
    what, places = source.u8(), source.string()
    match what % 5:
        case 0:
            return _same(_greet, _options(source), places)
        case 1:
            return _same(_bar, _options(source), places)
        case 2:
            return _same(_haggle, _options(source), places)
        case 3:
            which = source.u8()
            return _same(lambda pieces: _shake(pieces, which), source.rest(), places)
        case _:
            return _transmit(source, places)


def pieces_of(data: bytes, places: bytes) -> Iterator[bytes]:
    """Cut after so many bytes, again and again; 0 stands for 256."""
    at = turn = 0
    while at < len(data):
        step = (places[turn % len(places)] or 256) if places else 1
        yield data[at : at + step]
        at += step
        turn += 1


def _same(run: Callable[[list[bytes]], object], data: bytes, places: bytes) -> object:
    whole = run([data])
    cut = run(list(pieces_of(data, places)))
    require(whole == cut, "it depends on where it is cut", whole, cut)
    return whole


def _options(source: Source) -> bytes:
    stream = b""
    for _ in range(_STEPS):
        if not source.more:
            break
        stream += source.string() if source.u8() % 4 == 0 else options.option(source)
    return stream


class _Tape:
    """Effects so far, of a machine that is fed piece by piece and may end with a fault."""

    def __init__(self) -> None:
        self.sent = b""
        self.others: list[object] = []
        self.fault = False

    def add(self, effects: list[Effect]) -> bool:
        """Whether something else than words has come."""
        for effect in effects:
            if isinstance(effect, Send):
                self.sent += effect.data
            else:
                self.others.append(effect)
        return len(effects) > 0 and not isinstance(effects[-1], Send)

    def all(self) -> tuple[object, ...]:
        # With a fault in the same piece nothing of that piece is said: closing is the answer.
        return (self.others, self.fault) if self.fault else (self.sent, self.others, self.fault)


def _greet(pieces: list[bytes]) -> object:
    tape, greeting = _Tape(), Greeting(tls_required=True)
    machine: PlainHaggling | None = None
    try:
        for piece in pieces:
            if machine is not None:
                if tape.add(machine.receive(piece)):
                    break
            elif greeting.receive(piece):
                machine = PlainHaggling(_ALLOWANCE)
                if tape.add(machine.receive(greeting.rest())):
                    break
    except PeerError:
        tape.fault = True
    return _without_tls(tape)


def _without_tls(tape: _Tape) -> object:
    """Bytes behind STARTTLS are a fault if they are there already, and TLS if they come later."""
    if tape.fault or any(type(one).__name__ == "StartTLS" for one in tape.others):
        return "tls or a fault"
    return tape.all()


def _bar(pieces: list[bytes]) -> object:
    tape, machine = _Tape(), Barred("not for you", _ALLOWANCE)
    try:
        for piece in pieces:
            if tape.add(machine.receive(piece)):
                break
    except PeerError:
        tape.fault = True
    return tape.all()


def _willing(question: Question) -> Answer:
    match question:
        case ListExports():
            return Listed((ListedExport("disk", "a disk"), ListedExport("ü", "")))
        case Open():
            return Granted(1 << 20, 0x5ED, BlockSizes(1, 4096, 1 << 20))
        case QueryContexts():
            return Contexts((MetaContext(1, "base:allocation"),))
        case _:
            return Acked()


def _haggle(pieces: list[bytes]) -> object:
    tape = _Tape()
    machine = Haggling(ExportPolicy("disk"), _ALLOWANCE, tls=True, no_zeroes=True)
    behind, over = b"", False
    try:
        for piece in pieces:
            if over:
                behind += piece
                continue
            effects = machine.receive(piece)
            while effects and isinstance(effects[-1], Ask):
                tape.add(effects)
                effects = machine.answer(_willing(effects[-1].question))
            if tape.add(effects):
                over, behind = True, machine.rest()
    except PeerError:
        tape.fault = True
    return (tape.all(), behind if any("Enter" in str(o)[:5] for o in tape.others) else b"")


def _shake(pieces: list[bytes], which: int) -> object:
    """Ends with the first answer to an option: what comes behind it is a fault, if it is there."""
    machine, found = Handshake(), None
    try:
        stream = b"".join(pieces)
        head = stream[:18] if stream[8:16] == b"IHAVEOPT" else stream[:152]
        rest = stream[len(head) :]
        sizes = [len(one) for one in pieces]
        for piece in _again(head, sizes):
            if isinstance(found := machine.receive(piece), Greeted):
                break
        if not isinstance(found, Greeted) or found.style.value == "oldstyle":
            return found
        if found.style.value == "newstyle":
            machine.export_name("disk")
        else:
            asks = (machine.list_exports, machine.structured_reply, machine.abort)
            more = (lambda: machine.go("", (3,)), lambda: machine.set_meta_context("", ("base:",)))
            (*asks, *more)[which % 5]()
        for piece in _again(rest, sizes):
            if machine.receive(piece) is not None:
                return "an answer, or a fault behind it"
    except PeerError:
        return "an answer, or a fault behind it" if found else "a fault"
    return None


def _again(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = turn = 0
    while at < len(data):
        step = max(sizes[turn % len(sizes)], 1)
        yield data[at : at + step]
        at += step
        turn += 1


# -- transmission


def _transmit(source: Source, places: bytes) -> object:
    """The client's bytes, then the upstream's: what each request comes to is the same."""
    setup = replace(read_setup(source, plain=True), limits=InFlightLimits())
    whole, cut = Play(setup), Line(setup)
    asks = b""
    for _ in range(source.u8() % 16):
        asks += source.string() if source.u8() % 8 == 0 else whole.request(source)
    whole.line.ask(asks)
    for piece in pieces_of(asks, places):
        cut.ask(piece)
    require(whole.line.forwarded == cut.forwarded, "another request")
    said = b"".join(_answers(source, whole))
    whole.line.say(said)
    for piece in pieces_of(said, places):
        cut.say(piece)
    ends = (_ends(whole.line), _ends(cut))
    require(ends[0] == ends[1], "another reply", *ends)
    return ends[0]


def _answers(source: Source, play: Play) -> Iterator[bytes]:
    for one in play.line.outstanding:
        how = source.u8()
        match how % 8:
            case 0:
                yield play.words.odd(one, source.u8(), source.u8())
            case 1:
                yield source.string()
            case _:
                yield play.words.honest(one)


def _ends(line: Line) -> object:
    machine = line.machine
    faults = (bool(machine.client_fault), bool(machine.upstream_fault), machine.client_done)
    told = [
        (one.cookie, one.errors, merged(one.told), sorted(one.contexts), one.padded)
        for _, one in sorted(line.eyes.seen.items())
    ]
    return faults, line.over, told
