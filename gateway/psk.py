"""Pre-shared keys: the file of them, the TLS contexts, and the proof that one was used.

A gateway with keys has no certificate at all: OpenSSL would fall back to that for a client whose
key it does not know (proto.md, "TLS support", leaves the kind of credentials to us).

`ssl` calls back with the name that a client claims, and not with whose handshake that is. So each
connection has an SSLContext of its own (a fifth of a millisecond), with a record of its own in it:
two handshakes at a time cannot be taken for each other, and there is no session to resume either.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from gateway.errors import Refusal, SettingsError, TLSRefused
from gateway.identity import shown

AVAILABLE: Final = hasattr(ssl.SSLContext, "set_psk_server_callback")  # Python 3.13
MIN_KEY: Final = 16  # bytes; RFC 9257, section 6: at least 128 bits
MAX_KEY: Final = 256  # bytes that every OpenSSL takes (PSK_MAX_PSK_LEN)
MAX_NAME: Final = 255  # bytes in UTF-8 that OpenSSL takes on both sides (PSK_MAX_IDENTITY_LEN)
# With forward secrecy and AEAD, the only one of TLS 1.2 that OpenSSL and GnuTLS have in common
# (with DHE there are more, at the price of parameters). TLS 1.3 brings its own.
_CIPHERS: Final = "ECDHE-PSK-CHACHA20-POLY1305"
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_ALLOW_NO_DHE_KEX: Final = 1 << 10  # SSL_OP_ALLOW_NO_DHE_KEX, which `ssl` has no name for

_HEX: Final = re.compile(rb"[0-9A-Fa-f]*")

# OpenSSL's reasons, when a key was claimed and another one used.
_WRONG_KEY: Final = frozenset(
    {
        "BINDER_DOES_NOT_VERIFY",  # TLS 1.3
        "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",  # TLS 1.2, where the first record is not to be read
        "RECORD_LAYER_FAILURE",  # the same, from OpenSSL 3.2 on
    }
)
# And when nothing was found by which the two sides could authenticate.
_NOTHING_IN_COMMON: Final = frozenset(
    {"NO_SUITABLE_SIGNATURE_ALGORITHM", "NO_SUITABLE_KEY_SHARE", "NO_SHARED_CIPHER"}
)
_NEEDED: Final = "TLS 1.3 with (EC)DHE and SHA-256, or ECDHE-PSK-CHACHA20-POLY1305"


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """The keys by name. Shows none of them."""

    _by_name: dict[str, bytes] = field(repr=False)
    # SHA-256 of each key, by which a reload can tell that it is another one.
    fingerprints: dict[str, bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        prints = {name: hashlib.sha256(key).digest() for name, key in self._by_name.items()}
        object.__setattr__(self, "fingerprints", prints)

    def __str__(self) -> str:
        return f"{len(self._by_name)} pre-shared keys"

    def find(self, name: str | None) -> bytes:
        """The key of that name; for a name that is not here a new one that nobody has.

        So an unknown name fails like a wrong key does: nobody can ask which names there are.
        """
        decoy = os.urandom(32)
        return decoy if name is None else self._by_name.get(name, decoy)


def parse(path: Path, data: bytes) -> Keys:
    """The keys in a file as psktool writes it, and nbdkit and QEMU read it: lines of `name:hex`.

    A name with a colon in it is `#` and the name in hexadecimal, as GnuTLS has it. Empty lines, and
    those that begin with `#` and have no colon, mean nothing. Raises SettingsError that names the
    line, and shows nothing of what is in it: who has mixed up the halves would find a key in a log.
    """
    found: dict[str, bytes] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line or (line.startswith(b"#") and b":" not in line):
            continue
        try:
            name, key = _parse_line(line)
            if name in lines:
                raise ValueError(f"the name of line {lines[name]} again: a name has one key")
        except ValueError as error:
            raise SettingsError(f"--psk-file: {path}, line {number}: {error}") from None
        found[name] = key
        lines[name] = number
    if not found:
        raise SettingsError(
            f"--psk-file: {path} holds no key, so nobody could enter: "
            f"psktool --username=NAME --pskfile={path} makes one"
        )
    return Keys(found)


def _parse_line(line: bytes) -> tuple[str, bytes]:
    """Name and key. Raises ValueError that shows nothing of the line."""
    if line.endswith(b"\r"):
        raise ValueError("ends with a carriage return: save the file with Unix line ends")
    raw, colon, key = line.partition(b":")
    if not colon:
        raise ValueError("no colon: a line is NAME:KEY, the key in hexadecimal")
    if raw.startswith(b"#"):
        if not raw[1:] or not _is_hex(raw[1:]) or len(raw) % 2 == 0:
            raise ValueError("behind # comes a name in hexadecimal, and this is none")
        raw = bytes.fromhex(raw[1:].decode())
    if not raw:
        raise ValueError("no name before the colon")
    if len(raw) > MAX_NAME:
        raise ValueError(f"the name has {len(raw)} bytes, and TLS libraries take {MAX_NAME}")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise ValueError("the name is not UTF-8") from None
    if any(unicodedata.category(char) == "Cc" for char in name):
        raise ValueError("control characters in the name")
    if name != name.strip():
        raise ValueError("white space at an end of the name")
    return name, _parse_key(key)


def _parse_key(key: bytes) -> bytes:
    """Raises ValueError that shows nothing of it."""
    if not key:
        raise ValueError("no key behind the colon")
    if not _is_hex(key):
        raise ValueError("the key is not hexadecimal")
    if len(key) % 2:
        raise ValueError("the key has an odd number of hexadecimal digits")
    size = len(key) // 2
    if size < MIN_KEY:
        raise ValueError(f"the key has {size} bytes, and less than {MIN_KEY} can be guessed")
    if size > MAX_KEY:
        raise ValueError(f"the key has {size} bytes, and OpenSSL takes {MAX_KEY}")
    return bytes.fromhex(key.decode())


def _is_hex(text: bytes) -> bool:
    return _HEX.fullmatch(text) is not None


class PSKContext(ssl.SSLContext):
    """Stands for the keys: `wrap_socket` makes a context for that one connection, and uses it.

    This one never shakes hands itself: it has neither keys nor a certificate. Made by `context`.
    """

    keys: Keys
    minimum: Literal["1.2", "1.3"]

    def wrap_socket(self, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return _one_connection(self.keys, self.minimum).wrap_socket(sock, *args, **kwargs)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        raise NotImplementedError("a client with a pre-shared key comes by a socket")


class _OneConnection(ssl.SSLContext):
    """The context of one connection, and the names that its client has claimed."""

    claim: _Claim


class _Claim:
    """What was asked for in one handshake. OpenSSL may ask more than once (HelloRetryRequest)."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.name: str | None = None  # empty: something that is no name
        self.several = False  # different ones, so that nobody knows which it was

    def key(self, name: str | None) -> bytes:
        """For OpenSSL, within `do_handshake`. Raises nothing: that would be a key of no bytes."""
        claimed = name or ""
        self.several = self.several or (self.name is not None and self.name != claimed)
        self.name = claimed
        return self.keys.find(name)


class PSKHandshakeError(ssl.SSLError):
    """A handshake that failed, with what it was about the key that failed it."""

    def __init__(self, cause: ssl.SSLError, refused: TLSRefused) -> None:
        super().__init__(*cause.args)
        self.reason = cause.reason
        self.library = cause.library
        self.refused = refused


class PSKSocket(ssl.SSLSocket):
    """A connection by pre-shared key, in a context of its own."""

    def do_handshake(self, block: bool = False) -> None:
        """Raises PSKHandshakeError where there is more to say than OpenSSL does."""
        try:
            super().do_handshake(block)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if (refused := _refused(_claim(self), error)) is None:
                raise
            raise PSKHandshakeError(error, refused) from None


def context(keys: Keys, minimum: Literal["1.2", "1.3"]) -> ssl.SSLContext:
    """What to wrap the connections of all clients with. Raises SettingsError.

    No certificate, no tickets, no sessions, no renegotiation; no hint to what names there are.
    """
    if not AVAILABLE:
        raise SettingsError(
            "--psk-file: pre-shared keys need Python 3.13 or newer, and this is "
            f"{sys.version.split()[0]}: use that, or certificates (--cert, --key, --client-ca)"
        )
    if not getattr(ssl, "HAS_PSK", False):
        raise SettingsError(
            f"--psk-file: the TLS library of this Python ({ssl.OPENSSL_VERSION}) was built without "
            "pre-shared keys"
        )
    outer = PSKContext(ssl.PROTOCOL_TLS_SERVER)
    outer.keys, outer.minimum = keys, minimum
    try:
        _one_connection(keys, minimum)  # what cannot be made fails here, not with the first client
    except ssl.SSLError as error:
        raise SettingsError(
            f"--psk-file: {ssl.OPENSSL_VERSION} cannot do {_CIPHERS}: {error.reason or error}"
        ) from None
    return outer


def _one_connection(keys: Keys, minimum: str) -> _OneConnection:
    made = _OneConnection(ssl.PROTOCOL_TLS_SERVER)
    made.sslsocket_class = PSKSocket
    made.minimum_version = _VERSIONS[minimum]
    made.verify_mode = ssl.CERT_NONE
    made.set_ciphers(_CIPHERS)
    made.num_tickets = 0
    made.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # Off unless openssl.cnf says otherwise. Without (EC)DHE there is no forward secrecy.
    made.options &= ~_ALLOW_NO_DHE_KEX
    # Some builds of Python set it: a connection that is cut would pass for one that is closed.
    made.options &= ~int(getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0))
    made.claim = _Claim(keys)
    made.set_psk_server_callback(made.claim.key, None)  # type: ignore[attr-defined]  # from 3.13 on
    return made


def prove(context: ssl.SSLContext, sock: ssl.SSLSocket) -> str:
    """The name of the key that a finished handshake has proved. Raises TLSRefused.

    `context` is what the socket was wrapped with. That a handshake has succeeded is not taken to
    mean that a key was used: the connection itself is asked.
    """
    if not isinstance(context, PSKContext) or not isinstance(sock, PSKSocket):
        raise TLSRefused(Refusal.NO_PSK, "it came in without a pre-shared key")
    claim = _claim(sock)
    if claim.keys is not context.keys:
        raise TLSRefused(Refusal.UNKNOWN_PSK, "it came in with a key of another set")
    cipher = sock.cipher()
    match sock.version():
        case "TLSv1.3":  # OpenSSL keeps an external key as a session that is taken up again
            used = sock.session_reused
        case "TLSv1.2":  # where that would be a session of before, and there can be none
            used = not sock.session_reused and cipher is not None and cipher[0] == _CIPHERS
        case _:
            used = False
    if not used or claim.name is None:
        raise TLSRefused(Refusal.NO_PSK, "it came in without a pre-shared key")
    if claim.several:
        raise TLSRefused(Refusal.UNKNOWN_PSK, "it claimed several names in one handshake")
    if claim.name not in claim.keys.fingerprints:
        raise TLSRefused(Refusal.UNKNOWN_PSK, _unknown(claim))
    return claim.name


def refusal(error: ssl.SSLError) -> TLSRefused | None:
    """Why a handshake failed, if that has to do with pre-shared keys."""
    return error.refused if isinstance(error, PSKHandshakeError) else None


def _claim(sock: PSKSocket) -> _Claim:
    assert isinstance(sock.context, _OneConnection)
    return sock.context.claim


def _refused(claim: _Claim, error: ssl.SSLError) -> TLSRefused | None:
    """None: this says nothing about keys, and happens with certificates too."""
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or (
        error.reason == "UNEXPECTED_EOF_WHILE_READING"
    ):
        return TLSRefused(
            Refusal.EOF, "it left in the middle of the handshake; does it use a pre-shared key?"
        )
    if error.reason == "PSK_IDENTITY_NOT_FOUND":  # not UTF-8: we were not even asked
        return TLSRefused(Refusal.UNKNOWN_PSK, "the name of its pre-shared key is no text")
    if claim.name is not None and error.reason in _WRONG_KEY:
        return TLSRefused(Refusal.UNKNOWN_PSK, _unknown(claim))
    if error.reason not in _NOTHING_IN_COMMON:
        return None
    if claim.name is not None:
        return TLSRefused(
            Refusal.NO_SHARED_CIPHER, f"it has a pre-shared key, but for that it needs {_NEEDED}"
        )
    return TLSRefused(
        Refusal.NO_PSK, f"it offered no pre-shared key that we can use: it needs {_NEEDED}"
    )


def _unknown(claim: _Claim) -> str:
    """For the log; clients cannot tell one from the other."""
    name = shown(repr(claim.name))
    if claim.name in claim.keys.fingerprints:
        return f"its key for {name} is not the one in --psk-file"
    return f"--psk-file has no key for {name}"
