"""What the two negotiations say to each other.

The front end (`negotiation`) asks questions; the upstream's handshake (`handshake`) yields answers.
So each thing that a client negotiates is something that the upstream has agreed to.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.nbd.constants import TransmissionFlag
from gateway.nbd.upgrades import Capabilities
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, BlockSizes, ListedExport, MetaContext

_READ_ONLY = int(TransmissionFlag.READ_ONLY)  # an operation on an IntFlag is a dozen calls

# -- questions of the front end


@dataclass(frozen=True, slots=True)
class UseStructuredReplies:
    """NBD_OPT_STRUCTURED_REPLY. Answers: Acked, Refused, Unavailable."""


@dataclass(frozen=True, slots=True)
class UseExtendedHeaders:
    """NBD_OPT_EXTENDED_HEADERS. Answers: Acked, Refused, Unavailable."""


@dataclass(frozen=True, slots=True)
class ListExports:
    """NBD_OPT_LIST. Answers: Listed, Refused, Unavailable."""


@dataclass(frozen=True, slots=True)
class Open:
    """NBD_OPT_INFO, or with `go` NBD_OPT_GO or NBD_OPT_EXPORT_NAME.

    Answers: Granted, Refused, Unavailable. After Granted to `go` the upstream is in transmission.
    """

    name: str  # the upstream's name
    infos: tuple[int, ...]  # NBD_INFO_*, what the client asked for
    go: bool
    learn_sizes: bool = False  # also find out the block sizes, without a promise to obey them


@dataclass(frozen=True, slots=True)
class QueryContexts:
    """NBD_OPT_LIST_META_CONTEXT, or with `select` NBD_OPT_SET_META_CONTEXT.

    Answers: Contexts, Refused, Unavailable.
    """

    name: str  # the upstream's name
    queries: tuple[str, ...]
    select: bool


Question = UseStructuredReplies | UseExtendedHeaders | ListExports | Open | QueryContexts

# -- answers of the upstream


@dataclass(frozen=True, slots=True)
class Acked:
    """NBD_REP_ACK, and nothing more to say."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An error reply. `kind` is a NBD_REP_ERR_*; the upstream's own text is for the log only."""

    kind: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There is no upstream to ask: it cannot be reached, or it is no NBD server."""


@dataclass(frozen=True, slots=True)
class Listed:
    """NBD_REP_SERVER replies, in the upstream's order."""

    exports: tuple[ListedExport, ...]


@dataclass(frozen=True, slots=True)
class Contexts:
    """NBD_REP_META_CONTEXT replies, in the upstream's order."""

    contexts: tuple[MetaContext, ...]


@dataclass(frozen=True, slots=True)
class Granted:
    """What the upstream says of one export.

    `flags` is 0 when NBD_FLAG_HAS_FLAGS was missing; `block_sizes` is None when not advertised.
    `infos` are the remaining NBD_REP_INFO payloads, information type included. `learnt_sizes` are
    block sizes that nobody has promised to obey: see `Open.learn_sizes`.
    """

    size: int
    flags: int
    block_sizes: BlockSizes | None = None
    infos: tuple[tuple[int, bytes], ...] = ()
    learnt_sizes: BlockSizes | None = None


Answer = Acked | Refused | Unavailable | Listed | Contexts | Granted


# -- what both sides agreed on


@dataclass(frozen=True, slots=True)
class Terms:
    """Everything that the transmission phase needs to know of the haggling before it.

    `flags`, `structured_replies` and `block_sizes` are the client's view; where they promise more
    than `upstream` keeps, the gateway does the rest itself.
    """

    export: str  # the name that the client asked for
    size: int  # bytes
    flags: TransmissionFlag  # as the client was told
    structured_replies: bool = False  # false also with extended headers
    extended_headers: bool = False  # always on both sides, or on neither
    contexts: tuple[MetaContext, ...] = ()
    block_sizes: BlockSizes = DEFAULT_BLOCK_SIZES  # what the client has to obey
    upstream: Capabilities | None = None  # None: all that the client was told, and no more
    split: bool = False  # READ and WRITE beyond the upstream's maximum payload are taken apart

    @property
    def read_only(self) -> bool:
        return bool(int(self.flags) & _READ_ONLY)

    @property
    def served(self) -> Capabilities:
        """What the upstream does itself."""
        return self.upstream or Capabilities(self.flags, self.structured_replies, self.block_sizes)
