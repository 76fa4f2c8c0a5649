"""Looks at one upstream from all sides, directly and through a gateway."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.interop import judge
from tests.interop.catalogue import Stage, Variant
from tests.interop.comparison import Answers, Seen, Shape, Tools, Way, ask, told, ways
from tests.interop.questions import requests
from tests.interop.rules import UPGRADES, facts
from tests.support.gateway import Gateway
from tests.support.peers import Client, Server

MODES: dict[str, tuple[str, ...]] = {"upgraded": UPGRADES, "as it is": ()}
NO_SUCH = "no such export"


class Front:
    """A gateway for one upstream after the other, for starting one for each would take long."""

    def __init__(self, directory: Path, pki: Path, upgrades: tuple[str, ...]) -> None:
        self.pki = pki
        self.socket = directory / "upstream.sock"
        off = [name for name in UPGRADES if name not in upgrades]
        flags = [word for name in off for word in ("--no-upgrade", name)]
        self.gateway = Gateway(
            *("--tls-dir", pki, "--listen", "127.0.0.1:0", "--any-export"),
            *("--socket", self.socket, *flags),
        )

    def client(self, server: Server, export: str) -> Client:
        """In front of `server` from now on."""
        self.socket.unlink(missing_ok=True)
        self.socket.symlink_to(server.socket)
        return Client(self.gateway.uri, self.pki).with_export(export)


@dataclass(frozen=True)
class View:
    """All that was seen of one upstream, one way or the other."""

    nbdinfo: Answers
    connections: dict[str, Seen]
    disk: list[object]


@dataclass(frozen=True)
class Case:
    """One upstream, seen directly and through the gateway."""

    ways: list[Way]
    options: bool  # whether the upstream has any
    direct: dict[str, View]
    through: dict[str, View]
    log: str

    def connections(self) -> Iterator[tuple[str, Way, Seen, Seen]]:
        """The mode, the way to connect, and what was seen on it directly and through."""
        for mode, direct in self.direct.items():
            for way in self.ways:
                seen = self.through[mode].connections[way.name]
                yield mode, way, direct.connections[way.name], seen


class Examination:
    """Looks at fresh copies of one upstream from all sides."""

    def __init__(self, variant: Variant, stage: Stage, tools: Tools) -> None:
        self._variant = variant
        self._stage = stage
        self._tools = tools
        self._unused: list[Server] = [variant.start(stage)]
        client = self._directly(self._unused[0])
        self._shape = Shape.of(client)
        self._ways = ways(variant, self._shape, extended=tools.extended)
        self._names = [variant.export, "first", NO_SUCH]
        quiet = [replace(way, requests=()) for way in self._ways]
        self._seen = ask(tools, client, self._shape, quiet, names=self._names)
        self._nbdinfo = told(tools, client, self._shape.contexts)

    def case(self, fronts: dict[str, Front]) -> Case:
        """Look at it in each mode in which there is something to see."""
        # Where there is nothing to upgrade, one gateway would show what the other does.
        modes = list(MODES) if self._upgraded() else ["upgraded"]
        behind = {mode: len(fronts[mode].gateway.log()) for mode in modes}
        with ThreadPoolExecutor(2) as pool:
            direct = {mode: pool.submit(self._direct, self._server(), mode) for mode in modes}
            through = {
                mode: pool.submit(self._through, self._server(), fronts[mode]) for mode in modes
            }
        return Case(
            self._ways,
            judge.has_options(self._seen["all"]),
            {mode: future.result() for mode, future in direct.items()},
            {mode: future.result() for mode, future in through.items()},
            "".join(fronts[mode].gateway.log()[behind[mode] :] for mode in modes),
        )

    def _server(self) -> Server:
        return self._unused.pop() if self._unused else self._variant.start(self._stage)

    def _directly(self, server: Server) -> Client:
        return Client(server.uri(self._variant.export))

    def _upgraded(self) -> bool:
        """Whether any upgrade has something to do."""
        return any(
            facts(self._seen[way.name].facts, UPGRADES, structured=way.structured)
            != self._seen[way.name].facts
            for way in self._ways
        )

    def _disk(self, server: Server) -> list[object]:
        """What is on it now, read directly."""
        if not any(way.requests for way in self._ways):
            return []
        whole = requests(("whole",), self._shape.size, self._shape.minimum)
        seen = ask(self._tools, self._directly(server), self._shape, [Way("disk", whole)])
        return list(seen["disk"].answers.values())

    def _direct(self, server: Server, mode: str) -> View:
        """Without the gateway; what its upgrades would do is done by hand."""
        upgrades = MODES[mode]
        asked = [
            replace(
                way,
                options=False,
                requests=judge.passed_on(way, self._seen[way.name].facts, upgrades),
            )
            for way in self._ways
        ]
        client = self._directly(server)
        seen = ask(self._tools, client, self._shape, asked, by_hand=upgrades)
        merged = {
            name: replace(seen[name], options=self._seen[name].options) for name in self._seen
        }
        return View(self._nbdinfo, merged, self._disk(server))

    def _through(self, server: Server, front: Front) -> View:
        client = front.client(server, self._variant.export)
        nbdinfo = told(self._tools, client, self._shape.contexts)  # the disk is still as it was
        seen = ask(self._tools, client, self._shape, self._ways, names=self._names)
        return View(nbdinfo, seen, self._disk(server))
