"""The targets, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

Target = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a target is, and how much of the time it gets beside others."""

    module: str
    function: str
    share: int
    what: str
    writes: bool = False  # its inputs are what people write, not NBD


TARGETS = {
    "plaintext": Entry("negotiation", "plaintext", 1, "greeting and haggling before TLS"),
    "haggling": Entry("haggling", "haggling", 2, "haggling inside TLS, any answers of an upstream"),
    "handshake": Entry("handshake", "handshake", 2, "the client role, any upstream"),
    "transmission": Entry("transmission", "transmission", 5, "requests and replies, any terms"),
    "oldstyle": Entry("oldstyle", "oldstyle", 1, "the oldstyle front"),
    "rules": Entry("texts", "rules", 1, "identities in rules", True),
    "config": Entry("texts", "config", 1, "the file of --config", True),
    "psk": Entry("texts", "psk", 1, "files of pre-shared keys", True),
    "addresses": Entry("texts", "addresses", 1, "addresses, networks, bounds, URIs, records", True),
    "certificates": Entry("certificates", "certificates", 1, "DER to an identity"),
    "cuts": Entry("cuts", "cuts", 2, "the same bytes whole and in pieces"),
}


def target(name: str) -> Target:
    entry = TARGETS[name]
    found: Target = getattr(import_module(f"tests.fuzz.targets.{entry.module}"), entry.function)
    return found
