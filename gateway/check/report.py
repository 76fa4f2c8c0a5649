"""What `check` has found: one verdict a line, and a sum. Nothing is passed over in silence."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from gateway.errors import GatewayError


class Level(enum.StrEnum):
    """BAD: the gateway does not start, or does something else than what was meant."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


class Verdict(NamedTuple):
    level: Level
    what: str  # the file, the flag or the rule
    text: str  # what is wrong with it, and the remedy; or what it is

    def __str__(self) -> str:
        """One line, whatever stands in names, files and paths."""
        line = f"{self.level:<5} {self.what}: {self.text}"
        return "".join(char if char.isprintable() else "?" for char in line)


class Report:
    """Collects verdicts. `now` is the one moment that all dates are measured by."""

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)
        self.verdicts: list[Verdict] = []

    def ok(self, what: object, text: str) -> None:
        self.verdicts.append(Verdict(Level.OK, str(what), text))

    def warn(self, what: object, text: str) -> None:
        self.verdicts.append(Verdict(Level.WARN, str(what), text))

    def bad(self, what: object, text: str) -> None:
        """Once, also if several parts meet the same."""
        if (verdict := Verdict(Level.BAD, str(what), text)) not in self.verdicts:
            self.verdicts.append(verdict)

    def count(self, level: Level) -> int:
        return sum(one.level is level for one in self.verdicts)

    @contextlib.contextmanager
    def part(self, what: object) -> Iterator[None]:
        """A part of the check, about one file or flag. What it raises is a verdict too: a file
        that cannot be judged is not a good one, and those after it are looked at all the same."""
        try:
            yield
        except OSError as error:
            self.bad(what, f"cannot be read: {error.strerror or error}")
        except GatewayError as error:
            self.bad(what, str(error))
        except Exception as error:
            # Files are anybody's bytes, and a parser may raise what it likes over them.
            self.bad(what, f"cannot be judged: {type(error).__name__}: {error}")

    def lines(self) -> Iterator[str]:
        """All verdicts in the order in which they were found, and the sum."""
        yield from map(str, self.verdicts)
        ok, warn, bad = (self.count(level) for level in Level)
        yield f"{ok} ok, {warn} warn, {bad} bad: " + (
            "mend what is bad before you start or reload" if bad else "fit to start or reload"
        )


def date(moment: datetime) -> str:
    """Days are what people plan by."""
    return f"{moment:%Y-%m-%d}"


def some(names: tuple[str, ...], limit: int = 6) -> str:
    """As many as fit on a line."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
