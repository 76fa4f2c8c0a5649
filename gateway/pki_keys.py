"""Private keys: the types that are issued, and their way into a file and back."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Final, assert_never

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from gateway.errors import GatewayError, SettingsError

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
SignatureHash = hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None

MAX_PASSWORD: Final = 1023  # ours: what OpenSSL and GnuTLS take without cutting it off
_RSA_EXPONENT: Final = 65537


class PkiError(GatewayError):
    """Certificates cannot be issued or written as asked. `str()` is one line for a person."""


class KeyType(enum.StrEnum):
    """What can be issued. certs/README.md says which program takes which."""

    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    ED25519 = "ed25519"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"


def generate(kind: KeyType) -> PrivateKey:
    """A new key. RSA takes some tenths of a second."""
    match kind:
        case KeyType.EC_P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyType.EC_P384:
            return ec.generate_private_key(ec.SECP384R1())
        case KeyType.ED25519:
            return ed25519.Ed25519PrivateKey.generate()
        case KeyType.RSA_3072:
            return rsa.generate_private_key(_RSA_EXPONENT, 3072)
        case KeyType.RSA_4096:
            return rsa.generate_private_key(_RSA_EXPONENT, 4096)
        case _:
            assert_never(kind)


def hash_for(key: PrivateKey) -> SignatureHash:
    """The hash that this key signs with: as strong as its curve. Ed25519 brings its own."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return None
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.key_size > 256:
        return hashes.SHA384() if key.curve.key_size <= 384 else hashes.SHA512()
    return hashes.SHA256()


def name_of(public_key: object) -> str:
    """A public key's type for people, in the words of KeyType where it has one."""
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        curves = {"secp256r1": "ec-p256", "secp384r1": "ec-p384", "secp521r1": "ec-p521"}
        return curves.get(public_key.curve.name, f"ec-{public_key.curve.name}")
    if isinstance(public_key, rsa.RSAPublicKey):
        return f"rsa-{public_key.key_size}"
    name = type(public_key).__name__.lower()  # cryptography's own: ed25519publickey, ...
    return name.removesuffix("publickey")


def key_pem(key: PrivateKey, password: bytes | None = None) -> bytes:
    """PKCS #8 in PEM; with a password, encrypted by it (PBES2, AES-256)."""
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        lock = serialization.BestAvailableEncryption(password)
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, lock)


def load_key(pem: bytes, password: bytes | None, *, what: str, flag: str) -> PrivateKey:
    """The key in a PEM file. Raises PkiError that names `what`, the file, and for a password
    that is missing, wrong or given in vain `flag`, which takes the password's file.
    """
    try:
        key = serialization.load_pem_private_key(pem, password)
    except TypeError:
        if password is None:
            raise PkiError(f"{what} is encrypted: give the passphrase with {flag}") from None
        raise PkiError(f"{what} is not encrypted, so leave {flag} out") from None
    except (ValueError, UnsupportedAlgorithm):
        if password is not None and b"ENCRYPTED" in pem:
            raise PkiError(f"{flag}: not the passphrase of {what}") from None
        raise PkiError(f"{what}: not a private key in PEM") from None
    if not isinstance(key, PrivateKey):
        raise PkiError(f"{what}: a key of this type cannot sign certificates here")
    return key


def read_password(flag: str, path: Path) -> bytes:
    """The passphrase in a file: its one line, without the line's end.

    Raises SettingsError that begins with `flag`.
    """
    try:
        password = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{flag} {path}: {error.strerror}") from None
    password = password.removesuffix(b"\n").removesuffix(b"\r")
    if not password:
        raise SettingsError(f"{flag} {path}: no passphrase in it")
    if b"\n" in password or b"\0" in password:
        raise SettingsError(f"{flag} {path}: not one line; the passphrase is all that it may hold")
    if len(password) > MAX_PASSWORD:
        raise SettingsError(f"{flag} {path}: longer than {MAX_PASSWORD} bytes")
    return password
