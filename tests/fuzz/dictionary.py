"""Words of the protocol, and of what people write, for the fuzzer to put into its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_MAGICS: Final = (
    *(b"NBDMAGIC", b"IHAVEOPT", bytes.fromhex("00420281861253")),
    *map(bytes.fromhex, ("0003e889045565a9", "25609513", "67446698", "668e33ef")),
    *map(bytes.fromhex, ("21e41c71", "6e8a278c")),
)
_REPLIES: Final = (*range(1, 5), *range((1 << 31) + 1, (1 << 31) + 11))
_U32: Final = (0, 8, 512, 4096, 4097, 65536, 1 << 25, (1 << 25) + 1, 1 << 31, (1 << 32) - 1)
_U64: Final = (512, 1 << 20, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_NAMES: Final = (b"base:allocation", b"base:", b"x-a:b", b"disk", b"\0\0\0\x04disk", b"*")
_RULES: Final = tuple(
    word.encode()
    for word in "cn= dn= dns= uri= email= sha256= spki= psk= uid= spiffe:// *. /* %2F xn-- \\2c "
    "+ , CN=vm1,O=x #0c03 allow deny allow-from deny-from [[export]] name= read-write= read-only= "
    '["*"] [limits] unix: systemd systemd: [::1]:10809 127.0.0.0/8 ::ffff: 0x1f '
    "2030-01-31T12:00:00Z".split()
)
NBD: Final = (
    *_MAGICS,
    *(one.to_bytes(4, "big") for one in (*range(12), *_REPLIES, *_U32)),
    *(one.to_bytes(8, "big") for one in _U64),
    *_NAMES,
)
TEXTS: Final = (*_RULES, b"\n", b"\xef\xbb\xbf", "ü".encode(), b"\0")


def written(words: Iterable[bytes]) -> str:
    """As libFuzzer reads a dictionary."""
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words)
