"""What a client is told of an export, with and without upgrades."""

from __future__ import annotations

import pytest

from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Granted, Terms
from gateway.nbd.policy import ExportPolicy, Replies, agree
from gateway.nbd.upgrades import ALL_UPGRADES, NO_UPGRADES, Upgrade
from gateway.nbd.wire import BlockSizes, MetaContext
from tests.nbd.support import ALL_FEATURES, MIB, Tf

FLUSH = int(Tf.HAS_FLAGS | Tf.SEND_FLUSH)
ZEROES = Tf.SEND_WRITE_ZEROES | Tf.SEND_FAST_ZERO


def told(
    export: Granted,
    upgrades: frozenset[Upgrade] = ALL_UPGRADES,
    replies: Replies | None = None,
    *,
    read_only: bool = False,
    **more: object,
) -> Terms:
    policy = ExportPolicy("", read_only, upgrades)
    return agree(policy, export, name="", replies=replies or Replies(), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("below", "upgrade", "added"),
    [
        (FLUSH, Upgrade.WRITE_ZEROES, ZEROES),
        (FLUSH, Upgrade.FUA, Tf.SEND_FUA),
        (int(Tf.HAS_FLAGS), Upgrade.FUA, 0),
        (FLUSH | Tf.SEND_WRITE_ZEROES, Upgrade.WRITE_ZEROES, 0),
        (FLUSH | Tf.SEND_FUA, Upgrade.FUA, 0),
        (FLUSH, Upgrade.STRUCTURED_REPLIES, 0),
        (FLUSH | Tf.READ_ONLY, Upgrade.WRITE_ZEROES, 0),
        (FLUSH | Tf.READ_ONLY, Upgrade.FUA, 0),
    ],
)
def test_flags_that_an_upgrade_adds(below: int, upgrade: Upgrade, added: int) -> None:
    terms = told(Granted(MIB, below), frozenset({upgrade}))
    assert terms.flags == TransmissionFlag(below | added)
    assert terms.served.flags == below
    assert told(Granted(MIB, below), NO_UPGRADES).flags == TransmissionFlag(below)


def test_read_only_here_is_as_read_only_there() -> None:
    terms = told(Granted(MIB, FLUSH), read_only=True)
    assert terms.flags == TransmissionFlag(FLUSH | Tf.READ_ONLY)


def test_flags_of_nothing() -> None:
    """An upstream without NBD_FLAG_HAS_FLAGS."""
    assert told(Granted(MIB, 0)).flags == Tf.HAS_FLAGS | ZEROES


@pytest.mark.parametrize("below", [0, int(Tf.SEND_DF)])
def test_unfragmented_reads_need_chunks(below: int) -> None:
    export = Granted(MIB, below | Tf.HAS_FLAGS)
    assert not told(export).flags & Tf.SEND_DF
    for replies in (Replies(structured=True), Replies(extended=True)):
        assert told(export, replies=replies).flags & Tf.SEND_DF
        assert told(export, NO_UPGRADES, replies).flags & Tf.SEND_DF == below


@pytest.mark.parametrize("go", [True, False])
@pytest.mark.parametrize("contexts", [(), (MetaContext(1, "base:allocation"),)])
@pytest.mark.parametrize("extended", [True, False])
def test_filters_need_extended_headers_and_contexts(
    extended: bool, contexts: tuple[MetaContext, ...], go: bool
) -> None:
    """(EX): "MUST NOT" without the one, "SHOULD NOT" in the answer to GO without the other.

    Behind NBD_OPT_INFO contexts may still be selected.
    """
    replies = Replies(structured=not extended, extended=extended)
    for flag in (0, Tf.BLOCK_STATUS_PAYLOAD):
        export = Granted(MIB, int(ALL_FEATURES | flag))
        terms = told(export, replies=replies, contexts=contexts, go=go)
        expected = flag if extended and (contexts or not go) else 0
        assert terms.flags & Tf.BLOCK_STATUS_PAYLOAD == expected
        assert terms.served.flags == export.flags


@pytest.mark.parametrize(
    ("below", "upgrades", "expected"),
    [
        (BlockSizes(512, 4096, 65536), ALL_UPGRADES, BlockSizes(512, 4096, 32 * MIB)),
        (BlockSizes(512, 4096, 65536), NO_UPGRADES, BlockSizes(512, 4096, 65536)),
        (BlockSizes(1, 4096, 64 * MIB), ALL_UPGRADES, BlockSizes(1, 4096, 64 * MIB)),
    ],
)
def test_block_sizes(below: BlockSizes, upgrades: frozenset[Upgrade], expected: BlockSizes) -> None:
    terms = told(Granted(MIB, FLUSH, below), upgrades)
    assert terms.block_sizes == expected
    assert terms.served.block_sizes == below
    assert terms.split == bool(upgrades)


def test_learnt_sizes_bind_nobody() -> None:
    learnt = BlockSizes(4096, 4096, 65536)
    terms = told(Granted(MIB, FLUSH, learnt_sizes=learnt))
    assert terms.block_sizes == BlockSizes()
    assert terms.served.block_sizes == learnt


def test_replies_and_contexts() -> None:
    contexts = (MetaContext(1, "base:allocation"),)
    terms = agree(
        ExportPolicy("disk"),
        Granted(MIB, FLUSH),
        name="disk",
        replies=Replies(structured=True, chunks_below=True),
        contexts=contexts,
    )
    assert (terms.export, terms.contexts) == ("disk", contexts)
    assert terms.structured_replies
    assert terms.served.structured_replies
    assert not told(Granted(MIB, FLUSH), replies=Replies(structured=True)).served.structured_replies
