"""An upstream with features masked, a client that asks for some, and the terms between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Granted, Terms
from gateway.nbd.policy import ExportPolicy, Replies, agree
from gateway.nbd.upgrades import ALL_UPGRADES, Upgrade
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, BlockSizes, MetaContext
from tests.nbd.masked.frames import Style

Tf = TransmissionFlag
SIZE = 64 << 10
MAX_UNADVERTISED = 32 << 20
EVERYTHING = int(
    Tf.HAS_FLAGS
    | Tf.SEND_FLUSH
    | Tf.SEND_FUA
    | Tf.SEND_TRIM
    | Tf.SEND_WRITE_ZEROES
    | Tf.SEND_DF
    | Tf.SEND_CACHE
    | Tf.SEND_FAST_ZERO
    | Tf.BLOCK_STATUS_PAYLOAD
)
MASKABLE = (
    Tf.SEND_FLUSH,
    Tf.SEND_FUA,
    Tf.SEND_TRIM,
    Tf.SEND_WRITE_ZEROES,
    Tf.SEND_DF,
    Tf.SEND_CACHE,
    Tf.SEND_FAST_ZERO,
    Tf.BLOCK_STATUS_PAYLOAD,
)
CONTEXTS = (MetaContext(3, "base:allocation"), MetaContext(0, "x-a:64bit"))


@dataclass(frozen=True, slots=True)
class Mask:
    """What an upstream can do. `best` is the richest style of replies that it knows."""

    size: int = SIZE
    flags: int = EVERYTHING
    best: Style = Style.EXTENDED
    block_sizes: BlockSizes = DEFAULT_BLOCK_SIZES
    contexts: tuple[MetaContext, ...] = CONTEXTS


@dataclass(frozen=True)
class Setup:
    """One session. `wish` is the style that the client would like."""

    mask: Mask
    wish: Style = Style.EXTENDED
    upgrades: frozenset[Upgrade] = ALL_UPGRADES
    read_only: bool = False  # the gateway's own rule, not the upstream's
    asks_sizes: bool = True  # the client asks for block sizes, and has to obey them

    @property
    def below(self) -> Style:
        """How the upstream answers."""
        if self.wish is Style.EXTENDED and self.mask.best is Style.EXTENDED:
            return Style.EXTENDED
        if self.wish is Style.SIMPLE or self.mask.best is Style.SIMPLE:
            return Style.SIMPLE
        return Style.STRUCTURED

    @property
    def above(self) -> Style:
        """How the client is answered."""
        adds = Upgrade.STRUCTURED_REPLIES in self.upgrades
        if self.below is Style.SIMPLE and self.wish is not Style.SIMPLE and adds:
            return Style.STRUCTURED
        return self.below

    @property
    def flags(self) -> int:
        """What the upstream advertises, now that this was negotiated."""
        flags = self.mask.flags
        if self.below is Style.SIMPLE:
            flags &= ~Tf.SEND_DF
        if self.below is not Style.EXTENDED:
            flags &= ~Tf.BLOCK_STATUS_PAYLOAD
        return flags

    @cached_property
    def terms(self) -> Terms:
        """As the gateway derives them, out of what the upstream grants."""
        learns = Upgrade.BLOCK_SIZE in self.upgrades and not self.asks_sizes
        export = Granted(
            self.mask.size,
            self.flags,
            block_sizes=self.mask.block_sizes if self.asks_sizes else None,
            learnt_sizes=self.mask.block_sizes if learns else None,
        )
        replies = Replies(
            structured=self.above is Style.STRUCTURED,
            extended=self.above is Style.EXTENDED,
            chunks_below=self.below is Style.STRUCTURED,
        )
        contexts = () if self.below is Style.SIMPLE else self.mask.contexts
        policy = ExportPolicy("", self.read_only, self.upgrades)
        return agree(policy, export, name="", replies=replies, contexts=contexts)

    # -- what the gateway has to do itself, as the documentation of the upgrades says

    def _told_only(self, feature: Tf) -> bool:
        return bool(self.terms.flags & feature and not self.flags & feature)

    @cached_property
    def adds_zeroes(self) -> bool:
        return self._told_only(Tf.SEND_WRITE_ZEROES)

    @cached_property
    def adds_fua(self) -> bool:
        return self._told_only(Tf.SEND_FUA)

    @cached_property
    def df_is_ours(self) -> bool:
        """The upstream's chunks have to be put together. (Its simple replies are in one piece.)"""
        return self.below is not Style.SIMPLE and self._told_only(Tf.SEND_DF)

    @cached_property
    def splits(self) -> bool:
        """READ and WRITE."""
        return Upgrade.BLOCK_SIZE in self.upgrades

    @cached_property
    def max_payload(self) -> int:
        """What the upstream may be sent, or asked for in one piece."""
        known = self.asks_sizes or self.splits
        return self.mask.block_sizes.maximum if known else MAX_UNADVERTISED

    @cached_property
    def piece(self) -> int:
        """The longest READ or WRITE that the upstream may be sent, in whole blocks."""
        return self.max_payload - self.max_payload % self.minimum

    @cached_property
    def minimum(self) -> int:
        """The minimum block size, which binds whoever has asked for it."""
        return self.mask.block_sizes.minimum if self.asks_sizes or self.splits else 1
