"""Holds what was seen through the gateway against what was seen directly. Each function returns
the faults that it finds, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.interop.comparison import Answers, Seen, Way
from tests.interop.questions import Request
from tests.interop.rules import (
    NO_CONTEXTS,
    UNKNOWN_OPTION,
    Facts,
    Refusals,
    chunks_fault,
    facts,
)

_JSON_FACTS = {  # nbdinfo's words for what tests/interop/probe.py calls otherwise
    "is_read_only": "is read_only",
    "block_size_maximum": "block maximum",
    **{f"can_{name}": f"can {name}" for name in ("df", "fast_zero", "flush", "fua", "zero")},
}


def unequal(question: str, wanted: Any, seen: Any) -> Iterator[str]:
    """The differences, each as deep inside as it goes."""
    if isinstance(wanted, dict) and isinstance(seen, dict):
        for key in {**wanted, **seen}:
            yield from unequal(f"{question}: {key}", wanted.get(key), seen.get(key))
    elif wanted != seen:
        yield f"{question}: {_short(wanted)} is due, but through the gateway: {_short(seen)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 4000 else text[:4000]


def has_options(direct: Seen) -> bool:
    """Whether the upstream speaks fixed newstyle. The gateway itself always does."""
    return direct.options.get("list", ["ENOTSUP"])[0] != "ENOTSUP"


# ---------------------------------------------------------------- nbdinfo


def in_nbdinfo(
    direct: Answers, through: Answers, upgrades: tuple[str, ...], *, options: bool
) -> list[str]:
    """`options`: whether the upstream has any. If not, the gateway still has, and a list."""
    wanted = dict(direct)
    wanted["--json"] = _document(direct["--json"], upgrades)
    wanted["--json --list"] = _document(direct["--json --list"], upgrades)
    if not options:
        wanted["--json"]["protocol"] = "newstyle-fixed"
        (export,) = wanted["--json"]["exports"]
        listed = {key: value for key, value in export.items() if key != "content"}
        wanted["--json --list"] = wanted["--json"] | {"exports": [listed]}
    seen = {flags: _without_empty_contexts(answer) for flags, answer in through.items()}
    return list(unequal("nbdinfo", wanted, seen))


def _without_empty_contexts(document: Any) -> Any:
    """No meta contexts are none, whether the server knows of such or not: `rules.NO_CONTEXTS`."""
    if isinstance(document, dict):
        for export in document["exports"]:
            if export.get("contexts") == []:
                del export["contexts"]
    return document


def _document(document: Answers, upgrades: tuple[str, ...]) -> Answers:
    if not isinstance(document, dict):
        return document  # an error
    exports = []
    for export in document["exports"]:
        direct = {ours: export.get(its, 0) for its, ours in _JSON_FACTS.items()}
        told = facts(direct | {"structured": document["structured"]}, upgrades)
        known = {its: told[ours] for its, ours in _JSON_FACTS.items() if its in export}
        exports.append(export | known)
        if told["structured"] and not document["structured"]:
            exports[-1]["contexts"] = []
    structured = document["structured"] or "structured-replies" in upgrades
    told_document = document | {"structured": structured, "exports": exports}
    return dict(_without_empty_contexts(told_document))


# ---------------------------------------------------------------- options


def in_options(way: Way, direct: Seen, through: Seen, upgrades: tuple[str, ...]) -> list[str]:
    """The differences in what the negotiation says."""
    told = facts(direct.facts, upgrades, structured=way.structured)
    found = list(unequal(f"{way.name}, facts", told, through.facts))
    if not way.options:
        return found
    if has_options(direct):
        wanted = {
            question: _option(question, answer, through.options.get(question), told, direct.facts)
            for question, answer in direct.options.items()
        }
    else:
        wanted = _options_of_our_own(way, direct, through, upgrades)
    return [*found, *unequal(f"{way.name}, options", wanted, through.options)]


def _option(question: str, answer: Any, seen: Any, told: Facts, direct: Facts) -> Any:
    """What is due through the gateway, where `answer` is the upstream's."""
    if isinstance(answer, dict):
        return answer | {key: told[key] for key in answer if direct[key] != told[key]}
    if question.startswith("contexts of "):
        if told["structured"] and not direct["structured"]:
            return NO_CONTEXTS  # nobody could use them
        if answer == UNKNOWN_OPTION and seen == NO_CONTEXTS:
            return seen
    return answer


def _options_of_our_own(
    way: Way, direct: Seen, through: Seen, upgrades: tuple[str, ...]
) -> Answers:
    """The gateway's answers to options for an upstream that has none."""
    told = facts(direct.facts, upgrades, structured=way.structured)
    wanted = dict(through.options)
    wanted["list"] = [1, [["", ""]]]
    for question in through.options:
        if question == "info ''" or question == "opened":
            wanted[question] = told
        elif question.startswith("info ") and through.options[question] != "ENOENT":
            wanted[question] = told  # the upstream takes any name; an oldstyle one knows none
        elif question.startswith("contexts of ") and told["structured"]:
            wanted[question] = NO_CONTEXTS
    return wanted


# ---------------------------------------------------------------- requests


def passed_on(way: Way, direct: Facts, upgrades: tuple[str, ...]) -> list[Request]:
    """The requests that the gateway does not refuse: those that a direct client sends, too."""
    refusals = Refusals(facts(direct, upgrades, structured=way.structured))
    return [request for request in way.requests if not refusals.of(request)]


def in_requests(way: Way, direct: Seen, through: Seen, upgrades: tuple[str, ...]) -> list[str]:
    """The differences in the answers to requests. `direct` has answers to `passed_on` ones."""
    told = facts(direct.facts, upgrades, structured=way.structured)
    refusals = Refusals(told)
    converted = told["structured"] and not direct.facts["structured"]
    found = []
    for request in way.requests:
        seen = through.answers[request.number]
        errors = refusals.of(request)
        if errors:
            due: Any = " or ".join(sorted(errors))
            right = _error(seen) in errors
        elif refusals.answered(request):
            due, right = "success", _error(seen) is None
        else:
            due = direct.answers[request.number]
            right = seen == due
            if request.command == "read chunks" and (converted or due[1] == "by hand"):
                fault = chunks_fault(request, seen[1], ours=converted)
                right = seen[0] == due[0] and (not fault or _error(seen) is not None)
                due = f"{due[0]}, {fault}"
        if not right:
            found += unequal(f"{way.name}, {request}", due, seen)
    return found


def _error(answer: Any) -> str | None:
    """The error in an answer, None if it is a success."""
    word = answer[0] if isinstance(answer, list) and answer else answer
    return word if isinstance(word, str) and word.isupper() else None


def in_disks(direct: Sequence[Any], through: Sequence[Any]) -> list[str]:
    """The differences between two disks, of which each MiB was read."""
    pairs = enumerate(zip(direct, through, strict=True))
    return [f"the disks differ in MiB {i}" for i, (one, other) in pairs if one != other]
