"""The file of `--config`: rules and bounds, in TOML.

The rules of the flags are added to its rules; a bound that a flag sets is not asked for here.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from gateway.access import ExportRules, Rule, Rules, parse_network
from gateway.errors import SettingsError
from gateway.limits import checked
from gateway.settings import check_export_name


class _Export(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """One `[[export]]`."""

    name: str
    read_write: list[str] = []
    read_only: list[str] = []
    deny: list[str] = []


class _File(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """The whole file."""

    allow: list[str] = []
    deny: list[str] = []
    allow_from: list[str] = []
    deny_from: list[str] = []
    export: list[_Export] = []
    limits: dict[str, int | float] = {}


@dataclass(frozen=True, slots=True)
class Config:
    """What is in the file. `limits`: the bounds in it, by the names of the fields of `Limits`."""

    rules: Rules = field(default_factory=Rules)
    limits: Mapping[str, float] = field(default_factory=dict)


_MAX_BYTES: Final = 1 << 20  # ours: some ten thousand rules
_EXPORT, _LIMITS = "export", "limits"
_ANYBODY: Final = "*"
_KEYS: Final = [one.encode_name for one in msgspec.structs.fields(_File)]
_EXPORT_KEYS: Final = [one.encode_name for one in msgspec.structs.fields(_Export)]
_LISTS: Final = frozenset({*_KEYS, *_EXPORT_KEYS}) - {_EXPORT, _LIMITS, "name"}
# Where an empty list may stand: there it can mean one thing only.
_MAY_BE_EMPTY: Final = frozenset({"deny", "deny-from"})


def read_config(path: Path) -> Config:
    """What is in this file. Raises SettingsError that names it, and the place in it.

    Refused is also what could let in more than was meant: an empty file, which is what is left of
    one that is being written, and an empty list where to leave it out means "everybody".
    """
    flag = f"--config {path}:"
    document = _read(path)
    if not document:
        raise SettingsError(f"{flag} it is empty: leave --config out if there are no rules")
    for wrong in _mistakes(document):
        raise SettingsError(f"{flag} {wrong}")
    limits: dict[str, float] = {}
    if isinstance(table := document.get(_LIMITS), dict):
        limits = checked(table, lambda name: f"{flag} $.{_LIMITS}.{name}:")
    try:
        file = msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{flag} {error}") from None

    def rules(texts: list[str], place: str) -> tuple[Rule, ...]:
        return tuple(
            Rule.parse(f"{flag} $.{place}[{index}]:", text) for index, text in enumerate(texts)
        )

    def people(texts: list[str], place: str) -> tuple[Rule, ...]:
        return (Rule.anybody(),) if texts == [_ANYBODY] else rules(texts, place)

    exports: list[ExportRules] = []
    for index, one in enumerate(file.export):
        place = f"{_EXPORT}[{index}]"
        check_export_name(f"{flag} $.{place}.name", one.name)
        if any(one.name == other.name for other in exports):
            raise SettingsError(f"{flag} $.{place}.name: {one.name!r} is there already")
        if not (one.read_write or one.read_only):
            # Not everybody by itself: a file that was cut off here looks the same.
            raise SettingsError(
                f"{flag} $.{place}: who may open it? read-write = [RULE, ...] and read-only = "
                '[RULE, ...] say it; ["*"] is whoever may enter'
            )
        exports.append(
            ExportRules(
                one.name,
                read_write=people(one.read_write, f"{place}.read-write"),
                read_only=people(one.read_only, f"{place}.read-only"),
                deny=rules(one.deny, f"{place}.deny"),
            )
        )
    found = Rules(
        allow=rules(file.allow, "allow"),
        deny=rules(file.deny, "deny"),
        allow_from=tuple(
            parse_network(f"{flag} $.allow-from[{index}]:", text)
            for index, text in enumerate(file.allow_from)
        ),
        deny_from=tuple(
            parse_network(f"{flag} $.deny-from[{index}]:", text)
            for index, text in enumerate(file.deny_from)
        ),
        exports=tuple(exports),
    )
    return Config(found, limits)


def _read(path: Path) -> Mapping[str, Any]:
    """A file and nothing else: it is read again for each reload, and a pipe would be waited for."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SettingsError(f"--config: {path} is no regular file")
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"--config: cannot read {path}: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise SettingsError(f"--config: {path} has more than {_MAX_BYTES} bytes")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, or a number too long, are ValueError
        raise SettingsError(f"--config {path}: not TOML: {error}") from None


def _mistakes(document: Mapping[str, Any]) -> Iterator[str]:
    """What msgspec would not find, or not say so that it helps."""
    yield from _mistakes_in(document, _KEYS, "$")
    exports = document.get(_EXPORT)
    if isinstance(exports, dict):
        yield f"$.{_EXPORT}: a table goes in double brackets: [[{_EXPORT}]]"
    elif isinstance(exports, list):
        for index, one in enumerate(exports):
            if isinstance(one, dict):
                yield from _mistakes_in(one, _EXPORT_KEYS, f"$.{_EXPORT}[{index}]")


def _mistakes_in(table: Mapping[str, Any], known: Collection[str], place: str) -> Iterator[str]:
    for key, value in table.items():
        where = f"{place}.{key if re.fullmatch('[A-Za-z0-9_-]+', key) else repr(key)}"
        if key not in known:
            near = difflib.get_close_matches(key.lower().replace("_", "-"), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"keys here are {', '.join(known)}"
            yield f"{where}: unknown key; {hint}"
        elif isinstance(value, str) and key in _LISTS:
            yield f"{where}: a list is needed, also for one: {key} = [{json.dumps(value)}]"
        elif value == [] and key not in _MAY_BE_EMPTY:
            yield f"{where}: an empty list: does it mean nobody, or everybody? Leave the key out"
