"""Fixed structs, strings, the data of options and replies, and the inbox they are cut from."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from gateway.errors import GatewayError, PeerError
from gateway.nbd import wire
from gateway.nbd.wire import (
    BlockSizes,
    Inbox,
    InfoRequest,
    ListedExport,
    Malformed,
    MetaContext,
    MetaQuery,
    OptionHeader,
    OptionReply,
)
from tests.nbd.support import (
    DONE,
    all_cuts,
    chunk,
    context,
    info_block_size,
    info_data,
    info_export,
    info_text,
    listed,
    meta_data,
    option,
    option_reply,
    simple,
    string,
)

LIES = [0, 1, 5, 6, 4096, 4097, 2**31, 2**32 - 1]  # lengths that a peer may claim


# -- the sizes of fixed headers


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("GREETING", 16),
        ("HANDSHAKE_FLAGS", 2),
        ("CLIENT_FLAGS", 4),
        ("OLDSTYLE_REST", 152 - 16),
        ("EXPORT_NAME_ANSWER", 10),
        ("OPTION", 16),
        ("OPTION_REPLY", 20),
        ("REQUEST", 28),
        ("SIMPLE_REPLY", 16),
        ("CHUNK", 20),
        ("ERROR_CHUNK", 6),
        ("HOLE", 12),
    ],
)
def test_headers_are_as_wide_as_drawn(name: str, size: int) -> None:
    layout = getattr(wire, name)
    assert layout.size == size
    assert layout.format.startswith(">")


def test_headers_have_their_fields_in_the_order_drawn() -> None:
    assert wire.REQUEST.pack(1, 2, 3, 4, 5, 6).hex() == (
        "00000001" "0002" "0003" "0000000000000004" "0000000000000005" "00000006"
    )  # fmt: skip
    assert wire.SIMPLE_REPLY.pack(0x67446698, 5, 7) == simple(7, 5)
    assert wire.CHUNK.pack(0x668E33EF, DONE, 2, 7, 0) == chunk(7, 2, flags=DONE)


def test_disconnect_request_is_all_zero_but_for_magic_and_type() -> None:
    assert wire.disconnect_request().hex() == "25609513" "0000" "0002" + "00" * 20  # fmt: skip


# -- the inbox


def test_take_gives_all_or_nothing() -> None:
    inbox = Inbox("client")
    inbox.append(b"abc")
    assert inbox.take(4) is None
    assert len(inbox) == 3
    inbox.append(b"de")
    assert inbox.take(4) == b"abcd"
    assert inbox.take(1) == b"e"
    assert not inbox


def test_peek_leaves_everything() -> None:
    inbox = Inbox("client")
    inbox.append(b"abc")
    assert (inbox.peek(2), inbox.peek(9)) == (b"ab", b"abc")
    assert len(inbox) == 3


def test_skip_says_how_much_was_there() -> None:
    inbox = Inbox("client")
    inbox.append(b"abc")
    assert (inbox.skip(2), inbox.skip(2), inbox.skip(2)) == (2, 1, 0)


def test_option_header_is_taken_at_every_cut_and_its_data_stays() -> None:
    for pieces in all_cuts(option(77, length=2**32 - 1) + b"da"):
        inbox, found = Inbox("client"), None
        for piece in pieces:
            inbox.append(piece)
            found = found or inbox.take_option_header()
        assert found == OptionHeader(77, 2**32 - 1)
        assert inbox.peek(9) == b"da"


def test_option_reply_is_taken_whole_at_every_cut() -> None:
    for pieces in all_cuts(option_reply(3, 2, b"data") + b"rest"):
        inbox, found = Inbox("upstream"), None
        for piece in pieces:
            inbox.append(piece)
            found = found or inbox.take_option_reply(max_data=4)
        assert found == OptionReply(3, 2, b"data")
        assert inbox.peek(9) == b"rest"


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_wrong_magic_is_the_fault_of_the_inbox_side(side: str) -> None:
    for take, size in (("take_option_header", 16), ("take_option_reply", 20)):
        inbox = Inbox(side)  # type: ignore[arg-type]
        inbox.append(b"NBDMAGIC" + bytes(size - 8))
        with pytest.raises(PeerError, match="magic 0x4e42444d41474943") as caught:
            getattr(inbox, take)(**({"max_data": 0} if size == 20 else {}))
        assert caught.value.side == side


@pytest.mark.parametrize("length", [5, 4096, 2**31, 2**32 - 1])
def test_option_reply_too_long_is_refused_on_its_header_alone(length: int) -> None:
    inbox = Inbox("upstream")
    inbox.append(struct.pack(">QIII", 0x3E889045565A9, 3, 2, length))
    with pytest.raises(PeerError, match=f"{length} bytes"):
        inbox.take_option_reply(max_data=4)


# -- strings (H5)


@pytest.mark.parametrize("text", ["", "disk", "Größe \N{SNOWMAN}", "a\n\x1b[31m", "n" * 4096])
def test_string_of_legal_length_and_code_points(text: str) -> None:
    assert wire.decode_string(text.encode()) == text


@pytest.mark.parametrize(
    "raw",
    [
        b"n" * 4097,
        "\N{SNOWMAN}".encode() * 1366,  # 1366 code points, 4098 bytes
        b"\0",
        b"a\0b",
        b"\xff",
        b"\xc0\xaf",  # overlong
        b"\xed\xa0\x80",  # surrogate
        "\N{SNOWMAN}".encode()[:2],
    ],
)
def test_string_too_long_or_with_nul_or_not_utf8(raw: bytes) -> None:
    with pytest.raises(Malformed):
        wire.decode_string(raw)


def test_malformed_is_an_error_of_ours_and_names_no_side() -> None:
    assert issubclass(Malformed, GatewayError)
    assert not issubclass(Malformed, PeerError)


# -- what we send


@pytest.mark.parametrize(
    ("packed", "drawn"),
    [
        (wire.option(3), option(3)),
        (wire.option(7, b"data"), option(7, b"data")),
        (wire.option_reply(3, 1), option_reply(3, 1)),
        (wire.option_reply(3, 2**31 + 1, b"no"), option_reply(3, 2**31 + 1, b"no")),
        (wire.pack_info_request("", ()), bytes(6)),
        (wire.pack_info_request("ü", iter((3, 0))), info_data("ü", (3, 0))),
        (wire.pack_meta_query("", ()), bytes(8)),
        (wire.pack_meta_query("x", iter(("base:", "q:ü"))), meta_data("x", ("base:", "q:ü"))),
        (wire.pack_listed_export(ListedExport("ü", "ein Brett")), listed("ü", "ein Brett")),
        (wire.pack_meta_context(MetaContext(2**32 - 1, "base:a")), context(2**32 - 1, "base:a")),
        (wire.pack_info_export(2**63 - 1, 0x1FF), info_export(2**63 - 1, 0x1FF)),
        (wire.pack_info_block_size(BlockSizes(1, 512, 513)), info_block_size(1, 512, 513)),
        (wire.pack_info_text(1, "ü"), info_text(1, "ü")),
    ],
)
def test_message_is_packed_as_drawn(packed: bytes, drawn: bytes) -> None:
    assert packed == drawn


# -- what we are sent


@pytest.mark.parametrize(
    ("unpack", "data", "value"),
    [
        (wire.unpack_info_request, info_data("", ()), InfoRequest("", ())),
        (wire.unpack_info_request, info_data("ü", (3, 99)), InfoRequest("ü", (3, 99))),
        (wire.unpack_info_request, info_data("n" * 4096), InfoRequest("n" * 4096, ())),
        (wire.unpack_meta_query, meta_data("", ()), MetaQuery("", ())),
        (wire.unpack_meta_query, meta_data("x", ("a:", "")), MetaQuery("x", ("a:", ""))),
        (wire.unpack_meta_query, meta_data("", [""] * 99), MetaQuery("", ("",) * 99)),
        (wire.unpack_listed_export, listed(""), ListedExport("", "")),
        (wire.unpack_listed_export, listed("ü", "so"), ListedExport("ü", "so")),
        (wire.unpack_meta_context, context(9, "base:a"), MetaContext(9, "base:a")),
        (wire.unpack_info_export, info_export(2**63 - 1, 3), (2**63 - 1, 3)),
        (wire.unpack_info_block_size, info_block_size(1, 512, 512), BlockSizes(1, 512, 512)),
    ],
)
def test_data_is_read_as_drawn(
    unpack: Callable[[bytes], object], data: bytes, value: object
) -> None:
    assert unpack(data) == value


@pytest.mark.parametrize(
    ("unpack", "data"),
    [
        (wire.unpack_info_request, info_data("disk", (3,))),
        (wire.unpack_meta_query, meta_data("disk", ("base:", "x-y:z"))),
        (wire.unpack_listed_export, listed("disk")),
        (wire.unpack_meta_context, context(1, "")),
        (wire.unpack_info_export, info_export(1, 1)),
        (wire.unpack_info_block_size, info_block_size(1, 4096, 4096)),
    ],
)
def test_data_cut_short_anywhere_is_malformed(
    unpack: Callable[[bytes], object], data: bytes
) -> None:
    unpack(data)
    for length in range(len(data)):
        with pytest.raises(Malformed):
            unpack(data[:length])


@pytest.mark.parametrize(
    ("unpack", "data"),
    [
        (wire.unpack_info_request, info_data("disk", (3,))),
        (wire.unpack_meta_query, meta_data("disk", ("base:",))),
        (wire.unpack_info_export, info_export(1, 1)),
        (wire.unpack_info_block_size, info_block_size(1, 4096, 4096)),
    ],
)
def test_data_with_more_behind_it_is_malformed(
    unpack: Callable[[bytes], object], data: bytes
) -> None:
    """(H5): the data is exactly as long as its own fields say."""
    with pytest.raises(Malformed):
        unpack(data + b"\0")


@pytest.mark.parametrize("claim", [claim for claim in LIES if claim != 5])
def test_name_length_that_lies_is_malformed(claim: int) -> None:
    """(H5): checked before anything is allocated."""
    name = string("disk5", length=claim)
    with pytest.raises(Malformed):
        wire.unpack_info_request(name + bytes(2))
    with pytest.raises(Malformed):
        wire.unpack_meta_query(name + bytes(4))
    with pytest.raises(Malformed):
        wire.unpack_meta_query(meta_data("x")[:-4] + struct.pack(">I", 1) + name + b"\0")
    if claim > 5:
        with pytest.raises(Malformed):
            wire.unpack_listed_export(name)


@pytest.mark.parametrize("count", [1, 5, 6, 2**16 - 1])
def test_number_of_infos_that_lies_is_malformed(count: int) -> None:
    with pytest.raises(Malformed):
        wire.unpack_info_request(string("disk") + struct.pack(">H", count))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 4096, 2**31, 2**32 - 1])
def test_number_of_queries_that_lies_is_malformed(count: int) -> None:
    """(H11): no loop on a mere claim."""
    with pytest.raises(Malformed):
        wire.unpack_meta_query(string("") + struct.pack(">I", count) + string("base:"))


@pytest.mark.parametrize("size", [2**63, 2**64 - 1])
def test_export_size_that_is_a_negative_offset_is_malformed(size: int) -> None:
    """(U5, CVE-2023-5215)."""
    with pytest.raises(Malformed):
        wire.check_size(size)
    with pytest.raises(Malformed):
        wire.unpack_info_export(info_export(size))


@pytest.mark.parametrize("size", [0, 1, 512, 2**63 - 1])
def test_export_size_of_any_other_value_is_legal(size: int) -> None:
    wire.check_size(size)


# -- block sizes (H9, U5)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 512, 512),
        (1, 4096, 2**25),
        (512, 512, 2**32 - 1),
        (65536, 65536, 65536),
        (4096, 2**31, 2**31 + 1),
        (1, 512, 513),  # the maximum need not be a power of two
    ],
)
def test_block_sizes_within_the_size_constraints(sizes: tuple[int, int, int]) -> None:
    assert wire.unpack_info_block_size(info_block_size(*sizes)) == BlockSizes(*sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 512, 512),
        (3, 512, 512),
        (2**17, 2**17, 2**17),  # minimum above 2^16
        (1, 0, 512),
        (1, 256, 512),  # preferred below 2^9
        (1, 768, 1024),
        (4096, 2048, 4096),  # preferred below minimum
        (1, 4096, 4095),
        (1, 4096, 0),
    ],
)
def test_block_sizes_against_the_size_constraints(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(Malformed):
        wire.unpack_info_block_size(info_block_size(*sizes))


def test_block_sizes_default_to_those_of_the_specification() -> None:
    assert wire.DEFAULT_BLOCK_SIZES == BlockSizes(1, 2**12, 2**25)
    wire.DEFAULT_BLOCK_SIZES.check()


# -- words for logs


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (1, "NBD_REP_ACK"),
        (2**31 + 6, "NBD_REP_ERR_UNKNOWN"),
        (5, "reply type 0x5"),
        (2**31 + 77, "reply type 0x8000004d"),
    ],
)
def test_reply_types_have_names(kind: int, name: str) -> None:
    assert wire.rep_name(kind) == name
