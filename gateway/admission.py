"""What one client may do: who it is, what the rules give it, and what it has opened of that."""

from __future__ import annotations

import socket
import struct
from typing import Final

from gateway.access import Mode, Rules
from gateway.errors import Refusal
from gateway.identity import Identity
from gateway.nbd.policy import Export, ExportPolicy
from gateway.settings import Settings
from gateway.trust import Trust

_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: process, user, group
_SHOWN: Final = 80  # characters of an export's name in a log line


class Admission:
    """One client's rights. Before `admit` it has none, and nothing to lose."""

    __slots__ = ("_settings", "identity", "opened", "policy", "refusal")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.identity = Identity()
        self.policy: ExportPolicy | None = None  # what may be opened, until something is
        self.opened: Export | None = None  # in transmission, as the client was told
        self.refusal = Refusal.NOT_ALLOWED  # the word for who may open nothing

    def admit(self, identity: Identity, rules: Rules) -> ExportPolicy | None:
        """What this client may open; None: nothing, for the reason in `barred`."""
        self.identity = identity
        self.policy = policy_of(rules, identity, self._settings)
        return self.policy

    def crowded(self) -> None:
        """It may open nothing after all: too many of the same identity are here."""
        self.policy, self.refusal = None, Refusal.TOO_MANY_CLIENTS

    def open(self, name: str, *, read_only: bool) -> None:
        """It has opened the export that it calls by this name; nothing else is to come."""
        assert self.policy is not None
        found = self.policy.find(name)
        assert found is not None
        self.opened, self.policy = found._replace(read_only=read_only), None

    @property
    def barred(self) -> str:
        """For a client that may open nothing, and for the log."""
        if self.refusal is Refusal.TOO_MANY_CLIENTS:
            most = self._settings.limits.clients_per_identity
            return f"too many connections of {self.identity}: {most} at a time are allowed"
        return f"{self.identity} may not open anything here"

    def objection(self, trust: Trust) -> str:
        """Why this client could not do by this set what it may do now; empty: it could.

        For the log: a `Refusal`, and words.
        """
        if self.policy is None and self.opened is None:
            return ""
        who, opened = self.identity, self.opened
        reason = trust.objection(who)
        if reason not in (None, Refusal.NOT_ALLOWED):
            return f"{reason}: {who}"
        policy = policy_of(trust.rules, who, self._settings)
        if policy is None or reason is not None:
            return f"{Refusal.NOT_ALLOWED}: {self.barred}"
        if opened is not None and not policy.opens(opened):
            do = "write to" if policy.opens(opened._replace(read_only=True)) else "open"
            return f"{Refusal.NOT_ALLOWED}: {who} may not {do} export {opened.name[:_SHOWN]!r}"
        if self.policy is not None and not policy.covers(self.policy):
            return f"{Refusal.NOT_ALLOWED}: {who} may open less than before"
        return ""


def policy_of(rules: Rules, identity: Identity, settings: Settings) -> ExportPolicy | None:
    """What a client may open; None: nothing."""
    grant = rules.grant(identity)
    if not grant.may_enter:
        return None
    # With `--reconnect` writes of one connection may be lost, and only its own flushes know of it.
    replaceable = bool(settings.reconnect_s)
    if grant.exports is None:
        return ExportPolicy(
            settings.export, settings.read_only, settings.upgrades, replaceable=replaceable
        )
    table = tuple(
        Export(name, settings.read_only or mode is Mode.READ_ONLY) for name, mode in grant.exports
    )
    if len(rules.exports) == 1:  # then the empty name is this one too
        ((name, read_only),) = table
        return ExportPolicy(name, read_only, settings.upgrades, replaceable=replaceable)
    return ExportPolicy(upgrades=settings.upgrades, table=table, replaceable=replaceable)


def proven_by_kernel(sock: socket.socket, identity: Identity) -> Identity:
    """With the user and group of who connected, as they were then, if this is a Unix socket."""
    if sock.family != socket.AF_UNIX:
        return identity
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, gid = _CREDENTIALS.unpack(raw)
    return identity.with_unix(uid, gid)
