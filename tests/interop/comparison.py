"""All that a client can see of an upstream, directly and through the gateway."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.interop.catalogue import Variant
from tests.interop.questions import PAYLOAD_LEN, Request, requests
from tests.interop.rules import Facts
from tests.support.gateway import environment
from tests.support.peers import CLIENT_S, SYSTEM_PYTHON, Client, find, nbdsh
from tests.support.trixie import Trixie

PROBE = Path(__file__).with_name("probe.py")
NO_SUCH = "no such export"
QUERIES = (
    [],
    ["base:"],
    ["base:allocation"],
    ["qemu:"],
    ["qemu:dirty-bitmap:"],
    ["qemu:allocation-depth"],
    ["base:allocation", "qemu:dirty-bitmap:b0"],
    ["x-nosuch:y"],
    ["nocolon"],
    [""],
)
Answers = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What the questions depend on: learnt once, from the upstream itself."""

    size: int
    minimum: int
    maximum: int  # 0: not told
    contexts: tuple[str, ...]

    @classmethod
    def of(cls, client: Client) -> Shape:
        script = """
        h = nbd.NBD()
        h.set_uri_allow_local_file(True)
        h.set_opt_mode(True)
        h.connect_uri(args["uri"])
        contexts = []
        if h.aio_is_negotiating():
            failed(h.opt_list_meta_context, contexts.append)
            h.opt_go()
        report(size=h.get_size(), minimum=h.get_block_size(nbd.SIZE_MINIMUM) or 1,
               maximum=h.get_block_size(nbd.SIZE_MAXIMUM), contexts=contexts)
        h.shutdown()
        """
        told = nbdsh(script, client)
        return cls(**told | {"contexts": tuple(told["contexts"])})


# ---------------------------------------------------------------- programs


class Tools:
    """libnbd's programs, those of this system."""

    extended = False  # whether they know extended headers

    def command(self, *argv: str) -> list[str]:
        return [find(argv[0]), *argv[1:]]

    def python(self) -> list[str]:
        return [SYSTEM_PYTHON, str(PROBE)]

    def client(self, client: Client) -> Client:
        return client

    def run(self, argv: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            input=given,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=CLIENT_S,
            check=False,
        )


class NewerTools(Tools):
    """The same of Debian trixie."""

    extended = True

    def __init__(self, trixie: Trixie) -> None:
        self.trixie = trixie

    def command(self, *argv: str) -> list[str]:
        return self.trixie.command(*argv)

    def python(self) -> list[str]:
        return self.trixie.command("python3", "-c", PROBE.read_text())

    def client(self, client: Client) -> Client:
        return self.trixie.client(client)


# ---------------------------------------------------------------- what nbdinfo says


def nbdinfo(tools: Tools, client: Client, *flags: str) -> Any:
    """What it prints, parsed if that is JSON, without addresses and TLS; or that it failed."""
    done = tools.run(tools.command("nbdinfo", *flags, tools.client(client).uri))
    if done.returncode:
        return f"exit code {done.returncode}"
    if "--json" not in flags:
        return done.stdout
    document = json.loads(done.stdout)
    if isinstance(document, dict):
        assert document.pop("TLS", None) in (None, client.certificates is not None)
        for export in document.get("exports", ()):
            export.pop("uri")
    return document


def told(tools: Tools, client: Client, contexts: Sequence[str]) -> Answers:
    """All that nbdinfo says of one export, and of the list of them."""
    asked = [("--json",), ("--json", "--list"), ("--size",)]
    asked += [("--json", f"--map={context}") for context in contexts]
    return {" ".join(flags): nbdinfo(tools, client, *flags) for flags in asked}


# ---------------------------------------------------------------- what libnbd says


@dataclass(frozen=True)
class Way:
    """One way to connect: each opens another part of the protocol."""

    name: str
    requests: Sequence[Request]
    contexts: tuple[str, ...] = ()
    extended: bool = True
    structured: bool = True
    block_size: bool = True
    handshake_flags: int | None = None
    options: bool = False


def ways(variant: Variant, shape: Shape, *, extended: bool) -> list[Way]:
    """`extended`: for a client that knows extended headers."""

    def asked(*parts: str) -> list[Request]:
        chosen = tuple(part for part in parts if part in variant.parts)
        return [
            request
            for request in requests(chosen, shape.size, shape.minimum)
            if not (extended and request.flags & PAYLOAD_LEN)  # libnbd itself sees to this flag
            and (
                request.command not in variant.fragile
                or not (request.offset | request.length) % shape.minimum
            )
        ]

    every = ["flags", "places", "edges", "large", "huge", "whole"]
    most = asked("flags", "places", "pieces") if "places" in variant.parts else asked("edges")
    some, look = asked("edges", "pieces"), asked("edges")
    contexts = shape.contexts
    found = [
        Way("all", asked(*every, *(["filtered"] if extended else [])), contexts, options=True),
        Way("simple", most, extended=False, structured=False, options=True),
        Way("no contexts", look),
        Way("no sizes", some, contexts[:1], block_size=False),
        Way("zeroes", (), handshake_flags=1),
    ]
    if extended:
        found.append(Way("structured", some, contexts, extended=False, options=True))
    return found


@dataclass(frozen=True)
class Seen:
    """What one connection has seen: answers to options by question, to requests by number."""

    options: Answers
    facts: Facts
    answers: dict[int, Any]


def ask(
    tools: Tools,
    client: Client,
    shape: Shape,
    asked: Sequence[Way],
    *,
    names: Sequence[str] = ("",),
    by_hand: Sequence[str] = (),
) -> dict[str, Seen]:
    """Run the probe; what each connection saw, by its name."""
    wanted = {
        "uri": tools.client(client).uri,
        "contexts": [*shape.contexts, "x-nosuch:y"],
        "queries": QUERIES,
        "names": names,
        "by_hand": by_hand,
        "maximum": shape.maximum,
        "connections": [asdict(way) | {"requests": way.requests} for way in asked],
    }
    done = tools.run(tools.python(), json.dumps(wanted))
    assert done.returncode == 0, f"{done.stderr}\nafter {done.stdout[-500:]}"
    seen = {}
    for line in map(json.loads, done.stdout.splitlines()):
        answers = {int(number): answer for number, answer in line["answers"].items()}
        seen[line["connection"]] = Seen(line.get("options", {}), line["facts"], answers)
    return seen
