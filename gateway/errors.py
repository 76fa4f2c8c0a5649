"""Every exception and every way in which a session can end, on one screen."""

from __future__ import annotations

import enum
from typing import Literal

Side = Literal["client", "upstream"]
"""Who is at fault. "client" is the network peer, "upstream" the plain NBD server behind us."""


class GatewayError(Exception):
    """Base of all errors that the gateway raises on purpose. `str()` is one line for a person."""


class SettingsError(GatewayError):
    """A flag, or a file that a flag names, is wrong. The command exits with code 2."""


class ListenError(GatewayError):
    """A listener cannot be opened. The command exits with code 1."""


class PeerError(GatewayError):
    """A peer broke the protocol, and closing is all that is left to do.

    proto.md, "Termination of the session during option haggling" and "Terminating the
    transmission phase": a party that detects such a violation may disconnect.
    """

    def __init__(self, side: Side, what: str) -> None:
        super().__init__(f"{side}: {what}")
        self.side: Side = side
        self.what = what


class UpstreamUnavailable(GatewayError):
    """The upstream could not be reached, or is no NBD server that we can speak to."""


class ChannelClosed(GatewayError):
    """The other end of a channel is gone without a proper end: reset, broken pipe, cut TLS."""


class TLSRefused(GatewayError):
    """The TLS handshake failed. `reason` is one word of a fixed vocabulary, for the log."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


class SessionEnd(enum.StrEnum):
    """The one reason for which a session ended. Logged once, at its close."""

    DISCONNECTED = "client disconnected"  # NBD_CMD_DISC
    ABORTED = "client aborted the negotiation"  # NBD_OPT_ABORT
    PROBE = "probe"  # connected and left without a byte
    CLIENT_LEFT = "client left without a word"  # EOF or reset where a DISC was due
    CLIENT_BROKE_PROTOCOL = "client broke the protocol"
    PLAINTEXT_CLIENT = "plaintext client"  # wanted an export without TLS
    TLS_FAILED = "TLS handshake failed"
    TIMEOUT = "handshake timeout"
    REFUSED = "export refused"  # EXPORT_NAME, which has no error reply
    UPSTREAM_LOST = "upstream lost"
    SHUTDOWN = "gateway shut down"
    BUG = "bug in the gateway"
