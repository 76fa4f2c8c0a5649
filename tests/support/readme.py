"""What programs write into README.md: sections between two marks, which are comments there."""

from __future__ import annotations

from pathlib import Path
from typing import Final

README: Final = Path(__file__).resolve().parents[2] / "README.md"


class Section:
    """`<!-- NAME -->` to `<!-- /NAME -->`, each on a line of its own."""

    def __init__(self, name: str) -> None:
        self._begin, self._end = f"<!-- {name} -->\n", f"<!-- /{name} -->"

    @property
    def text(self) -> str:
        """Without a line's end behind it. Raises ValueError if a mark is missing."""
        return self._parts()[1].removesuffix("\n")

    def write(self, text: str) -> None:
        """Put this there. Raises ValueError if a mark is missing; then README is as it was."""
        before, _, after = self._parts()
        README.write_text(f"{before}{self._begin}{text}\n{self._end}{after}")

    def _parts(self) -> tuple[str, str, str]:
        before, begin, rest = README.read_text().partition(self._begin)
        inside, end, after = rest.partition(self._end)
        if not (begin and end):
            raise ValueError(f"README.md has no {self._begin.strip()} ... {self._end}")
        return before, inside, after
