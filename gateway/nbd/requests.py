"""What a client may ask: one verdict on each request, from what was negotiated."""

from __future__ import annotations

from gateway.errors import PeerError
from gateway.nbd.constants import (
    MAX_UNADVERTISED_PAYLOAD,
    UNLIMITED_PAYLOAD,
    Cmd,
    CmdFlag,
    Error,
    TransmissionFlag,
)
from gateway.nbd.pairing import Terms

CHANGES_DATA = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
ANSWERED_HERE = -1  # a verdict beside 0 (forward) and NBD_E* (refuse): success without upstream

# Plain ints: `~` of an IntFlag is the complement within its members, not of all bits.
_FUA, _NO_HOLE, _DF = int(CmdFlag.FUA), int(CmdFlag.NO_HOLE), int(CmdFlag.DF)
_REQ_ONE, _FAST_ZERO = int(CmdFlag.REQ_ONE), int(CmdFlag.FAST_ZERO)


class RequestRules:
    """The bounds of one session, for NBD_CMD_DISC apart, which is always allowed.

    A READ or WRITE is to be forwarded without a verdict if its length is at least 1 and at most
    `limits[kind]`, it ends within `size`, offset and length have no bit of `mask`, and the flags
    none of `forbidden_flags[kind]`. That is nearly every request, and so the caller looks itself.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._refuse_all = False
        self._max_payload = terms.block_sizes.maximum
        self._allowed: dict[int, int | None] = {kind: self._allowed_flags(kind) for kind in Cmd}
        self.size = terms.size
        self.mask = terms.block_sizes.minimum - 1
        self.limits = (
            UNLIMITED_PAYLOAD if terms.structured_replies else self._max_payload,
            0 if terms.read_only else self._max_payload,
        )
        # FUA on a READ needs a closer look: it is taken off.
        self.forbidden_flags = (
            ~((self._allowed[Cmd.READ] or 0) & ~_FUA),
            ~(self._allowed[Cmd.WRITE] or 0),
        )

    def refuse_all(self) -> None:
        """NBD_ESHUTDOWN is the verdict from now on."""
        self._refuse_all = True
        self.limits = (0, 0)

    def verdict(self, kind: int, flags: int, offset: int, length: int) -> int:
        """0: forward. ANSWERED_HERE: success, without the upstream. Else the NBD_E* to refuse with.

        Raises PeerError for a payload that is an attack. proto.md, "Size constraints", "Command
        flags", "Request types" and "Error values".
        """
        if kind == Cmd.WRITE and length > max(self._max_payload, MAX_UNADVERTISED_PAYLOAD):
            raise PeerError("client", f"NBD_CMD_WRITE of {length} bytes")
        if self._refuse_all:
            return Error.ESHUTDOWN
        if kind in CHANGES_DATA and self._terms.read_only:
            return Error.EPERM
        allowed = self._allowed.get(kind)
        if allowed is None or flags & ~allowed:
            return Error.EINVAL
        if kind == Cmd.FLUSH:
            return Error.EINVAL if offset or length else 0
        if offset > self.size or length > self.size - offset:
            return Error.ENOSPC if kind in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Error.EINVAL
        if length == 0:  # "unspecified", and some servers do not survive it: never forwarded
            return Error.EINVAL if kind == Cmd.BLOCK_STATUS else ANSWERED_HERE
        if (offset | length) & self.mask:
            return Error.EINVAL
        if kind in (Cmd.READ, Cmd.WRITE) and length > self.limits[kind]:
            return Error.EINVAL
        return 0

    def _allowed_flags(self, kind: Cmd) -> int | None:
        """Command flags that this command may carry; None if the command was not negotiated."""
        features = self._terms.flags
        fua = _FUA if features & TransmissionFlag.SEND_FUA else 0
        match kind:
            case Cmd.READ:
                return fua | (_DF if features & TransmissionFlag.SEND_DF else 0)
            case Cmd.WRITE:
                return fua
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
