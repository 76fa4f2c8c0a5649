"""Who may enter, and open what: rules about identities and addresses. Deny wins, always."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.errors import SettingsError
from gateway.identity import Identity
from gateway.rule import KINDS, Rule

__all__ = ["KINDS", "ExportRules", "Grant", "Mode", "Network", "Rule", "Rules", "parse_network"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Mode(enum.StrEnum):
    """What may be done with an export."""

    READ_ONLY = "read-only"
    READ_WRITE = "read-write"


@dataclass(frozen=True, slots=True)
class ExportRules:
    """Who may open one export. Who is in both lists may write."""

    name: str
    read_write: tuple[Rule, ...] = ()
    read_only: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()

    def mode(self, identity: Identity) -> Mode | None:
        """What this client may do with it; None: it does not exist for this client."""
        if any(rule.denies(identity) for rule in self.deny):
            return None
        if _any(self.read_write, identity):
            return Mode.READ_WRITE
        return Mode.READ_ONLY if _any(self.read_only, identity) else None


@dataclass(frozen=True, slots=True)
class Grant:
    """What one client may do. `exports` None: there are no tables of exports, all are alike."""

    may_enter: bool
    exports: tuple[tuple[str, Mode], ...] | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules together. With none, whoever TLS lets in may enter."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    allow_from: tuple[Network, ...] = ()
    deny_from: tuple[Network, ...] = ()
    exports: tuple[ExportRules, ...] = ()

    def admits(self, address: str) -> bool:
        """Whether a client of this IP address is listened to at all. Raises ValueError for text
        that is no address."""
        ip: ipaddress.IPv4Address | ipaddress.IPv6Address
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped  # how a socket for both families shows an IPv4 client
        if any(ip in network for network in self.deny_from):
            return False
        return not self.allow_from or any(ip in network for network in self.allow_from)

    def grant(self, identity: Identity) -> Grant:
        """What this client may do. With tables of exports, to open none is not to enter."""
        denied = any(rule.denies(identity) for rule in self.deny)
        if denied or (self.allow and not _any(self.allow, identity)):
            return Grant(False, () if self.exports else None)
        if not self.exports:
            return Grant(True)
        modes = ((export.name, export.mode(identity)) for export in self.exports)
        opened = tuple((name, mode) for name, mode in modes if mode is not None)
        return Grant(bool(opened), opened)


def parse_network(flag: str, text: str) -> Network:
    """An address or a network in CIDR form. Raises SettingsError that begins with `flag`."""
    try:
        if "%" in text:
            raise ValueError("no zone (%...) in it: addresses are compared without")
        network = ipaddress.ip_network(text)
    except ValueError as wrong:
        if (meant := _meant(text)) is not None:
            raise SettingsError(
                f"{flag} {text}: it has host bits set: the network is {meant.network}, the one "
                f"address {meant.ip}; write which is meant"
            ) from None
        raise SettingsError(f"{flag} {text}: {wrong}; write 192.0.2.0/24 or 2001:db8::1") from None
    mapped = isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped
    if mapped and network.prefixlen >= 96:  # IPv4 clients are looked for under their own addresses
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def _meant(text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface | None:
    """An address of a network, written with the length of that network's prefix."""
    try:
        return None if "%" in text else ipaddress.ip_interface(text)
    except ValueError:
        return None


def _any(rules: Iterable[Rule], identity: Identity) -> bool:
    return any(rule.matches(identity) for rule in rules)
