"""The server role for a client that knows only the oldstyle handshake: all is said at once.

proto.md, "Oldstyle negotiation". One export, no TLS, no options, and no way to say "no".
"""

from __future__ import annotations

from gateway.errors import SessionEnd
from gateway.nbd.constants import CLISERV_MAGIC, NBD_MAGIC
from gateway.nbd.negotiation import Ask, Close, Effect, EnterTransmission, Send
from gateway.nbd.pairing import Answer, Granted, Open, Unavailable
from gateway.nbd.policy import ExportPolicy, Replies, agree
from gateway.nbd.upgrades import Upgrade
from gateway.nbd.wire import GREETING, OLDSTYLE_REST


class OldstyleHaggling:
    """Asks one question, and then greets, or closes."""

    def __init__(self, policy: ExportPolicy) -> None:
        assert policy.name is not None, "an oldstyle client cannot name an export"
        assert policy.table is None, "an oldstyle client cannot name an export"
        self._policy = policy
        self._name = policy.name
        self._shutdown = False
        self.refused = ""  # why there was no greeting: for the log

    def begin(self) -> list[Effect]:
        """What to do when the client has connected. It says nothing first."""
        if self._shutdown:
            return [Close(SessionEnd.SHUTDOWN)]
        learn = Upgrade.BLOCK_SIZE in self._policy.upgrades
        return [Ask(Open(self._name, (), go=True, learn_sizes=learn))]

    def answer(self, answer: Answer) -> list[Effect]:
        """Take the upstream's answer."""
        if self._shutdown:
            return [Close(SessionEnd.SHUTDOWN)]
        if not isinstance(answer, Granted):
            absent = isinstance(answer, Unavailable)
            why = "the NBD server behind cannot be reached" if absent else "the NBD server refuses"
            self.refused = f"export {self._name[:80]!r}: {why}"
            return [Close(SessionEnd.REFUSED)]
        terms = agree(self._policy, answer, name=self._name, replies=Replies())
        greeting = GREETING.pack(NBD_MAGIC, CLISERV_MAGIC)
        return [
            Send(greeting + OLDSTYLE_REST.pack(terms.size, terms.flags)),
            EnterTransmission(terms),
        ]

    def shutdown(self) -> None:
        """From now on there is no greeting any more."""
        self._shutdown = True

    def rest(self) -> bytes:
        """Nothing is read from the client before its transmission phase."""
        return b""
