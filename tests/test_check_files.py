"""gateway.check: who else can read or replace the files."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.check import files as check_files
from gateway.check.files import granted, resolve
from tests.check_rig import Folder

STRANGER = 54321


def give(path: Path, uid: int, gid: int) -> None:
    try:
        os.chown(path, uid, gid)
    except PermissionError:
        pytest.skip("only root can give files away")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "tls")
    folder.write(folder.password, b"secret")
    return folder


def test_good_ones_are_counted(folder: Folder) -> None:
    found = folder.check()
    assert found.has("ok", r"^ok    modes and owners: 4 files, \d+ folders on the way"), str(found)


@pytest.mark.parametrize("name", ["key", "password"])
def test_secrets_are_nobody_elses_to_read(name: str, folder: Folder) -> None:
    path = folder.path / name
    path.chmod(0o604)
    assert folder.check().has("bad", f"{name}: everybody can read it: chmod 0600")
    path.chmod(0o640)
    give(path, -1, STRANGER)
    assert folder.check().has("warn", f"{name}: can be read by group {STRANGER} too: chmod")
    path.chmod(0o400)
    assert folder.check().has("ok", "modes and owners")


@pytest.mark.parametrize("name", ["cert", "key", "ca", "password", "crl"])
def test_nobody_else_may_write(name: str, folder: Folder) -> None:
    path = folder.path / name
    if name == "crl":
        folder.write(path, b"")
    path.chmod(0o602)
    assert folder.check().has("bad", f"{name}: everybody can write there, and so decide who enters")
    path.chmod(0o620)
    give(path, -1, STRANGER)
    assert folder.check().has("warn", f"{name}: group {STRANGER} can write there: chmod g-w")


@pytest.mark.parametrize("name", ["cert", "ca"])
def test_certificates_are_for_all_to_read(name: str, folder: Folder) -> None:
    (folder.path / name).chmod(0o644)
    assert folder.check().has("ok", "modes and owners")


def test_roots_own_group_is_root(folder: Folder) -> None:
    folder.key.chmod(0o660)
    give(folder.key, 0, 0)
    assert folder.check().has("ok", "modes and owners")


def test_files_of_others(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root it is not known whom the gateway will run as."""
    give(folder.client_ca, STRANGER, -1)
    assert folder.check().has("warn", f"ca: belongs to user {STRANGER}, .* chown")
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER + 1)
    assert folder.check().has("bad", f"ca: belongs to user {STRANGER}, who can change it: it has")
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert folder.check().has("ok", "modes and owners")


def test_the_rules_file_is_one_of_them(folder: Folder) -> None:
    rules = folder.write(folder.path / "rules.toml", b"")
    assert folder.check(config=rules).has("ok", "modes and owners: 5 files")
    rules.chmod(0o606)
    assert folder.check(config=rules).has("bad", "rules.toml: everybody can write there")


# ---------------------------------------------------------------- folders and links


@pytest.mark.parametrize(
    ("mode", "good"), [(0o700, True), (0o755, True), (0o757, False), (0o777, False), (0o1777, True)]
)
def test_folder_that_others_can_write(mode: int, good: bool, folder: Folder) -> None:
    folder.path.chmod(mode)
    found = folder.check()
    assert found.has("bad", f"{folder.path}: everybody can write there") is not good, str(found)
    assert found.has("ok", "modes and owners") is good


def test_folder_further_up(folder: Folder, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert folder.check().has("bad", f"{tmp_path}: everybody can write there")


def test_both_ends_of_a_link(folder: Folder, tmp_path: Path) -> None:
    """As Kubernetes has it: a link to a link, and all of it swapped at once."""
    links = tmp_path / "links"
    links.mkdir(mode=0o700)
    (links / "..data").symlink_to("../tls")
    for path in (folder.cert, folder.key, folder.client_ca):
        (links / path.name).symlink_to(f"..data/{path.name}")
    tls = {"cert": links / "cert", "key": links / "key", "client_ca": links / "ca"}
    found = folder.check(tls=tls)
    assert found.has("ok", "modes and owners"), str(found)
    for wide in (links, folder.path):
        wide.chmod(0o777)
        found = folder.check(tls=tls)
        assert [line for line in found.of("bad") if "write" in line] == [
            f"bad   {wide}: everybody can write there, and so decide who enters: chmod o-w"
        ]
        wide.chmod(0o700)
    folder.key.chmod(0o644)
    assert folder.check(tls=tls).has("bad", f"{links}/key: everybody can read it: chmod 0600 .*tls")


def test_links_in_a_circle(folder: Folder) -> None:
    folder.cert.unlink()
    folder.cert.symlink_to("cert")
    found = folder.check()
    assert found.has("bad", "cert: cannot be read: Too many levels of symbolic links"), str(found)


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "link").symlink_to("a/./b")
    (tmp_path / "back").symlink_to(tmp_path / "link" / ".." / "b")
    above = [str(one) for one in reversed(tmp_path.parents)]
    folders, end = resolve(f"{tmp_path}//back/file")
    assert end == f"{tmp_path}/a/b/file"
    assert folders == [*above, str(tmp_path), f"{tmp_path}/a", f"{tmp_path}/a/b"]
    monkeypatch.chdir(tmp_path / "a")
    assert resolve("../link/file") == (
        [*above, str(tmp_path), f"{tmp_path}/a", f"{tmp_path}/a/b"],
        end,
    )
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="symbolic links"):
        resolve(str(tmp_path / "round"))


# ---------------------------------------------------------------- ACLs

_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_NOBODY = 0xFFFFFFFF
Entry = tuple[int, int, int]


def acl(*middle: Entry, mask: int) -> bytes:
    entries = [
        (_USER_OBJ, 4, _NOBODY),
        *middle,
        (_MASK, mask, _NOBODY),
        (_OTHER, 0, _NOBODY),
    ]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)


@pytest.mark.parametrize(
    ("entries", "mask", "group"),
    [
        ([(_USER, 4, 0), (_GROUP_OBJ, 0, _NOBODY)], 4, 0),
        ([(_USER, 4, 77), (_GROUP_OBJ, 0, _NOBODY)], 4, 0),
        ([(_USER, 4, STRANGER), (_GROUP_OBJ, 0, _NOBODY)], 4, 4),
        ([(_GROUP_OBJ, 4, _NOBODY)], 4, 4),
        ([(_GROUP_OBJ, 0, _NOBODY), (_GROUP, 6, 5)], 7, 6),
        ([(_GROUP_OBJ, 0, _NOBODY), (_GROUP, 6, 5)], 4, 4),
    ],
)
def test_acl_is_what_counts(
    entries: list[Entry], mask: int, group: int, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd gives a service its credentials by an ACL: mode 0440, and the group cannot read."""
    monkeypatch.setattr(os, "geteuid", lambda: 77)
    monkeypatch.setattr(os, "getxattr", lambda path, name: acl(*entries, mask=mask))
    folder.key.chmod(0o440)
    give(folder.key, 0, STRANGER)
    assert granted(str(folder.key), os.stat(folder.key), os.geteuid()) == (group, 0)


def test_real_acl(folder: Folder) -> None:
    """The kernel's own, where the file system keeps them."""
    content = acl((_USER, 4, STRANGER), (_GROUP_OBJ, 0, _NOBODY), mask=4)
    give(folder.key, 0, STRANGER)
    try:
        os.setxattr(folder.key, "system.posix_acl_access", content)
    except OSError as error:
        pytest.skip(f"no ACLs on this file system: {error.strerror}")
    assert stat.S_IMODE(folder.key.stat().st_mode) == 0o440
    assert granted(str(folder.key), os.stat(folder.key), os.geteuid()) == (0, 0)
    assert folder.check().has("ok", "modes and owners")


# ---------------------------------------------------------------- what is no file

Making = Callable[[Path], object]


@pytest.mark.parametrize("name", ["cert", "key", "ca", "crl", "password"])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(os.mkfifo, "is no regular file", id="pipe"),
        pytest.param(os.mkdir, "Is a directory|is no regular file", id="folder"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), "is no regular file", id="device"),
        pytest.param(lambda path: path.symlink_to("gone"), "No such file", id="dangling link"),
        pytest.param(lambda path: None, "No such file", id="missing"),
    ],
)
def test_no_file(name: str, make: Making, text: str, folder: Folder) -> None:
    path = folder.path / name
    path.unlink(missing_ok=True)
    make(path)
    files = {"crl": folder.crl} if name == "crl" else {"key_password": folder.password}
    found = folder.check(tls=files)
    assert found.has("bad", f"{path}: .*({text})"), str(found)


def test_too_large(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_files, "MAX_BYTES", 100)
    assert folder.check().has("bad", "cert: is larger than")
