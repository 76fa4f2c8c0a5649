"""An upstream's answers to the front end's questions, out of an input."""

from __future__ import annotations

import struct

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
    Refused,
    Unavailable,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.wire import ListedExport, MetaContext
from tests.fuzz.source import Source
from tests.fuzz.targets.setups import BLOCK_SIZES, CONTEXTS, SIZES

_NAMES = ("", "disk", "other", "ü", "n" * 300, "\x1b[2J")
_ERRORS = (*((1 << 31) + number for number in range(12)), (1 << 32) - 1)


def answer(question: Question, source: Source) -> Answer:
    """An answer of a kind that the client role can give to it."""
    how = source.u8()
    if how % 8 == 6:
        return Refused(source.pick(_ERRORS), source.pick(_NAMES))
    if how % 8 == 7:
        return Unavailable()
    match question:
        case UseStructuredReplies() | UseExtendedHeaders():
            return Acked()
        case ListExports():
            count = source.u8() % 5
            return Listed(tuple(_listed(source) for _ in range(count)))
        case QueryContexts():
            return Contexts(_contexts(source))
        case Open():
            return _granted(source)


def _listed(source: Source) -> ListedExport:
    return ListedExport(source.pick(_NAMES), source.pick(_NAMES))


def _contexts(source: Source) -> tuple[MetaContext, ...]:
    return source.pick(CONTEXTS)


def _granted(source: Source) -> Granted:
    flags, where = source.u16(), source.u8()
    infos = []
    for kind in range(1, 3):
        if where >> 5 + kind & 1:
            text = source.pick(_NAMES).encode()
            infos.append((kind, struct.pack(">H", kind) + text))
    return Granted(
        SIZES[where & 7],
        flags if flags & 1 else 0,
        BLOCK_SIZES[where >> 3 & 7],
        tuple(infos),
        source.pick(BLOCK_SIZES),
    )
