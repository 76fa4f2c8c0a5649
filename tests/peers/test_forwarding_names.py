"""Export names and content that depends on them: each name finds its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.bench import Bench, Front
from tests.peers.watched import staged
from tests.support.peers import Client, Server, check, nbdsh, run, said
from tests.support.rawclient import Opt, RawClient, tls_context

NAMES = {
    "empty": "",
    "one-slash": "/",
    "dots-and-slashes": "../../etc/passwd",
    "spaces": "  a disk ",
    "newline": "first\nsecond",
    "non-ascii": "Жёсткий диск №1",
    "beyond-16-bits": "💾\u200d💿",
    "looks-like-an-option": "--read-only",
    "percents": "%2F%%41%",
    "uri": "?socket=/dev/null&a=b#c",
    "quotes": "\"a\" 'b' `c` $HOME \\",
    "longest": "0123456789abcdef" * 256,
    "longest-non-ascii": "ü" * 2048,
}
CONTENT = """
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.set_opt_mode(True)
h.connect_uri(args["uri"])
h.set_export_name(args["name"])
h.opt_go()
size = h.get_size()
report(content=bytes(h.pread(size, 0)).hex() if size else "", size=size)
h.shutdown()
"""


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


@pytest.fixture(scope="module")
def mirror(stage: Bench) -> Server:
    """Any export exists, and its content is its own name."""
    return stage.nbdkit("info", "exportname")


@pytest.fixture(scope="module")
def any_export(stage: Bench, mirror: Server) -> Front:
    return stage.gateway(mirror, "--any-export")


@pytest.mark.parametrize("kind", NAMES)
def test_content_by_name(any_export: Front, kind: str) -> None:
    name = NAMES[kind]
    wanted = {"content": name.encode().hex(), "size": len(name.encode())}
    assert nbdsh(CONTENT, any_export.client(), name=name) == wanted
    # The same name in the client's URI, and what is told of it.
    script = """
    h = connect(full_info=True)
    report(size=h.get_size(), name=h.get_canonical_export_name() if args["size"] else "")
    h.shutdown()
    """
    client, direct = any_export.client(name), any_export.direct(name)
    told = nbdsh(script, client, size=wanted["size"])
    assert told == nbdsh(script, direct, size=wanted["size"])
    assert told == {"size": len(name.encode()), "name": name}


def test_content_by_name_with_the_oldest_option(any_export: Front, pki: Path) -> None:
    """NBD_OPT_EXPORT_NAME: the name is all there is, up to the end of the option."""
    for name in NAMES.values():
        with RawClient(any_export.gateway.uri) as client:
            client.greet()
            client.start_tls(tls_context(pki))
            data = name.encode()
            client.send(b"IHAVEOPT" + bytes([0, 0, 0, Opt.EXPORT_NAME]))
            client.send(len(data).to_bytes(4, "big") + data)
            assert int.from_bytes(client.recv_exactly(10)[:8], "big") == len(data)


@pytest.mark.parametrize(
    "kind", ["newline", "looks-like-an-option", "uri", "longest", "longest-non-ascii"]
)
def test_a_configured_name(bench: Bench, mirror: Server, kind: str) -> None:
    name = NAMES[kind]
    front = bench.gateway(mirror, f"--export={name}")
    wanted = {"content": name.encode().hex(), "size": len(name.encode())}
    for asked in ("", name):
        assert nbdsh(CONTENT, front.client(), name=asked) == wanted
    # The URI as printed is one line, and can be pasted.
    assert len(front.gateway.uris) == 1
    printed = Client(front.gateway.uri, front.pki)
    assert int(check("nbdinfo", "--size", printed.uri)) == wanted["size"]
    # It is not a beginning or an end of the name that is compared.
    for other in (name[:-1], name[1:], name.swapcase() + "x", name.replace("1", "2") + " "):
        done = run("nbdinfo", front.client(other[:2000]).uri)
        assert done.returncode != 0
        assert "No such file or directory" in said(done)


@pytest.mark.parametrize("kind", ["one-slash", "spaces", "non-ascii", "percents", "longest"])
def test_qemu_asks_by_name(any_export: Front, kind: str) -> None:
    name = NAMES[kind]
    client = any_export.client(name)
    printed = check("qemu-img", "info", "--output=json", *client.qemu())
    assert json.loads(printed)["virtual-size"] == -(-len(name.encode()) // 512) * 512


# ---------------------------------------------------------------- lists that change


class Dynamic:
    """An upstream whose list of exports, and default export, are the content of a file."""

    def __init__(self, bench: Bench) -> None:
        self.file = bench.directory() / "exports"
        server = bench.nbdkit(
            "eval",
            f"list_exports=cat {self.file}",
            f"default_export=cat {self.file}",
            'open=printf "%s" "$3"',
            'get_size=printf "%s" "$2" | wc -c',
            'export_description=printf "about %.20s" "$2"',
            'pread=printf "%s" "$2" | tail -c +$(($4 + 1)) | head -c "$3"',
        )
        self.front = bench.gateway(server, "--any-export")

    def set(self, *lines: str) -> None:
        self.file.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def dynamic(stage: Bench) -> Dynamic:
    return Dynamic(stage)


def both(front: Front, ask: Callable[[Client], Any], *names: str) -> Any:
    """The answers through the gateway, which are those without."""
    through = [ask(front.client(name)) for name in names]
    assert through == [ask(front.direct(name)) for name in names]
    return through[0] if len(names) == 1 else through


def asked_for_a_list(client: Client) -> dict[str, Any]:
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.set_opt_mode(True)
    h.connect_uri(args["uri"])
    rows = []
    error = failed(h.opt_list, lambda name, description: rows.append([name, description]))
    h.opt_abort()
    report(rows=rows, error=error)
    """
    return nbdsh(script, client)


def listed(client: Client) -> list[list[str]]:
    seen = asked_for_a_list(client)
    assert seen["error"] is None, seen
    rows: list[list[str]] = seen["rows"]
    return rows


def told(client: Client) -> Any:
    """What nbdinfo tells of one export, without the address."""
    document = json.loads(check("nbdinfo", "--json", "--no-content", client.uri))
    (export,) = document["exports"]
    return {key: value for key, value in export.items() if key != "uri"}


LISTS: dict[str, tuple[list[str], list[list[str]]]] = {
    "none": ([], []),
    "only-the-default": ([""], [["", ""]]),
    "one-name": (["disk"], [["disk", ""]]),
    "described": (
        ["INTERLEAVED", "a", "the first", "b/c", "", "ö", "größer & <größer>"],
        [["a", "the first"], ["b/c", ""], ["ö", "größer & <größer>"]],
    ),
    "longest": (
        ["NAMES+DESCRIPTIONS", "n" * 4096, "é" * 2048, "d" * 4096, "ß" * 2048],
        [["n" * 4096, "d" * 4096], ["é" * 2048, "ß" * 2048]],
    ),
    "a-thousand": (
        ["INTERLEAVED", *(word for n in range(1000) for word in (f"disk/{n}", f"{n}, " * 40))],
        [[f"disk/{n}", f"{n}, " * 40] for n in range(1000)],
    ),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_as_they_are_at_the_time(dynamic: Dynamic, kind: str) -> None:
    """The gateway keeps nothing from one client for the next."""
    lines, wanted = LISTS[kind]
    dynamic.set(*lines)
    assert both(dynamic.front, listed, "") == wanted
    # An export need not be in the list to be opened, and the default one has a name.
    both(dynamic.front, told, *(("", "other") if kind != "longest" else ("other",)))


def test_nbdinfo_lists_what_is_behind_every_name(dynamic: Dynamic) -> None:
    dynamic.set("INTERLEAVED", *(word for n in range(12) for word in (f"disk {n}" * n, f"#{n}")))

    def everything(client: Client) -> Any:
        document = json.loads(check("nbdinfo", "--json", "--list", client.uri))
        for export in document["exports"]:
            export.pop("uri")
        return document["exports"]

    exports = both(dynamic.front, everything, "")
    assert [one["export-size"] for one in exports] == [len(f"disk {n}" * n) for n in range(12)]


def test_an_upstream_that_fails_to_list(dynamic: Dynamic) -> None:
    """The exports themselves can be opened; there is no list, and no made-up one."""
    dynamic.file.unlink(missing_ok=True)
    both(dynamic.front, told, "name")

    assert run("nbdinfo", "--list", dynamic.front.client().uri).returncode != 0
    seen = both(dynamic.front, asked_for_a_list, "")
    assert seen["rows"] == []
    assert seen["error"] is not None
    dynamic.set("disk")
    assert both(dynamic.front, listed, "") == [["disk", ""]]


def test_a_list_with_a_configured_name(bench: Bench, dynamic: Dynamic) -> None:
    """Only that one; with its description, if the upstream lists it."""
    front = bench.gateway(dynamic.front.server, "--export", "disk/500")
    dynamic.set(*LISTS["a-thousand"][0])
    assert listed(front.client()) == [["disk/500", "500, " * 40]]
    dynamic.set("other")
    assert listed(front.client()) == [["disk/500", ""]]
    dynamic.file.unlink()
    assert listed(front.client()) == [["disk/500", ""]]
    assert nbdsh("h = connect(); report(size=h.get_size()); h.shutdown()", front.client()) == {
        "size": len("disk/500")
    }
