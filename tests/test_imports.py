"""Imports go one way only, and each layer keeps to its own tools.

cli -> serve -> server -> session -> {relay, upstream, trust} -> {transport, nbd, access} -> errors
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "gateway"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# Standard library without clock, socket, log or operating system in it.
PURE = frozenset(
    "__future__ bisect collections collections.abc dataclasses enum errno functools itertools "
    "struct typing urllib.parse".split()
)

# Standard library that a module may touch only if its line says so. The rest of the standard
# library is free for all but the pure modules; every third-party package has to be named.
GUARDED = frozenset(
    "asyncio concurrent http importlib multiprocessing selectors signal socket socketserver ssl "
    "subprocess threading".split()
)


class Layer(NamedTuple):
    """What one module may import. Names of modules below `gateway.` are given without it."""

    inside: str = ""
    outside: str = ""  # third-party packages, and names out of GUARDED
    pure: bool = False  # beyond `outside`, nothing but PURE


# One line a module. `nbd` itself stands for the package's __init__, not for what is in it.
TABLE = {
    "": Layer(outside="importlib"),
    "__main__": Layer("cli"),
    "cli": Layer(
        "flags options privileges serve check certs.cli demo settings errors signals",
        "click signal trio",
    ),
    "flags": Layer("settings config access errors limits nbd.upgrades"),
    "config": Layer("access settings errors limits", "msgspec"),
    "limits": Layer("errors"),
    "check": Layer(
        "certs check.certs check.crl check.files check.keys check.report check.rules check.user "
        "rule trust settings errors",
        "socket",
    ),
    "serve": Layer(
        "errors listeners places privileges reload server settings signals snapshot trust workers",
        "signal trio",
    ),
    "reload": Layer("errors privileges settings snapshot trust", "trio"),
    "trust": Layer(
        "access credentials crls errors identity psk settings snapshot tls", "cryptography ssl"
    ),
    "psk": Layer("identity errors", "ssl socket"),
    "workers": Layer("places", "signal"),
    "places": Layer("tables"),
    "tables": Layer(),
    "gate": Layer("errors identity limits places tables", "trio"),
    "accepting": Layer("gate", "socket trio"),
    "few_lines": Layer("", "trio"),
    "demo": Layer("selftest server certs memory_upstream settings errors signals", "trio signal"),
    "signals": Layer("", "signal"),
    "selftest": Layer("client certs memory_upstream errors nbd.*", "trio ssl"),
    "client": Layer("transport errors nbd.*", "socket ssl"),
    "server": Layer(
        "accepting errors few_lines gate identity listeners places reload session settings trust "
        "workers",
        "signal socket trio",
    ),
    "session": Layer(
        "admission client_handshake limits relay trust identity transport settings errors nbd.*",
        "trio socket",
    ),
    "client_handshake": Layer(
        "admission redial upstream trust tls identity transport settings errors nbd.*",
        "socket ssl",
    ),
    "relay": Layer(
        "buffers outlet reply_path turns transport errors nbd.transmission lifeline", "trio"
    ),
    "reply_path": Layer("buffers transport errors nbd.transmission", "trio"),
    "outlet": Layer("buffers lifeline transport errors nbd.transmission", "trio"),
    "lifeline": Layer("buffers transport errors nbd.transmission", "trio"),
    "redial": Layer("transport upstream nbd.pairing", "trio"),
    "buffers": Layer("transport nbd.transmission"),
    "turns": Layer("", "time"),
    "upstream": Layer("transport settings errors nbd.*", "trio socket"),
    "tls": Layer("credentials errors identity psk settings snapshot", "cryptography socket ssl"),
    "access": Layer("errors identity rule"),
    "identity": Layer("dn", "cryptography"),
    "listeners": Layer("settings errors nbd.uri", "trio socket"),
    "settings": Layer("access errors limits rule nbd.constants nbd.upgrades nbd.uri"),
    "memory_upstream": Layer("transport errors nbd.*", "trio socket"),
    "certs": Layer("certs.store pki pki_keys", "socket"),
    "certs.cli": Layer(
        "identity certs certs.bundle certs.folder certs.options certs.show errors pki pki_keys",
        "click",
    ),
    "pki": Layer("pki_keys", "cryptography"),
    "options": Layer("access settings nbd.upgrades", "click"),
    "check.certs": Layer("check.files check.report credentials identity", "cryptography"),
    "check.crl": Layer("check.certs check.files check.report identity", "cryptography"),
    "check.keys": Layer(
        "check.certs check.files check.report psk access identity settings", "cryptography"
    ),
    "check.files": Layer("check.report snapshot errors"),
    "check.user": Layer("check.files check.report errors privileges"),
    "privileges": Layer("errors"),
    "check.rules": Layer("check.report access identity rule"),
    "check.report": Layer("errors"),
    "certs.store": Layer("pki_keys signals"),
    "certs.read": Layer("pki_keys", "cryptography"),
    "certs.folder": Layer("certs certs.read certs.store pki pki_keys revocations", "cryptography"),
    "certs.bundle": Layer(
        "certs certs.folder certs.read certs.store pki_keys revocations", "cryptography"
    ),
    "certs.show": Layer("access certs.read certs.store errors identity pki_keys", "cryptography"),
    "certs.options": Layer("pki", "click"),
    "revocations": Layer("pki_keys"),
    "pki_keys": Layer("errors", "cryptography"),
    "admission": Layer("access errors identity nbd.policy settings trust", "socket"),
    "credentials": Layer("crls identity snapshot", "cryptography"),
    "crls": Layer("identity snapshot", "cryptography"),
    "dn": Layer("", "cryptography"),
    "rule": Layer("dn errors identity"),
    "snapshot": Layer("errors settings"),
    "transport": Layer("errors", "trio ssl socket"),
    "nbd": Layer(pure=True),
    "nbd.haggling": Layer(
        "nbd.negotiation nbd.policy nbd.pairing nbd.upgrades nbd.wire nbd.constants errors",
        pure=True,
    ),
    "nbd.oldstyle": Layer(
        "nbd.negotiation nbd.policy nbd.pairing nbd.upgrades nbd.wire nbd.constants errors",
        pure=True,
    ),
    "nbd.policy": Layer("nbd.pairing nbd.upgrades nbd.wire nbd.constants", pure=True),
    "nbd.negotiation": Layer("nbd.pairing nbd.wire nbd.constants errors", pure=True),
    "nbd.handshake": Layer("nbd.pairing nbd.wire nbd.constants errors", pure=True),
    "nbd.transmission": Layer(
        "nbd.request_walk nbd.reply_walk nbd.plans nbd.requests nbd.replies nbd.in_flight "
        "nbd.journal nbd.resumption nbd.framing nbd.pairing nbd.constants errors",
        pure=True,
    ),
    "nbd.journal": Layer(
        "nbd.plans nbd.requests nbd.in_flight nbd.framing nbd.constants", pure=True
    ),
    "nbd.resumption": Layer(
        "nbd.request_walk nbd.plans nbd.replies nbd.sparse nbd.in_flight nbd.constants errors",
        pure=True,
    ),
    "nbd.request_walk": Layer(
        "nbd.plans nbd.requests nbd.replies nbd.in_flight nbd.framing nbd.wire nbd.constants "
        "errors",
        pure=True,
    ),
    "nbd.reply_walk": Layer(
        "nbd.resumption nbd.reply_output nbd.request_walk nbd.plans nbd.requests nbd.replies "
        "nbd.in_flight nbd.framing nbd.wire nbd.constants errors",
        pure=True,
    ),
    "nbd.reply_output": Layer(
        "nbd.request_walk nbd.replies nbd.sparse nbd.in_flight nbd.constants", pure=True
    ),
    "nbd.plans": Layer(
        "nbd.requests nbd.replies nbd.in_flight nbd.framing nbd.constants", pure=True
    ),
    "nbd.requests": Layer("nbd.pairing nbd.constants errors", pure=True),
    "nbd.replies": Layer("nbd.in_flight nbd.framing nbd.wire nbd.constants errors", pure=True),
    "nbd.sparse": Layer(pure=True),
    "nbd.in_flight": Layer(pure=True),
    "nbd.framing": Layer("nbd.wire nbd.constants", pure=True),
    "nbd.pairing": Layer("nbd.upgrades nbd.wire nbd.constants errors", pure=True),
    "nbd.upgrades": Layer("nbd.wire nbd.constants", pure=True),
    "nbd.uri": Layer("nbd.constants errors", pure=True),
    "nbd.wire": Layer("nbd.constants errors", pure=True),
    "nbd.constants": Layer(pure=True),
    "errors": Layer(pure=True),
}


class Import(NamedTuple):
    name: str  # absolute and dotted; `from a import b` gives a.b if that is one of our modules
    line: int


def our_modules() -> dict[str, Path]:
    """Every module of the package: name without `gateway.` (the package itself is ""), and file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = our_modules()


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """All imports in `source`: at the top, in functions and under TYPE_CHECKING alike."""
    here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                base = ".".join([*here[: len(here) - up], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = inside(full)
                yield Import(full if ours in TABLE or ours in MODULES else base, node.lineno)


def inside(name: str) -> str | None:
    """`gateway.nbd.wire` -> `nbd.wire`, `gateway` -> "", anything else -> None."""
    if name == PACKAGE:
        return ""
    return name.removeprefix(f"{PACKAGE}.") if name.startswith(f"{PACKAGE}.") else None


def broken_rules(
    source: str, module: str, *, is_package: bool = False, file: str = "?"
) -> list[str]:
    """One line for each import in `source` that the table does not allow to `module`."""
    layer = TABLE[module]
    allowed_inside = layer.inside.split()
    broken = []
    for name, line in imports_of(source, module, is_package=is_package):
        where = f"{file}:{line}: imports {name}, but {PACKAGE}.{module}".rstrip(".")
        top = name.partition(".")[0]
        if (ours := inside(name)) is not None:
            family = "nbd.*" if ours.startswith("nbd.") else ours
            # The bare package ("") is free for all: it holds __version__ and pulls nothing in.
            if ours and not {ours, family} & set(allowed_inside):
                may = ", ".join(allowed_inside) or "nothing"
                broken.append(f"{where} may import, of our own modules, only: {may}")
        elif top in layer.outside.split():
            continue
        elif layer.pure and name not in PURE:
            broken.append(f"{where} is pure: only {', '.join(sorted(PURE))}")
        elif top in GUARDED or top not in sys.stdlib_module_names:
            may = layer.outside or "none"
            broken.append(f"{where} may, of third-party and guarded modules, use only: {may}")
    return broken


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or PACKAGE)
def test_module_keeps_to_its_layer(module: str) -> None:
    path = MODULES[module]
    file = str(path.relative_to(ROOT.parent))
    assert module in TABLE, f"{file} has no line in the table of this test: say where it belongs"
    broken = broken_rules(
        path.read_text(), module, is_package=path.name == "__init__.py", file=file
    )
    assert not broken, "\n".join(["", *broken])


def test_table_names_no_module_that_is_gone() -> None:
    assert sorted(set(TABLE) - set(MODULES)) == []


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module: {
            ours
            for name, _ in imports_of(
                path.read_text(), module, is_package=path.name == "__init__.py"
            )
            if (ours := inside(name))
        }
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the modules in it


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("nbd.wire", "import trio", "trio"),
        ("nbd.wire", "import os.path", "os.path"),
        ("nbd.wire", "from time import monotonic", "time"),
        ("nbd.wire", "from typing_extensions import Self", "typing_extensions"),
        ("nbd.wire", "from gateway.nbd import negotiation", "gateway.nbd.negotiation"),
        ("nbd.wire", "from . import negotiation", "gateway.nbd.negotiation"),
        ("nbd.wire", "from ..settings import Settings", "gateway.settings"),
        ("nbd.wire", "from gateway.upstream import dial as _dial", "gateway.upstream"),
        ("relay", "import ssl", "ssl"),
        ("relay", "from gateway.settings import Settings", "gateway.settings"),
        ("relay", "def pump():\n    from gateway import session", "gateway.session"),
        ("tls", "import trio.lowlevel", "trio.lowlevel"),
        (
            "upstream",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gateway.session",
            "gateway.session",
        ),
        ("settings", "from importlib import import_module", "importlib"),
        ("cli", "from gateway.nbd.wire import OptionHeader", "gateway.nbd.wire"),
        ("server", "import msgspec", "msgspec"),
        ("server", "from gateway.not_in_the_table import thing", "gateway.not_in_the_table"),
    ],
)
def test_checker_sees_a_forbidden_import(module: str, source: str, culprit: str) -> None:
    (broken,) = broken_rules(source, module, file="some/file.py")
    line = source.count("\n") + 1
    assert broken.startswith(f"some/file.py:{line}: imports {culprit}, but gateway.{module} ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nbd.wire", "from __future__ import annotations\nimport struct\nimport collections.abc"),
        ("nbd.wire", "from gateway.errors import PeerError\nfrom .constants import Opt"),
        ("session", "from gateway.nbd import wire\nimport gateway.relay, trio, logging"),
        ("cli", "from gateway import __version__, serve\nimport os, click"),
    ],
)
def test_checker_lets_an_allowed_import_pass(module: str, source: str) -> None:
    assert broken_rules(source, module) == []
