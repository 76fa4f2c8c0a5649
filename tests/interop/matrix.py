"""Runs every client in front of every upstream, through the gateway, and writes what came of it
into README.md: `make interop-matrix`.

Exit code 1 if anything failed, or could not be tried; README.md is left alone if not all was tried.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway import certs
from tests.interop.catalogue import Stage
from tests.interop.clients import PROGRAMS, SIZE, Cell, Program
from tests.interop.comparison import Shape, Tools, Way, ask
from tests.interop.rules import UPGRADES, facts
from tests.interop.tap import EXTENDED_HEADERS
from tests.peers.bench import Front
from tests.support.gateway import Gateway
from tests.support.peers import NbdServer, Server, run, said
from tests.support.rawclient import Opt, RawClient, tls_context
from tests.support.readme import Section
from tests.support.trixie import Trixie, trixie

SECTION = Section("interop-matrix")
FAILED = "FAILED"
CORNER = "client"
ADDED = "added by the gateway"


Start = Callable[[Stage, Path], Server]  # with an image of its own to serve


@dataclass(frozen=True)
class Upstream:
    """A column. In the table the version stands behind the program's name."""

    program: str
    start: Start
    kind: str = ""
    version: str = "--version"
    newer: bool = False  # of Debian trixie


def _nbdkit(*flags: str, plugin: str = "file", settings: Sequence[str] = ()) -> Start:
    return lambda stage, image: stage.nbdkit(*flags, plugin, image, *settings)


# nbdkit 1.32 refuses in oldstyle what it offers there: FUA, flushes, zeroes, caching. So here is a
# disk that can do none of these.
_OLDSTYLE = _nbdkit("-o", "--filter=nozero", "--filter=nocache", plugin="split")

# What there is an upgrade for, this one lacks.
_POOR = _nbdkit(
    *("--no-sr", "--filter=nozero", "--filter=fua", "--filter=blocksize-policy"),
    settings=("blocksize-maximum=64K", "blocksize-error-policy=error"),
)

UPSTREAMS = [
    Upstream("nbdkit", _nbdkit()),
    Upstream("nbdkit", _OLDSTYLE, "`-o`"),
    Upstream("nbdkit", _nbdkit("--no-sr"), "`--no-sr`"),
    Upstream("nbdkit", _POOR, "poor"),
    Upstream("qemu-nbd", lambda stage, image: stage.qemu_nbd("-f", "raw", image), "raw"),
    Upstream(
        "qemu-nbd", lambda stage, _: stage.qemu_nbd("-f", "qcow2", stage.qcow2(SIZE)), "qcow2"
    ),
    Upstream("nbd-server", lambda stage, image: stage.nbd_server(image), version="-V"),
    Upstream("nbdkit", lambda stage, image: stage.newer_nbdkit("file", image), newer=True),
    Upstream(
        "qemu-nbd", lambda stage, image: stage.newer_qemu_nbd("-f", "raw", image), "raw", newer=True
    ),
]


@dataclass(frozen=True)
class Result:
    """What came of one cell."""

    failure: str  # "": none
    asked: frozenset[int]  # options that the gateway sent upstream, so those that the client sent
    granted: frozenset[int]


class Column:
    """One upstream with a gateway in front of it, and a tap between them."""

    def __init__(self, upstream: Upstream, stage: Stage) -> None:
        self.upstream = upstream
        self.stage = stage
        server = upstream.start(stage, stage.image(SIZE))
        self.name = "disk" if isinstance(server, NbdServer) else ""
        self.tap = stage.tap(server)
        flags = ["--tls-dir", stage.pki, "--export", self.name, "--listen", "127.0.0.1:0"]
        gateway = stage.enter(Gateway("--socket", self.tap.path, *flags))
        self.front = Front(gateway, server, stage.pki)
        self.converts = self._converts()
        self.added = self._added()

    def _converts(self) -> bool:
        """Whether a client may have structured replies, whatever the upstream has."""
        with RawClient(self.front.gateway.uri) as client:
            client.greet()
            client.start_tls(tls_context(self.front.pki))
            client.ask_structured(optional=True)
            client.ask(Opt.ABORT)
            return client.structured

    def _added(self) -> list[str]:
        """The upgrades that have something to do."""
        direct = self.front.direct(self.name)
        shape = Shape.of(direct)
        seen = ask(Tools(), direct, shape, [Way("look", ())])["look"].facts
        return [f"`{name}`" for name in UPGRADES if facts(seen, (name,)) != seen]

    def run(self, program: Program, picture: Path, work: Path) -> Result:
        newer = self.stage.newer if program.newer else None
        before = len(self.tap.sessions)
        failure = ""
        try:
            program.job(Cell(self.stage, self.front, work, picture, newer))
        except Exception as error:  # a cell that fails says so in the table
            failure = _last_words(error)
        sessions = self.tap.sessions[before:]
        return Result(
            failure,
            asked=_numbers(session.asked() for session in sessions),
            granted=_numbers(session.granted() for session in sessions),
        )


def _numbers(sets: Iterable[Iterable[int]]) -> frozenset[int]:
    return frozenset(number for one in sets for number in one)


def _last_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:100].replace("|", "/")


def dialect(result: Result, asks: frozenset[int], *, converts: bool) -> str:
    """The kind of replies, in a client's words; `asks`: the options that this client knows."""
    if EXTENDED_HEADERS in result.granted:
        return "extended"
    if Opt.STRUCTURED_REPLY in result.granted:
        return "structured"
    if Opt.STRUCTURED_REPLY in asks and converts:
        return "simple→structured"
    return "simple"


# ---------------------------------------------------------------- the table


@contextlib.contextmanager
def _maybe_trixie() -> Iterator[Trixie | None]:
    with contextlib.ExitStack() as stack:
        newer = None
        try:
            newer = stack.enter_context(trixie())
        except (pytest.skip.Exception, pytest.fail.Exception) as reason:
            print(f"not all can be tried: {reason}", file=sys.stderr)
        yield newer


def pictures(directory: Path) -> list[Path]:
    """Two files of SIZE bytes that differ in data and in where zeroes are.

    Both in pieces of 64 KiB, the clusters of a qcow2 image: when a write meets a write of zeroes in
    one cluster, qemu 7.2 may lose it.
    """
    paths = [directory / "one.img", directory / "two.img"]
    for seed, path in enumerate(paths):
        source = random.Random(seed)
        with path.open("wb") as file:
            while (room := SIZE - file.tell()) > 0:
                length = min(room, (64 << 10) * source.randint(1, 6))
                file.write(source.randbytes(length) if source.random() < 0.6 else bytes(length))
    return paths


def try_all(
    upstream: Upstream, programs: Sequence[Program], both: Sequence[Path], stage: Stage
) -> tuple[Column, list[Result]]:
    """One column, from the top to the bottom."""
    column = Column(upstream, stage)
    results = []
    for i, program in enumerate(programs):
        work = stage.directory()
        picture = work / "picture"
        picture.write_bytes(both[i % 2].read_bytes())
        results.append(column.run(program, picture, work))
        pair = f"{title(program, '')} in front of {title(upstream, '')}"
        print(f"{pair}: {results[-1].failure or 'ok'}", file=sys.stderr)
    return column, results


def table(root: Path, newer: Trixie | None) -> tuple[list[str], bool]:
    """The lines of the table, and whether all cells are well."""
    pki = root / "pki"
    certs.init(pki)
    both = pictures(root)
    programs = [one for one in PROGRAMS if newer or not one.newer]
    tried: list[tuple[Column, list[Result]]] = []
    for i, upstream in enumerate(one for one in UPSTREAMS if newer or not one.newer):
        place = newer.directory() if newer else root / str(i)
        place.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            tried.append(try_all(upstream, programs, both, Stage(place, pki, stack, newer)))
    rows = [[CORNER, *(_title(column.upstream, newer) for column, _ in tried)]]
    for i, program in enumerate(programs):
        asks = _numbers(results[i].asked for _, results in tried)
        cells = [_cell(program, results[i], asks, column.converts) for column, results in tried]
        rows.append([_title(program, newer), *cells])
    rows.append([ADDED, *(", ".join(column.added) or "nothing" for column, _ in tried)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return lines, not any(one.failure for _, results in tried for one in results)


def _cell(program: Program, result: Result, asks: frozenset[int], converts: bool) -> str:
    if result.failure:
        return f"{FAILED}: {result.failure}"
    return f"ok, {program.note or dialect(result, asks, converts=converts)}"


def title(one: Program | Upstream, version: str) -> str:
    """As it stands in the table."""
    return " ".join(word for word in (one.program, version, one.kind) if word)


def _title(one: Program | Upstream, newer: Trixie | None) -> str:
    asked = ("nbdinfo" if one.program == "nbdsh" else one.program, one.version)
    done = newer.run(*asked) if newer and one.newer else run(*asked)
    found = re.search(r"\d+\.\d+(\.\d+)?", said(done))
    assert found is not None, f"{asked} tells no version: {said(done)}"
    return title(one, found[0])


def main() -> int:
    with (
        tempfile.TemporaryDirectory() as root,
        _maybe_trixie() as newer,
    ):
        lines, well = table(Path(root), newer)
    text = "\n".join(lines)
    print(text)
    if newer is None:
        return 1
    SECTION.write(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
