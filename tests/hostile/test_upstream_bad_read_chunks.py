"""Content chunks that lie: outside of the request, over each other, too few, malformed (X7, U5).

What was already passed on stands; the reply ends in an error, and a success never comes.
"""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Answering, Make
from tests.hostile.session import Session
from tests.support.fake_upstream import (
    DONE,
    MIB,
    chunk,
    data_chunk,
    hole_chunk,
    none_chunk,
    pattern,
)
from tests.support.rawclient import CHUNK, CHUNK_MAGIC, Cf, Cmd, Ct, Request

AT, LENGTH = 8192, 4096


def data(got: Request, low: int, high: int, flags: int = 0) -> bytes:
    """A chunk for a part of the request; bounds relative to its offset."""
    return data_chunk(got.cookie, got.offset + low, bytes(high - low), flags=flags)


def announced(got: Request, kind: int, length: int, body: bytes) -> bytes:
    """A chunk that claims another length than it has."""
    return CHUNK.pack(CHUNK_MAGIC, DONE, kind, got.cookie, length) + body


BAD: dict[str, Make] = {
    "before": lambda got: data(got, -512, 512) + none_chunk(got.cookie),
    "wholly_before": lambda got: data(got, -512, 0) + none_chunk(got.cookie),
    "behind": lambda got: data(got, LENGTH - 512, LENGTH + 512) + none_chunk(got.cookie),
    "wholly_behind": lambda got: data(got, LENGTH, LENGTH + 512) + none_chunk(got.cookie),
    "relative_offset": lambda got: data_chunk(got.cookie, 0, bytes(LENGTH), flags=DONE),
    "offset_2^64-1": lambda got: data_chunk(got.cookie, (1 << 64) - 1, bytes(LENGTH), flags=DONE),
    "more_than_asked": lambda got: data(got, 0, LENGTH + 1, DONE),
    "length_2^32-1": lambda got: announced(got, Ct.OFFSET_DATA, (1 << 32) - 1, bytes(MIB)),
    "overlap": lambda got: data(got, 0, 2048) + data(got, 2047, LENGTH, DONE),
    "same_twice": lambda got: data(got, 0, LENGTH) + data(got, 0, LENGTH, DONE),
    "overlap_backwards": lambda got: data(got, 2048, LENGTH) + data(got, 0, 2049, DONE),
    "inside_another": lambda got: data(got, 0, LENGTH) + data(got, 512, 1024, DONE),
    "nothing": lambda got: none_chunk(got.cookie),
    "too_little": lambda got: data(got, 0, LENGTH - 1, DONE),
    "too_little_then_none": lambda got: data(got, 0, 2048) + none_chunk(got.cookie),
    "gap": lambda got: data(got, 0, 1024) + data(got, 2048, LENGTH, DONE),
    "data_empty": lambda got: data(got, 0, 0) + data(got, 0, LENGTH, DONE),
    "data_without_offset": lambda got: chunk(got.cookie, Ct.OFFSET_DATA, bytes(7), flags=DONE),
    "data_without_payload": lambda got: chunk(got.cookie, Ct.OFFSET_DATA, flags=DONE),
    "hole_empty": lambda got: hole_chunk(got.cookie, got.offset, 0) + data(got, 0, LENGTH, DONE),
    "hole_before": lambda got: hole_chunk(got.cookie, got.offset - 1, LENGTH, flags=DONE),
    "hole_too_long": lambda got: hole_chunk(got.cookie, got.offset, LENGTH + 1, flags=DONE),
    "hole_of_4_GiB": lambda got: hole_chunk(got.cookie, got.offset, 0xFFFFFFFF, flags=DONE),
    "hole_offset_2^64-1": lambda got: hole_chunk(got.cookie, (1 << 64) - 1, LENGTH, flags=DONE),
    "hole_over_data": lambda got: (
        data(got, 0, 2048) + hole_chunk(got.cookie, got.offset, LENGTH, flags=DONE)
    ),
    "hole_short": lambda got: chunk(got.cookie, Ct.OFFSET_HOLE, bytes(11), flags=DONE),
    "hole_long": lambda got: chunk(
        got.cookie, Ct.OFFSET_HOLE, struct.pack(">QI", got.offset, LENGTH) + b"\0", flags=DONE
    ),
    "none_without_done": lambda got: chunk(got.cookie, Ct.NONE),
    "none_with_payload": lambda got: chunk(got.cookie, Ct.NONE, b"\0", flags=DONE),
    "unknown_type": lambda got: chunk(got.cookie, 3, bytes(12), flags=DONE),
    "unknown_type_77": lambda got: chunk(got.cookie, 77) + data(got, 0, LENGTH, DONE),
    "status": lambda got: chunk(
        got.cookie, Ct.BLOCK_STATUS, struct.pack(">III", 0x1001, LENGTH, 0), flags=DONE
    ),
    "status_ext": lambda got: chunk(got.cookie, 6, bytes(28), flags=DONE),
    "unknown_type_of_4_GiB": lambda got: announced(got, 99, (1 << 32) - 1, bytes(MIB)),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_no_success(lab: Lab, witness: Session, make: Make) -> None:
    lab.fake.script = Answering(Cmd.READ, make)
    session = lab.session(contexts=[b"base:allocation"])
    lab.forget_peak()
    before = lab.peak_kib()
    session.submit(Cmd.READ, AT, LENGTH)
    session.lost()
    assert lab.peak_kib() - before < 8 << 10
    lab.fake.wait_end(1)


@pytest.mark.parametrize("make", [BAD["wholly_behind"], BAD["unknown_type"], BAD["nothing"]])
def test_with_others_outstanding(lab: Lab, witness: Session, make: Make) -> None:
    """Requests of the same client that wait behind the bad reply are told, too."""
    lab.fake.script = Answering(Cmd.READ, make)
    session = lab.session()
    for i in range(10):
        session.submit(Cmd.READ, AT + i * LENGTH, LENGTH)
    session.submit(Cmd.FLUSH)
    session.submit(Cmd.WRITE, 0, payload=bytes(70000))
    session.lost()


def test_fragments_in_spite_of_df(lab: Lab, witness: Session) -> None:
    lab.fake.script = Answering(
        Cmd.READ, lambda got: data(got, 0, 2048) + data(got, 2048, LENGTH, DONE)
    )
    session = lab.session()
    session.submit(Cmd.READ, AT, LENGTH, flags=Cf.DF)
    session.lost()


LEGAL: dict[str, Make] = {
    "two_chunks": lambda got: good(got, 0, 2048) + good(got, 2048, LENGTH, DONE),
    "out_of_order": lambda got: good(got, 100, LENGTH) + good(got, 0, 100, DONE),
    "then_none": lambda got: good(got, 0, LENGTH) + none_chunk(got.cookie),
    "single_bytes": lambda got: (
        b"".join(good(got, i, i + 1) for i in range(LENGTH)) + none_chunk(got.cookie)
    ),
    "unknown_flags": lambda got: good(got, 0, LENGTH, DONE | 0x8000),
}


def good(got: Request, low: int, high: int, flags: int = 0) -> bytes:
    content = pattern(got.offset + low, high - low)
    return data_chunk(got.cookie, got.offset + low, content, flags=flags)


@pytest.mark.parametrize("make", LEGAL.values(), ids=LEGAL.keys())
def test_odd_but_legal(lab: Lab, make: Make) -> None:
    lab.fake.script = Answering(Cmd.READ, make)
    session = lab.session()
    for _ in range(3):
        session.check(AT, LENGTH)
    session.disc()


def test_holes_are_legal(lab: Lab) -> None:
    lab.fake.script = Answering(
        Cmd.READ,
        lambda got: hole_chunk(got.cookie, got.offset, 1000) + good(got, 1000, LENGTH, DONE),
    )
    session = lab.session()
    answer = session.ask(Cmd.READ, AT, LENGTH)
    assert answer.data == bytes(1000) + pattern(AT + 1000, LENGTH - 1000)
    session.disc()
