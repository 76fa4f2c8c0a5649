"""Bytes that a peer may send, from honest to noise, and what an upstream may answer."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from gateway.nbd.constants import Opt, Rep
from gateway.nbd.handshake import Handshake
from gateway.nbd.pairing import (
    Acked,
    Contexts,
    Granted,
    Listed,
    ListExports,
    Open,
    QueryContexts,
    Refused,
    Terms,
    Unavailable,
    UseStructuredReplies,
)
from gateway.nbd.wire import BlockSizes, ListedExport, MetaContext
from tests.nbd.support import (
    ALL_FEATURES,
    MIB,
    REQUEST,
    REQUEST_MAGIC,
    Reply,
    Req,
    Tf,
    context,
    info_block_size,
    info_data,
    info_export,
    info_text,
    listed,
    meta_data,
    option,
    option_reply,
    terms,
)

# Where `support.cut` cuts. Many small numbers: the first bytes are headers.
cuts = st.lists(st.integers(0, 40) | st.integers(0, 10_000), max_size=6)
noise = st.binary(max_size=40)
texts = st.sampled_from(["", "disk", "other", "a/b", "ü", "n" * 300])
u16 = st.integers(0, 2**16 - 1)
u32 = st.sampled_from([0, 1, 5, 8, 12, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
u64 = st.sampled_from([0, 1, 512, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)


def streams(
    good: st.SearchStrategy[bytes], *bad: st.SearchStrategy[bytes]
) -> st.SearchStrategy[bytes]:
    """Some good messages, one behind the other, and then perhaps some that are not so good."""
    some_good = st.lists(good, max_size=10).map(b"".join)
    some_bad = st.lists(st.one_of(good, *bad), max_size=3).map(b"".join)
    return st.tuples(some_good, st.just(b"") | some_bad).map(b"".join)


# -- a client's options

option_numbers = st.sampled_from([*Opt, 0, 77, 2**32 - 1])
info_requests = st.builds(info_data, texts, st.lists(st.sampled_from([0, 1, 2, 3, 99]), max_size=4))
meta_queries = st.builds(
    meta_data, texts, st.lists(st.sampled_from(["base:", "x-a:b", "q"]), max_size=3)
)
good_options = st.one_of(
    st.builds(option, st.sampled_from([Opt.LIST, Opt.STRUCTURED_REPLY, 77, Opt.ABORT])),
    st.builds(option, st.sampled_from([Opt.INFO, Opt.INFO, Opt.INFO, Opt.GO]), info_requests),
    st.builds(option, st.sampled_from([Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT]), meta_queries),
    st.just(option(Opt.STRUCTURED_REPLY)),
)
odd_options = st.builds(option, option_numbers, info_requests | meta_queries | noise)
lying_options = st.builds(
    lambda number, data, length: option(number, data, length=length),
    option_numbers,
    info_requests | noise,
    u32,
)
option_streams = streams(good_options | odd_options, odd_options, lying_options, noise)

client_flags = st.sampled_from([0, 1, 2, 3]).map(lambda flags: struct.pack(">I", flags))
greeting_answers = st.tuples(client_flags | noise, noise).map(b"".join)

# -- an upstream's answers

names = st.sampled_from(["base:allocation", "x-a:b"])
refused = st.builds(Refused, st.sampled_from([one for one in Rep if one >= 1 << 31]) | u32)
block_sizes = st.sampled_from([None, BlockSizes(), BlockSizes(512, 4096, 65536)])
other_infos = st.lists(
    st.sampled_from([(1, info_text(1, "disk")), (2, info_text(2, "ü")), (99, b"\0\x63")]),
    max_size=3,
).map(tuple)
answers = st.fixed_dictionaries(
    {
        UseStructuredReplies: st.just(Acked()) | refused | st.just(Unavailable()),
        ListExports: st.builds(
            Listed, st.lists(st.builds(ListedExport, texts, texts), max_size=3).map(tuple)
        )
        | refused
        | st.just(Unavailable()),
        Open: st.builds(Granted, st.integers(0, 2**63 - 1), u16, block_sizes, other_infos)
        | refused
        | st.just(Unavailable()),
        QueryContexts: st.builds(
            Contexts, st.lists(st.builds(MetaContext, u32, names), max_size=3).map(tuple)
        )
        | refused
        | st.just(Unavailable()),
    }
)

# -- an upstream's handshake

QUESTIONS = {
    Opt.STRUCTURED_REPLY: Handshake.structured_reply,
    Opt.STARTTLS: Handshake.starttls,
    Opt.LIST: Handshake.list_exports,
    Opt.INFO: lambda machine: machine.info("disk", (3,)),
    Opt.GO: lambda machine: machine.go("disk", (3,)),
    Opt.LIST_META_CONTEXT: lambda machine: machine.list_meta_context("disk", ()),
    Opt.SET_META_CONTEXT: lambda machine: machine.set_meta_context("disk", ("base:",)),
    Opt.ABORT: Handshake.abort,
    Opt.EXPORT_NAME: lambda machine: machine.export_name("disk"),
}
reply_data = st.one_of(
    noise,
    st.builds(listed, texts, texts),
    st.builds(context, u32, names),
    st.builds(info_export, u64, u16),
    st.builds(info_block_size, u32, u32, u32),
    st.just(info_block_size(512, 4096, 65536)),
    st.builds(info_text, st.sampled_from([1, 2, 99]), texts),
)
greetings = st.one_of(
    st.builds(lambda flags: b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags), u16),
    st.builds(
        lambda size, flags: b"NBDMAGIC" + struct.pack(">QQI124x", 0x420281861253, size, flags),
        u64,
        u32,
    ),
    noise.map(lambda raw: b"NBDMAGIC" + raw),
    noise,
)


FITTING = {Opt.LIST: Rep.SERVER, Opt.INFO: Rep.INFO, Opt.GO: Rep.INFO}
_INFOS = [info_export(MIB, 1), info_block_size(512, 4096, 65536), info_text(1, "x"), b"\0\x63?"]
GOOD_DATA = {
    Opt.LIST: [listed("disk", "a disk"), listed("")],
    Opt.INFO: _INFOS,
    Opt.GO: _INFOS,
    Opt.LIST_META_CONTEXT: [context(0, "base:allocation"), context(0, "x-a:b")],
    Opt.SET_META_CONTEXT: [context(1, "base:allocation"), context(2, "x-a:b")],
}


def replies_to(number: int) -> st.SearchStrategy[bytes]:
    """What an upstream may say to this option, mostly replies to it."""
    kind = FITTING.get(number, Rep.META_CONTEXT)
    ends = st.sampled_from([Reply(number, 1), Reply(number, Rep.ERR_UNSUP)]).map(Reply.pack)
    fitting = st.builds(option_reply, st.just(number), st.just(kind), reply_data)
    good = st.sampled_from(GOOD_DATA.get(number, [b""])).map(
        lambda data: option_reply(number, kind, data)
    )
    replies = st.builds(option_reply, st.just(number), st.sampled_from([*Rep, 77]), reply_data)
    others = st.builds(option_reply, option_numbers, st.sampled_from([*Rep]), reply_data)
    answer = struct.pack(">QH", MIB, 1)
    return st.one_of(
        st.tuples(st.lists(good, max_size=4).map(b"".join), ends).map(b"".join),
        st.tuples(st.lists(good, max_size=4).map(b"".join), fitting, ends).map(b"".join),
        st.tuples(streams(good, fitting, replies, others, noise), ends).map(b"".join),
        st.sampled_from([answer, answer + bytes(124), answer + bytes(123)]),
    )


# -- transmission

GENEROUS = terms(MIB, structured=True, contexts=(MetaContext(1, "x-a:1"), MetaContext(3, "x-a:3")))
features = st.sets(st.sampled_from(list(Tf))).map(sum)
contexts = st.sets(st.integers(0, 3), max_size=2).map(
    lambda ids: tuple(MetaContext(number, f"x-a:{number}") for number in sorted(ids))
)
some_sizes = st.sampled_from(
    [
        BlockSizes(),
        BlockSizes(512, 512, 512),
        BlockSizes(1, 512, 600),
        BlockSizes(8, 512, 2**32 - 1),
    ]
)
stingy_terms = st.builds(
    lambda size, flags, sizes: terms(size, flags, block_sizes=sizes),
    st.sampled_from([0, 1, 4096, 65536 + 1, 2**63 - 1]),
    features,
    some_sizes,
)
structured_terms = st.builds(
    lambda size, flags, sizes, which: terms(
        size, flags, structured=True, block_sizes=sizes, contexts=which
    ),
    st.sampled_from([4096, 65536 + 1, 2**63 - 1]),
    st.just(int(ALL_FEATURES)) | features,
    some_sizes,
    contexts,
)
some_terms: st.SearchStrategy[Terms] = st.one_of(
    st.just(GENEROUS), st.just(terms()), structured_terms, stingy_terms
)

kinds = st.sampled_from([0, 1, 0, 1, 3, 4, 5, 6, 7, 8, 9])
offsets = st.sampled_from([0, 0, 8, 512, 1024, 4095, 4096, 65535, 2**63, 2**64 - 1])
small_lengths = st.sampled_from([0, 1, 2, 8, 512, 512, 513, 600, 1024])
lengths = small_lengths | st.sampled_from([2**31, 2**32 - 1])
command_flags = st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 17, 64, 0x8000])
LEGAL_FLAGS = {0: (0, 4), 1: (0, 1), 4: (0, 1), 6: (0, 1, 2, 16, 19), 7: (0, 8)}


def _request(kind: int, offset: int, length: int, flags: int) -> Req:
    payload = b""
    if kind == 1:  # the payload tells each write from the others
        payload = bytes((offset + at) % 251 for at in range(length))
    elif kind == 3 and flags != 8:
        offset = length = 0
    return Req(kind, offset, length, 0, flags, payload)


# Reads and writes are small, since their payload has to be made.
odd_requests = st.builds(_request, kinds, offsets, small_lengths, command_flags) | st.builds(
    _request, st.sampled_from([3, 4, 5, 6, 7, 9]), offsets, lengths, command_flags
)
legal_requests = st.sampled_from([0, 0, 1, 1, 3, 4, 5, 6, 7]).flatmap(
    lambda kind: st.builds(
        _request,
        st.just(kind),
        st.sampled_from([0, 8, 512, 1024]),
        st.sampled_from([8, 512, 512]),
        st.sampled_from(LEGAL_FLAGS.get(kind, (0,))),
    )
)
requests = st.one_of(legal_requests, legal_requests, odd_requests)
raw_requests = st.builds(
    lambda kind, flags, offset, length: REQUEST.pack(REQUEST_MAGIC, flags, kind, 5, offset, length),
    u16 | kinds,
    command_flags,
    offsets | u64,
    lengths | u32,
)
request_streams = streams(requests.map(Req.pack), raw_requests, noise)
