"""Every number against the specification, written down from proto.md and not from the code."""

from __future__ import annotations

import enum

import pytest

from gateway.nbd import constants
from gateway.nbd.constants import (
    Chunk,
    ClientFlag,
    Cmd,
    CmdFlag,
    Error,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
    ReplyFlag,
    TransmissionFlag,
)

BIT_31 = 2**31
BIT_15 = 2**15

SPECIFIED: dict[type[enum.IntEnum], dict[str, int]] = {
    Opt: {  # "Option types"
        "EXPORT_NAME": 1,
        "ABORT": 2,
        "LIST": 3,
        "PEEK_EXPORT": 4,
        "STARTTLS": 5,
        "INFO": 6,
        "GO": 7,
        "STRUCTURED_REPLY": 8,
        "LIST_META_CONTEXT": 9,
        "SET_META_CONTEXT": 10,
        "EXTENDED_HEADERS": 11,
    },
    Rep: {  # "Option reply types"
        "ACK": 1,
        "SERVER": 2,
        "INFO": 3,
        "META_CONTEXT": 4,
        "ERR_UNSUP": BIT_31 + 1,
        "ERR_POLICY": BIT_31 + 2,
        "ERR_INVALID": BIT_31 + 3,
        "ERR_PLATFORM": BIT_31 + 4,
        "ERR_TLS_REQD": BIT_31 + 5,
        "ERR_UNKNOWN": BIT_31 + 6,
        "ERR_SHUTDOWN": BIT_31 + 7,
        "ERR_BLOCK_SIZE_REQD": BIT_31 + 8,
        "ERR_TOO_BIG": BIT_31 + 9,
        "ERR_EXT_HEADER_REQD": BIT_31 + 10,
    },
    Info: {"EXPORT": 0, "NAME": 1, "DESCRIPTION": 2, "BLOCK_SIZE": 3},
    Chunk: {  # "Structured reply types"
        "NONE": 0,
        "OFFSET_DATA": 1,
        "OFFSET_HOLE": 2,
        "BLOCK_STATUS": 5,
        "BLOCK_STATUS_EXT": 6,
        "ERROR": BIT_15 + 1,
        "ERROR_OFFSET": BIT_15 + 2,
    },
    Cmd: {  # "Request types"
        "READ": 0,
        "WRITE": 1,
        "DISC": 2,
        "FLUSH": 3,
        "TRIM": 4,
        "CACHE": 5,
        "WRITE_ZEROES": 6,
        "BLOCK_STATUS": 7,
        "RESIZE": 8,
    },
    Error: {  # "Error values"
        "EPERM": 1,
        "EIO": 5,
        "ENOMEM": 12,
        "EINVAL": 22,
        "ENOSPC": 28,
        "EOVERFLOW": 75,
        "ENOTSUP": 95,
        "ESHUTDOWN": 108,
    },
}

BITS: dict[type[enum.IntFlag], list[str]] = {  # bit 0 first
    HandshakeFlag: ["FIXED_NEWSTYLE", "NO_ZEROES"],
    ClientFlag: ["FIXED_NEWSTYLE", "NO_ZEROES"],
    TransmissionFlag: [
        "HAS_FLAGS",
        "READ_ONLY",
        "SEND_FLUSH",
        "SEND_FUA",
        "ROTATIONAL",
        "SEND_TRIM",
        "SEND_WRITE_ZEROES",
        "SEND_DF",
        "CAN_MULTI_CONN",
        "SEND_RESIZE",
        "SEND_CACHE",
        "SEND_FAST_ZERO",
        "BLOCK_STATUS_PAYLOAD",
    ],
    CmdFlag: ["FUA", "NO_HOLE", "DF", "REQ_ONE", "FAST_ZERO", "PAYLOAD_LEN"],
    ReplyFlag: ["DONE"],
}


@pytest.mark.parametrize(("values", "specified"), SPECIFIED.items(), ids=lambda v: str(v)[:20])
def test_values_are_those_of_the_specification(
    values: type[enum.IntEnum], specified: dict[str, int]
) -> None:
    assert {one.name: one.value for one in values} == specified


@pytest.mark.parametrize(("flags", "names"), BITS.items(), ids=lambda v: str(v)[:20])
def test_flags_are_those_of_the_specification(flags: type[enum.IntFlag], names: list[str]) -> None:
    assert {one.name: one.value for one in flags} == {name: 2**n for n, name in enumerate(names)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NBD_MAGIC", 0x4E42444D41474943),
        ("CLISERV_MAGIC", 0x00420281861253),
        ("IHAVEOPT", 0x49484156454F5054),
        ("OPTION_REPLY_MAGIC", 0x3E889045565A9),
        ("REQUEST_MAGIC", 0x25609513),
        ("SIMPLE_REPLY_MAGIC", 0x67446698),
        ("STRUCTURED_REPLY_MAGIC", 0x668E33EF),
        ("REP_ERROR_BIT", 2147483648),
        ("CHUNK_ERROR_BIT", 32768),
        ("MAX_STRING", 4096),
        ("MAX_UNADVERTISED_PAYLOAD", 33554432),
        ("UNLIMITED_PAYLOAD", 0xFFFFFFFF),
        ("MAX_EXTENTS", 1048576),
        ("MAX_MIN_BLOCK", 65536),
        ("MAX_EXPORT_SIZE", 0x7FFFFFFFFFFFFFFF),
        ("EXPORT_NAME_ZEROES", b"\0" * 124),
    ],
)
def test_magic_numbers_and_limits_are_those_of_the_specification(name: str, value: object) -> None:
    assert getattr(constants, name) == value


def test_magics_that_are_words_read_as_such() -> None:
    assert constants.NBD_MAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert constants.IHAVEOPT.to_bytes(8, "big") == b"IHAVEOPT"


def test_client_flags_answer_the_handshake_flags_bit_by_bit() -> None:
    assert {one.name: one.value for one in ClientFlag} == {
        one.name: one.value for one in HandshakeFlag
    }


def test_every_error_reply_and_no_other_has_bit_31() -> None:
    assert all((one >= BIT_31) == one.name.startswith("ERR_") for one in Rep)


def test_every_error_chunk_and_no_other_has_bit_15() -> None:
    assert all((one >= BIT_15) == one.name.startswith("ERROR") for one in Chunk)
