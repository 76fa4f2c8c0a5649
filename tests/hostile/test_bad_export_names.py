"""Names too long, with NUL, or not UTF-8 (CVE-2017-15118 was a stack smash by a long one).

The gateway passes names through here, so the test also sees what came out at the other side.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Opt, PeerClosedError, Rep, info_data, meta_data, option

OPTIONS = ("--any-export",)

LEGAL = {
    "257": b"n" * 257,
    "3000": b"n" * 3000,
    "4096": b"n" * 4096,
    "utf8": "Größe \N{SNOWMAN}".encode(),
    "escape": b"\x1b[31mred\x1b[0m\r\nforged line",
}
ILLEGAL = {
    "4097": b"n" * 4097,
    "65536": b"n" * 65536,
    "nul": b"a\0b",
    "nul_only": b"\0",
    "latin1": b"Gr\xf6\xdfe",
    "overlong": b"\xc0\xaf",
    "surrogate": b"\xed\xa0\x80",
    "cut": "\N{SNOWMAN}".encode()[:2],
}
REFUSALS = (Rep.ERR_INVALID, Rep.ERR_UNKNOWN, Rep.ERR_TOO_BIG)


@pytest.mark.parametrize("opt", [Opt.INFO, Opt.GO])
@pytest.mark.parametrize("name", LEGAL.values(), ids=LEGAL.keys())
def test_legal_but_unknown(lab: Lab, opt: int, name: bytes) -> None:
    logged = len(lab.gateway.log())
    client = lab.tls()
    (reply,) = client.ask(opt, info_data(name))  # H10: no INFO replies
    assert reply.type == Rep.ERR_UNKNOWN
    assert client.go().size == lab.fake.script.size  # and the session goes on
    forwarded = {got[4 : 4 + len(name)] for link in lab.fake.links for _, got in link.options}
    assert name in forwarded
    client.close()
    lab.wait(lambda: "closed" in lab.gateway.log()[logged:], "the session's last line")
    log = lab.gateway.log()[logged:]
    assert "\x1b" not in log
    assert not any(line.startswith("forged") for line in log.splitlines())


@pytest.mark.parametrize("opt", [Opt.INFO, Opt.GO, Opt.SET_META_CONTEXT, Opt.LIST_META_CONTEXT])
@pytest.mark.parametrize("name", ILLEGAL.values(), ids=ILLEGAL.keys())
def test_illegal(lab: Lab, opt: int, name: bytes) -> None:
    lab.fake.script.names = None
    client = lab.tls()
    client.ask_structured()
    meta = opt in (Opt.SET_META_CONTEXT, Opt.LIST_META_CONTEXT)
    try:
        (reply,) = client.ask(opt, meta_data(name) if meta else info_data(name))
        assert reply.type in REFUSALS
        assert client.verdict(Opt.ABORT) == Rep.ACK
    except (PeerClosedError, ConnectionError):
        assert len(name) > 4096, "a name of legal length can be answered"
    assert not lab.asked_upstream()


@pytest.mark.parametrize("name", [*ILLEGAL.values(), *LEGAL.values()])
def test_export_name(lab: Lab, name: bytes) -> None:
    """EXPORT_NAME cannot be refused in words."""
    client = lab.tls()
    client.send(option(Opt.EXPORT_NAME, name))
    assert client.recv_to_end() == b""
    if name in ILLEGAL.values():
        assert not lab.asked_upstream()
