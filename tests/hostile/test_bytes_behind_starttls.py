"""Bytes that share a segment with STARTTLS: someone in the middle put them there.

The class of bugs known as "nostarttls": plaintext that a server read ahead is served later as if it
had come through TLS. Rule T4: nothing may stand behind STARTTLS, or the session ends.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import (
    Info,
    Opt,
    Request,
    client_hello,
    info_data,
    meta_data,
    option,
    tls_context,
)

FORGED = {
    "structured_reply": option(Opt.STRUCTURED_REPLY),
    "set_meta_context": option(Opt.SET_META_CONTEXT, meta_data(b"", [b"base:allocation"])),
    "go": option(Opt.GO, info_data(b"", [Info.BLOCK_SIZE])),
    "go_and_read": option(Opt.GO, info_data()) + Request(0, 0, 512).pack(),
    "export_name": option(Opt.EXPORT_NAME),
    "starttls": option(Opt.STARTTLS),
    "abort": option(Opt.ABORT),
    "part_of_a_header": option(Opt.GO)[:7],
    "one_byte": b"\0",
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_forged_plaintext(lab: Lab, forged: bytes) -> None:
    client = lab.plain()
    client.send(option(Opt.STARTTLS) + forged)
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0


@pytest.mark.parametrize("part", [1.0, 0.5, 0.01])
def test_client_hello_too_early(lab: Lab, part: float) -> None:
    """The TLS engine must not see it: no ServerHello, no alert."""
    hello = client_hello(tls_context(lab.pki))
    client = lab.plain()
    client.send(option(Opt.STARTTLS) + hello[: max(1, int(len(hello) * part))])
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0


def test_together_with_the_client_flags(lab: Lab) -> None:
    """The same, with all that a client says in one segment."""
    client = lab.raw()
    client.recv_exactly(18)
    flags = b"\0\0\0\3"
    client.send(flags + option(Opt.STARTTLS) + option(Opt.STRUCTURED_REPLY))
    assert client.recv_to_end() == b""
    assert lab.fake.connects == 0


def test_starttls_alone_in_the_segment_of_the_flags_is_fine(lab: Lab) -> None:
    """Nothing is behind it, so the session goes on: the counterpart of the test above."""
    client = lab.raw()
    client.recv_exactly(18)
    client.send(b"\0\0\0\3" + option(Opt.STARTTLS))
    assert client.replies(Opt.STARTTLS)[-1].type == 1
    client.wrap(tls_context(lab.pki))
    assert client.go().size == lab.fake.script.size
