"""A client that makes its TLS records itself: any type, content and order, with the right keys.

OpenSSL shakes hands for it, and says by its key log what the keys are; from then on OpenSSL only
reads. RFC 8446 sections 5 and 7 for TLS 1.3; RFC 5246 section 6 and RFC 5288 for TLS 1.2.
"""

from __future__ import annotations

import contextlib
import hmac
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import Opt, RawClient, Rep, tls_context

ALERT, HANDSHAKE, DATA = 21, 22, 23  # content types
WARNING, FATAL = 1, 2
CLOSE_NOTIFY, USER_CANCELED, NO_RENEGOTIATION = 0, 90, 100
VERSIONS = ("1.3", "1.2")


class Forger(RawClient):
    """Greeted and inside TLS from the start. `send` sends records of application data."""

    def __init__(self, lab: Lab, version: str, keys: Path) -> None:
        super().__init__(lab.gateway.uri)
        lab.keep(self)
        self._heard = bytearray()
        keys.unlink(missing_ok=True)
        fresh = tls_context.__wrapped__  # not the one of all others: it keeps a key log
        context = fresh(lab.pki, only_1_2=version == "1.2")
        context.keylog_filename = str(keys)
        context.set_ciphers("ECDHE+AESGCM")
        self.greet()
        assert self.verdict(Opt.STARTTLS) == Rep.ACK
        self.wrap(context)
        assert self.tls is not None
        name, _, _ = self.tls.cipher() or ("", "", 0)
        assert self.tls.version() == f"TLSv{version}"
        self._hash = "sha384" if "SHA384" in name else "sha256"
        self._key_length = 32 if "256" in name.split("SHA")[0] else 16
        secrets = {}
        for line in keys.read_text().splitlines():
            if not line.startswith("#"):
                label, random, secret = line.split()
                secrets[label] = bytes.fromhex(random), bytes.fromhex(secret)
        self._old = version == "1.2"
        if self._old:
            self._use_master_secret(*secrets["CLIENT_RANDOM"])
        else:
            self._use_traffic_secret(secrets["CLIENT_TRAFFIC_SECRET_0"][1])

    def _feed(self) -> None:
        if raw := self.sock.recv(1 << 18):
            self._heard += raw[: 64 - len(self._heard)]
            self._incoming.write(raw)
        else:
            self._incoming.write_eof()

    # Records

    def forge(self, content: bytes, kind: int = DATA, *, padding: int = 0) -> bytes:
        """One record, not yet sent. It may be larger than any may be."""
        number = struct.pack(">Q", self._number)
        self._number += 1
        if self._old:
            told = number + struct.pack(">BHH", kind, 0x303, len(content))
            sealed = number + self._cipher.encrypt(self._iv + number, content, told)
            return struct.pack(">BHH", kind, 0x303, len(sealed)) + sealed
        inner = content + bytes([kind]) + bytes(padding)
        head = struct.pack(">BHH", DATA, 0x303, len(inner) + 16)
        mask = int.from_bytes(number, "big") ^ int.from_bytes(self._iv, "big")
        return head + self._cipher.encrypt(mask.to_bytes(12, "big"), inner, head)

    def alert(self, what: int, level: int = WARNING) -> bytes:
        return self.forge(bytes([level, what]), ALERT)

    def key_update(self, *, answer: bool) -> bytes:
        """RFC 8446, section 4.6.3. `answer`: the peer is to do the same."""
        record = self.forge(b"\x18\0\0\1" + bytes([answer]), HANDSHAKE)
        self._use_traffic_secret(self._label(self._secret, b"traffic upd", len(self._secret)))
        return record

    def seal(self, data: bytes) -> bytes:
        return b"".join(self.forge(data[at : at + 16384]) for at in range(0, len(data), 16384))

    # Keys

    def _use_traffic_secret(self, secret: bytes) -> None:
        self._secret, self._number = secret, 0
        self._cipher = AESGCM(self._label(secret, b"key", self._key_length))
        self._iv = self._label(secret, b"iv", 12)

    def _label(self, secret: bytes, label: bytes, length: int) -> bytes:
        """HKDF-Expand-Label with an empty context, of one block at the most."""
        name = b"tls13 " + label
        info = struct.pack(">HB", length, len(name)) + name + b"\0\1"
        return hmac.digest(secret, info, self._hash)[:length]

    def _use_master_secret(self, random: bytes, master: bytes) -> None:
        seed = b"key expansion" + bytes(self._heard[11:43]) + random  # of ServerHello, of ours
        block, a = b"", seed
        while len(block) < 2 * self._key_length + 8:
            a = hmac.digest(master, a, self._hash)
            block += hmac.digest(master, a + seed, self._hash)
        self._cipher = AESGCM(block[: self._key_length])
        self._iv = block[2 * self._key_length :][:4]
        self._number = 1  # Finished was record 0


def opened(client: Forger) -> Session:
    """In transmission on the default export, with structured replies."""
    client.ask_structured()
    return Session(client, client.go(), {})


def flush(client: Forger) -> None:
    """Close what may have been closed already."""
    with contextlib.suppress(OSError):
        client.reset()
