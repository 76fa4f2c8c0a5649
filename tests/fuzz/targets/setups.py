"""Terms of a transmission phase, out of a few bytes: what two negotiations can have agreed on."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.nbd.pairing import Granted, Terms
from gateway.nbd.policy import ExportPolicy, Replies, agree
from gateway.nbd.transmission import InFlightLimits
from gateway.nbd.upgrades import Upgrade
from gateway.nbd.wire import BlockSizes, MetaContext
from tests.fuzz.source import Source

SIZES = (1 << 20, 65536 + 1, 4096, 0, (1 << 63) - 1, 1 << 33, 1 << 26, 513)
BLOCK_SIZES = (
    None,
    BlockSizes(1, 512, 512),
    BlockSizes(512, 4096, 4096),
    BlockSizes(8, 512, 600),
    BlockSizes(512, 4096, 0xFFFFFFFF),
    BlockSizes(65536, 65536, 1 << 20),
    BlockSizes(1, 4096, 1 << 26),
    BlockSizes(1, 512, 4096),
)
CONTEXTS = (
    (),
    (MetaContext(1, "base:allocation"),),
    (MetaContext(1, "base:allocation"), MetaContext(0xFFFFFFFF, "x-a:b")),
    (MetaContext(0, "x-a:b"), MetaContext(7, "qemu:dirty-bitmap:ü"), MetaContext(8, "q:r")),
)
LIMITS = (
    InFlightLimits(),
    InFlightLimits(4, 4096),
    InFlightLimits(1, 1),
    InFlightLimits(64, 1 << 20),
)
SIMPLE, STRUCTURED, UPGRADED, EXTENDED = range(4)


@dataclass(frozen=True)
class Setup:
    terms: Terms
    limits: InFlightLimits
    resumable: bool


def read_setup(source: Source, *, plain: bool = False) -> Setup:
    """`plain`: nothing that the gateway does itself, but for chunks."""
    manner = source.u8()
    flags = source.u16()
    where, more = source.u8(), source.u8()
    style = manner & 3
    upgrades = {
        upgrade
        for bit, upgrade in enumerate((Upgrade.WRITE_ZEROES, Upgrade.FUA, Upgrade.BLOCK_SIZE))
        if manner >> 4 + bit & 1 and not plain
    }
    if style == UPGRADED:
        upgrades.add(Upgrade.STRUCTURED_REPLIES)
    resumable = bool(manner & 8) and not plain
    policy = ExportPolicy(
        "", read_only=bool(manner & 4), upgrades=frozenset(upgrades), replaceable=resumable
    )
    sizes = BLOCK_SIZES[where >> 3 & 7]
    learnt = BLOCK_SIZES[more >> 4 & 7] if Upgrade.BLOCK_SIZE in upgrades else None
    if not flags & 1:
        flags = 0  # as `Granted` has it when NBD_FLAG_HAS_FLAGS is missing
    chunks = style in (STRUCTURED, EXTENDED)
    terms = agree(
        policy,
        Granted(SIZES[where & 7], flags, sizes, learnt_sizes=None if sizes else learnt),
        name="",
        replies=Replies(
            structured=style in (STRUCTURED, UPGRADED),
            extended=style == EXTENDED,
            chunks_below=style == STRUCTURED,
        ),
        contexts=CONTEXTS[more & 3] if chunks else (),
    )
    return Setup(terms, LIMITS[more >> 2 & 3], resumable)
