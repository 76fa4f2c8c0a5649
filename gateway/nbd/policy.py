"""Which exports a client may open, and what it is told of one that is opened for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from gateway.nbd.constants import MAX_UNADVERTISED_PAYLOAD, TransmissionFlag
from gateway.nbd.pairing import Granted, Terms
from gateway.nbd.upgrades import (
    NO_UPGRADES,
    Capabilities,
    Upgrade,
    offered_block_sizes,
    offered_flags,
)
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, BlockSizes, MetaContext

NO_SUCH_EXPORT: Final = "no such export here, or it is not yours to open"

# Plain ints: an operation on an IntFlag is a dozen calls.
_HAS_FLAGS, _READ_ONLY = int(TransmissionFlag.HAS_FLAGS), int(TransmissionFlag.READ_ONLY)
_CAN_MULTI_CONN = int(TransmissionFlag.CAN_MULTI_CONN)
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


class Export(NamedTuple):
    """One export that a client may open. The name is the upstream's, and the client's."""

    name: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class ExportPolicy:
    """Which exports a client may open, and how.

    Either one, `name`, which is also what the empty name stands for; or with `name` None any, by
    its own name; or those in `table`, which goes before `name`: each by its own name only.
    A client that may open nothing has no policy: see `negotiation.Barred`.
    """

    name: str | None = ""
    read_only: bool = False  # whatever is opened by `name`
    upgrades: frozenset[Upgrade] = NO_UPGRADES
    table: tuple[Export, ...] | None = None
    # The upstream may be replaced. Then, where something may be written, a flush on one connection
    # says nothing about another; and what is in flight is kept, so it has to have an end.
    replaceable: bool = False

    def find(self, asked: str) -> Export | None:
        """What a client means by this name; None if there is no such export, or not for it."""
        if self.table is not None:
            return next((one for one in self.table if one.name == asked), None)
        if self.name is None:
            return Export(asked, self.read_only)
        return Export(self.name, self.read_only) if asked in ("", self.name) else None

    @property
    def exports(self) -> tuple[Export, ...] | None:
        """All there are, in the order of a list; None: whatever the upstream has."""
        if self.table is not None:
            return self.table
        return None if self.name is None else (Export(self.name, self.read_only),)

    def opens(self, export: Export) -> bool:
        """Whether this very export may still be opened, with no less a right than this."""
        found = self.find(export.name)
        return (
            found is not None
            and found.name == export.name
            and (export.read_only or not found.read_only)
        )

    def covers(self, other: ExportPolicy) -> bool:
        """Whether all that may be opened by the other may be opened by this."""
        if other.exports is None:
            return self.exports is None and (other.read_only or not self.read_only)
        return all(self.opens(one) for one in other.exports)


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

    `name` is as the client asked for it. Without `go` the export is only described, and contexts
    may still be selected for it.
    """
    found = policy.find(name)
    assert found is not None, "an export that this client may not open"
    # Sizes that were only learnt bind nobody; the payload is taken apart all the same.
    told = export.block_sizes or DEFAULT_BLOCK_SIZES
    return Terms(
        export=name,
        size=export.size,
        flags=_told_flags(
            export.flags,
            policy.upgrades,
            replies,
            read_only=found.read_only,
            filters=bool(contexts) or not go,
            multi_conn=not policy.replaceable,
        ),
        structured_replies=replies.structured,
        extended_headers=replies.extended,
        contexts=contexts,
        block_sizes=_bounded(offered_block_sizes(told, policy.upgrades), policy),
        upstream=Capabilities(
            export.flags,
            replies.chunks_below and not replies.extended,
            export.block_sizes or export.learnt_sizes or DEFAULT_BLOCK_SIZES,
        ),
        split=Upgrade.BLOCK_SIZE in policy.upgrades,
    )


def _bounded(sizes: BlockSizes, policy: ExportPolicy) -> BlockSizes:
    if not policy.replaceable or sizes.maximum <= MAX_UNADVERTISED_PAYLOAD:
        return sizes
    preferred = min(sizes.preferred, MAX_UNADVERTISED_PAYLOAD)  # both are powers of 2
    return BlockSizes(sizes.minimum, preferred, MAX_UNADVERTISED_PAYLOAD)


def _told_flags(
    upstream: int,
    upgrades: frozenset[Upgrade],
    replies: Replies,
    *,
    read_only: bool,
    filters: bool,
    multi_conn: bool,
) -> TransmissionFlag:
    """What can be offered, less what was not negotiated or may not be used.

    With `filters` there are, or may yet be, meta contexts for a client to filter.
    """
    if read_only:
        upstream |= _READ_ONLY
    flags = offered_flags(upstream, upgrades) & _CARRIED_FEATURES | _HAS_FLAGS
    if not (replies.structured or replies.extended):
        flags &= ~_SEND_DF
    elif Upgrade.STRUCTURED_REPLIES in upgrades:
        flags |= _SEND_DF
    if not (replies.extended and filters):
        flags &= ~_BLOCK_STATUS_PAYLOAD
    if not flags & _SEND_WRITE_ZEROES:
        flags &= ~_SEND_FAST_ZERO
    if read_only:
        flags &= ~_WRITE_FEATURES
    if not (multi_conn or flags & _READ_ONLY):
        flags &= ~_CAN_MULTI_CONN
    return TransmissionFlag(flags)
