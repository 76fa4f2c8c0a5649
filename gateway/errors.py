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


class Stalled(ChannelClosed):
    """The other end of a channel has taken no bytes for too long."""


class Refusal(enum.StrEnum):
    """Why a client did not get in: a fixed vocabulary, for logs, and to be counted."""

    # of its address
    ADDRESS_NOT_ALLOWED = "address_not_allowed"
    HANDSHAKE_RATE = "handshake_rate"  # more new clients a second than one address may be
    # of how many are here already, of its address or of its identity
    TOO_MANY_CLIENTS = "too_many_clients"
    # before TLS
    PROBE = "probe"  # connected and left without a byte
    PLAINTEXT_CLIENT = "plaintext_client"  # asked for something without TLS
    EOF_BEFORE_HELLO = "eof_before_hello"  # said STARTTLS and left
    # in the handshake
    NOT_TLS = "not_tls"
    TLS_VERSION = "tls_version"
    NO_SHARED_CIPHER = "no_shared_cipher"
    EOF = "eof"  # left in the middle of it
    TIMEOUT = "timeout"
    CLIENT_REJECTED_US = "client_rejected_us"  # our certificate is not to its liking
    CLIENT_ALERT = "client_alert"
    RESUMED = "resumed"  # a session of before, whose certificate would not be looked at again
    TLS_ERROR = "tls_error"
    # of its certificate or key
    NO_CLIENT_CERT = "no_client_cert"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    REVOKED = "revoked"
    UNKNOWN_CA = "unknown_ca"
    WRONG_EKU = "wrong_eku"
    WEAK_KEY = "weak_key"
    BAD_CERTIFICATE = "bad_certificate"
    NO_PSK = "no_psk"  # it did not use a pre-shared key
    UNKNOWN_PSK = "unknown_psk"  # a name that is not in the file, or another key than there
    # of the CRL here, and so of nobody in particular
    NO_CRL = "no_crl"
    CRL_EXPIRED = "crl_expired"
    CRL_NOT_YET_VALID = "crl_not_yet_valid"
    # of the rules
    NOT_ALLOWED = "not_allowed"


class TLSRefused(GatewayError):
    """The TLS handshake failed. `reason` for machines, the text for people."""

    def __init__(self, reason: Refusal, what: str) -> None:
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
    NOT_ALLOWED = "client not allowed"  # by the rules
    EXPELLED = "client no longer allowed"  # after a reload
    IDLE = "idle for too long"
    UPSTREAM_LOST = "upstream lost"
    SHUTDOWN = "gateway shut down"
    BUG = "bug in the gateway"
