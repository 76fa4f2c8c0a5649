"""The server role inside TLS: option haggling, paired option by option with the upstream's.

proto.md, "Option types". Before TLS see `negotiation`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.errors import SessionEnd
from gateway.nbd.constants import (
    EXPORT_NAME_ZEROES,
    MAX_STRING,
    Info,
    Opt,
    Rep,
)
from gateway.nbd.negotiation import (
    INSIDE_TLS,
    MAX_OPTION_DATA,
    SHUTTING_DOWN,
    Allowance,
    Ask,
    Close,
    Effect,
    EnterTransmission,
    Option,
    Options,
    Send,
    refusal,
)
from gateway.nbd.pairing import (
    Acked,
    Answer,
    Contexts,
    Granted,
    Listed,
    ListExports,
    Open,
    QueryContexts,
    Question,
    Refused,
    Terms,
    Unavailable,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.policy import NO_SUCH_EXPORT, ExportPolicy, Replies, agree
from gateway.nbd.upgrades import Upgrade
from gateway.nbd.wire import (
    EXPORT_NAME_ANSWER,
    ListedExport,
    Malformed,
    MetaContext,
    decode_string,
    option_reply,
    pack_info_block_size,
    pack_info_export,
    pack_info_text,
    pack_listed_export,
    pack_meta_context,
    unpack_info_request,
    unpack_meta_query,
)

_WITH_DATA = frozenset({Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT})

CHUNKS_FIRST = "meta contexts need NBD_OPT_STRUCTURED_REPLY first"
EXTENDED_REQUIRED = "the NBD server wants extended headers for this"
UPSTREAM_UNAVAILABLE = "the NBD server behind this gateway cannot be reached"


class Haggling:
    """Option haggling proper: inside TLS, or with `tls` False in NOTLS mode.

    After an `Ask` effect nothing more is parsed until `answer` was called with the answer.
    """

    def __init__(
        self,
        policy: ExportPolicy,
        allowance: Allowance = INSIDE_TLS,
        *,
        tls: bool,
        no_zeroes: bool,
    ) -> None:
        self._policy = policy
        self._tls = tls
        self._no_zeroes = no_zeroes
        self._options = Options(MAX_OPTION_DATA, allowance)
        self._asked: Option | None = None  # the option that waits for the upstream
        self._asked_name = ""  # the export name in it, as the client spelt it
        self._structured = False  # for the client
        self._extended = False  # on both sides
        self._chunks_below = False  # the upstream has structured replies of its own
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_name: str | None = None  # the name they were selected for
        self._done = False
        self._shutdown = False
        self.refused = ""  # the last export that was refused, and why: for the log

    def receive(self, data: bytes) -> list[Effect]:
        """Take bytes from the client, TLS taken off. Raises PeerError."""
        self._options.inbox.append(data)
        return self._steps()

    def answer(self, answer: Answer) -> list[Effect]:
        """Take the upstream's answer to the last `Ask`."""
        message, self._asked = self._asked, None
        assert message is not None, "an answer that was not asked for"
        return [*self._answered(message, answer), *self._steps()]

    def shutdown(self) -> None:
        """From now on every option but ABORT is answered NBD_REP_ERR_SHUTDOWN."""
        self._shutdown = True

    def rest(self) -> bytes:
        """Bytes behind the last option: the first of the transmission phase."""
        inbox = self._options.inbox
        return inbox.take(len(inbox)) or b""

    def _steps(self) -> list[Effect]:
        effects: list[Effect] = []
        while self._asked is None and not self._done:
            if (message := self._options.next()) is None:
                break
            effects += self._step(message)
        return effects

    # -- options of the client

    def _step(self, message: Option) -> list[Effect]:
        if message.number == Opt.ABORT:  # its data, which it should not have, is ignored
            self._done = True
            return [Send(option_reply(Opt.ABORT, Rep.ACK)), Close(SessionEnd.ABORTED)]
        if message.number == Opt.EXPORT_NAME:
            return self._export_name(message)
        if self._shutdown:
            return [refusal(message, Rep.ERR_SHUTDOWN, SHUTTING_DOWN)]
        if message.number == Opt.SET_META_CONTEXT:
            # "replaces all previously-set metadata contexts (including when this command fails)"
            self._contexts, self._contexts_name = (), None
        try:
            return self._served(message)
        except Malformed as wrong:
            return [refusal(message, Rep.ERR_INVALID, str(wrong))]

    def _served(self, message: Option) -> list[Effect]:
        match message.number:
            case Opt.STARTTLS:
                if self._tls:
                    return [refusal(message, Rep.ERR_INVALID, "TLS is on already")]
                return [refusal(message, Rep.ERR_POLICY, "TLS is off on this listener")]
            case Opt.STRUCTURED_REPLY:
                _no_data(message)
                if self._extended:  # "takes precedence over this option"
                    return [refusal(message, Rep.ERR_EXT_HEADER_REQD, "extended headers are on")]
                if self._structured:
                    raise Malformed("structured replies are on already")
                return self._ask(message, UseStructuredReplies())
            case Opt.EXTENDED_HEADERS:
                _no_data(message)
                if self._extended:
                    raise Malformed("extended headers are on already")
                return self._ask(message, UseExtendedHeaders())
            case Opt.LIST:
                _no_data(message)
                return self._ask(message, ListExports())
            case _ if message.number in _WITH_DATA and message.length > MAX_OPTION_DATA:
                return [refusal(message, Rep.ERR_TOO_BIG, "too much data in one option")]
            case Opt.INFO | Opt.GO:
                request = unpack_info_request(message.data)
                return self._open(message, request.name, request.infos)
            case Opt.LIST_META_CONTEXT | Opt.SET_META_CONTEXT:
                return self._query_contexts(message)
            case _:
                return [refusal(message, Rep.ERR_UNSUP, "")]

    def _ask(self, message: Option, question: Question) -> list[Effect]:
        self._asked = message
        return [Ask(question)]

    def _export_name(self, message: Option) -> list[Effect]:
        """NBD_OPT_EXPORT_NAME has no error reply: every "no" closes the connection."""
        try:
            if message.length > MAX_STRING or self._shutdown or self._extended:
                raise Malformed("refused")
            return self._open(message, decode_string(message.data), ())
        except Malformed:
            return self._refuse_export_name()

    def _refuse_export_name(self) -> list[Effect]:
        self._done = True
        return [Close(SessionEnd.SHUTDOWN if self._shutdown else SessionEnd.REFUSED)]

    def _open(self, message: Option, name: str, infos: tuple[int, ...]) -> list[Effect]:
        export = self._policy.find(name)
        self._asked_name = name
        if export is None:  # not there, or not for this client: nobody is asked
            return self._no_export(message, Rep.ERR_UNKNOWN, NO_SUCH_EXPORT)
        once = tuple(dict.fromkeys(infos))  # "MUST NOT include any ... more than once", we neither
        go = message.number != Opt.INFO
        learn = Upgrade.BLOCK_SIZE in self._policy.upgrades and Info.BLOCK_SIZE not in once
        return self._ask(message, Open(export.name, once, go, learn_sizes=go and learn))

    def _query_contexts(self, message: Option) -> list[Effect]:
        select = message.number == Opt.SET_META_CONTEXT
        if select and not (self._structured or self._extended):
            raise Malformed(CHUNKS_FIRST)  # to list them is only a "SHOULD NOT": see `_queried`
        query = unpack_meta_query(message.data)
        export = self._policy.find(query.name)
        if export is None:
            return [refusal(message, Rep.ERR_UNKNOWN, NO_SUCH_EXPORT)]
        self._asked_name = query.name
        if self._structured and not self._chunks_below:  # ours: none to list or to select
            return [Send(option_reply(message.number, Rep.ACK))]
        return self._ask(message, QueryContexts(export.name, query.queries, select))

    # -- answers of the upstream

    def _answered(self, message: Option, answer: Answer) -> list[Effect]:
        match message.number:
            case Opt.STRUCTURED_REPLY:
                self._chunks_below = isinstance(answer, Acked)
                added = Upgrade.STRUCTURED_REPLIES in self._policy.upgrades
                self._structured = self._chunks_below or (added and isinstance(answer, Refused))
                if self._structured:
                    return [Send(option_reply(message.number, Rep.ACK))]
                # Also when there is no upstream: the refusal with the reason then meets the GO.
                return [refusal(message, Rep.ERR_UNSUP, "")]
            case Opt.EXTENDED_HEADERS:
                self._extended = isinstance(answer, Acked)
                if self._extended:  # "takes precedence over structured replies"
                    self._structured = False
                    return [Send(option_reply(message.number, Rep.ACK))]
                return [refusal(message, Rep.ERR_UNSUP, "")]
            case Opt.LIST:
                return self._listed(message, answer)
            case Opt.LIST_META_CONTEXT | Opt.SET_META_CONTEXT:
                return self._queried(message, answer)
            case _:
                return self._opened(message, answer)

    def _listed(self, message: Option, answer: Answer) -> list[Effect]:
        offered = self._policy.exports
        if isinstance(answer, Listed) and offered is None:
            return _list(answer.exports)
        if offered is None:
            match answer:
                case Unavailable():
                    return [refusal(message, Rep.ERR_UNKNOWN, UPSTREAM_UNAVAILABLE)]
                case Refused(kind=Rep.ERR_POLICY | Rep.ERR_PLATFORM | Rep.ERR_SHUTDOWN as kind):
                    # It knows how to list, and does not do it now.
                    return [refusal(message, Rep(kind), "the NBD server does not list its exports")]
                case _:
                    return _list((ListedExport("", ""),))
        named = tuple(ListedExport(one.name, "") for one in offered)
        if not isinstance(answer, Listed):  # it cannot list, or not now: we know the names
            return _list(named)
        found = {one.name: one for one in reversed(answer.exports)}
        listed = tuple(found[one.name] for one in offered if one.name in found)
        # A server need not list its only export, and the one in the settings is there for sure.
        return _list(listed or named if self._policy.table is None else listed)

    def _queried(self, message: Option, answer: Answer) -> list[Effect]:
        match answer:
            case Contexts(contexts):
                pass
            case Unavailable():
                return [refusal(message, Rep.ERR_UNKNOWN, UPSTREAM_UNAVAILABLE)]
            case Refused(kind=Rep.ERR_UNKNOWN):
                return [refusal(message, Rep.ERR_UNKNOWN, NO_SUCH_EXPORT)]
            case Refused(kind=Rep.ERR_EXT_HEADER_REQD):
                return [refusal(message, Rep.ERR_EXT_HEADER_REQD, EXTENDED_REQUIRED)]
            case Refused(kind=Rep.ERR_INVALID) if not (self._structured or self._extended):
                return [refusal(message, Rep.ERR_INVALID, CHUNKS_FIRST)]
            case _:  # an upstream without meta contexts has none to select: no error
                contexts = ()
        if message.number == Opt.SET_META_CONTEXT:
            self._contexts, self._contexts_name = contexts, self._asked_name
        else:  # "The metadata context ID in these replies is reserved and SHOULD be set to zero"
            contexts = tuple(one._replace(id=0) for one in contexts)
        replies = [
            option_reply(message.number, Rep.META_CONTEXT, pack_meta_context(one))
            for one in contexts
        ]
        return [Send(reply) for reply in (*replies, option_reply(message.number, Rep.ACK))]

    def _opened(self, message: Option, answer: Answer) -> list[Effect]:
        match answer:
            case Granted() as export:
                pass
            case Unavailable():
                return self._no_export(message, Rep.ERR_UNKNOWN, UPSTREAM_UNAVAILABLE)
            case Refused(kind=Rep.ERR_SHUTDOWN):
                return self._no_export(message, Rep.ERR_SHUTDOWN, "the NBD server shuts down")
            case Refused(kind=Rep.ERR_EXT_HEADER_REQD):
                return self._no_export(message, Rep.ERR_EXT_HEADER_REQD, EXTENDED_REQUIRED)
            case Refused(kind=Rep.ERR_POLICY | Rep.ERR_PLATFORM as kind):
                return self._no_export(message, Rep(kind), "the NBD server refuses this export")
            case _:
                return self._no_export(message, Rep.ERR_UNKNOWN, NO_SUCH_EXPORT)
        terms = self._terms(export, go=message.number != Opt.INFO)
        if message.number == Opt.EXPORT_NAME:
            zeroes = b"" if self._no_zeroes else EXPORT_NAME_ZEROES
            answer_data = EXPORT_NAME_ANSWER.pack(terms.size, terms.flags) + zeroes
            return [Send(answer_data), self._enter(terms)]
        effects: list[Effect] = [
            Send(reply) for reply in self._info_replies(message, export, terms)
        ]
        if message.number == Opt.GO:
            effects.append(self._enter(terms))
        return effects

    def _info_replies(self, message: Option, export: Granted, terms: Terms) -> list[bytes]:
        """All that the upstream said, in a fixed order, then ACK: GO repeats INFO.

        The upstream was asked what the client asked; what it volunteers is for the client as well.
        """
        mine = self._policy.find(self._asked_name)
        infos = [pack_info_export(terms.size, terms.flags)]
        if export.block_sizes is not None:
            infos.append(pack_info_block_size(terms.block_sizes))
        for kind, data in export.infos:
            if kind == Info.NAME and mine and self._policy.exports is not None:
                data = pack_info_text(Info.NAME, mine.name)
            infos.append(data)
        replies = [option_reply(message.number, Rep.INFO, info) for info in infos]
        return [*replies, option_reply(message.number, Rep.ACK)]

    def _terms(self, export: Granted, *, go: bool) -> Terms:
        return agree(
            self._policy,
            export,
            name=self._asked_name,
            replies=Replies(self._structured, self._extended, self._chunks_below),
            contexts=self._contexts if self._contexts_name == self._asked_name else (),
            go=go,
        )

    def _no_export(self, message: Option, kind: Rep, text: str) -> list[Effect]:
        self.refused = f"export {self._asked_name[:80]!r}: {text}"
        if message.number == Opt.EXPORT_NAME:
            return self._refuse_export_name()
        return [refusal(message, kind, text)]

    def _enter(self, terms: Terms) -> EnterTransmission:
        self._done = True
        return EnterTransmission(terms)


def _list(exports: Iterable[ListedExport]) -> list[Effect]:
    replies = [option_reply(Opt.LIST, Rep.SERVER, pack_listed_export(one)) for one in exports]
    return [Send(reply) for reply in (*replies, option_reply(Opt.LIST, Rep.ACK))]


def _no_data(message: Option) -> None:
    if message.length:
        raise Malformed("this option takes no data")
