"""In what a client's view through the gateway may differ from a direct one. Nothing else may.

Two kinds: upgrades, which `--no-upgrade` turns off, and what the gateway answers itself because the
upstream must not see it. Both are in the README, "What passes through"; they are written down here
a second time, from the README and not from the gateway, to say what a client has to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.interop.questions import (
    CARRIES_DATA,
    CHANGES_DATA,
    DF,
    FAST_ZERO,
    FUA,
    MIB,
    NO_HOLE,
    REQ_ONE,
    Request,
)

UPGRADES = ("write-zeroes", "fua", "structured-replies", "block-size")
PAYLOAD = 32 * MIB  # what an upstream takes that does not say how much
ZERO_BLOCK = 4096  # in which zeroes are looked for

# An upstream that does not know NBD_OPT_LIST_META_CONTEXT has none to list, which is no error.
NO_CONTEXTS = [0, []]
UNKNOWN_OPTION = ["ENOTSUP", []]

Facts = dict[str, Any]


def facts(direct: Facts, upgrades: tuple[str, ...], *, structured: bool = True) -> Facts:
    """What a client is told that would be told `direct` by the upstream.

    `structured`: whether it asks for structured replies.
    """
    told = dict(direct)
    if not direct["is read_only"]:
        if "write-zeroes" in upgrades and not direct["can zero"]:
            told |= {"can zero": True, "can fast_zero": True}
        if "fua" in upgrades and direct["can flush"] and not direct["can fua"]:
            told["can fua"] = True
    if "structured-replies" in upgrades and structured and not direct["structured"]:
        told |= {"structured": True, "can df": True}
    if "block-size" in upgrades and 0 < direct["block maximum"] < PAYLOAD:
        told["block maximum"] = PAYLOAD
    return told


@dataclass(frozen=True)
class Refusals:
    """What the gateway refuses, by what the client was told; the upstream never sees it."""

    told: Facts

    def of(self, request: Request) -> frozenset[str]:
        """The errors that the answer may be, one for each reason; none: it is passed on."""
        told, (_, command, offset, length, flags) = self.told, request
        if self.client_refuses(command):
            return frozenset()
        found = set()
        if command in CHANGES_DATA and told["is read_only"]:
            found.add("EPERM")
        if not self.negotiated(command) or flags & ~self.flags(command):
            found.add("EINVAL")
        if command == "flush":
            return frozenset(found)
        if offset + length > told["size"]:
            found.add("ENOSPC" if command in ("write", "zero") else "EINVAL")
        if command.startswith("status") and length == 0:
            found.add("EINVAL")
        if told["block minimum"] and (offset | length) % told["block minimum"] and length:
            found.add("EINVAL")
        if command in CARRIES_DATA and length > self.payload(command):
            found.add("EINVAL")
        return frozenset(found)

    def answered(self, request: Request) -> bool:
        """Whether it asks for no bytes: success, and the upstream never sees it either."""
        local = self.client_refuses(request.command)
        return request.command != "flush" and request.length == 0 and not local

    def client_refuses(self, command: str) -> bool:
        """Whether libnbd itself does, so that nothing is sent."""
        match command:
            case "status":
                return not self.told["structured"]
            case "status of one" | "status of none":
                return not self.told["extended"]
        return False

    def payload(self, command: str) -> int:
        """The longest READ or WRITE."""
        most: int = self.told["block maximum"] or PAYLOAD
        return 1 << 32 if command != "write" and self.told["structured"] else most

    def negotiated(self, command: str) -> bool:
        """Whether the command was offered."""
        match command:
            case "flush" | "trim" | "zero" | "cache":
                return bool(self.told[f"can {command}"])
            case "status" | "status of one" | "status of none":
                return bool(self.told["contexts"])
        return True

    def flags(self, command: str) -> int:
        """The flags that this command may carry. FUA is for all of them, or for none."""
        told = self.told
        allowed = FUA if told["can fua"] else 0
        match command:
            case "read" | "read chunks":
                allowed |= DF if told["can df"] else 0
            case "zero":
                allowed |= NO_HOLE | (FAST_ZERO if told["can fast_zero"] else 0)
            case "status" | "status of one" | "status of none":
                allowed |= REQ_ONE
        return allowed


def chunks_fault(request: Request, chunks: list[list[Any]], *, ours: bool) -> str:
    """What is wrong with chunks that the gateway has made of other replies; "" if nothing.

    They may come in any order, but cover all and nothing twice. `ours`: made of simple replies.
    Then whole blocks of zeroes are holes, unless DF asks for one piece; what a request takes of
    such blocks at its edges may be.
    """
    if request.flags & DF and len(chunks) != 1:
        return f"{len(chunks)} chunks in spite of DF"
    at = request.offset
    end = request.offset + request.length
    for kind, offset, length, what in sorted(chunks, key=lambda one: one[1]):
        if offset != at or not length:
            return f"a chunk at {offset} where {at} is due"
        at += length
        inside = offset in (request.offset, offset // ZERO_BLOCK * ZERO_BLOCK)
        inside &= at in (end, at // ZERO_BLOCK * ZERO_BLOCK)
        if ours and kind == "hole" and not inside:
            return f"a hole that is no whole blocks: {length} at {offset}"
        whole = -(-offset // ZERO_BLOCK) * ZERO_BLOCK + ZERO_BLOCK <= at
        if (
            ours
            and kind == "data"
            and what.endswith(" zeroes")
            and whole
            and not request.flags & DF
        ):
            return f"zeroes sent as data: {length} at {offset}"
    return "" if at == end else f"no chunk behind {at}"
