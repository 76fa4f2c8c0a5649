"""The client role: the handshake towards an upstream of any style, in lock step.

proto.md, "Handshake": oldstyle, newstyle and fixed newstyle are told apart by the first 16 bytes.
One method per option gives the bytes to send; `receive` gives the answer once it is whole.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gateway.errors import PeerError
from gateway.nbd.constants import (
    CLISERV_MAGIC,
    EXPORT_NAME_ZEROES,
    IHAVEOPT,
    MAX_STRING,
    NBD_MAGIC,
    REP_ERROR_BIT,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
    TransmissionFlag,
)
from gateway.nbd.pairing import Acked, Answer, Contexts, Granted, Listed, Refused
from gateway.nbd.wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_ANSWER,
    GREETING,
    HANDSHAKE_FLAGS,
    OLDSTYLE_REST,
    U16,
    BlockSizes,
    Inbox,
    ListedExport,
    Malformed,
    MetaContext,
    OptionReply,
    check_size,
    decode_string,
    option,
    pack_info_request,
    pack_meta_query,
    rep_name,
    unpack_info_block_size,
    unpack_info_export,
    unpack_listed_export,
    unpack_meta_context,
)

MAX_REPLY_DATA = 4 + 2 * MAX_STRING  # the largest legal reply: a name and a description
MAX_REPLIES = 10_000  # to one option: an upstream with more exports than that is no upstream
MAX_REPLY_BYTES = 4 << 20  # to one option, all replies together

# Plain ints: an operation on an IntFlag is a dozen calls. The bits are the same in both directions.
_FIXED_NEWSTYLE, _NO_ZEROES = int(HandshakeFlag.FIXED_NEWSTYLE), int(HandshakeFlag.NO_ZEROES)
_HAS_FLAGS = int(TransmissionFlag.HAS_FLAGS)


class Style(enum.Enum):
    """How an upstream shakes hands."""

    OLDSTYLE = "oldstyle"  # one export, no names, no options
    NEWSTYLE = "newstyle"  # a name, no options
    FIXED_NEWSTYLE = "fixed newstyle"


@dataclass(frozen=True, slots=True)
class Greeted:
    """The upstream's greeting is over. Send `reply` (empty for oldstyle)."""

    style: Style
    reply: bytes
    export: Granted | None  # oldstyle only: its transmission phase has begun


class Handshake:
    """One upstream's handshake. Send what a method returns, then feed `receive` until it answers.

    Only `export_name` may be used on an upstream that is not fixed newstyle, and nothing on an
    oldstyle one. After a PeerError the connection is of no more use.
    """

    def __init__(self) -> None:
        self._inbox = Inbox("upstream")
        self.style: Style | None = None
        self._zeroes = True
        self._asked: int | None = None  # the option under way
        self._collected: list[OptionReply] = []
        self._collected_bytes = 0

    def receive(self, data: bytes) -> Greeted | Answer | None:
        """Take bytes from the upstream. None while the answer is not whole.

        Raises PeerError when they are not NBD, or not an answer to what was asked.
        """
        self._inbox.append(data)
        result: Greeted | Answer | None
        if self.style is None:
            result = self._greeting()
        elif self._asked is None:
            raise PeerError("upstream", "bytes that nobody asked for")
        elif self._asked == Opt.EXPORT_NAME:
            result = self._export_name_answer()
        else:
            result = self._option_replies()
        if result is not None:
            self._asked = None
            if self._inbox:  # lock step: the next word is ours
                raise PeerError("upstream", "bytes that nobody asked for")
        return result

    def closed(self) -> PeerError:
        """The error to raise when the upstream closes instead of answering."""
        if self.style is None and not self._inbox:
            return PeerError("upstream", "closed during the handshake, before a greeting")
        return PeerError("upstream", "closed during the handshake")

    # -- what can be asked

    def structured_reply(self) -> bytes:
        """NBD_OPT_STRUCTURED_REPLY. Answers: Acked, Refused."""
        return self._ask(Opt.STRUCTURED_REPLY)

    def extended_headers(self) -> bytes:
        """NBD_OPT_EXTENDED_HEADERS. Answers: Acked, Refused."""
        return self._ask(Opt.EXTENDED_HEADERS)

    def starttls(self) -> bytes:
        """NBD_OPT_STARTTLS. Answers: Acked (then start TLS at once), Refused."""
        return self._ask(Opt.STARTTLS)

    def list_exports(self) -> bytes:
        """NBD_OPT_LIST. Answers: Listed, Refused."""
        return self._ask(Opt.LIST)

    def info(self, name: str, infos: tuple[int, ...]) -> bytes:
        """NBD_OPT_INFO. Answers: Granted, Refused."""
        return self._ask(Opt.INFO, pack_info_request(name, infos))

    def go(self, name: str, infos: tuple[int, ...]) -> bytes:
        """NBD_OPT_GO. Answers: Granted (transmission has begun), Refused."""
        return self._ask(Opt.GO, pack_info_request(name, infos))

    def list_meta_context(self, name: str, queries: tuple[str, ...]) -> bytes:
        """NBD_OPT_LIST_META_CONTEXT. Answers: Contexts, Refused."""
        return self._ask(Opt.LIST_META_CONTEXT, pack_meta_query(name, queries))

    def set_meta_context(self, name: str, queries: tuple[str, ...]) -> bytes:
        """NBD_OPT_SET_META_CONTEXT. Answers: Contexts, Refused."""
        return self._ask(Opt.SET_META_CONTEXT, pack_meta_query(name, queries))

    def abort(self) -> bytes:
        """NBD_OPT_ABORT. Answer: Acked, or the upstream just closes."""
        return self._ask(Opt.ABORT)

    def export_name(self, name: str) -> bytes:
        """NBD_OPT_EXPORT_NAME. Answer: Granted, or the upstream closes (its only "no")."""
        self._asked = Opt.EXPORT_NAME
        return option(Opt.EXPORT_NAME, name.encode())

    def _ask(self, number: Opt, data: bytes = b"") -> bytes:
        assert self.style is Style.FIXED_NEWSTYLE, "options need fixed newstyle"
        self._asked = number
        self._collected, self._collected_bytes = [], 0
        return option(number, data)

    # -- what comes back

    def _greeting(self) -> Greeted | None:
        """proto.md, "Oldstyle negotiation" and "Newstyle negotiation"."""
        expected = NBD_MAGIC.to_bytes(8, "big")
        begin = self._inbox.peek(GREETING.size)
        if (
            begin[:8] != expected[: len(begin)]
        ):  # said at once, not after 16 bytes that may not come
            raise PeerError("upstream", "not an NBD server")
        if len(begin) < GREETING.size:
            return None
        _, magic = GREETING.unpack(begin)
        if magic == CLISERV_MAGIC:
            return self._oldstyle()
        if magic != IHAVEOPT:
            raise PeerError("upstream", f"unexpected version of the NBD protocol ({magic:#018x})")
        if (raw_all := self._inbox.take(GREETING.size + HANDSHAKE_FLAGS.size)) is None:
            return None
        (flags,) = HANDSHAKE_FLAGS.unpack_from(raw_all, GREETING.size)
        self.style = Style.FIXED_NEWSTYLE if flags & _FIXED_NEWSTYLE else Style.NEWSTYLE
        self._zeroes = not flags & _NO_ZEROES
        # Unknown bits are not to be answered.
        reply = CLIENT_FLAGS.pack(flags & (_FIXED_NEWSTYLE | _NO_ZEROES))
        return Greeted(self.style, reply, None)

    def _oldstyle(self) -> Greeted | None:
        if (raw := self._inbox.take(GREETING.size + OLDSTYLE_REST.size)) is None:
            return None
        size, flags = OLDSTYLE_REST.unpack_from(raw, GREETING.size)
        self.style = Style.OLDSTYLE
        # The upper half are handshake flags, which an oldstyle server must not set.
        return Greeted(self.style, b"", _granted(size, flags & 0xFFFF))

    def _export_name_answer(self) -> Granted | None:
        zeroes = len(EXPORT_NAME_ZEROES) if self._zeroes else 0
        if (raw := self._inbox.take(EXPORT_NAME_ANSWER.size + zeroes)) is None:
            return None
        return _granted(*EXPORT_NAME_ANSWER.unpack_from(raw))

    def _option_replies(self) -> Answer | None:
        while True:
            reply = self._inbox.take_option_reply(max_data=MAX_REPLY_DATA)
            if reply is None:
                return None
            if reply.option != self._asked:
                raise PeerError("upstream", f"a reply to option {reply.option}, not to ours")
            if reply.kind & REP_ERROR_BIT:
                return Refused(reply.kind, reply.data[:MAX_STRING].decode(errors="replace"))
            if reply.kind == Rep.ACK:
                try:
                    return self._acked()
                except Malformed as wrong:
                    raise PeerError("upstream", str(wrong)) from None
            self._collect(reply)

    def _collect(self, reply: OptionReply) -> None:
        self._collected_bytes += len(reply.data)
        if len(self._collected) >= MAX_REPLIES or self._collected_bytes > MAX_REPLY_BYTES:
            raise PeerError("upstream", "too many replies to one option")
        self._collected.append(reply)

    def _acked(self) -> Answer:
        match self._asked:
            case Opt.LIST:
                return Listed(tuple(self._listed()))
            case Opt.INFO | Opt.GO:
                return self._described()
            case Opt.LIST_META_CONTEXT | Opt.SET_META_CONTEXT:
                return Contexts(tuple(self._contexts()))
            case _:
                if self._collected:
                    raise Malformed(f"{rep_name(self._collected[0].kind)} where only an ACK fits")
                return Acked()

    def _listed(self) -> list[ListedExport]:
        return [unpack_listed_export(data) for data in self._all_of(Rep.SERVER)]

    def _contexts(self) -> list[MetaContext]:
        contexts = [unpack_meta_context(data) for data in self._all_of(Rep.META_CONTEXT)]
        for one in contexts:  # "a namespace, followed by a colon, followed by a leaf-name"
            if one.name.find(":") < 1:
                raise Malformed("a meta context without a namespace")
        if self._asked == Opt.SET_META_CONTEXT and len({one.id for one in contexts}) != len(
            contexts
        ):
            raise Malformed("one id for two meta contexts")
        return contexts

    def _described(self) -> Granted:
        export: tuple[int, int] | None = None
        block_sizes = None
        others = []
        for data in self._all_of(Rep.INFO):
            if len(data) < U16.size:
                raise Malformed("NBD_REP_INFO without a type")
            (kind,) = U16.unpack_from(data)
            if kind == Info.EXPORT:
                export = unpack_info_export(data)
            elif kind == Info.BLOCK_SIZE:
                block_sizes = unpack_info_block_size(data)
            else:
                if kind in (Info.NAME, Info.DESCRIPTION):
                    decode_string(data[U16.size :])
                others.append((kind, data))
        if export is None:
            raise Malformed("no NBD_INFO_EXPORT before NBD_REP_ACK")
        return _granted(*export, block_sizes, tuple(others))

    def _all_of(self, kind: Rep) -> list[bytes]:
        for reply in self._collected:
            if reply.kind != kind:
                raise Malformed(f"{rep_name(reply.kind)} where {rep_name(kind)} fits")
        return [reply.data for reply in self._collected]


def _granted(
    size: int,
    flags: int,
    block_sizes: BlockSizes | None = None,
    infos: tuple[tuple[int, bytes], ...] = (),
) -> Granted:
    """A Granted whose size and flags are fit to be relied on. Raises PeerError."""
    try:
        check_size(size)
    except Malformed as wrong:
        raise PeerError("upstream", str(wrong)) from None
    if not flags & _HAS_FLAGS:
        flags = 0
    return Granted(size, flags, block_sizes, infos)
