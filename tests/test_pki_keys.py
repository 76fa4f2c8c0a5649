"""gateway.pki_keys: key types, passphrases, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519

from gateway.errors import SettingsError
from gateway.pki_keys import (
    KeyType,
    PkiError,
    generate,
    hash_for,
    key_pem,
    load_key,
    name_of,
    read_password,
)


@pytest.mark.parametrize("kind", KeyType)
def test_a_key_goes_into_a_file_and_back(kind: KeyType) -> None:
    key = generate(kind)
    assert name_of(key.public_key()) == kind
    for password in (None, b"correct horse"):
        pem = key_pem(key, password)
        assert pem.startswith(
            b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n" if password else b"-----BEGIN PRIVATE KEY-"
        )
        again = load_key(pem, password, what="key.pem", flag="--flag")
        assert again.public_key() == key.public_key()


def test_a_signature_is_as_strong_as_its_key() -> None:
    assert isinstance(hash_for(generate(KeyType.EC_P256)), hashes.SHA256)
    assert isinstance(hash_for(generate(KeyType.EC_P384)), hashes.SHA384)
    assert isinstance(hash_for(ec.generate_private_key(ec.SECP521R1())), hashes.SHA512)
    assert isinstance(hash_for(rsa.generate_private_key(65537, 2048)), hashes.SHA256)
    assert hash_for(generate(KeyType.ED25519)) is None


@pytest.mark.parametrize(
    ("public_key", "name"),
    [
        (ec.generate_private_key(ec.SECP521R1()).public_key(), "ec-p521"),
        (ec.generate_private_key(ec.SECP256K1()).public_key(), "ec-secp256k1"),
        (rsa.generate_private_key(65537, 1024).public_key(), "rsa-1024"),
        (ed448.Ed448PrivateKey.generate().public_key(), "ed448"),
        (dsa.generate_private_key(1024).public_key(), "dsa"),
    ],
)
def test_names_of_keys_that_others_made(public_key: object, name: str) -> None:
    assert name_of(public_key) == name


LOCKED = key_pem(ed25519.Ed25519PrivateKey.generate(), b"right")
OPEN = key_pem(ed25519.Ed25519PrivateKey.generate())


@pytest.mark.parametrize(
    ("pem", "password", "complaint"),
    [
        (LOCKED, None, "key.pem is encrypted: give the passphrase with --flag"),
        (LOCKED, b"wrong", "--flag: not the passphrase of key.pem"),
        (OPEN, b"right", "key.pem is not encrypted, so leave --flag out"),
        (b"", None, "key.pem: not a private key in PEM"),
        (b"", b"right", "key.pem: not a private key in PEM"),
        (OPEN.replace(b"MC4", b"AAA"), None, "key.pem: not a private key in PEM"),
        (
            x25519.X25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            None,
            "key.pem: a key of this type cannot sign certificates here",
        ),
    ],
)
def test_keys_that_cannot_be_loaded(pem: bytes, password: bytes | None, complaint: str) -> None:
    with pytest.raises(PkiError) as caught:
        load_key(pem, password, what="key.pem", flag="--flag")
    assert str(caught.value) == complaint


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"secret", b"secret"),
        (b"secret\n", b"secret"),
        (b"secret\r\n", b"secret"),
        (b" two words \n", b" two words "),
        ("Schlüssel\n".encode(), "Schlüssel".encode()),
        (1023 * b"x", 1023 * b"x"),
    ],
)
def test_a_passphrase_is_the_one_line_of_its_file(
    content: bytes, password: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(content)
    assert read_password("--flag", tmp_path / "file") == password


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no passphrase in it"),
        (b"\n", "no passphrase in it"),
        (b"\r\n", "no passphrase in it"),
        (b"one\ntwo\n", "not one line"),
        (b"one\n\n", "not one line"),
        (b"a\0b", "not one line"),
        (1024 * b"x", "longer than 1023 bytes"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_hold_no_passphrase(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"^--flag {tmp_path}/file: {why}") as caught:
        read_password("--flag", tmp_path / "file")
    assert "secret" not in str(caught.value)
    assert "one\n" not in str(caught.value)
