"""Who a client is."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

_SHOWN: Final = 80  # characters of a peer's text in a log line
# Identities kept for clients that come again, a kilobyte or two each. Only what was read out of a
# certificate is kept: whether it is good is looked at each time, by OpenSSL.
_KEPT: Final = 128


@dataclass(frozen=True, slots=True)
class Identity:
    """What TLS has proved of a client. Texts are a certificate's, so shown with `str()` only."""

    common_name: str | None
    subject: str  # RFC 4514
    sha256: str  # of the certificate, hexadecimal

    @classmethod
    def of_certificate(cls, der: bytes) -> Identity:
        """The identity in a verified leaf certificate. Raises ValueError if it cannot be parsed."""
        return _identity(der)

    def __str__(self) -> str:
        return f"{shown(self.subject or 'no subject')} sha256:{self.sha256[:16]}"


@functools.lru_cache(_KEPT)
def _identity(der: bytes) -> Identity:
    certificate = x509.load_der_x509_certificate(der)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    common_name = str(names[0].value) if names else None
    fingerprint = hashlib.sha256(der).hexdigest()
    return Identity(common_name, certificate.subject.rfc4514_string(), fingerprint)


def shown(text: str) -> str:
    """A peer's text, fit for one log line: no control characters, not too long."""
    clean = text
    if not text.isprintable():
        clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= _SHOWN else clean[: _SHOWN - 3] + "..."
