"""Who a client is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

_SHOWN = 80  # characters of a peer's text in a log line


@dataclass(frozen=True, slots=True)
class Identity:
    """What TLS has proved of a client. Texts are a certificate's, so shown with `str()` only."""

    common_name: str | None
    subject: str  # RFC 4514
    sha256: str  # of the certificate, hexadecimal

    @classmethod
    def of_certificate(cls, der: bytes) -> Identity:
        """The identity in a verified leaf certificate. Raises ValueError if it cannot be parsed."""
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        common_name = str(names[0].value) if names else None
        return cls(
            common_name, certificate.subject.rfc4514_string(), hashlib.sha256(der).hexdigest()
        )

    def __str__(self) -> str:
        return f"{shown(self.subject or 'no subject')} sha256:{self.sha256[:16]}"


def shown(text: str) -> str:
    """A peer's text, fit for one log line: no control characters, not too long."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= _SHOWN else clean[: _SHOWN - 3] + "..."
