"""A client's options as an input has them, and a reader of the replies that is as strict."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gateway.nbd.negotiation import Allowance, Effect, Send
from tests.fuzz.source import Source, require

IHAVEOPT, REPLY_MAGIC = 0x49484156454F5054, 0x3E889045565A9
ACK, SERVER, INFO, META = 1, 2, 3, 4
ERROR_BIT = 1 << 31
(UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE, TOO_BIG, EXT_REQD) = (
    ERROR_BIT + number for number in range(1, 11)
)
(
    EXPORT_NAME,
    ABORT,
    LIST,
    PEEK,
    STARTTLS,
    INFO_OPT,
    GO,
    STRUCTURED,
    LIST_META,
    SET_META,
    EXTENDED,
) = range(1, 12)
MAX_SKIP = 1 << 25  # of an option's data, above which it is an attack
MAX_STRING = 4096

_NUMBERS = (*range(1, 12), 0, 12, 77, (1 << 32) - 1)
_NAMES = (b"", b"disk", b"other", b"n" * 300, "ü".encode(), b"a\0b", b"\xff", b"x" * 4097)
_QUERIES = (b"base:allocation", b"base:", b"x-a:", b"", b"q" * 4096)


def option(source: Source) -> bytes:
    """One option, from honest to lying."""
    number = source.pick(_NUMBERS)
    form = source.u8()
    if number in (INFO_OPT, GO):
        data = _string(source) + struct.pack(">H", form >> 4)
        data += b"".join(struct.pack(">H", source.u8() % 8) for _ in range(form >> 4))
    elif number in (LIST_META, SET_META):
        queries = form >> 6
        data = _string(source) + struct.pack(">I", queries)
        for _ in range(queries):
            one = source.pick(_QUERIES)
            data += struct.pack(">I", len(one)) + one
    elif number == EXPORT_NAME:
        data = source.pick(_NAMES)
    else:
        data = b""
    if form & 1:
        data += source.string()
    claim = len(data)
    if form & 2:
        claim = source.pick((0, 1, claim + 1, max(claim - 1, 0), 65536, 65537, MAX_SKIP + 1))
    return struct.pack(">QII", IHAVEOPT, number, claim) + data


def _string(source: Source) -> bytes:
    name = source.pick(_NAMES)
    return struct.pack(">I", len(name)) + name


@dataclass(frozen=True, slots=True)
class Heard:
    """One option that the gateway has read."""

    number: int
    data: bytes | None  # None: it was too long to be looked at
    length: int
    end: int  # where it ends in the stream


class Reader:
    """A client's stream of options, read apart from the gateway."""

    def __init__(self, *, stored: int) -> None:
        self._stream = bytearray()
        self._stored = stored
        self._skip = 0
        self._skipped: Heard | None = None
        self.options = 0
        self.octets = 0
        self._at = 0  # of the stream
        self.broken = False

    def read(self, data: bytes) -> Iterator[Heard]:
        """Whole options. None once the stream is `broken`."""
        self._stream += data
        while not self.broken:
            if self._skipped is not None:
                gone = min(self._skip, len(self._stream))
                del self._stream[:gone]
                self._skip -= gone
                if self._skip:
                    return
                skipped, self._skipped = self._skipped, None
                yield skipped
                continue
            if len(self._stream) < 16:
                return
            magic, number, length = struct.unpack_from(">QII", self._stream)
            self.broken = magic != IHAVEOPT or length > MAX_SKIP
            if self.broken:
                return
            if length > self._stored:
                del self._stream[:16]
                self._count(length)
                self._skip, self._skipped = length, Heard(number, None, length, self._at)
                continue
            if len(self._stream) < 16 + length:
                return
            self._count(length)
            data = bytes(self._stream[16 : 16 + length])
            del self._stream[: 16 + length]
            yield Heard(number, data, length, self._at)

    def _count(self, length: int) -> None:
        self.options += 1
        self.octets += 16 + length
        self._at += 16 + length

    def too_much(self, allowed: Allowance) -> bool:
        """Whether what has come is more than that; the next option's header counts already."""
        count, octets = self.options, self.octets
        if len(self._stream) >= 16 and not self.broken:
            count, octets = count + 1, octets + 16 + struct.unpack_from(">I", self._stream, 12)[0]
        return count > allowed.options or octets > allowed.octets

    @property
    def rest(self) -> bytes:
        return bytes(self._stream)


@dataclass(frozen=True, slots=True)
class Said:
    """One option reply."""

    number: int
    kind: int
    data: bytes

    @property
    def last(self) -> bool:
        return self.kind == ACK or bool(self.kind & ERROR_BIT)


def said(effect: Effect) -> Said:
    """A `Send` that is one whole option reply, in one write (H14)."""
    assert isinstance(effect, Send)
    magic, number, kind, length = struct.unpack_from(">QIII", effect.data)
    data = effect.data[20:]
    require(magic == REPLY_MAGIC and length == len(data), "not one whole reply", effect)
    if kind & ERROR_BIT:
        require(UNSUP <= kind <= EXT_REQD, "an unknown error", hex(kind))
        require(length <= MAX_STRING and data.decode().isprintable(), "an odd text", data)
    else:
        require(kind in (ACK, SERVER, INFO, META), "an unknown reply", kind)
        require(kind != ACK or not data, "an ACK with data", data)
    return Said(number, kind, data)


def sends(effects: Iterable[Effect]) -> list[Send]:
    return [one for one in effects if isinstance(one, Send)]
