"""A session's way with `Haggling`: every `Ask` is answered before anything else happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.nbd.haggling import Haggling
from gateway.nbd.negotiation import Ask, Effect, EnterTransmission
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
    Terms,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.wire import ListedExport, MetaContext
from tests.nbd.support import ALL_FEATURES, MIB, said

ALLOCATION = MetaContext(7, "base:allocation")


def willing(question: Question) -> Answer:
    """An upstream with everything, and one export, the default one."""
    match question:
        case UseStructuredReplies() | UseExtendedHeaders():
            return Acked()
        case ListExports():
            return Listed((ListedExport("", ""),))
        case Open():
            return Granted(MIB, ALL_FEATURES)
        case QueryContexts():
            return Contexts((ALLOCATION,))


class Front:
    """`questions` is what the upstream was asked; `terms` are set once transmission begins."""

    def __init__(
        self,
        upstream: Answer | Callable[[Question], Answer] = willing,
        *,
        policy: ExportPolicy | None = None,
        tls: bool = True,
        no_zeroes: bool = True,
    ) -> None:
        self.machine = Haggling(policy or ExportPolicy(), tls=tls, no_zeroes=no_zeroes)
        self.upstream = upstream
        self.questions: list[Question] = []
        self.terms: Terms | None = None

    def act(self, effects: list[Effect]) -> list[Effect]:
        """All that follows, the questions left out."""
        done = []
        while effects:
            effect = effects.pop(0)
            if isinstance(effect, Ask):
                assert not effects, "nothing may follow a question that has no answer yet"
                self.questions.append(effect.question)
                answer = self.upstream
                effects = self.machine.answer(
                    answer(effect.question) if callable(answer) else answer
                )
                continue
            if isinstance(effect, EnterTransmission):
                self.terms = effect.terms
            done.append(effect)
        return done

    def effects(self, *pieces: bytes) -> list[Effect]:
        return [effect for piece in pieces for effect in self.act(self.machine.receive(piece))]

    def say(self, *pieces: bytes) -> list[object]:
        return said(self.effects(*pieces))


def say(pieces: Iterable[bytes], upstream: Answer | Callable[[Question], Answer] = willing,
        **more: object) -> list[object]:  # fmt: skip
    """What a new front says to these bytes."""
    return Front(upstream, **more).say(*pieces)  # type: ignore[arg-type]
