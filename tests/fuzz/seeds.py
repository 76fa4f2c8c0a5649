"""Inputs for the targets, out of what real programs have said to each other."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.fuzz.recording import Haggled, Message, Record, haggled, messages
from tests.fuzz.targets.handshake import OPTIONS as ASKED
from tests.fuzz.worker import MAX_LENGTH

_LONG = 1000  # bytes of a session that is used in a few ways only
_SHORT = 64  # bytes of a payload that are kept as they were; of a longer one only how long it is


def write(folder: Path, target: str, seeds: Iterable[bytes]) -> int:
    """Those that are new and not too long. Returns how many."""
    count = 0
    for seed in seeds:
        if not 0 < len(seed) <= MAX_LENGTH:
            continue
        path = folder / target / hashlib.sha256(seed).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(seed)
            count += 1
    return count


def _strings(data: bytes, before: bytes = b"") -> bytes:
    """As `Source.string` reads them, each behind `before`."""
    parts = [data[at : at + 255] for at in range(0, len(data), 255)] or [b""]
    return b"".join(before + bytes([len(part)]) + part for part in parts)


def of_record(record: Record) -> Iterator[tuple[str, bytes]]:
    """Target and input."""
    start = haggled(record)
    if start is None:
        return
    yield "handshake", bytes(_handshake(start))
    if start.flags:
        stream = b"".join(
            struct.pack(">QII", 0x49484156454F5054, one.number, len(one.data)) + one.data
            for one in start.options
        )
        yield "plaintext", b"\0\0" + _strings(start.flags) + _strings(stream, b"\0")
        for how in (b"\0\0\2", b"\2\0\0", b"\3\0\2"):
            yield "haggling", how + b"".join(_haggling(start))
        for what in (b"\0", b"\2"):
            yield "cuts", what + b"\2\7\3" + _strings(stream, b"\0")
    if start.export is not None:
        extended = start.agreed(11)
        said = messages(record, start, extended=extended)
        body = b"".join(_transmission(said))
        for setup in _setups(start, extended, few=len(body) > _LONG):
            yield "transmission", setup + body
    yield "cuts", b"\3\1\5\0" + bytes(record.server[: start.server_at])


def _handshake(start: Haggled) -> bytes:
    parts = [_strings(start.greeting, b"\0")]
    for one in start.options:
        parts.append(bytes([2, ASKED.index(one.number)]))
        parts.append(_strings(one.replies, b"\0"))
    return b"".join(parts)


def _haggling(start: Haggled) -> Iterator[bytes]:
    """Each option, and an answer like the one that it got."""
    for one in start.options:
        raw = struct.pack(">QII", 0x49484156454F5054, one.number, len(one.data)) + one.data
        yield _strings(raw, b"\0")
        refused = not one.granted and one.number != 1
        if refused:
            yield b"\2\6\1\0"
        elif one.number in (6, 7, 1):
            flags = start.export[1] if start.export else 1
            yield b"\2\0" + struct.pack(">H", flags) + b"\xe0\1\1\0"
        elif one.number == 3:
            yield b"\2\0\1\1\2"
        elif one.number in (9, 10):
            yield b"\2\0\1"
        else:
            yield b"\2\0"


def _setups(start: Haggled, extended: bool, *, few: bool) -> Iterator[bytes]:
    """What was agreed on, and what else might have been: see `setups.read_setup`."""
    assert start.export is not None
    style = 3 if extended else int(start.agreed(8))
    flags, contexts = start.export[1], int(start.agreed(10))
    yield _setup(style, flags, 0, contexts)
    yield _setup(style | 0x78, flags, 0, contexts)  # all upgrades, resumable
    if few:
        return
    yield _setup(style | 4, flags, 0, contexts)  # read-only
    # Nothing but FLUSH below, and then in small blocks as well, and with small limits.
    yield _setup(style | 0x30, flags & 5, 0, contexts)
    yield _setup(style | 0x70, flags & 5, 0, contexts | 0x70)
    yield _setup((2 if style == 0 else style) | 8, flags, 0, contexts | 4)


def _setup(manner: int, flags: int, where: int, more: int) -> bytes:
    return struct.pack(">BHBB", manner, flags, where, more)


def _transmission(said: list[Message]) -> Iterator[bytes]:
    """The messages, with the cookies that a gateway would have used."""
    ours: dict[bytes, int] = {}
    for one in said:
        cookie = one.header[8:16]
        header = one.header
        if one.from_client:
            if header[6:8] == b"\0\2":
                return
            ours[cookie] = len(ours) + 1
        elif cookie in ours:
            header = header[:8] + struct.pack(">Q", ours[cookie]) + header[16:]
        keep = len(one.body) if len(one.body) <= _SHORT else _SHORT // 8
        yield _strings(header + one.body[:keep], bytes([not one.from_client]))
        left = len(one.body) - keep
        while left:
            count = min(left, 0xFFFF)
            yield bytes([2 if one.from_client else 3, 0]) + struct.pack(">H", count)
            left -= count
