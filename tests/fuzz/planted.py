"""Bugs on purpose, to see that they are found: a fuzzer that finds nothing may be blind.

To be imported once the engine has instrumented the gateway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway import identity, psk
from gateway.nbd import haggling, handshake, policy, replies, requests, wire
from gateway.nbd.in_flight import Plan
from gateway.nbd.plans import Plans
from gateway.nbd.reply_walk import ReplyWalk
from gateway.nbd.request_walk import RequestWalk
from gateway.rule import Rule


@dataclass(frozen=True, slots=True)
class Bug:
    """`make` gets what stands at `name` of `where`, and returns what is put there."""

    target: str
    where: Any
    name: str
    make: Callable[[Any], Any]


def _beyond_the_end(was: Any) -> Any:
    def verdict(self: Any, kind: int, flags: int, offset: int, length: int) -> int:
        size, self.size = self.size, 1 << 64
        try:
            return int(was(self, kind, flags, offset, length))
        finally:
            self.size = size

    return verdict


def _no_flush(was: Any) -> Any:
    def begin(self: Any, plan: Plan) -> Plan:
        plan = was(self, plan)
        plan.flush = False
        return plan

    return begin


def _read_only_is_written(was: Any) -> Any:
    def init(self: Any, terms: Any, **more: Any) -> None:
        was(self, terms, **more)
        self.limits = (self.limits[0], self.told_maximum)

    return init


def _one_byte_short(was: Any) -> Any:
    def drop(self: Any, at: int, end: int, length: int, reply: bytes) -> int:
        return int(was(self, at, end, max(length - 1, 0), reply))

    return drop


def _nothing(_: Any) -> Any:
    return lambda *args: None


def _answered_too_early(_: Any) -> Any:
    return lambda self, cookie: self._in_flight.requests[cookie]


def _wrong_table(was: Any) -> Any:
    return lambda self, asked: was(self, asked) or policy.Export(asked)


def _case_does_not_count(was: Any) -> Any:
    return lambda self, identity: was(self, identity) or self.kind == "cn"


BUGS = {
    # A request beyond the end of the export is passed on.
    "bounds": Bug("transmission", requests.RequestRules, "verdict", _beyond_the_end),
    # A READ that the upstream has not told in full is a success.
    "short read": Bug("transmission", replies.ChunkedReply, "finish", _nothing),
    # Data is taken for whatever place the upstream says.
    "offsets": Bug("transmission", replies.ChunkedReply, "content", _nothing),
    # FUA is said to have been done without the flush.
    "flush": Bug("transmission", Plans, "_begin", _no_flush),
    # A reply to nothing is a KeyError, and one to half a write is passed on.
    "early": Bug("transmission", ReplyWalk, "_request", _answered_too_early),
    # Read-only is a matter of what is told, not of what is done.
    "read-only": Bug("transmission", requests.RequestRules, "__init__", _read_only_is_written),
    # A payload that is thrown away is counted one short.
    "payload": Bug("transmission", RequestWalk, "_drop", _one_byte_short),
    # Replies of our own are never sent.
    "locals": Bug("transmission", RequestWalk, "take_local_replies", lambda _: lambda self: b""),
    # Bytes behind STARTTLS are left where they are.
    "plaintext": Bug("plaintext", wire.Inbox, "__len__", lambda _: lambda self: 0),
    # An upstream's export may be of any size.
    "size": Bug("handshake", handshake, "check_size", _nothing),
    # An export that is in no table is opened.
    "table": Bug("haggling", policy.ExportPolicy, "find", _wrong_table),
    # What the client is told of an export is not what the upstream has granted.
    "told": Bug("haggling", haggling, "pack_info_export", lambda was: lambda s, f: was(s + 1, f)),
    # Who is allowed is more than who is denied.
    "wider": Bug("rules", Rule, "matches", _case_does_not_count),
    # A message shows the key.
    "secret": Bug("psk", psk, "_parse_key", lambda _: lambda key: _raise(key.decode("latin-1"))),
    # A certificate that cannot be read is an exception of another library.
    "exception": Bug("certificates", identity, "_UNREADABLE", lambda _: ()),
}


def _raise(text: str) -> Any:
    raise ValueError(text)


def plant(name: str, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put a bug in its place; with nothing for a name, none."""
    if name:
        bug = BUGS[name]
        put(bug.where, bug.name, bug.make(getattr(bug.where, bug.name)))
