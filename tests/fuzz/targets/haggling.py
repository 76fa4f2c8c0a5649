"""Haggling inside TLS: any options, and an upstream that says anything that one can say."""

from __future__ import annotations

import struct

from gateway.errors import PeerError
from gateway.nbd.haggling import Haggling
from gateway.nbd.negotiation import (
    MAX_OPTION_DATA,
    Allowance,
    Ask,
    Close,
    Effect,
    EnterTransmission,
    Send,
)
from gateway.nbd.pairing import (
    Acked,
    Answer,
    Granted,
    ListExports,
    Open,
    QueryContexts,
    Question,
    Refused,
    Terms,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.policy import Export, ExportPolicy
from gateway.nbd.transmission import Transmission
from gateway.nbd.upgrades import Upgrade
from tests.fuzz.source import Source, require
from tests.fuzz.targets import answers, options
from tests.fuzz.targets.options import (
    ABORT,
    ACK,
    ERROR_BIT,
    EXPORT_NAME,
    EXTENDED,
    GO,
    INFO,
    INFO_OPT,
    LIST,
    LIST_META,
    META,
    SERVER,
    SET_META,
    SHUTDOWN,
    STARTTLS,
    STRUCTURED,
    TLS_REQD,
    Heard,
    Reader,
)

_STEPS = 200
_KINDS = {LIST: SERVER, INFO_OPT: INFO, GO: INFO, LIST_META: META, SET_META: META}
_QUESTIONS: dict[int, tuple[type, ...]] = {
    EXPORT_NAME: (Open,),
    LIST: (ListExports,),
    INFO_OPT: (Open,),
    GO: (Open,),
    STRUCTURED: (UseStructuredReplies,),
    LIST_META: (QueryContexts,),
    SET_META: (QueryContexts,),
    EXTENDED: (UseExtendedHeaders,),
}
_POLICIES = (
    ExportPolicy(),
    ExportPolicy("disk", read_only=True),
    ExportPolicy("disk", upgrades=frozenset(Upgrade)),
    ExportPolicy(None),
    ExportPolicy(None, read_only=True, upgrades=frozenset(Upgrade)),
    ExportPolicy("disk", table=(Export("disk"), Export("ü", read_only=True))),
    ExportPolicy("disk", table=()),
    ExportPolicy("disk", replaceable=True, upgrades=frozenset({Upgrade.STRUCTURED_REPLIES})),
)
_ALLOWANCES = (Allowance(4096, 64 << 20), Allowance(5, 1000))


def haggling(data: bytes) -> Talk:
    """One client's haggling, until its end."""
    source = Source(data)
    talk = Talk(source)
    for _ in range(_STEPS):
        if talk.done or not source.more:
            break
        talk.step(source)
    return talk


class Talk:
    """A client, the machine, and an upstream."""

    def __init__(self, source: Source) -> None:
        self._policy = source.pick(_POLICIES)
        self._allowance = source.pick(_ALLOWANCES)
        how = source.u8()
        self._tls = not how & 1
        self._no_zeroes = bool(how & 2)
        self._machine = Haggling(
            self._policy, self._allowance, tls=self._tls, no_zeroes=self._no_zeroes
        )
        self._reader = Reader(stored=MAX_OPTION_DATA)
        self._stream = b""
        self._aborted = False
        self._due: list[Heard] = []  # options that are not answered
        self._question: Question | None = None
        self._answer: Answer | None = None
        self._granted = {STRUCTURED: False, EXTENDED: False}
        self._said_flags: int | None = None
        self._shutdown = False
        self.done = False
        self.terms: Terms | None = None
        self.said: list[bytes] = []

    def step(self, source: Source) -> None:
        match source.u8() % 8:
            case 0:
                self._hear(source.string())
            case 1 if source.u8() % 16 == 0:
                self._machine.shutdown()
                self._shutdown = True
            case 2 | 3:
                self._reply(source)
            case _:
                self._hear(options.option(source))
                if source.u8() & 1:
                    self._reply(source)

    def _reply(self, source: Source) -> None:
        if self._question is None:
            return
        question, self._question = self._question, None
        self._answer = answers.answer(question, source)
        self._take(lambda: self._machine.answer(self._answer))  # type: ignore[arg-type]

    def _hear(self, data: bytes) -> None:
        self._stream += data
        self._due += self._reader.read(data)
        self._take(lambda: self._machine.receive(data))

    def _take(self, act) -> None:  # type: ignore[no-untyped-def]
        try:
            effects = act()
        except PeerError as fault:
            require(fault.side == "client", "not the client's fault", fault)
            much = self._reader.too_much(self._allowance)
            require(much or self._reader.broken, "a fault that is none", fault)
            self.done = True
            return
        for at, effect in enumerate(effects):
            require(not self.done, "something behind the end", effects)
            self._effect(effect, last=at == len(effects) - 1)
        if not (self.done or self._question):
            require(not self._due, "an option without an answer", self._due)
            require(not self._reader.broken, "went on behind what is no option")

    # -- what the machine does

    def _effect(self, effect: Effect, *, last: bool) -> None:
        match effect:
            case Send(data):
                self.said.append(data)
                self._sent(effect)
            case Ask(question):
                require(last and self._question is None, "something behind a question", effect)
                self._asked(question)
            case EnterTransmission(terms):
                require(last, "something behind the end", effect)
                self._entered(terms)
            case Close():
                require(last, "something behind the end", effect)
                refused = self._due and self._due[0].number == EXPORT_NAME
                require(self._aborted or refused, "closed without a reason", effect)
                self.done = True
            case _:
                require(False, "an odd effect", effect)

    def _asked(self, question: Question) -> None:
        option = self._due[0]
        require(not self._shutdown or option.number == EXPORT_NAME, "asked while shutting down")
        require(isinstance(question, _QUESTIONS.get(option.number, ())), "odd", question, option)
        if isinstance(question, (Open, QueryContexts)):
            self._check_name(option, question.name)
        if isinstance(question, Open):
            require(question.go == (option.number != INFO_OPT), "another option", question)
            require(len(set(question.infos)) == len(question.infos), "twice", question)
        if isinstance(question, QueryContexts):
            require(question.select == (option.number == SET_META), "another option", question)
        self._question = question

    def _check_name(self, option: Heard, name: str) -> None:
        """Nobody is asked about an export that this client may not open."""
        asked = self._name_in(option)
        policy = self._policy
        if policy.table is not None:
            require(name == asked and name in {o.name for o in policy.table}, "not for it", name)
        elif policy.name is None:
            require(name == asked, "another export", name, asked)
        else:
            require(name == policy.name and asked in ("", policy.name), "not for it", asked)

    def _name_in(self, option: Heard) -> str:
        assert option.data is not None
        if option.number == EXPORT_NAME:
            return option.data.decode()
        (length,) = struct.unpack_from(">I", option.data)
        require(length <= len(option.data) - 4, "a name that was not there", option)
        return option.data[4 : 4 + length].decode()

    def _sent(self, effect: Send) -> None:
        require(self._due, "a reply to nothing", effect)
        option = self._due[0]
        if option.number == EXPORT_NAME:
            self._check_export_name(effect.data)
            return
        one = options.said(effect)
        require(one.number == option.number, "a reply to another option", one, option)
        if not one.last:
            fits = one.kind == _KINDS.get(option.number) and isinstance(
                self._answer, (Granted, Acked) if one.kind == INFO else object
            )
            require(fits, "a reply of another kind", one)
            if one.kind == INFO and one.data[:2] == b"\0\0":
                self._check_export(one.data[2:])
            return
        self._check_last(option, one)
        if not (option.number == GO and one.kind == ACK):
            self._due.pop(0)

    def _check_last(self, option: Heard, one: options.Said) -> None:
        number, kind = option.number, one.kind
        if number == ABORT:
            require(kind == ACK, "an abort that is refused")
            self._aborted = True
            return
        require(not self._shutdown or kind == SHUTDOWN or self._answer, "not shutting down", one)
        require(kind != TLS_REQD, "TLS is asked for inside TLS", one)
        if kind == ACK:
            require(number in _QUESTIONS, "an unknown option is served", one)
            if number in self._granted:
                self._grant(number)
            if number in (GO, INFO_OPT):
                require(isinstance(self._answer, Granted), "granted by nobody", self._answer)
                require(self._said_flags is not None, "no NBD_INFO_EXPORT")
        elif number in (GO, INFO_OPT):
            self._said_flags = None
        require(number != STARTTLS or kind & ERROR_BIT, "TLS twice")
        self._answer = None if number not in (GO,) else self._answer

    def _grant(self, number: int) -> None:
        helped = Upgrade.STRUCTURED_REPLIES in self._policy.upgrades and number == STRUCTURED
        agreed = isinstance(self._answer, Acked) or (helped and isinstance(self._answer, Refused))
        require(agreed, "granted what the upstream has not", number, self._answer)
        require(not self._granted[number] and not self._granted[EXTENDED], "granted twice")
        self._granted[number] = True
        if number == EXTENDED:
            self._granted[STRUCTURED] = False

    # -- exports

    def _check_export(self, data: bytes) -> None:
        size, flags = struct.unpack(">QH", data)
        granted = self._answer
        require(isinstance(granted, Granted), "an export of nobody", granted)
        assert isinstance(granted, Granted)
        require(size == granted.size, "another size", size)
        require(flags & 1, "no NBD_FLAG_HAS_FLAGS")
        require(not granted.flags & 2 or flags & 2, "read-only is gone", flags)
        require(not flags & ~0x1DFF, "flags that nobody carries", hex(flags))
        if self._policy.read_only:
            require(flags & 2, "may be written", hex(flags))
            require(not flags & 0x860, "writes of a read-only export", hex(flags))
        self._said_flags = flags

    def _check_export_name(self, data: bytes) -> None:
        require(len(data) == 10 + (0 if self._no_zeroes else 124), "another length", len(data))
        require(not any(data[10:]), "zeroes that are none")
        require(not self._granted[EXTENDED], "EXPORT_NAME with extended headers")
        self._check_export(data[:10])

    def _entered(self, terms: Terms) -> None:
        option = self._due[0]
        require(option.number in (GO, EXPORT_NAME), "entered by another option", option)
        require(int(terms.flags) == self._said_flags, "other flags than were said", terms)
        require(isinstance(self._answer, Granted), "entered without an upstream")
        require(terms.structured_replies == self._granted[STRUCTURED], "structured?", terms)
        require(terms.extended_headers == self._granted[EXTENDED], "extended?", terms)
        require(terms.export == self._name_in(option), "another export", terms)
        chunks = terms.structured_replies or terms.extended_headers
        require(chunks or not terms.contexts, "contexts without chunks", terms)
        assert isinstance(self._answer, Granted)
        found = self._policy.find(terms.export)
        require(found and (not found.read_only or terms.read_only), "may be written", terms)
        require(self._machine.rest() == self._stream[option.end :], "bytes are lost")
        Transmission(terms, resumable=self._policy.replaceable)
        self.terms, self.done = terms, True
