"""gateway.check against a start: what the gateway refuses, `check` has called bad, with the reason.

Files are broken in many ways, one at a time and two of them at once.
"""

from __future__ import annotations

import functools
import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.settings import Settings, TLSSettings
from gateway.trust import load_trust
from tests.check_rig import (
    DAY,
    LOCAL,
    Folder,
    make,
    make_ca,
    make_crl,
    said,
)

FILES = ("cert", "key", "ca", "crl", "password")
Break = Callable[[Path], object]


def flip(path: Path) -> None:
    """Other letters in the middle of the base64."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, min(len(content), len(content) // 2 + 8)):
        if content[place] not in b"\n=-":
            content[place] = ord("A") if content[place] != ord("A") else ord("B")
    path.write_bytes(content)


def rewrite(change: Callable[[bytes], bytes]) -> Break:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def link_to(target: str) -> Break:
    return lambda path: (path.unlink(), path.symlink_to(target))


def copy_from(name: str, path: Path) -> None:
    shutil.copy(path.with_name(name), path)


WAYS: dict[str, Break] = {
    "missing": Path.unlink,
    "empty": rewrite(lambda content: b""),
    "rubbish": rewrite(lambda content: b"rubbish\n"),
    "binary": rewrite(lambda content: bytes(range(256)) * 9),
    "half": rewrite(lambda content: content[: len(content) // 2]),
    "no end": rewrite(lambda content: content[:-8]),
    "no begin": rewrite(lambda content: content[8:]),
    "flipped": flip,
    "twice": rewrite(lambda content: content + content),
    "DOS": rewrite(lambda content: content.replace(b"\n", b"\r\n")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": link_to("nothing"),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    **{f"another file, {name}": functools.partial(copy_from, f"spare-{name}") for name in FILES},
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A complete set: key with a password, CRL."""
    folder = Folder(tmp_path / "tls")
    folder.write(folder.key, folder.server.key_pem("secret"))
    folder.write(folder.password, b"secret\n")
    folder.write(folder.crl, make_crl(folder.ca))
    for name in FILES:
        shutil.copy(folder.path / name, folder.path / f"spare-{name}")
    return folder


def mend(folder: Folder) -> None:
    """All files as they were."""
    for name in FILES:
        path = folder.path / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        shutil.copy(folder.path / f"spare-{name}", path)


def refusal(settings: Settings) -> str:
    """Why a start refuses it; nothing if it does not."""
    try:
        load_trust(settings)
    except SettingsError as refused:
        return str(refused)
    return ""


def held_against_a_start(settings: Settings) -> bool:
    """Whether it starts. What does not is bad, and not only because a start said so."""
    found = said(settings)
    if refused := refusal(settings):
        others = [line for line in found.of("bad") if not line.startswith("bad   start: ")]
        assert others, f"{refused}{found}"
        assert found.has("bad", "^bad   start: "), str(found)
    else:
        assert not found.has("bad", "^bad   start: "), str(found)
    return not refused


def complete(folder: Folder) -> Settings:
    return folder.settings(tls={"crl": folder.crl, "key_password": folder.password})


def test_the_set_is_good(folder: Folder) -> None:
    assert held_against_a_start(complete(folder))
    assert said(complete(folder)).code == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", WAYS)
def test_one_file_broken(name: str, way: str, folder: Folder) -> None:
    WAYS[way](folder.path / name)
    held_against_a_start(complete(folder))


def test_two_files_broken(folder: Folder) -> None:
    draw = random.Random(5)
    cases = list(itertools.product(itertools.combinations(FILES, 2), WAYS, WAYS))
    for (one, other), way, second in draw.sample(cases, 60):
        mend(folder)
        WAYS[way](folder.path / one)
        WAYS[second](folder.path / other)
        held_against_a_start(complete(folder))


def wrong_sets(folder: Folder) -> Iterator[tuple[str, dict[Path, list[bytes]]]]:
    """Each file is well-formed; together they are not."""
    ca, other = folder.ca, make_ca("other")
    middle = make_ca("middle", ca)
    leaf, stranger = make("leaf", middle), make("disk", other)
    stale = make_crl(ca, begin=-9 * DAY, end=-DAY)
    cert, key, cas, crl = folder.cert, folder.key, folder.client_ca, folder.crl
    yield "another key", {key: [stranger.key_pem()]}
    yield "leaf last", {cert: [middle.pem, leaf.pem], key: [leaf.key_pem()]}
    yield "stale CRL", {crl: [stale]}
    yield "future CRL", {crl: [make_crl(ca, begin=DAY)]}
    yield "foreign CRL", {crl: [make_crl(other)]}
    yield "forged CRL", {crl: [make_crl(ca, key=other.key)]}
    yield "a CA without a CRL", {cas: [ca.pem, other.pem]}
    yield "a CRL without a CA", {crl: [make_crl(ca), make_crl(other)]}
    yield "no CA", {cas: [folder.server.pem]}
    yield "expired CA", {cas: [make_ca("x", end=-DAY, begin=-9 * DAY).pem]}
    yield "expired", {cert: [make("x", ca, key=folder.server.key, end=-DAY / 24).pem]}
    yield "future", {cert: [make("x", ca, key=folder.server.key, begin=DAY).pem]}


def test_files_that_do_not_go_together(folder: Folder) -> None:
    for name, files in wrong_sets(folder):
        mend(folder)
        for path, content in files.items():
            folder.write(path, *content)
        started = held_against_a_start(complete(folder))
        assert said(complete(folder)).code == 1, name
        assert not started or "CRL" not in name, f"a start takes it: {name}"


def test_an_old_crl_beside_the_new_one(folder: Folder) -> None:
    old = make_crl(folder.ca, begin=-9 * DAY, end=-DAY)
    for both in ([old, make_crl(folder.ca)], [make_crl(folder.ca), old]):
        folder.write(folder.crl, *both)
        assert held_against_a_start(complete(folder))
        assert said(complete(folder)).code == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"alice", b"alice:", b":00", b"alice:0", b"alice:zz", b"alice:00", b"a:b:c"],
)
def test_pre_shared_keys(content: bytes, folder: Folder) -> None:
    path = folder.write(folder.path / "keys.psk", content)
    tls = TLSSettings(None, None, None, psk=path)
    settings = Settings(str(folder.socket), tls, LOCAL)
    assert not held_against_a_start(settings)
