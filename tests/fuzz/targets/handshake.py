"""The client role, towards an upstream that says anything."""

from __future__ import annotations

import struct
from collections.abc import Callable

from gateway.errors import PeerError
from gateway.nbd.handshake import Greeted, Handshake, Style
from gateway.nbd.pairing import Acked, Answer, Contexts, Granted, Listed, Refused
from tests.fuzz.source import Source, require
from tests.fuzz.targets.options import REPLY_MAGIC

_STEPS = 200
_ASKS: tuple[tuple[Callable[[Handshake], bytes], int, type], ...] = (
    (lambda machine: machine.structured_reply(), 8, Acked),
    (lambda machine: machine.extended_headers(), 11, Acked),
    (lambda machine: machine.starttls(), 5, Acked),
    (lambda machine: machine.list_exports(), 3, Listed),
    (lambda machine: machine.info("disk", (3,)), 6, Granted),
    (lambda machine: machine.go("disk", (1, 2, 3)), 7, Granted),
    (lambda machine: machine.list_meta_context("", ("base:",)), 9, Contexts),
    (lambda machine: machine.set_meta_context("disk", ("base:allocation", "x-a:")), 10, Contexts),
    (lambda machine: machine.abort(), 2, Acked),
    (lambda machine: machine.export_name("disk"), 1, Granted),
)
OPTIONS = tuple(number for _, number, _ in _ASKS)
_KINDS = (1, 2, 3, 4, *((1 << 31) + number for number in range(1, 11)), 0, 77, (1 << 32) - 1)
_GREETINGS = (
    b"NBDMAGICIHAVEOPT\0\3",
    b"NBDMAGICIHAVEOPT\0\1",
    b"NBDMAGICIHAVEOPT\0\0",
    b"NBDMAGICIHAVEOPT\xff\xff",
    b"NBDMAGIC" + bytes.fromhex("0000420281861253") + struct.pack(">QI124x", 1 << 20, 7),
)
_SIZES = (1 << 20, 0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def handshake(data: bytes) -> Talk:
    """One connection, up to its first fault."""
    talk = Talk()
    source = Source(data)
    for _ in range(_STEPS):
        if talk.over or not source.more:
            break
        talk.step(source)
    return talk


class Talk:
    """The machine, and what it has made of the upstream's words."""

    def __init__(self) -> None:
        self.machine = Handshake()
        self.over = False
        self.results: list[Greeted | Answer] = []
        self.fault = ""
        self._style: Style | None = None
        self._number = 0  # of the option that is asked; 0: none
        self._fits: type = Greeted
        self._bytes = 0  # that have come for the answer

    def step(self, source: Source) -> None:
        match source.u8() % 8:
            case 0:
                self.say(source.string())
            case 1:
                self.say(source.pick(_GREETINGS))
            case 2 | 3 | 4:
                self._ask(source)
            case _:
                self.say(self._reply(source))

    def _ask(self, source: Source) -> None:
        """What a shell may ask now; nothing while an answer is due."""
        if self._number or self._style in (None, Style.OLDSTYLE):
            return
        newstyle = self._style is Style.NEWSTYLE
        ask, number, fits = _ASKS[-1] if newstyle else source.pick(_ASKS)
        raw = ask(self.machine)
        magic, found, length = struct.unpack_from(">QII", raw)
        require((magic, found) == (0x49484156454F5054, number), "another option", raw)
        require(length == len(raw) - 16, "another length", raw)
        self._number, self._fits, self._bytes = number, fits, 0

    def _reply(self, source: Source) -> bytes:
        """A reply, mostly to what was asked."""
        if self._number == 1:
            return struct.pack(">QH", source.pick(_SIZES), source.u16()) + bytes(source.u8())
        form = source.u8()
        number = source.u8() if form & 1 else self._number
        kind = source.pick(_KINDS)
        data = b""
        if kind == 3 and not form & 2:
            data = self._info(source)
        elif kind in (2, 4):
            name = source.string()
            data = struct.pack(">I", len(name) if kind == 2 else form) + name
        if form & 4:
            data += source.string()
        claim = len(data) if not form & 8 else source.u16()
        return struct.pack(">QIII", REPLY_MAGIC, number, kind, claim) + data

    def _info(self, source: Source) -> bytes:
        match source.u8() % 5:
            case 0 | 1:
                return struct.pack(">HQH", 0, source.pick(_SIZES), source.u16())
            case 2:
                return struct.pack(">HIII", 3, 1 << source.u8() % 32, 4096, source.u32())
            case other:
                return struct.pack(">H", other) + source.string()

    def say(self, data: bytes) -> None:
        if self.over:
            return
        if data and self._style is not None:
            self._bytes += len(data)
        asked = self._style is None or self._number
        try:
            result = self.machine.receive(data)
        except PeerError as fault:
            require(fault.side == "upstream", "not the upstream's fault", fault)
            self.over, self.fault = True, fault.what
            return
        if result is None:
            most = (8 << 20) if self._number else 152
            require(self._bytes <= most or not self._number, "an answer without an end")
            return
        require(asked, "an answer to nothing", result)
        self.results.append(result)
        if isinstance(result, Greeted):
            require(self._style is None, "greeted twice", result)
            self._style = result.style
            self._check_greeted(result)
        else:
            fits = (self._fits, Refused) if self._number != 1 else (Granted,)
            require(isinstance(result, fits), "another answer", result, self._number)
            self._check(result)
            self._number = 0

    def _check_greeted(self, result: Greeted) -> None:
        if result.style is Style.OLDSTYLE:
            require(not result.reply and result.export, "oldstyle is all said", result)
            assert result.export is not None
            self._check(result.export)
            return
        require(len(result.reply) == 4 and not result.reply[3] & ~3, "odd flags", result)
        fixed = bool(result.reply[3] & 1)
        require(fixed == (result.style is Style.FIXED_NEWSTYLE), "another style", result)

    def _check(self, answer: Answer) -> None:
        match answer:
            case Granted(size, flags, sizes, infos):
                require(0 <= size < 1 << 63, "a size that no offset can have", size)
                require(flags & 1 or not flags, "flags without NBD_FLAG_HAS_FLAGS", flags)
                if sizes is not None:
                    least, best, most = sizes.minimum, sizes.preferred, sizes.maximum
                    powers = not (least & least - 1 or best & best - 1)
                    require(powers and 0 < least <= best <= most, "odd sizes", sizes)
                    require(least <= 65536 and best >= 512, "odd sizes", sizes)
                for kind, data in infos:
                    require(data[:2] == struct.pack(">H", kind), "another kind", data)
            case Refused(kind, text):
                require(kind >> 31, "refused by what is no error", kind)
                require(len(text) <= 4096, "a long text", len(text))
            case Listed(exports):
                names = [text for one in exports for text in one]
                self._check_names(names)
            case Contexts(contexts):
                self._check_names([one.name for one in contexts])
                require(all(":" in one.name[1:] for one in contexts), "no namespace", contexts)
                ids = {one.id for one in contexts}
                require(self._number != 10 or len(ids) == len(contexts), "an id twice", contexts)
            case _:
                require(answer == Acked(), "another answer", answer)

    def _check_names(self, names: list[str]) -> None:
        for one in names:
            require(len(one.encode()) <= 4096 and "\0" not in one, "a name that is none", one)
