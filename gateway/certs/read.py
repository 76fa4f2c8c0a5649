"""PEM files taken apart: certificates, CRLs and keys, each with a say in what is wrong with it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa

from gateway.pki_keys import PkiError

MAX_FILE: Final = 64 << 20  # ours: a CRL of a million entries has 40 MB
_BLOCK: Final = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]+)-----\r?\n(?:(?!-----).)*-----END \1-----[^\S\n]*(?:\n|\Z)", re.DOTALL
)
_CERTIFICATE: Final = ("CERTIFICATE", "X509 CERTIFICATE")
_SIGNER: Final = (
    ec.EllipticCurvePublicKey,
    rsa.RSAPublicKey,
    ed25519.Ed25519PublicKey,
    ed448.Ed448PublicKey,
    dsa.DSAPublicKey,
)


class Block(NamedTuple):
    """One thing in a PEM file."""

    label: str  # what stands behind BEGIN
    pem: bytes
    item: x509.Certificate | x509.CertificateRevocationList | None  # None: something else

    @property
    def is_key(self) -> bool:
        return self.label.endswith("PRIVATE KEY")


def read(path: Path) -> bytes:
    """A file's content. Raises PkiError."""
    try:
        # A pipe would be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PkiError(f"{path}: no regular file")
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise PkiError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_FILE:
        raise PkiError(f"{path}: larger than {MAX_FILE >> 20} MiB")
    return content


def blocks_in(content: bytes, path: Path) -> tuple[Block, ...]:
    """Everything in a PEM file, in its order. Raises PkiError if one cannot be parsed, or if there
    is nothing at all.
    """
    blocks: list[Block] = []
    for found in _BLOCK.finditer(content):
        label, pem = found[1].decode(), found[0]
        item: x509.Certificate | x509.CertificateRevocationList | None = None
        try:
            if label in _CERTIFICATE:
                item = x509.load_pem_x509_certificate(pem)
            elif label == "X509 CRL":
                item = x509.load_pem_x509_crl(pem)
        except ValueError as error:
            raise PkiError(f"{path}: number {len(blocks) + 1} in it, {label}: {error}") from None
        blocks.append(Block(label, pem, item))
    if content.count(b"-----BEGIN ") != len(blocks):
        raise PkiError(f"{path}: a block in it is cut off or damaged")
    if not blocks:
        raise PkiError(f"{path}: no PEM in it (`openssl x509 -inform der` turns DER into PEM)")
    return tuple(blocks)


def certificates_in(content: bytes, path: Path) -> tuple[x509.Certificate, ...]:
    """At least one. Raises PkiError."""
    items = (block.item for block in blocks_in(content, path))
    found = tuple(item for item in items if isinstance(item, x509.Certificate))
    if not found:
        raise PkiError(f"{path}: no certificate in it")
    return found


def crls_in(content: bytes, path: Path) -> tuple[x509.CertificateRevocationList, ...]:
    """At least one. Raises PkiError."""
    items = (block.item for block in blocks_in(content, path))
    found = tuple(item for item in items if isinstance(item, x509.CertificateRevocationList))
    if not found:
        raise PkiError(f"{path}: no CRL in it")
    return found


def signed_by(
    signed: x509.Certificate | x509.CertificateRevocationList, issuer: x509.Certificate
) -> bool:
    """Whether this bears the issuer's name and a good signature of its key."""
    if signed.issuer != issuer.subject:
        return False
    try:
        if isinstance(signed, x509.Certificate):
            signed.verify_directly_issued_by(issuer)
            return True
        key = issuer.public_key()
        return isinstance(key, _SIGNER) and signed.is_signature_valid(key)
    except (InvalidSignature, UnsupportedAlgorithm, TypeError, ValueError):
        return False
