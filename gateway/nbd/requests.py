"""What a client may ask: one verdict on each request, from what was negotiated."""

from __future__ import annotations

from gateway.errors import PeerError
from gateway.nbd.constants import (
    MAX_UNADVERTISED_PAYLOAD,
    Cmd,
    CmdFlag,
    Error,
    TransmissionFlag,
)
from gateway.nbd.pairing import Terms

CHANGES_DATA = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
# Verdicts beside 0 (forward) and NBD_E* (refuse):
ANSWERED_HERE = -1  # success, without the upstream
PLANNED = -2  # the upstream cannot do it in one go: see `plans`

# Plain ints: `~` of an IntFlag is the complement within its members, not of all bits.
_FUA, _NO_HOLE, _DF = int(CmdFlag.FUA), int(CmdFlag.NO_HOLE), int(CmdFlag.DF)
_REQ_ONE, _FAST_ZERO = int(CmdFlag.REQ_ONE), int(CmdFlag.FAST_ZERO)
_PAYLOAD_LEN = int(CmdFlag.PAYLOAD_LEN)
_READ, _WRITE = int(Cmd.READ), int(Cmd.WRITE)
_ANY_LENGTH = (1 << 64) - 1


class RequestRules:
    """The bounds of one session, for NBD_CMD_DISC apart, which is always allowed.

    A READ or WRITE is to be forwarded without a verdict if its length is at least 1 and at most
    `limits[kind]`, it ends within `size`, offset and length have no bit of `mask`, and of the
    flags in `checked_flags[kind]` it has exactly `needed_flags[kind]`. That is nearly every
    request, and so the caller looks itself.
    """

    def __init__(self, terms: Terms, *, resumable: bool = False) -> None:
        """With `resumable` no READ or WRITE is of more than MAX_UNADVERTISED_PAYLOAD below."""
        served = terms.served
        self._terms = terms
        self._refuse_all = False
        self._owes_error = False
        self._max_payload = self.told_maximum = terms.block_sizes.maximum
        self._allowed: dict[int, int | None] = {kind: self._allowed_flags(kind) for kind in Cmd}
        # Where the client was told more than the upstream keeps:
        self.adds_fua = _told_only(terms, TransmissionFlag.SEND_FUA)
        self.adds_zeroes = _told_only(terms, TransmissionFlag.SEND_WRITE_ZEROES)
        chunks_above = terms.structured_replies or terms.extended_headers
        chunks_below = served.structured_replies or terms.extended_headers
        df_below = chunks_below and served.flags & TransmissionFlag.SEND_DF
        self.drops_df = chunks_above and not df_below
        self._adds_df = chunks_below and self.drops_df  # else the gateway makes the chunks
        # The longest READ or WRITE that the upstream takes, whole blocks of its own.
        most = served.block_sizes.maximum
        unsplit = _ANY_LENGTH
        if resumable:
            most = min(most, MAX_UNADVERTISED_PAYLOAD)
            unsplit = MAX_UNADVERTISED_PAYLOAD & -served.block_sizes.minimum
        self.piece = max(most & -served.block_sizes.minimum, 1)
        self.zero_piece = min(self.piece, MAX_UNADVERTISED_PAYLOAD)
        whole = self.piece if terms.split else unsplit
        # In chunks, a server may answer any read; one that has to be split is in chunks above.
        chunks = chunks_below or (chunks_above and terms.split)
        self._max_read = _ANY_LENGTH if chunks else self._max_payload
        # A read that must come in one chunk, but not from the upstream, is held in memory.
        self._max_held = min(self._max_payload, MAX_UNADVERTISED_PAYLOAD)
        self.whole = whole
        self.chunks_above = chunks_above
        self.extended = terms.extended_headers
        self.filters_contexts = bool(
            terms.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD and terms.extended_headers
        )
        self.context_ids = frozenset(one.id for one in terms.contexts)
        self.base_ids = frozenset(one.id for one in terms.contexts if one.name.startswith("base:"))

        self.size = terms.size
        self.mask = terms.block_sizes.minimum - 1
        self.limits = (
            min(self._max_read, whole),
            0 if terms.read_only else min(self._max_payload, whole),
        )
        # FUA on a READ needs a closer look: it is taken off.
        read = (self._allowed[Cmd.READ] or 0) & ~_FUA & ~(_DF if self.drops_df else 0)
        write = (self._allowed[Cmd.WRITE] or 0) & ~(_FUA if self.adds_fua else 0)
        needed = _PAYLOAD_LEN if self.extended else 0
        self._checked_writes = ~write | needed
        self.checked_flags = (~read, self._checked_writes)
        self.needed_flags = (0, needed)

    def refuse_all(self) -> None:
        """NBD_ESHUTDOWN is the verdict from now on."""
        self._refuse_all = True
        self.limits = (0, 0)

    def owe_error(self) -> None:
        """NBD_EIO is the verdict on the next request that asks for durability, and on that only."""
        self._owes_error = True
        self._check_fua(self.checked_flags[_WRITE] | _FUA)

    def _check_fua(self, checked: int) -> None:
        self.checked_flags = (self.checked_flags[_READ], checked)

    def _takes_error(self, kind: int, flags: int) -> bool:
        """Whether this is the request that fails in place of writes that are lost."""
        if not (
            self._owes_error and (kind == Cmd.FLUSH or (kind in CHANGES_DATA and flags & _FUA))
        ):
            return False
        self._owes_error = False
        self._check_fua(self._checked_writes)
        return True

    def payload(self, kind: int, flags: int, length: int) -> int:
        """How many bytes follow this header. Raises PeerError for a payload that is an attack.

        With extended headers NBD_CMD_FLAG_PAYLOAD_LEN says so, on any command.
        """
        if not (flags & _PAYLOAD_LEN if self.extended else kind == _WRITE):
            return 0
        if length > max(self._max_payload, MAX_UNADVERTISED_PAYLOAD):
            raise PeerError("client", f"a payload of {length} bytes for command {kind}")
        return length

    def verdict(self, kind: int, flags: int, offset: int, length: int) -> int:
        """0: forward. ANSWERED_HERE, PLANNED. Else the NBD_E* to refuse with.

        `length` is the effect length. proto.md, "Size constraints", "Command flags", "Request
        types" and "Error values".
        """
        if self._refuse_all:
            return Error.ESHUTDOWN
        if kind in CHANGES_DATA and self._terms.read_only:
            return Error.EPERM
        allowed = self._allowed.get(kind)
        if allowed is None or flags & ~allowed:
            return Error.EINVAL
        if kind == Cmd.FLUSH:
            if offset or length:
                return Error.EINVAL
            return Error.EIO if self._takes_error(kind, flags) else 0
        if offset > self.size or length > self.size - offset:
            return Error.ENOSPC if kind in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Error.EINVAL
        if length == 0:  # "unspecified", and some servers do not survive it: never forwarded
            return Error.EINVAL if kind == Cmd.BLOCK_STATUS else ANSWERED_HERE
        if (offset | length) & self.mask:
            return Error.EINVAL
        if kind == _READ:
            return self._read_verdict(flags, length)
        if kind == _WRITE and length > self._max_payload:
            return Error.EINVAL
        if self._takes_error(kind, flags):
            return Error.EIO
        if kind == Cmd.WRITE_ZEROES and self.adds_zeroes:
            return Error.ENOTSUP if flags & _FAST_ZERO else PLANNED
        if kind in CHANGES_DATA and flags & _FUA and self.adds_fua:
            return PLANNED
        return PLANNED if kind == _WRITE and length > self.whole else 0

    def _read_verdict(self, flags: int, length: int) -> int:
        if length > self._max_read:
            return Error.EINVAL
        adds_df = bool(self._adds_df and flags & _DF)
        if not adds_df and length <= self.whole:
            return 0
        # "The server MAY reply with NBD_EOVERFLOW if the read is too large" for one chunk.
        return Error.EOVERFLOW if flags & _DF and length > self._max_held else PLANNED

    def _allowed_flags(self, kind: Cmd) -> int | None:
        """Command flags that this command may carry; None if the command was not negotiated."""
        features = self._terms.flags
        fua = _FUA if features & TransmissionFlag.SEND_FUA else 0
        match kind:
            case Cmd.READ:
                return fua | (_DF if features & TransmissionFlag.SEND_DF else 0)
            case Cmd.WRITE:
                return fua | (_PAYLOAD_LEN if self._terms.extended_headers else 0)
            case Cmd.FLUSH if features & TransmissionFlag.SEND_FLUSH:
                return fua
            case Cmd.TRIM if features & TransmissionFlag.SEND_TRIM:
                return fua
            case Cmd.CACHE if features & TransmissionFlag.SEND_CACHE:
                return fua
            case Cmd.WRITE_ZEROES if features & TransmissionFlag.SEND_WRITE_ZEROES:
                fast = _FAST_ZERO if features & TransmissionFlag.SEND_FAST_ZERO else 0
                return fua | _NO_HOLE | fast
            case Cmd.BLOCK_STATUS if self._terms.contexts:
                return fua | _REQ_ONE
            case _:
                return None


def _told_only(terms: Terms, feature: TransmissionFlag) -> bool:
    """Whether the client was told of something that the upstream does not do."""
    return bool(terms.flags & feature and not terms.served.flags & feature)
