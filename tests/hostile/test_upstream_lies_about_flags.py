"""Transmission flags that make no sense, contradict each other, or change their mind (U3, U5).

A client is told what the gateway can answer for, and what it is told works or fails cleanly.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import ALL_FEATURES, MIB, Link, Script
from tests.support.rawclient import Cmd, Err, Info, Opt, Rep, Request, Tf, info_data

FEATURES = {
    Cmd.FLUSH: Tf.SEND_FLUSH,
    Cmd.TRIM: Tf.SEND_TRIM,
    Cmd.CACHE: Tf.SEND_CACHE,
    Cmd.WRITE_ZEROES: Tf.SEND_WRITE_ZEROES,
}


class Exact(Script):
    """Serves what its flags say, and asserts that nothing else is asked."""

    def requested(self, link: Link, request: Request) -> None:
        flags = self.flags if self.flags & Tf.HAS_FLAGS else 0
        needed = FEATURES.get(Cmd(request.cmd), 0)
        assert flags & needed == needed, f"asked for what it has not: {request}"
        assert not request.flags or flags & Tf.SEND_FUA, f"flags of a request: {request}"
        super().requested(link, request)


def works(session: Session) -> None:
    """Every command is served or refused with EINVAL; the session stays in step."""
    flags = session.export.flags
    assert flags & Tf.HAS_FLAGS
    for cmd in Cmd:
        if cmd in (Cmd.DISC, Cmd.BLOCK_STATUS):
            continue
        error = session.ask_plainly(cmd).error
        if flags & Tf.READ_ONLY and cmd in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
            assert error in (Err.EPERM, Err.EINVAL)
        elif flags & (needed := FEATURES.get(cmd, 0)) == needed:
            assert error == 0, f"{cmd.name} was promised"
        else:
            assert error == Err.EINVAL, f"{cmd.name} was not promised"
    session.check()


ONES = [1 << bit for bit in range(1, 16)]
ODD = {
    "none": 0,
    "no_has_flags": ALL_FEATURES & ~Tf.HAS_FLAGS,
    "no_has_flags_all_others": 0xFFFE,
    "all": 0xFFFF & ~Tf.READ_ONLY,
    "fua_without_flush": Tf.HAS_FLAGS | Tf.SEND_FUA,
    "fast_zero_without_zeroes": Tf.HAS_FLAGS | Tf.SEND_FAST_ZERO,
    "read_only_and_all_writes": ALL_FEATURES | Tf.READ_ONLY,
    "unknown": Tf.HAS_FLAGS | 0xF000,
    "df": Tf.HAS_FLAGS | Tf.SEND_DF,
    **{f"only_{one:#x}": Tf.HAS_FLAGS | one for one in ONES},
}


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("flags", ODD.values(), ids=ODD.keys())
def test_what_is_told_works(lab: Lab, witness: Session, flags: int, structured: bool) -> None:
    lab.fake.script = Exact(flags=flags, structured=structured)
    session = lab.session(structured=structured)
    told = session.export.flags
    assert not told & 0xF000, "what nobody knows is not handed on"
    if flags & Tf.HAS_FLAGS:
        assert bool(told & Tf.READ_ONLY) == bool(flags & Tf.READ_ONLY)
    if told & Tf.SEND_DF:
        assert session.client.structured
    works(session)
    session.disc()


class Fickle(Script):
    """Says one thing to INFO and another to GO."""

    def __init__(self, other: dict[str, int]) -> None:
        super().__init__()
        self.other = other

    def info(self, link: Link, opt: int, data: bytes) -> bool:
        if opt == Opt.GO:
            for name, value in self.other.items():
                setattr(self, name, value)
        return super().info(link, opt, data)


CHANGES = {
    "larger": {"size": 2 * MIB},
    "smaller": {"size": 64 << 10},
    "read_only": {"flags": ALL_FEATURES | Tf.READ_ONLY},
    "fewer_features": {"flags": int(Tf.HAS_FLAGS)},
}


@pytest.mark.parametrize("other", CHANGES.values(), ids=CHANGES.keys())
def test_info_and_then_go(lab: Lab, witness: Session, other: dict[str, int]) -> None:
    """What GO says counts, for the client and for what is checked here."""
    lab.fake.script = script = Fickle(other)
    client = lab.tls()
    client.ask_structured()
    first = client.go(opt=Opt.INFO)
    assert first.size == MIB
    session = Session(client, client.go(), {})
    assert session.export.size == script.size
    assert bool(session.export.flags & Tf.READ_ONLY) == bool(script.flags & Tf.READ_ONLY)
    session.check(script.size - 512, 512)
    assert session.ask(Cmd.READ, script.size - 511, 512).error == Err.EINVAL
    works(session)
    session.disc()


class Shifty(Script):
    """Grants an export in two versions: of infos that come twice one counts."""

    def infos(self, link: Link) -> list[bytes]:
        (first,) = super().infos(link)
        second = bytearray(first)
        second[2:10] = (2 * MIB).to_bytes(8, "big")
        second[11] |= Tf.READ_ONLY
        return [first, bytes(second)]


def test_export_told_twice(lab: Lab, witness: Session) -> None:
    """One of them, whole, or none at all; never the size of one with the flags of the other."""
    lab.fake.script = Shifty()
    client = lab.tls()
    *given, last = client.ask(Opt.GO, info_data())
    if last.failed:
        return
    assert last.type == Rep.ACK
    (export,) = [reply.data for reply in given if reply.data[:2] == bytes([0, Info.EXPORT])]
    size = int.from_bytes(export[2:10], "big")
    assert (size == 2 * MIB) == bool(export[11] & Tf.READ_ONLY)
