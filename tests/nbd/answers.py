"""One request on its way, and what becomes of the upstream's reply to it at every cut."""

from __future__ import annotations

import struct

from gateway.errors import PeerError
from gateway.nbd.constants import Cmd
from gateway.nbd.pairing import Terms
from gateway.nbd.wire import MetaContext
from tests.nbd.support import Req, all_cuts, terms
from tests.nbd.walker import Seen, Walker, joined, parse_replies

SIMPLE = terms()
STRUCTURED = terms(
    1 << 33,
    structured=True,
    contexts=(MetaContext(7, "base:allocation"), MetaContext(9, "qemu:dirty-bitmap:b0")),
)
READ = Req(Cmd.READ, 1000, 8)
FLUSH = Req(Cmd.FLUSH)
STATUS = Req(Cmd.BLOCK_STATUS, 0, 4096)
DATA = b"01234567"
OURS, THEIRS = 1, 0xC00C1E  # the first cookie that the gateway picks, and the client's


def asked(one: Req, given: Terms = STRUCTURED) -> Walker:
    return Walker(given).requests([one._replace(cookie=THEIRS).pack()])


def swap_cookie(raw: bytes) -> bytes:
    """What a client has to see of a reply without payload that looks like a cookie of ours."""
    return raw.replace(struct.pack(">Q", OURS), struct.pack(">Q", THEIRS))


def passes(one: Req, raw: bytes, given: Terms = STRUCTURED) -> None:
    """The reply reaches the client at every cut, unchanged but for the cookie, and is the last.

    Of data that did not come in one piece, DONE may be said behind it (X7).
    """
    for pieces in all_cuts(raw):
        relay = asked(one, given).replies(pieces)
        assert relay.machine.upstream_fault is None
        if len(pieces) == 1 or not given.structured_replies:
            assert relay.client == swap_cookie(raw)
        else:
            assert seen_by_client(relay.client) == seen_by_client(swap_cookie(raw))
        assert relay.machine.idle
        assert not relay.machine.mid_reply
        assert not relay.machine._from_upstream._chunked


def fault(one: Req, raw: bytes, given: Terms = STRUCTURED, good: bytes = b"") -> str:
    """What is wrong at every cut. The `good` messages in front of it have reached the client."""
    faults = set()
    for pieces in all_cuts(good + raw):
        relay = asked(one, given).replies(pieces)
        assert isinstance(relay.machine.upstream_fault, PeerError), "not found out"
        assert relay.machine.upstream_fault.side == "upstream"
        assert seen_by_client(relay.client) == seen_by_client(swap_cookie(good))
        faults.add(relay.machine.upstream_fault.what)
    (what,) = faults
    return what


def seen_by_client(raw: bytes | bytearray) -> list[Seen]:
    return joined(parse_replies(bytes(raw)))
