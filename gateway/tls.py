"""TLS policy: settings to an SSLContext, and what went wrong in a handshake in words."""

from __future__ import annotations

import socket
import ssl
import sys
from pathlib import Path
from typing import Final

from cryptography import x509

from gateway.access import Identity
from gateway.errors import SettingsError, TLSRefused
from gateway.settings import TLSSettings

# TLS 1.2 with forward secrecy and AEAD only; TLS 1.3 has nothing else to begin with.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

_CRL_BEGINS: Final = b"-----BEGIN X509 CRL-----"

LEFT: Final = "it left in the middle of the handshake; does it know the CA of our certificate?"

# X509_V_ERR_* of OpenSSL to (reason, words about the client's certificate).
_VERIFY: Final = {
    3: ("no_crl", "there is no CRL of its CA here, so nobody can enter: renew ca-crl.pem"),
    9: ("not_yet_valid", "its certificate is not yet valid"),
    10: ("expired", "its certificate has expired"),
    11: ("crl_not_yet_valid", "the CRL here is not yet valid, so nobody can enter"),
    12: ("crl_expired", "the CRL here has expired, so nobody can enter: renew it"),
    18: ("unknown_ca", "its certificate is self-signed"),
    19: ("unknown_ca", "its certificate is of another CA"),
    20: ("unknown_ca", "its certificate is of another CA"),
    21: ("unknown_ca", "its certificate is of another CA"),
    23: ("revoked", "its certificate is revoked"),
    26: ("wrong_eku", "its certificate is not for TLS clients (extended key usage)"),
}

# OpenSSL's reasons to (reason, words).
_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": ("no_client_cert", "it has no client certificate"),
    "UNSUPPORTED_PROTOCOL": ("tls_version", "its TLS version is too old"),
    "TLSV1_ALERT_PROTOCOL_VERSION": ("tls_version", "it does not accept our TLS version"),
    "NO_SHARED_CIPHER": ("no_shared_cipher", "it has no cipher suite in common with us"),
    "WRONG_VERSION_NUMBER": ("not_tls", "it sent something that is not TLS"),
    "HTTP_REQUEST": ("not_tls", "it sent something that is not TLS"),
    "TLSV1_ALERT_UNKNOWN_CA": (
        "client_rejected_us",
        "the client does not know the CA of our certificate: give it our ca-cert.pem",
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "client_rejected_us",
        "the client rejected our certificate: does it name the host that the client asked for?",
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "client_rejected_us",
        "the client says that our certificate has expired",
    ),
    "UNEXPECTED_EOF_WHILE_READING": ("eof", LEFT),
}


def server_context(settings: TLSSettings) -> ssl.SSLContext:
    """The context for all clients. Raises SettingsError that names the file and the flag.

    Not `ssl.create_default_context`: that one obeys SSLKEYLOGFILE and would write session keys.
    proto.md, "TLS versions": 1.2 is a MUST, and nbd-client speaks nothing newer by default.
    """
    _check_interpreter()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[settings.minimum]
    context.set_ciphers(_CIPHERS)
    # No tickets (for sessions by id see `identity`): a session would outlive a change of CRL or
    # rules. No renegotiation.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # Some builds of Python set it: a connection that is cut would pass for one that is closed.
    context.options &= ~int(getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0))
    _check_pem("--cert", settings.cert, "a certificate", x509.load_pem_x509_certificates)
    _read("--key", settings.key)
    try:
        # The password is only asked for when the key has one; a prompt would hang a service.
        context.load_cert_chain(settings.cert, settings.key, password=_no_password)
    except SettingsError:
        raise
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(
                f"--key: {settings.key} is not the key of the certificate in {settings.cert}"
            ) from None
        raise SettingsError(f"--key: {settings.key} is no usable PEM private key") from None
    if settings.client_ca is None:
        context.verify_mode = ssl.CERT_NONE
        return context
    context.verify_mode = ssl.CERT_REQUIRED
    _check_pem("--client-ca", settings.client_ca, "a certificate", x509.load_pem_x509_certificates)
    context.load_verify_locations(settings.client_ca)
    if settings.crl is not None:
        _check_pem("ca-crl.pem", settings.crl, "a CRL", x509.load_pem_x509_crl)
        context.load_verify_locations(settings.crl)
    if settings.crl is not None or _CRL_BEGINS in _read("--client-ca", settings.client_ca):
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return context


def server_names(cert: Path) -> tuple[str, ...]:
    """The DNS names and addresses that a client may know this certificate's owner by."""
    certificate = x509.load_pem_x509_certificates(cert.read_bytes())[0]
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    addresses = [str(one) for one in san.get_values_for_type(x509.IPAddress)]
    return (*san.get_values_for_type(x509.DNSName), *addresses)


def identity(sock: ssl.SSLSocket) -> Identity | None:
    """Who is at the other end of a finished handshake; None without a client certificate.

    Raises TLSRefused if the certificate passed OpenSSL and yet cannot be parsed, and for a TLS 1.2
    session that is resumed by its id, which `ssl` has no way to switch off: chain, dates and CRL
    would not be looked at again.
    """
    if sock.session_reused:
        raise TLSRefused("resumed", "it resumed a TLS session; it has to shake hands in full")
    der = sock.getpeercert(binary_form=True)
    if der is None:
        return None
    try:
        return Identity.of_certificate(der)
    except ValueError as error:
        raise TLSRefused("bad_certificate", f"its certificate cannot be read: {error}") from None


def refusal(error: ssl.SSLError) -> TLSRefused:
    """Why a handshake failed, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        fallback = ("bad_certificate", f"its certificate is refused: {error.verify_message}")
        return TLSRefused(*_VERIFY.get(error.verify_code, fallback))
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return TLSRefused(*_REASONS["UNEXPECTED_EOF_WHILE_READING"])
    reason = error.reason or ""
    if reason in _REASONS:
        return TLSRefused(*_REASONS[reason])
    if "ALERT" in reason:
        return TLSRefused("client_alert", f"the client gave up: {reason}")
    return TLSRefused("tls_error", reason or str(error))


class _Probe(ssl.SSLSocket):
    """A socket with bytes in it and no connection."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        return b"x"


def _check_interpreter() -> None:
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


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{flag}: cannot read {path}: {error.strerror}") from None


def _check_pem(flag: str, path: Path, what: str, load: object) -> None:
    data = _read(flag, path)
    try:
        load(data)  # type: ignore[operator]
    except ValueError:
        raise SettingsError(f"{flag}: {path} does not hold {what} in PEM format") from None


def _no_password() -> str:
    raise SettingsError("--key: the private key is encrypted: give one without a passphrase")
