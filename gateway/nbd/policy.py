"""Which exports a client may open, and what it is told of one that is opened for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.pairing import Granted, Terms
from gateway.nbd.upgrades import (
    NO_UPGRADES,
    Capabilities,
    Upgrade,
    offered_block_sizes,
    offered_flags,
)
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, MetaContext

NO_SUCH_EXPORT: Final = "no such export here, or it is not yours to open"

# Plain ints: an operation on an IntFlag is a dozen calls.
_HAS_FLAGS, _READ_ONLY = int(TransmissionFlag.HAS_FLAGS), int(TransmissionFlag.READ_ONLY)
_SEND_DF = int(TransmissionFlag.SEND_DF)
_BLOCK_STATUS_PAYLOAD = int(TransmissionFlag.BLOCK_STATUS_PAYLOAD)
_SEND_WRITE_ZEROES = int(TransmissionFlag.SEND_WRITE_ZEROES)
_SEND_FAST_ZERO = int(TransmissionFlag.SEND_FAST_ZERO)
_WRITE_FEATURES = int(TransmissionFlag.SEND_TRIM) | _SEND_WRITE_ZEROES | _SEND_FAST_ZERO
# What the gateway itself knows how to carry. Other features of an upstream are not advertised.
_CARRIED_FEATURES = int(
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.ROTATIONAL
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.BLOCK_STATUS_PAYLOAD
)


@dataclass(frozen=True, slots=True)
class ExportPolicy:
    """Which exports a client may open, and how. `name` None passes every name through."""

    name: str | None = ""
    read_only: bool = False
    upgrades: frozenset[Upgrade] = NO_UPGRADES

    def upstream_name(self, asked: str) -> str | None:
        """The upstream's name for what a client asked for; None if there is no such export."""
        if self.name is None:
            return asked
        return self.name if asked in ("", self.name) else None


@dataclass(frozen=True, slots=True)
class Replies:
    """How requests are answered, as far as it was negotiated."""

    structured: bool = False  # for the client; false also with extended headers
    extended: bool = False  # on both sides
    chunks_below: bool = False  # the upstream has structured replies of its own


def agree(
    policy: ExportPolicy,
    export: Granted,
    *,
    name: str,
    replies: Replies,
    contexts: tuple[MetaContext, ...] = (),
    go: bool = True,
) -> Terms:
    """What the client is told and what the upstream does, of one export that it granted.

    Without `go` it is only described, and contexts may still be selected for it.
    """
    # Sizes that were only learnt bind nobody; the payload is taken apart all the same.
    told = export.block_sizes or DEFAULT_BLOCK_SIZES
    return Terms(
        export=name,
        size=export.size,
        flags=_told_flags(policy, export.flags, replies, filters=bool(contexts) or not go),
        structured_replies=replies.structured,
        extended_headers=replies.extended,
        contexts=contexts,
        block_sizes=offered_block_sizes(told, policy.upgrades),
        upstream=Capabilities(
            export.flags,
            replies.chunks_below and not replies.extended,
            export.block_sizes or export.learnt_sizes or DEFAULT_BLOCK_SIZES,
        ),
        split=Upgrade.BLOCK_SIZE in policy.upgrades,
    )


def _told_flags(
    policy: ExportPolicy, upstream: int, replies: Replies, *, filters: bool
) -> TransmissionFlag:
    """What can be offered, less what was not negotiated or may not be used.

    With `filters` there are, or may yet be, meta contexts for a client to filter.
    """
    if policy.read_only:
        upstream |= _READ_ONLY
    flags = offered_flags(upstream, policy.upgrades) & _CARRIED_FEATURES | _HAS_FLAGS
    if not (replies.structured or replies.extended):
        flags &= ~_SEND_DF
    elif Upgrade.STRUCTURED_REPLIES in policy.upgrades:
        flags |= _SEND_DF
    if not (replies.extended and filters):
        flags &= ~_BLOCK_STATUS_PAYLOAD
    if not flags & _SEND_WRITE_ZEROES:
        flags &= ~_SEND_FAST_ZERO
    if policy.read_only:
        flags &= ~_WRITE_FEATURES
    return TransmissionFlag(flags)
