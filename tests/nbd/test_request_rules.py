"""Which requests are forwarded, and with which error the others are refused."""

from __future__ import annotations

import pytest

from gateway.nbd.constants import Cmd, CmdFlag, Error
from gateway.nbd.wire import BlockSizes, MetaContext
from tests.nbd.support import (
    ALL_FEATURES,
    MIB,
    WITH_LENGTH,
    WRITES,
    Req,
    Tf,
    all_cuts,
    read,
    request,
    terms,
    write,
)
from tests.nbd.walker import Walker, verdicts

CONTEXTS = (MetaContext(7, "base:allocation"),)
EVERYTHING = terms(structured=True, contexts=CONTEXTS)
READ_ONLY = terms(flags=Tf.HAS_FLAGS | Tf.READ_ONLY)
LIMITED = terms(block_sizes=BlockSizes(512, 4096, 65536))

FEATURE = {
    Cmd.FLUSH: Tf.SEND_FLUSH,
    Cmd.TRIM: Tf.SEND_TRIM,
    Cmd.CACHE: Tf.SEND_CACHE,
    Cmd.WRITE_ZEROES: Tf.SEND_WRITE_ZEROES,
}
FLAGS_OF = {  # "Command flags", FUA apart
    Cmd.READ: CmdFlag.DF,
    Cmd.WRITE_ZEROES: CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.REQ_ONE,
}


def verdict(one: Req, given: object = EVERYTHING) -> int | None:
    """The error with which a request is refused, 0 for success said here, None if forwarded.

    The request behind it is forwarded either way: the session is in step.
    """
    raw = one.pack() + read(0, 512, 77)
    results = []
    for pieces in all_cuts(raw) if len(raw) < 200 else [[raw], [raw[:30], raw[30:]]]:
        relay = Walker(given).requests(pieces)  # type: ignore[arg-type]
        assert relay.machine.client_fault is None
        *forwarded, last = relay.forwarded
        assert (last.kind, last.offset, last.length) == (Cmd.READ, 0, 512)
        answers = verdicts(relay.client)
        if answers:
            assert not forwarded
            ((cookie, error),) = answers
            assert cookie == one.cookie
            results.append(error)
        else:
            assert [same._replace(cookie=one.cookie) for same in forwarded] == [one]
            assert relay.machine.in_flight == 2
            results.append(None)
    assert len(set(results)) == 1
    return results[0]


# -- commands and flags that were not negotiated (X1)


@pytest.mark.parametrize("kind", [Cmd.RESIZE, 9, 255, 2**16 - 1])
def test_unknown_command_is_invalid(kind: int) -> None:
    assert verdict(request(kind)) == Error.EINVAL


@pytest.mark.parametrize(("kind", "feature"), FEATURE.items())
def test_command_needs_its_feature(kind: int, feature: Tf) -> None:
    """(U3)."""
    assert verdict(request(kind), terms(flags=feature)) is None
    assert verdict(request(kind), terms(flags=ALL_FEATURES & ~feature)) == Error.EINVAL


def test_block_status_needs_a_context() -> None:
    """(X8)."""
    assert verdict(request(Cmd.BLOCK_STATUS)) is None
    assert verdict(request(Cmd.BLOCK_STATUS), terms(structured=True)) == Error.EINVAL


@pytest.mark.parametrize("kind", [one for one in Cmd if one not in (Cmd.DISC, Cmd.RESIZE)])
@pytest.mark.parametrize("bit", range(1, 16))
def test_flag_is_for_the_commands_that_it_is_documented_for(kind: Cmd, bit: int) -> None:
    expected = None if FLAGS_OF.get(kind, 0) & 1 << bit else Error.EINVAL
    assert verdict(request(kind, length=8, flags=1 << bit)) == expected


@pytest.mark.parametrize(
    ("kind", "flag", "feature"),
    [
        (Cmd.READ, CmdFlag.DF, Tf.SEND_DF),
        (Cmd.WRITE_ZEROES, CmdFlag.FAST_ZERO, Tf.SEND_FAST_ZERO),
        (Cmd.WRITE, CmdFlag.FUA, Tf.SEND_FUA),
        (Cmd.READ, CmdFlag.FUA, Tf.SEND_FUA),
    ],
)
def test_flag_needs_its_feature(kind: int, flag: int, feature: Tf) -> None:
    without = terms(flags=ALL_FEATURES & ~feature)
    with_little_else = terms(flags=Tf.HAS_FLAGS | Tf.SEND_WRITE_ZEROES)
    for given in (without, with_little_else):
        for other in (0, CmdFlag.FUA, CmdFlag.DF):
            one = request(kind, length=8, flags=flag | other)
            assert verdict(one, given) == Error.EINVAL


@pytest.mark.parametrize("kind", [one for one in Cmd if one not in (Cmd.DISC, Cmd.RESIZE)])
def test_fua_is_legal_everywhere_and_reaches_the_upstream_on_what_writes(kind: Cmd) -> None:
    """(X1)."""
    one = request(kind, length=8, flags=CmdFlag.FUA | FLAGS_OF.get(kind, 0))
    for pieces in all_cuts(one.pack()):
        (forwarded,) = Walker(EVERYTHING).requests(pieces).forwarded
        assert bool(forwarded.flags & CmdFlag.FUA) is (kind in WRITES)
        assert forwarded.flags & 0xFFFE == FLAGS_OF.get(kind, 0)


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1), (512, 512)])
def test_flush_with_an_offset_or_a_length_is_invalid(offset: int, length: int) -> None:
    assert verdict(Req(Cmd.FLUSH, offset, length, 9)) == Error.EINVAL


# -- bounds (X3, X4, X5)


@pytest.mark.parametrize("kind", WITH_LENGTH)
@pytest.mark.parametrize(
    ("offset", "length"), [(MIB - 7, 8), (MIB, 1), (2**64 - 1, 1), (2**64 - 8, 8), (2**63, 8)]
)
def test_request_beyond_the_end(kind: Cmd, offset: int, length: int) -> None:
    """(X5): with numbers that would overflow 64 bits, too."""
    expected = Error.ENOSPC if kind in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Error.EINVAL
    assert verdict(request(kind, offset, length)) == expected


@pytest.mark.parametrize("kind", WITH_LENGTH)
def test_request_up_to_the_very_end_is_forwarded(kind: Cmd) -> None:
    assert verdict(request(kind, MIB - 8, 8)) is None


@pytest.mark.parametrize("kind", [Cmd.READ, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES])
def test_longest_length_there_is(kind: Cmd) -> None:
    """(X4): lengths without payload may exceed the maximum payload."""
    given = terms(1 << 33, structured=True, contexts=CONTEXTS)
    assert verdict(request(kind, 5, 2**32 - 1), given) is None


@pytest.mark.parametrize("excess", [0, 1, 65535])
def test_block_status_of_nearly_4_gib_is_asked_for_in_whole_blocks(excess: int) -> None:
    """(CVE-2025-47711): a reply may always tell less than was asked."""
    given = terms(1 << 33, structured=True, contexts=CONTEXTS)
    most = 2**32 - 65536
    for pieces in all_cuts(request(Cmd.BLOCK_STATUS, 65536, most + excess).pack()):
        (asked,) = Walker(given).requests(pieces).forwarded
        assert (asked.offset, asked.length) == (65536, most)


@pytest.mark.parametrize("kind", WITH_LENGTH)
@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 513), (256, 256)])
def test_unaligned_request_is_invalid(kind: Cmd, offset: int, length: int) -> None:
    """(X5)."""
    given = terms(structured=True, contexts=CONTEXTS, block_sizes=BlockSizes(512, 512, MIB))
    assert verdict(request(kind, offset, length), given) == Error.EINVAL
    assert verdict(request(kind, 512, 512), given) is None


def test_payload_above_the_maximum_is_invalid() -> None:
    """(X3): the write's payload is dropped."""
    for kind in (Cmd.READ, Cmd.WRITE):
        assert verdict(request(kind, 0, 65536), LIMITED) is None
        assert verdict(request(kind, 0, 65536 + 512), LIMITED) == Error.EINVAL


def test_payload_of_the_maximum_is_forwarded_whatever_its_flags() -> None:
    fua = request(Cmd.READ, 0, 65536, flags=CmdFlag.FUA)
    (forwarded,) = Walker(LIMITED).requests([fua.pack()]).forwarded
    assert (forwarded.length, forwarded.flags) == (65536, 0)
    assert verdict(fua._replace(length=65536 + 512), LIMITED) == Error.EINVAL


def test_structured_read_above_the_maximum_is_for_the_upstream_to_split() -> None:
    """(X3)."""
    given = terms(structured=True, block_sizes=BlockSizes(1, 512, 512))
    assert verdict(request(Cmd.READ, 0, 513), given) is None


@pytest.mark.parametrize("offset", [0, 1, MIB])
@pytest.mark.parametrize("kind", WITH_LENGTH)
def test_request_of_no_bytes_is_answered_here(kind: Cmd, offset: int) -> None:
    """(X5): unspecified, and some servers do not survive it."""
    expected = Error.EINVAL if kind == Cmd.BLOCK_STATUS else 0
    assert verdict(request(kind, offset, 0)) == expected
    if kind != Cmd.BLOCK_STATUS:
        assert verdict(request(kind, offset, 0), terms()) == 0


def test_size_of_zero_leaves_nothing_to_read() -> None:
    relay = Walker(terms(0)).requests([read(0, 1, 1) + write(0, b"x", 2) + read(0, 0, 3)])
    assert verdicts(relay.client) == [(1, Error.EINVAL), (2, Error.ENOSPC), (3, 0)]
    assert not relay.forwarded


# -- read-only


@pytest.mark.parametrize("kind", WRITES)
def test_read_only_export_refuses_all_that_writes(kind: Cmd) -> None:
    """(X5): also what was not negotiated."""
    assert verdict(request(kind, length=8), READ_ONLY) == Error.EPERM
    assert verdict(request(kind, offset=2**63, length=0), READ_ONLY) == Error.EPERM
