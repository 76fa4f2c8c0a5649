"""An upstream that says nonsense while haggling: the client's option fails, and nothing leaks."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import ALL_FEATURES, MIB, Link, Script
from tests.support.rawclient import (
    OPTION_REPLY,
    REP_MAGIC,
    Info,
    Opt,
    OptReply,
    PeerClosedError,
    Rep,
    Tf,
    info_data,
    meta_data,
    parse_export,
)

EXPORT = struct.pack(">HQH", Info.EXPORT, MIB, ALL_FEATURES & ~Tf.SEND_DF)


def rep(opt: int, kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    head = OPTION_REPLY.pack(REP_MAGIC, opt, kind, len(data) if length is None else length)
    return head + data


class Replying(Script):
    """Answers one option with raw bytes, and then listens."""

    def __init__(self, opt: int, raw: bytes, **changes: object) -> None:
        super().__init__(**changes)
        self.opt, self.raw = opt, raw

    def option(self, link: Link, opt: int, data: bytes) -> bool:
        if opt != self.opt and not (self.opt == Opt.GO and opt == Opt.INFO):
            return super().option(link, opt, data)
        link.send(self.raw.replace(b"OPTN", struct.pack(">I", opt)))
        return opt == Opt.GO


def go(kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A reply to whichever of INFO and GO was asked."""
    return rep(int.from_bytes(b"OPTN", "big"), kind, data, length=length)


def sizes(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">HIII", Info.BLOCK_SIZE, minimum, preferred, maximum)


ACK = go(Rep.ACK)
GRANTED = go(Rep.INFO, EXPORT) + ACK
BAD_GO = {
    "magic": b"\0" * 20,
    "magic_off_by_one": struct.pack(">QIII", REP_MAGIC ^ 1, Opt.GO, Rep.ACK, 0),
    "reply_to_another_option": rep(Opt.LIST, Rep.ACK),
    "reply_to_no_option": rep(0, Rep.INFO, EXPORT) + rep(0, Rep.ACK),
    "ack_without_export": ACK,
    "ack_with_other_info_only": go(Rep.INFO, sizes(1, 4096, MIB)) + ACK,
    "export_too_short": go(Rep.INFO, EXPORT[:-1]) + ACK,
    "export_too_long": go(Rep.INFO, EXPORT + b"\0") + ACK,
    "info_without_type": go(Rep.INFO, b"") + ACK,
    "info_half_a_type": go(Rep.INFO, b"\0") + ACK,
    "block_size_too_short": go(Rep.INFO, sizes(1, 4096, MIB)[:-1]) + GRANTED,
    "server_reply": go(Rep.SERVER, bytes(4)) + GRANTED,
    "context_reply": go(Rep.META_CONTEXT, b"\0\0\0\1x:y") + GRANTED,
    "unknown_reply": go(99) + GRANTED,
    "length_2^32-1": go(Rep.INFO, EXPORT, length=(1 << 32) - 1) + bytes(65536),
    "length_32_MiB": go(Rep.ERR_POLICY, b"x", length=32 * MIB) + bytes(65536),
}


def failed_or_gone(lab: Lab, opt: int, data: bytes) -> list[OptReply]:
    """What the client was told: an error, or the end of the session."""
    client = lab.tls()
    try:
        client.ask_structured()
        replies = client.ask(opt, data)
        assert replies[-1].failed
        assert replies[-1].type != Rep.ERR_TLS_REQD
        return replies
    except PeerClosedError:
        return []
    finally:
        client.close()


@pytest.mark.parametrize("raw", BAD_GO.values(), ids=BAD_GO.keys())
@pytest.mark.parametrize("opt", [Opt.INFO, Opt.GO])
def test_info_and_go(lab: Lab, witness: Session, raw: bytes, opt: int) -> None:
    lab.fake.script = Replying(Opt.GO, raw)
    lab.forget_peak()
    before = lab.peak_kib()
    failed_or_gone(lab, opt, info_data(b"", [Info.BLOCK_SIZE]))
    assert lab.peak_kib() - before < 8 << 10
    lab.fake.wait_end(1)


BAD_SIZES = {
    "min_0": (0, 4096, MIB),
    "min_3": (3, 4096, MIB),
    "min_128k": (131072, 131072, MIB),
    "preferred_0": (1, 0, MIB),
    "preferred_not_a_power": (1, 5000, MIB),
    "preferred_256": (1, 256, MIB),
    "preferred_below_min": (4096, 512, MIB),
    "max_0": (1, 4096, 0),
    "max_below_preferred": (1, 4096, 4095),
}


@pytest.mark.parametrize("bad", BAD_SIZES.values(), ids=BAD_SIZES.keys())
def test_block_sizes(lab: Lab, witness: Session, bad: tuple[int, int, int]) -> None:
    """Refused, or put right; never handed on as they are (H9, U5)."""
    lab.fake.script = Replying(Opt.GO, go(Rep.INFO, sizes(*bad)) + GRANTED)
    client = lab.tls()
    try:
        *given, last = client.ask(Opt.GO, info_data(b"", [Info.BLOCK_SIZE]))
    except PeerClosedError:
        return
    if last.type == Rep.ACK and (told := parse_export(given).block_sizes):
        minimum, preferred, maximum = told
        assert minimum.bit_count() == preferred.bit_count() == 1
        assert minimum <= 65536
        assert max(minimum, 512) <= preferred <= maximum


CONTEXT = b"base:allocation"
BAD_META = {
    "too_short": rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0"),
    "same_id_twice": rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1" + CONTEXT)
    + rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1qemu:dirty-bitmap:b0"),
    "not_utf8": rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1x:\xff\xfe"),
    "nul": rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1x:\0"),
    "name_too_long": rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1x:" + b"y" * 5000),
    "info_reply": rep(Opt.SET_META_CONTEXT, Rep.INFO, EXPORT),
}


@pytest.mark.parametrize("raw", BAD_META.values(), ids=BAD_META.keys())
def test_meta_contexts(lab: Lab, witness: Session, raw: bytes) -> None:
    lab.fake.script = Replying(Opt.SET_META_CONTEXT, raw + rep(Opt.SET_META_CONTEXT, Rep.ACK))
    asked = meta_data(b"", [CONTEXT, b"qemu:dirty-bitmap:b0"])
    failed_or_gone(lab, Opt.SET_META_CONTEXT, asked)


@pytest.mark.parametrize("name", [b"", b"nocolon", b":leaf"])
def test_meta_context_names(lab: Lab, witness: Session, name: bytes) -> None:
    """Not a namespace, a colon and a leaf: refused or left out, never handed on."""
    reply = rep(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\1" + name)
    lab.fake.script = Replying(Opt.SET_META_CONTEXT, reply + rep(Opt.SET_META_CONTEXT, Rep.ACK))
    client = lab.tls()
    client.ask_structured()
    try:
        *given, _ = client.ask(Opt.SET_META_CONTEXT, meta_data(b"", [CONTEXT]))
    except PeerClosedError:
        return
    assert given == []


@pytest.mark.parametrize(
    "entry",
    [b"", b"\0\0\0", struct.pack(">I", 5) + b"four", struct.pack(">I", 0xFFFFFFFF) + b"four"],
)
def test_list(lab: Lab, witness: Session, entry: bytes) -> None:
    """A gateway that lists its own names does not ask; one that asks must not hand this on."""
    lab.fake.script = Replying(Opt.LIST, rep(Opt.LIST, Rep.SERVER, entry) + rep(Opt.LIST, Rep.ACK))
    client = lab.tls()
    try:
        *listed, _ = client.ask(Opt.LIST)
    except PeerClosedError:
        return
    for reply in listed:
        (length,) = struct.unpack_from(">I", reply.data)
        assert length <= len(reply.data) - 4


SECRET = b"/srv/secret.img\x1b[31m\nforged line"


@pytest.mark.parametrize("kind", [Rep.ERR_UNKNOWN, Rep.ERR_POLICY, Rep.ERR_PLATFORM, 0xFFFFFFFF])
def test_error_text_stays_here(lab: Lab, witness: Session, kind: int) -> None:
    """H13: the upstream's words are not for the client's display, nor raw in the log."""
    logged = len(lab.gateway.log())
    lab.fake.script = Replying(Opt.GO, go(kind, SECRET))
    replies = failed_or_gone(lab, Opt.GO, info_data())
    assert not any(b"secret" in reply.data for reply in replies)
    assert replies[-1].type in set(Rep)
    assert "\x1b" not in lab.gateway.log()[logged:]


def test_endless_infos(lab: Lab, witness: Session) -> None:
    """A server that never comes to an end is not followed for ever, nor stored."""

    class Endless(Script):
        def info(self, link: Link, opt: int, data: bytes) -> bool:
            while True:
                link.send(rep(opt, Rep.INFO, struct.pack(">H", 999) + bytes(4000)) * 16)

    lab.fake.script = Endless()
    lab.forget_peak()
    before = lab.peak_kib()
    failed_or_gone(lab, Opt.GO, info_data())
    assert lab.peak_kib() - before < 8 << 10


@pytest.mark.parametrize(
    "strange",
    [
        lambda raw: go(Rep.INFO, struct.pack(">H", 999) + b"unknown") + raw,
        lambda raw: go(Rep.INFO, struct.pack(">H", Info.NAME) + b"other name") + raw,
        lambda raw: go(Rep.INFO, struct.pack(">H", Info.DESCRIPTION)) + raw,
    ],
    ids=["unknown_info", "canonical_name", "empty_description"],
)
def test_odd_but_legal(lab: Lab, strange: Callable[[bytes], bytes]) -> None:
    lab.fake.script = Replying(Opt.GO, strange(GRANTED))
    client = lab.tls()
    session = Session(client, client.go(infos=[1, 2, 3]), {})
    session.check()
    session.disc()
