"""A Python that has pre-shared keys, with the project: this one, or else Debian trixie's."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.psk import AVAILABLE
from tests.support.gateway import ROOT, Gateway
from tests.support.peers import missing
from tests.support.trixie import Trixie, trixie

_PACKAGES = Path("opt/nbd-gateway")  # in the root directory of trixie; install-python313 fills it
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "figures")


@dataclass(frozen=True)
class Modern:
    """`python` is its command; `place` a short directory that is seen from both sides."""

    python: tuple[str, ...]
    place: Path
    newer: Trixie | None

    def seen(self, path: Path) -> str:
        """What a file in `place` is called for it."""
        return str(path) if self.newer is None else self.newer.seen_inside(path)

    def gateway(self, *args: str | Path) -> Gateway:
        """One that is yet to be entered."""
        seen = [self.seen(one) if isinstance(one, Path) else one for one in args]
        return Gateway(*seen, python=self.python)

    @property
    def sources(self) -> str:
        """Where it finds pyproject.toml and tests/."""
        return str(ROOT) if self.newer is None else self.seen(self.place / "sources")


@contextlib.contextmanager
def modern() -> Iterator[Modern]:
    """Skips, or fails where CI is set, as `trixie` does; with word left by install-python313."""
    if AVAILABLE:
        with tempfile.TemporaryDirectory() as place:
            yield Modern((sys.executable,), Path(place), None)
        return
    with trixie() as newer:
        if (why := _why_not(newer.root)) is not None:
            if Path(f"{newer.root}.python.reason").exists():
                pytest.skip(why)
            missing(why)
        place = newer.directory()
        for name in ("gateway", "tests"):
            shutil.copytree(ROOT / name, place / "sources" / name, ignore=_NOT_COPIED)
        shutil.copy(ROOT / "pyproject.toml", place / "sources")
        path = f"PYTHONPATH=/{_PACKAGES}:{newer.seen_inside(place / 'sources')}"
        yield Modern(
            tuple(newer.command(path, "PYTHONDONTWRITEBYTECODE=1", "python3.13")), place, newer
        )


def _why_not(root: Path) -> str | None:
    """Why it cannot be used, if it cannot."""
    if (root / _PACKAGES / ".requirements").exists():
        return None
    why = f"no packages for Python 3.13 in {root} (tests/peers/install gets them)"
    with contextlib.suppress(OSError):
        why += f": {Path(f'{root}.python.reason').read_text().strip()}"
    return why
