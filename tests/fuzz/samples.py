"""Inputs for what is not NBD: texts as README has them, and certificates as we issue them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support import wrong_certs

_MOST = 2048
_RULES = (
    *("cn=vm1", "cn=*", "cn=*.vms", "dns=vm1.example.org", "dns=*.example.org", "psk=backup"),
    *("uri=spiffe://example.org/disks/*", "email=*@example.org", "dn=CN=vm1,O=Example", "uid=0"),
    *(f"sha256={'ab:' * 31}ab", f"spki={'01' * 32}", "dn=CN=a\\+b+OU=x,O=\\23é", "dns=ü", "cn="),
    *("dn=2.5.4.3=#0c03766d31", "uri=urn:x:*", "dns=*x", "uid=root", "Cn=vm1", "cn=\u202evm1"),
)
_CONFIGS = (
    'allow = ["cn=vm1", "dns=*.example.org"]\ndeny = ["cn=vm2"]\n',
    'allow-from = ["192.0.2.0/24", "2001:db8::/32"]\ndeny-from = []\n',
    '[[export]]\nname = "disk"\nread-write = ["cn=vm1"]\nread-only = ["*"]\ndeny = ["uid=1"]\n'
    '[[export]]\nname = "ü"\nread-only = ["psk=backup"]\n',
    "[limits]\nidle-timeout = 0\n",
    '[export]\nname = "x"\n',
    "allow = []\n",
)
_KEYS = (
    f"vm1:{'ab' * 32}\n# a comment\n#{b'a:b'.hex()}:{'01' * 16}\n",
    f"vm1:{'AB' * 64}\r\n",
    f"vm1:{'ab' * 32}\nvm1:{'cd' * 32}\n",
    "vm1:abc\n:00\n",
)
_ADDRESSES = (
    *("\0127.0.0.1:10809", "\0[::1]:0", "\0:10809", "\0unix:/run/x.sock", "\0systemd:nbd"),
    *("\0fe80::1%eth0:1", "\1192.0.2.0/24", "\1::ffff:10.0.0.0/104", "\1fe80::1%lo", "\2disk ü/?#"),
    *("\3idle-timeout=5\nhandshakes=3", "\3clients=1e9", "\0050.1.2.3", "\5::ffff:10.1.2.3%x"),
    "\4# x\n0x1f 2030-01-31T12:00:00Z CN=vm1\n0x2 2030-01-31T12:00:00Z\n",
    "\5" + "10.1.2.3",
)


def all_of_them() -> Iterator[tuple[str, list[bytes]]]:
    """Target and inputs."""
    yield "rules", [one.encode() for one in _RULES]
    yield "config", [one.encode() for one in _CONFIGS]
    yield "psk", [one.encode() for one in _KEYS]
    yield "addresses", [one.encode() for one in _ADDRESSES]
    yield "certificates", list(_certificates())
    yield "oldstyle", [bytes([at, 7, 0, 0x05, 0xED, at, 0, 1]) for at in range(12)]


def _certificates() -> Iterator[bytes]:
    """Good ones, and those that are wrong in one way each: as chains, with the length before."""
    for case in wrong_certs.cases().values():
        chain = x509.load_pem_x509_certificates(case.chain)
        yield _chained([one.public_bytes(Encoding.DER) for one in chain])
    for _, der in wrong_certs.unreadable():
        yield _chained([der])


def _chained(ders: list[bytes]) -> bytes:
    """Without what is too large for an input."""
    return b"".join(struct.pack(">H", len(der)) + der for der in ders if len(der) < _MOST)
