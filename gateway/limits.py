"""The bounds of a gateway: how much of everything a client, or all of them, can make it spend.

Together they bound the memory of the whole process; README, "Limits", has the formula.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.errors import SettingsError


def _bound(
    default: float,
    unit: str,
    meaning: str,
    *,
    least: float = 1,
    most: float = 1e9,
    off: bool = False,
) -> Any:
    """A field of `Limits`. With `off`, 0 means that there is no such bound."""
    facts = {"unit": unit, "meaning": meaning, "least": least, "most": most, "off": off}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """One field a bound, named as in `--limit NAME=VALUE` and `[limits]`, with `-` for `_`.

    Times are in seconds, sizes in bytes. Raises SettingsError for a value out of its range.
    """

    clients_per_address: int = _bound(
        0, "clients", "at a time from one IP address; a hypervisor has many behind one", off=True
    )
    clients_per_identity: int = _bound(
        32, "clients", "at a time with one certificate's key, pre-shared key or uid", off=True
    )
    handshakes: int = _bound(
        50, "clients", "at a time that have not proved yet that they may open something", off=True
    )
    handshake_rate: float = _bound(
        100.0,
        "a second",
        "new clients from one IP address, after a first burst of twice as many",
        least=0.1,
        off=True,
    )
    plain_options: int = _bound(32, "options", "before TLS, and of clients that may open nothing")
    plain_option_bytes: int = _bound(
        1 << 20, "bytes", "of these options, none of them kept", least=64
    )
    options: int = _bound(4096, "options", "inside TLS; some clients ask for each export by itself")
    option_bytes: int = _bound(
        64 << 20, "bytes", "of options inside TLS, 64 KiB of them kept", least=64
    )
    requests_in_flight: int = _bound(
        1024, "requests", "of one session that the server has not answered; more wait"
    )
    bytes_in_flight: int = _bound(
        64 << 20, "bytes", "to be written and read by these; one request is always let through"
    )
    stall_timeout: float = _bound(
        120.0, "s", "that either peer may refuse to take bytes", least=0.1, off=True
    )
    idle_timeout: float = _bound(
        0.0, "s", "without a request and with none in flight", least=0.1, off=True
    )
    keepalive_idle: int = _bound(
        60, "s", "of silence before TCP looks whether the client is there", most=32767
    )
    keepalive_interval: int = _bound(10, "s", "from one such look to the next", most=32767)
    keepalive_count: int = _bound(
        6,
        "looks",
        "without an answer, and the client is gone; with user-timeout, that decides",
        most=127,
    )
    user_timeout: float = _bound(
        120.0,
        "s",
        "that a client's TCP may acknowledge nothing, or have no room for more",
        most=2e6,
        off=True,
    )

    def __post_init__(self) -> None:
        for key in _FIELDS:
            if wrong := _objection(key, getattr(self, key)):
                raise SettingsError(f"--limit {option_name(key)}: {wrong}")

    @classmethod
    def of(cls, texts: Iterable[str], file: Mapping[str, float] | None = None) -> Limits:
        """From `NAME=VALUE` of the flags, which win, and what `checked` gave of a file.

        Raises SettingsError.
        """
        values: dict[str, Any] = dict(file or {})
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals:
                raise SettingsError(f"--limit {shown(text)}: it is NAME=VALUE")
            try:
                number: object = int(value) if value.lstrip("+-").isdecimal() else float(value)
            except ValueError:
                raise SettingsError(
                    f"--limit {shown(text)}: {shown(repr(value))} is no number"
                ) from None
            values |= checked({name: number}, lambda name: f"--limit {name}:")
        return cls(**values)


def checked(table: Mapping[str, object], place: Callable[[str], str]) -> dict[str, float]:
    """The bounds in a table that users have written: by the names of the fields.

    Raises SettingsError that begins with the `place` of the name that is wrong.
    """
    found: dict[str, float] = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        if key not in _FIELDS or "_" in name:
            near = difflib.get_close_matches(name.lower().replace("_", "-"), names(), 1)
            hint = f"did you mean {near[0]}?" if near else f"names are {', '.join(names())}"
            raise SettingsError(f"{place(shown(name))} unknown name; {hint}")
        if wrong := _objection(key, value):
            raise SettingsError(f"{place(name)} {wrong}")
        assert isinstance(value, (int, float))
        found[key] = value
    return found


_FIELDS: Final[Mapping[str, dataclasses.Field[Any]]] = {
    one.name: one for one in dataclasses.fields(Limits)
}


def _objection(key: str, value: object) -> str:
    """Why this cannot be the value of a bound; empty if it can."""
    one = _FIELDS[key]
    least, most, off = (one.metadata[name] for name in ("least", "most", "off"))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{shown(repr(value))} is no number"
    if isinstance(one.default, int) and not isinstance(value, int):
        return f"{value:g} is no whole number"
    if (off and value == 0) or least <= value <= most:  # NaN is neither
        return ""
    zero = " (or 0 for no bound)" if off else ""
    return f"{value:g} {one.metadata['unit']} is not between {least:g} and {most:g}{zero}"


def option_name(key: str) -> str:
    """A field's name as users write it."""
    return key.replace("_", "-")


def names() -> list[str]:
    """All bounds, as users write them."""
    return [option_name(key) for key in _FIELDS]


def shown(text: str) -> str:
    """A user's text, fit for one line."""
    return "".join(char if char.isprintable() else "?" for char in text[:80])
