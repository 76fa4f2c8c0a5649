"""What the gateway does itself for an upstream that cannot, and what clients are told then."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gateway.nbd.constants import MAX_UNADVERTISED_PAYLOAD, TransmissionFlag
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, BlockSizes


class Upgrade(enum.StrEnum):
    """A feature that the gateway adds. The value is what `--no-upgrade` calls it."""

    WRITE_ZEROES = "write-zeroes"  # zeroes are written; FAST_ZERO fails, "MAY ... always"
    FUA = "fua"  # the command, then NBD_CMD_FLUSH
    STRUCTURED_REPLIES = "structured-replies"  # chunks and holes out of simple replies
    BLOCK_SIZE = "block-size"  # requests beyond the upstream's maximum payload are split


ALL_UPGRADES = frozenset(Upgrade)
NO_UPGRADES: frozenset[Upgrade] = frozenset()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the upstream itself does with one export, in the transmission phase."""

    flags: int  # NBD_FLAG_*, as the upstream gave them, also those that nobody knows
    structured_replies: bool = False  # false also with extended headers
    block_sizes: BlockSizes = DEFAULT_BLOCK_SIZES  # what it advertised, or the defaults


def offered_flags(upstream: int, upgrades: frozenset[Upgrade]) -> int:
    """The upstream's flags with those that `upgrades` add. proto.md, "Transmission flags".

    SEND_DF is not for this function: it depends on what was negotiated before.
    """
    flags = int(upstream)
    if flags & TransmissionFlag.READ_ONLY:
        return flags
    if Upgrade.WRITE_ZEROES in upgrades and not flags & TransmissionFlag.SEND_WRITE_ZEROES:
        # "Servers MAY set this transmission flag even if it will always use NBD_ENOTSUP failures".
        flags |= TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
    if (
        Upgrade.FUA in upgrades
        and flags & TransmissionFlag.SEND_FLUSH
        and not flags & TransmissionFlag.SEND_FUA
    ):
        flags |= TransmissionFlag.SEND_FUA
    return flags


def offered_block_sizes(upstream: BlockSizes, upgrades: frozenset[Upgrade]) -> BlockSizes:
    """The upstream's block sizes, with the payload that the gateway can take apart.

    proto.md, "Size constraints": 32 MiB is what a server should support that advertises nothing.
    """
    if Upgrade.BLOCK_SIZE not in upgrades or upstream.maximum >= MAX_UNADVERTISED_PAYLOAD:
        return upstream
    return BlockSizes(upstream.minimum, upstream.preferred, MAX_UNADVERTISED_PAYLOAD)
