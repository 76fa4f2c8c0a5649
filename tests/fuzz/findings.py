"""What a target has found fault with: made small, and kept with the way to see it again."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
FINDINGS: Final = HERE / "findings"
_TRIES: Final = 3000  # inputs that are tried to make one smaller
_SECONDS: Final = 4.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an input fails. Two with one `place` are one finding."""

    place: tuple[str, ...]
    words: str


def fault_of(run: Callable[[bytes], object], data: bytes) -> Fault | None:
    """What happens with this input; None: nothing that should not."""
    try:
        run(data)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        place = [f"{Path(one.filename).name}:{one.lineno}" for one in frames]
        return Fault((type(error).__name__, *place), traceback.format_exc())
    return None


def smaller(run: Callable[[bytes], object], data: bytes, place: tuple[str, ...]) -> bytes:
    """A shorter input with the same fault: pieces are left out while that goes well."""
    deadline = time.monotonic() + _SECONDS
    tries, step = 0, max(len(data) // 2, 1)
    while step and tries < _TRIES and time.monotonic() < deadline:
        at, shrunk = 0, False
        while at < len(data) and tries < _TRIES and time.monotonic() < deadline:
            tries += 1
            shorter = data[:at] + data[at + step :]
            fault = fault_of(run, shorter)
            if fault is not None and fault.place == place:
                data, shrunk = shorter, True
            else:
                at += step
        step = step if shrunk and step == 1 else step // 2
    return data


def keep(directory: Path, target: str, data: bytes, words: str) -> Path:
    """Write a finding down. The same input has the same name."""
    folder = directory / target
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    how = f"python -m tests.fuzz --target {target} --replay {path}"
    path.with_suffix(".txt").write_text(f"{how}\n\n{words}")
    return path


def inputs(directory: Path) -> list[Path]:
    """The inputs in a folder, without the words beside them."""
    if not directory.is_dir():
        return []
    return sorted(one for one in directory.iterdir() if one.is_file() and one.suffix != ".txt")
