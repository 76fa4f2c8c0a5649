"""Greeting and haggling before TLS: one predicted answer to each thing that a client can say."""

from __future__ import annotations

import struct

from gateway.errors import PeerError
from gateway.nbd.negotiation import (
    Allowance,
    Barred,
    Close,
    Effect,
    Greeted,
    Greeting,
    PlainHaggling,
    Send,
    StartTLS,
)
from tests.fuzz.source import Source, require
from tests.fuzz.targets import options
from tests.fuzz.targets.options import (
    ABORT,
    ACK,
    EXPORT_NAME,
    INVALID,
    POLICY,
    SHUTDOWN,
    STARTTLS,
    TLS_REQD,
    Reader,
)

_ALLOWANCES = (Allowance(32, 1 << 20), Allowance(3, 200))
_STEPS = 200


def plaintext(data: bytes) -> object:
    """A client from its first byte to STARTTLS; or one inside TLS that may open nothing."""
    source = Source(data)
    barred = source.u8() % 4 == 3
    allowance = source.pick(_ALLOWANCES)
    if barred:
        return Talk(Barred("not for you", allowance), allowance, tls=False).run(source, b"")
    machine = Greeting(tls_required=True)
    require(machine.hello() == b"NBDMAGICIHAVEOPT\0\3", "another greeting")
    raw = b""
    while source.more:
        part = source.string()
        raw += part
        try:
            effects = machine.receive(part)
        except PeerError as fault:
            require(fault.side == "client" and len(raw) >= 4, "not the client's fault", fault)
            (flags,) = struct.unpack_from(">I", raw)
            require(flags & ~3 or not flags & 1, "a fault that is none", fault)
            return fault
        require(bool(effects) == (len(raw) >= 4), "at another byte", raw)
        if effects:
            (flags,) = struct.unpack_from(">I", raw)
            require(effects == [Greeted(bool(flags & 2))] and flags in (1, 3), "wrong", effects)
            require(machine.rest() == raw[4:], "bytes are lost")
            return Talk(PlainHaggling(allowance), allowance, tls=True).run(source, raw[4:])
    return None


class Talk:
    """Plaintext haggling, or that of a client who is barred."""

    def __init__(self, machine: PlainHaggling | Barred, allowance: Allowance, *, tls: bool) -> None:
        self._machine = machine
        self._allowance = allowance
        self._tls = tls
        self._reader = Reader(stored=0)
        self._shutdown = False
        self.done = False
        self.replies: list[tuple[int, int]] = []

    def run(self, source: Source, first: bytes) -> Talk:
        self.hear(first)
        for _ in range(_STEPS):
            if self.done or not source.more:
                break
            match source.u8() % 8:
                case 0:
                    self.hear(source.string())
                case 1 if source.u8() % 8 == 0:
                    self._machine.shutdown()
                    self._shutdown = True
                case 2:
                    self.hear(options.option(source) + options.option(source))
                case _:
                    self.hear(options.option(source))
        return self

    def hear(self, data: bytes) -> None:
        try:
            effects = self._machine.receive(data)
        except PeerError as fault:
            require(fault.side == "client", "not the client's fault", fault)
            self._check_fault(data)
            self.done = True
            return
        expected = self._expected(data)
        require(self._reader.options <= self._allowance.options, "too many options")
        require(self._reader.octets <= self._allowance.octets, "too many bytes")
        found = [self._short(one) for one in effects]
        require(found == expected, "another answer", found, expected)
        self.replies += [one for one in found if isinstance(one, tuple)]

    def _expected(self, data: bytes) -> list[object]:
        """What has to be said, by FORCEDTLS mode."""
        expected: list[object] = []
        for heard in self._reader.read(data):
            number = heard.number
            if number == ABORT:
                expected += [(ABORT, ACK), "close"]
                self.done = True
            elif number == EXPORT_NAME:
                expected.append("close")
                self.done = True
            elif self._shutdown:
                expected.append((number, SHUTDOWN))
            elif not self._tls:
                expected.append((number, POLICY))
            elif number == STARTTLS and heard.length:
                expected.append((number, INVALID))
            elif number == STARTTLS:
                require(not self._reader.rest, "TLS behind bytes that came before it")
                expected += [(STARTTLS, ACK), "tls"]
                self.done = True
            else:
                expected.append((number, TLS_REQD))
            if self.done:
                break
        require(self.done or not self._reader.broken, "went on behind what is no option")
        return expected

    def _check_fault(self, data: bytes) -> None:
        """There has to be something to find fault with."""
        behind_tls = False
        for heard in self._reader.read(data):
            if heard.number in (ABORT, EXPORT_NAME):
                break
            if self._tls and heard.number == STARTTLS and not (heard.length or self._shutdown):
                behind_tls = bool(self._reader.rest)
                break
        too_much = self._reader.too_much(self._allowance)
        require(behind_tls or self._reader.broken or too_much, "a fault that is none")

    def _short(self, effect: Effect) -> object:
        match effect:
            case Send():
                one = options.said(effect)
                return one.number, one.kind
            case StartTLS():
                return "tls"
            case Close():
                return "close"
            case _:
                return effect
