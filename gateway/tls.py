"""TLS policy: an SSLContext of checked files, and what went wrong in a handshake in words."""

from __future__ import annotations

import _ssl
import socket
import ssl
import sys
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from gateway import credentials, psk
from gateway.credentials import Clients, Own
from gateway.errors import Refusal, SettingsError, TLSRefused
from gateway.identity import Identity
from gateway.settings import TLSSettings
from gateway.snapshot import Snapshot, as_path

# TLS 1.2 with forward secrecy and AEAD only; TLS 1.3 has nothing else to begin with.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_SECURITY_LEVEL: Final = 2  # OpenSSL's: 112 bits, and no SHA-1. Debian's default, not everybody's
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

LEFT: Final = "it left in the middle of the handshake; does it know the CA of our certificate?"

# X509_V_ERR_* of OpenSSL's x509_vfy.h to (reason, words about the client's certificate).
_OTHER_CA: Final = (Refusal.UNKNOWN_CA, "its certificate is of another CA")
_NO_CA: Final = (Refusal.BAD_CERTIFICATE, "its certificate was issued by one that is no CA's")
_EXTENSION: Final = (Refusal.BAD_CERTIFICATE, "an extension in its certificate is wrong")
_NAMES: Final = (Refusal.BAD_CERTIFICATE, "its CA may not issue for the names in its certificate")
_DATES: Final = (Refusal.BAD_CERTIFICATE, "the dates in its certificate cannot be read")
_FORGED: Final = (Refusal.BAD_CERTIFICATE, "a signature in its chain of certificates is wrong")
_BAD_CRL: Final = (
    Refusal.NO_CRL,
    "the CRL of its CA here cannot be used for it, so it cannot enter: renew the CRL",
)
_VERIFY: Final = {
    2: _OTHER_CA,
    3: (Refusal.NO_CRL, "there is no CRL of its CA here, so it cannot enter: append it to --crl"),
    **dict.fromkeys((4, 6, 7), _FORGED),
    **dict.fromkeys((5, 8, 15, 16, 33, 35, 36, 44, 54), _BAD_CRL),
    9: (Refusal.NOT_YET_VALID, "its certificate is not yet valid"),
    10: (Refusal.EXPIRED, "its certificate has expired"),
    11: (Refusal.CRL_NOT_YET_VALID, "the CRL here is not yet valid, so nobody can enter"),
    12: (Refusal.CRL_EXPIRED, "the CRL here has expired, so nobody can enter: renew it"),
    **dict.fromkeys((13, 14), _DATES),
    18: (Refusal.UNKNOWN_CA, "its certificate is self-signed"),
    **dict.fromkeys((19, 20, 21, 27), _OTHER_CA),
    22: (Refusal.BAD_CERTIFICATE, "its chain of certificates is too long"),
    23: (Refusal.REVOKED, "its certificate is revoked"),
    **dict.fromkeys((24, 32, 37, 79, 82), _NO_CA),
    25: (Refusal.BAD_CERTIFICATE, "there are more CAs above its certificate than its root allows"),
    26: (
        Refusal.WRONG_EKU,
        "its certificate is not for TLS clients (extended key usage), or its CA's for no CA",
    ),
    28: (Refusal.BAD_CERTIFICATE, "its certificate is rejected"),
    34: (Refusal.BAD_CERTIFICATE, "its certificate has a critical extension nobody here knows"),
    39: (Refusal.WRONG_EKU, "its certificate is not for signatures (key usage)"),
    40: (Refusal.BAD_CERTIFICATE, "it came with a proxy certificate"),
    **dict.fromkeys((41, 42, 43, 45, 46), _EXTENSION),
    **dict.fromkeys((47, 48, 49, 51, 52, 53), _NAMES),
    66: (Refusal.WEAK_KEY, "the key of its certificate is too weak"),
    67: (Refusal.WEAK_KEY, "the key of its CA is too weak"),
    68: (Refusal.WEAK_KEY, "its certificate is signed with a weak hash, as SHA-1"),
    **dict.fromkeys((76, 77, 78), _FORGED),
    94: (Refusal.WEAK_KEY, "the key of its certificate is on a curve of its own"),
}

# OpenSSL's reasons to (reason, words).
_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (Refusal.NO_CLIENT_CERT, "it has no client certificate"),
    "EXCESSIVE_MESSAGE_SIZE": (Refusal.BAD_CERTIFICATE, "its chain of certificates is too large"),
    "WRONG_CURVE": (Refusal.WEAK_KEY, "the key of its certificate is on a curve not taken here"),
    "UNSUPPORTED_PROTOCOL": (Refusal.TLS_VERSION, "its TLS version is too old"),
    "TLSV1_ALERT_PROTOCOL_VERSION": (Refusal.TLS_VERSION, "it does not accept our TLS version"),
    "NO_SHARED_CIPHER": (Refusal.NO_SHARED_CIPHER, "it has no cipher suite in common with us"),
    "WRONG_VERSION_NUMBER": (Refusal.NOT_TLS, "it sent something that is not TLS"),
    "HTTP_REQUEST": (Refusal.NOT_TLS, "it sent something that is not TLS"),
    "TLSV1_ALERT_UNKNOWN_CA": (
        Refusal.CLIENT_REJECTED_US,
        "the client does not know the CA of our certificate: give it our ca-cert.pem",
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        Refusal.CLIENT_REJECTED_US,
        "the client rejected our certificate: does it name the host that the client asked for?",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        Refusal.CLIENT_REJECTED_US,
        "the client says that our certificate has expired",
    ),
    "UNEXPECTED_EOF_WHILE_READING": (Refusal.EOF, LEFT),
}


def server_context(settings: TLSSettings) -> ssl.SSLContext:
    """The context for all clients, of what is in the files now. Raises SettingsError."""
    files = Snapshot.take(settings)
    own, clients = credentials.own(files), credentials.clients(files, datetime.now(UTC))
    return context_of(own, clients, settings.minimum)


def context_of(own: Own, clients: Clients | None, minimum: str) -> ssl.SSLContext:
    """The context for all clients; without `clients` they are not asked for a certificate.

    Not `ssl.create_default_context`: that one obeys SSLKEYLOGFILE and would write session keys.
    proto.md, "TLS versions": 1.2 is a MUST, and nbd-client speaks nothing newer by default.
    Raises SettingsError for what OpenSSL does not take.
    """
    check_interpreter()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[minimum]
    level = max(_SECURITY_LEVEL, context.security_level)  # more is the system's to ask for
    context.set_ciphers(f"{_CIPHERS}:@SECLEVEL={level}")
    # No tickets (for sessions by id see `identity`): a session would outlive a change of CRL or
    # rules. No renegotiation.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # Some builds of Python set it: a connection that is cut would pass for one that is closed.
    context.options &= ~int(getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0))
    try:
        with as_path(own.chain_pem) as chain, as_path(own.key_pem) as key:
            # It has none, and if OpenSSL thought otherwise, a prompt would hang a service.
            context.load_cert_chain(chain, key, password=_no_password)
    except ssl.SSLError as error:
        raise SettingsError(
            f"--cert, --key: OpenSSL does not take them: {error.reason or error}"
        ) from None
    if clients is None:
        context.verify_mode = ssl.CERT_NONE
        return context
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(
            cadata=b"".join(one.public_bytes(Encoding.DER) for one in clients.cas)
        )
        if clients.crls:
            with as_path(b"".join(one.pem for one in clients.crls)) as crls:
                context.load_verify_locations(crls)
    except ssl.SSLError as error:
        raise SettingsError(
            f"--client-ca, --crl: OpenSSL does not take them: {error.reason or error}"
        ) from None
    if clients.crls:
        # Of the whole chain: else who has a revoked CA's key goes on making clients.
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN
    return context


def identity(sock: ssl.SSLSocket) -> Identity | None:
    """Who is at the other end of a finished handshake; None without a client certificate.

    Raises TLSRefused if the certificate passed OpenSSL and yet cannot be parsed or has a weak key,
    and for a TLS 1.2 session that is resumed by its id, which `ssl` has no way to switch off:
    chain, dates and CRL would not be looked at again.
    """
    if sock.session_reused:
        raise TLSRefused(Refusal.RESUMED, "it resumed a TLS session; it has to shake hands in full")
    der = sock.getpeercert(binary_form=True)
    if der is None:
        return None
    chain = verified_chain(sock)
    if not chain or chain[0] != der:
        raise TLSRefused(Refusal.BAD_CERTIFICATE, "no chain of certificates was verified for it")
    try:
        who = Identity.of_chain(chain)
        for weak in filter(None, map(credentials.weakness, map(_parsed, chain))):
            raise TLSRefused(Refusal.WEAK_KEY, f"a weak key in its chain of certificates: {weak}")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TLSRefused(
            Refusal.BAD_CERTIFICATE, f"its certificate cannot be read: {error}"
        ) from None
    return who


def verified_chain(sock: ssl.SSLSocket) -> tuple[bytes, ...]:
    """The certificates by which OpenSSL found the peer to be good, in DER, leaf first."""
    inner: Any = sock
    if sys.version_info >= (3, 13):
        return tuple(inner.get_verified_chain())
    # The same that 3.13 made public, as objects of `_ssl`; None where there is no chain.
    found = inner._sslobj.get_verified_chain()
    return tuple(one.public_bytes(_ssl.ENCODING_DER) for one in found or ())


def _parsed(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def refusal(error: ssl.SSLError) -> TLSRefused:
    """Why a handshake failed, for people."""
    if (by_psk := psk.refusal(error)) is not None:
        return by_psk
    if isinstance(error, ssl.SSLCertVerificationError):
        fallback = (Refusal.BAD_CERTIFICATE, f"its certificate is refused: {error.verify_message}")
        return TLSRefused(*_VERIFY.get(error.verify_code, fallback))
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return TLSRefused(*_REASONS["UNEXPECTED_EOF_WHILE_READING"])
    reason = error.reason or ""
    if reason in _REASONS:
        return TLSRefused(*_REASONS[reason])
    if "ALERT" in reason:
        return TLSRefused(Refusal.CLIENT_ALERT, f"the client gave up: {reason}")
    return TLSRefused(Refusal.TLS_ERROR, reason or str(error))


class _Probe(ssl.SSLSocket):
    """A socket with bytes in it and no connection."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        return b"x"


def check_interpreter() -> None:
    """Refuse a Python that takes plaintext for TLS data (CVE-2023-40217).

    Tried rather than read off the version, since distributions mend older ones: the mended
    `wrap_socket` refuses a socket that has data and no connection. Raises SettingsError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = _Probe
    with socket.socket() as unconnected:
        try:
            context.wrap_socket(
                unconnected, server_side=True, do_handshake_on_connect=False
            ).close()
        except ssl.SSLError:
            return
    raise SettingsError(
        f"this Python ({sys.version.split()[0]}) takes plaintext for TLS data (CVE-2023-40217): "
        "use 3.11.5 or newer, or a distribution's mended one"
    )


def _no_password() -> str:
    raise SettingsError("--key: the private key is encrypted: name --key-password-file FILE")
