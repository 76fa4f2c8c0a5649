"""Meta context queries whose lengths do not add up: ERR_INVALID, and what was set is gone (H11)."""

from __future__ import annotations

import struct

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.rawclient import Cmd, Err, Opt, Rep, meta_data

GOOD = b"base:allocation"
MALFORMED = {
    "empty": b"",
    "no_count": meta_data()[:-4],
    "half_a_count": meta_data()[:-2],
    "count_without_query": meta_data(b"", [], count=1),
    "count_one_too_many": meta_data(b"", [GOOD], count=2),
    "count_one_too_few": meta_data(b"", [GOOD, GOOD], count=1),
    "count_of_2^32-1": meta_data(b"", [GOOD], count=0xFFFFFFFF),
    "query_past_the_end": meta_data(b"", [], count=1) + struct.pack(">I", 99) + GOOD,
    "query_of_2^32-1": meta_data(b"", [], count=1) + struct.pack(">I", 0xFFFFFFFF) + GOOD,
    "query_length_cut": meta_data(b"", [], count=1) + b"\0\0",
    "bytes_behind": meta_data(b"", [GOOD]) + b"\0",
    "name_past_the_end": struct.pack(">I", 50) + meta_data(b"", [GOOD]),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("opt", [Opt.SET_META_CONTEXT, Opt.LIST_META_CONTEXT])
def test_invalid(lab: Lab, opt: int, data: bytes) -> None:
    client = lab.tls()
    client.ask_structured()
    (reply,) = client.ask(opt, data)
    assert reply.type == Rep.ERR_INVALID
    assert client.set_contexts([GOOD])  # in step


def test_a_failed_set_forgets_the_one_before(lab: Lab) -> None:
    """P:1475: it replaces all previous contexts, "including when this command fails"."""
    client = lab.tls()
    client.ask_structured()
    assert client.set_contexts([GOOD])
    assert client.verdict(Opt.SET_META_CONTEXT, MALFORMED["count_one_too_many"]) == Rep.ERR_INVALID
    session = Session(client, client.go(), {})
    assert session.ask(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL
    session.check()


def test_set_before_structured_reply(lab: Lab) -> None:
    client = lab.tls()
    assert client.verdict(Opt.SET_META_CONTEXT, meta_data(b"", [GOOD])) == Rep.ERR_INVALID
    client.ask_structured()
    session = Session(client, client.go(), {})
    assert session.ask(Cmd.BLOCK_STATUS, 0, 4096).error == Err.EINVAL


@pytest.mark.parametrize(
    "query", [b"no colon", b":", b":leaf", b"", b"x-nobody:knows", b"base:", b"base:unknown"]
)
def test_queries_that_select_nothing(lab: Lab, query: bytes) -> None:
    """Unknown ones MUST be ignored, malformed ones MAY be invalid; neither selects anything."""
    client = lab.tls()
    client.ask_structured()
    (reply,) = client.ask(Opt.SET_META_CONTEXT, meta_data(b"", [query]))
    namespace, colon, _ = query.partition(b":")
    allowed = {Rep.ACK} if namespace and colon else {Rep.ACK, Rep.ERR_INVALID}
    assert reply.type in allowed
    assert client.set_contexts([GOOD])


def test_query_longer_than_a_string_may_be(lab: Lab) -> None:
    client = lab.tls()
    client.ask_structured()
    (reply,) = client.ask(Opt.SET_META_CONTEXT, meta_data(b"", [b"x-a:" + b"q" * 4093]))
    assert reply.type in (Rep.ACK, Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
    assert client.set_contexts([GOOD])


def test_very_many_queries(lab: Lab) -> None:
    client = lab.tls()
    client.ask_structured()
    (reply,) = client.ask(
        Opt.SET_META_CONTEXT, meta_data(b"", [b"x-a:%d" % i for i in range(3000)])
    )
    assert reply.type in (Rep.ACK, Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
    assert client.set_contexts([GOOD])
