"""BLOCK_STATUS replies that make clients loop, assert or overrun (CVE-2023-5871)."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Answering, Make
from tests.hostile.session import Session
from tests.support.fake_upstream import (
    DONE,
    Script,
    chunk,
    data_chunk,
    none_chunk,
    simple,
    status_chunk,
)
from tests.support.rawclient import Cf, Cmd, Ct, Err, Request

LENGTH = 65536
BOTH = [b"base:allocation", b"qemu:dirty-bitmap:b0"]
FIRST, SECOND = 0x1001, 0x1003  # the ids that the fake gives


def first(*extents: tuple[int, int]) -> Make:
    """A bad chunk for the first context, a good one for the second."""

    def make(got: Request) -> bytes:
        bad = status_chunk(got.cookie, FIRST, extents)
        return bad + status_chunk(got.cookie, SECOND, [(got.length, 0)], flags=DONE)

    return make


def raw(body: bytes) -> Make:
    return lambda got: (
        chunk(got.cookie, Ct.BLOCK_STATUS, body)
        + status_chunk(got.cookie, SECOND, [(got.length, 0)], flags=DONE)
    )


BAD: dict[str, Make] = {
    "no_extent": first(),
    "empty_extent": first((0, 0)),
    "empty_extent_first": first((0, 0), (LENGTH, 0)),
    "empty_extent_last": first((512, 0), (0, 3)),
    "no_context": raw(b""),
    "half_a_context": raw(b"\0\0"),
    "half_an_extent": raw(struct.pack(">II", FIRST, 512)),
    "extent_and_a_half": raw(struct.pack(">IIII", FIRST, 512, 0, 512)),
    "one_byte_more": raw(struct.pack(">III", FIRST, 512, 0) + b"\0"),
    "unknown_context": lambda got: status_chunk(got.cookie, 77, [(512, 0)], flags=DONE),
    "context_0": lambda got: status_chunk(got.cookie, 0, [(512, 0)], flags=DONE),
    "same_context_twice": lambda got: (
        status_chunk(got.cookie, FIRST, [(512, 0)])
        + status_chunk(got.cookie, FIRST, [(512, 0)], flags=DONE)
    ),
    "unknown_context_among_good": lambda got: (
        status_chunk(got.cookie, 77, [(512, 0)]) + first((512, 0))(got)
    ),
    "same_context_twice_among_good": lambda got: (
        status_chunk(got.cookie, FIRST, [(512, 0)]) + first((512, 0))(got)
    ),
    "context_missing": lambda got: status_chunk(got.cookie, FIRST, [(512, 0)], flags=DONE),
    "nothing": lambda got: none_chunk(got.cookie),
    "simple_success": lambda got: simple(got.cookie),
    "data": lambda got: data_chunk(got.cookie, got.offset, bytes(512), flags=DONE),
    "status_ext": lambda got: chunk(got.cookie, 6, bytes(24), flags=DONE),
    "too_many_before_the_last": first((LENGTH, 0), (512, 3)),
    "far_too_many_before_the_last": first((0xFFFFFFFF, 0), (0xFFFFFFFF, 3)),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_no_success(lab: Lab, witness: Session, make: Make) -> None:
    lab.fake.script = Answering(Cmd.BLOCK_STATUS, make)
    session = lab.session(contexts=BOTH)
    session.submit(Cmd.BLOCK_STATUS, 0, LENGTH)
    session.lost()
    lab.fake.wait_end(1)


@pytest.mark.parametrize(
    "extents",
    [[(512, 0), (512, 3)], [(LENGTH + 1, 0)], [(0xFFFFFFFF, 0)]],
    ids=["two", "longer_by_1", "4_GiB"],
)
def test_req_one_violated(lab: Lab, witness: Session, extents: list[tuple[int, int]]) -> None:
    lab.fake.script = Answering(Cmd.BLOCK_STATUS, first(*extents))
    session = lab.session(contexts=BOTH)
    session.submit(Cmd.BLOCK_STATUS, 0, LENGTH, flags=Cf.REQ_ONE)
    session.lost()
    lab.fake.wait_end(1)


def test_more_than_2_20_extents(lab: Lab, witness: Session) -> None:
    """P:1869 says SHOULD NOT. Cut off or dropped; a client must not get more, nor we store it."""
    one = struct.pack(">II", 1, 0)
    body = struct.pack(">I", FIRST) + one * ((1 << 20) + 1)
    lab.fake.script = Answering(
        Cmd.BLOCK_STATUS,
        lambda got: chunk(got.cookie, Ct.BLOCK_STATUS, body, flags=DONE),
        size=8 << 30,
    )
    session = lab.session(contexts=BOTH[:1])
    answer = session.ask(Cmd.BLOCK_STATUS, 0, 0x7FFFFFFF)  # `session` checks the number
    assert answer.error in (0, Err.ESHUTDOWN, Err.EIO)


def test_as_many_as_are_allowed(lab: Lab) -> None:
    body = struct.pack(">I", FIRST) + struct.pack(">IIII", 1, 0, 1, 3) * (1 << 19)
    lab.fake.script = Answering(
        Cmd.BLOCK_STATUS,
        lambda got: chunk(got.cookie, Ct.BLOCK_STATUS, body, flags=DONE),
        size=8 << 30,
    )
    session = lab.session(contexts=BOTH[:1])
    answer = session.ask(Cmd.BLOCK_STATUS, 0, 0x7FFFFFFF)
    assert answer.error == 0
    (extents,) = answer.extents.values()
    assert len(extents) == 1 << 20
    session.check()
    session.disc()


LEGAL: dict[str, Make] = {
    "last_beyond_the_request": first((512, 0), (0xFFFFFFFF, 3)),
    "only_one_beyond_the_request": first((0xFFFFFFFF, 0)),
    "less_than_asked": first((1, 0)),
    "same_status_twice": first((512, 0), (512, 0)),
    "unknown_status_flags": first((512, 0xFFFFFFFF)),
    "other_order": lambda got: (
        status_chunk(got.cookie, SECOND, [(512, 0)])
        + status_chunk(got.cookie, FIRST, [(512, 0)])
        + none_chunk(got.cookie)
    ),
}


@pytest.mark.parametrize("make", LEGAL.values(), ids=LEGAL.keys())
def test_odd_but_legal(lab: Lab, make: Make) -> None:
    lab.fake.script = Answering(Cmd.BLOCK_STATUS, make)
    session = lab.session(contexts=BOTH)
    for _ in range(3):
        answer = session.ask(Cmd.BLOCK_STATUS, 0, LENGTH)
        assert answer.error == 0
        assert len(answer.extents) == 2
    session.check()
    session.disc()


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFF000])
@pytest.mark.parametrize("offset", [0, 512, 4 << 30])
def test_nearly_4_gib(lab: Lab, length: int, offset: int) -> None:
    """CVE-2025-47711, CVE-2025-47712: lengths near 2^32, where sums overflow."""
    lab.fake.script = Script(size=8 << 30)
    session = lab.session(contexts=BOTH)
    answer = session.ask(Cmd.BLOCK_STATUS, offset, length)
    assert answer.error == 0
    for extents in answer.extents.values():  # a server may say less than was asked
        assert 1 << 31 < sum(size for size, _ in extents) <= length
    session.check()
    session.disc()
