"""gateway.certs.store, by way of `init`: all files or none, whatever goes wrong in between."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway import certs
from gateway.certs.store import Content, locked, write_together
from gateway.pki import PkiError
from tests.test_certs import SIX, snapshot


@pytest.mark.parametrize(
    ("server_names", "client_name"), [(["good.example", "bad_name"], "vm1"), ([], "line\n")]
)
def test_bad_names_write_nothing(server_names: list[str], client_name: str, tmp_path: Path) -> None:
    with pytest.raises(PkiError, match="name"):
        certs.init(tmp_path / "tls", server_names, client_name=client_name)
    assert snapshot(tmp_path) == {}


def test_the_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(PkiError, match="file is a file, not a folder"):
        certs.init(tmp_path / "file", force=True)
    with pytest.raises(PkiError, match=r"Not a directory.*nothing was changed"):
        certs.init(tmp_path / "file/tls")
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_a_folder_has_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "ca-cert.pem").mkdir()
    with pytest.raises(PkiError, match="is a folder, not a file"):
        certs.init(tmp_path, force=True)
    assert snapshot(tmp_path) == {"ca-cert.pem": None}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_the_directory_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir(0o500)
    with pytest.raises(PkiError, match=r"cannot write.*Permission denied"):
        certs.init(tmp_path / "tls")
    assert snapshot(tmp_path) == {"tls": None}


class Failing:
    """Stands in for a function and fails at its n-th call."""

    def __init__(self, real: Callable[..., Any], at: int, error: BaseException) -> None:
        self.real, self.at, self.error, self.calls = real, at, error, 0

    def __get__(self, instance: object, owner: object) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.real(*args, **kwargs)


def complaint(directory: Path, *, force: bool) -> str | None:
    """What `init` says against it, or None if it goes through."""
    try:
        certs.init(directory, force=force)
    except PkiError as error:
        return str(error)
    return None


STEPS = [(os, "open"), (os, "fchmod"), (os, "fsync"), (Path, "rename"), (Path, "mkdir")]


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_failure_at_any_step_changes_nothing(
    owner: Any, name: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "parent/tls"
    if force:
        certs.init(directory)
        (directory / "client-cert.pem").unlink()  # a set with a gap
        if name == "mkdir":
            (directory / "ca/ca-key.pem").unlink()
            (directory / "ca").rmdir()
    before = snapshot(tmp_path)
    for at in itertools.count(1):
        failing = Failing(getattr(owner, name), at, OSError(28, "No space left on device"))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            text = complaint(directory, force=force)
        if text is None:
            break  # there is no n-th call: all have had their turn
        assert text == (
            f"cannot write the certificates in {directory}: No space left on device; "
            "nothing was changed"
        )
        assert snapshot(tmp_path) == before
    assert at > 1
    assert failing.calls == at - 1


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
def test_an_interrupt_changes_nothing(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        certs.init(tmp_path)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", Failing(Path.rename, 4, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            certs.init(tmp_path, force=force)
    assert snapshot(tmp_path) == before


def test_what_cannot_be_put_back_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certs.init(tmp_path)
    before = snapshot(tmp_path)

    def broken_disk(self: Path, target: Path) -> None:
        if self.name != ".ca-key.pem.new" and target.name != ".ca-key.pem.old":
            raise OSError(5, "Input/output error", str(self))
        os.rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken_disk)
        text = complaint(tmp_path, force=True)
    assert text is not None
    assert "ca-cert.pem" in text
    assert "not all could be put back" in text
    assert f"rename each .NAME.old in {tmp_path} and in its folder ca to NAME" in text
    # As told, and the former set is whole again.
    for path in tmp_path.rglob(".*.old"):
        path.rename(path.with_name(path.name.removeprefix(".").removesuffix(".old")))
    assert snapshot(tmp_path) == before


def test_former_files_that_cannot_be_removed_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certs.init(tmp_path)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Failing(Path.unlink, 1, OSError(1, "Not permitted", "x")))
        text = complaint(tmp_path, force=True)
    assert text is not None
    assert "the new certificates are in place" in text
    assert f"remove each .NAME.old in {tmp_path}" in text
    assert all(snapshot(tmp_path)[name] != before[name] for name in SIX)


@pytest.mark.parametrize("force", [False, True], ids=["fresh", "force"])
@pytest.mark.parametrize("left", ["ca/.ca-key.pem.new", ".client-cert.pem.new"])
def test_another_run_or_its_remains_are_not_touched(left: str, force: bool, tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    (tmp_path / left).write_bytes(b"theirs")
    text = complaint(tmp_path, force=force)
    assert text == (
        f"{tmp_path / left} exists: another run is at work, or one was cut short; if so, remove it"
    )
    assert snapshot(tmp_path) == {"ca": None, left: b"theirs"}


def test_a_former_file_left_by_a_killed_run_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / ".server-key.pem.old").write_bytes(b"former")
    for force in (False, True):
        text = complaint(tmp_path, force=force)
        assert text is not None
        assert "rename it to server-key.pem" in text
    assert snapshot(tmp_path) == {".server-key.pem.old": b"former"}


def test_a_run_that_finishes_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def meanwhile(descriptor: int) -> None:
        real(descriptor)
        (tmp_path / "server-cert.pem").write_bytes(b"theirs")

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(PkiError, match=r"already has server-cert\.pem"):
        certs.init(tmp_path)
    assert snapshot(tmp_path) == {"server-cert.pem": b"theirs"}


# ---------------------------------------------------------------- beyond `init`


def test_contents_and_modes(tmp_path: Path) -> None:
    files = {tmp_path / "a": Content(b"1"), tmp_path / "new/b": Content(b"2", secret=True)}
    write_together(tmp_path, files, force=False, remedy="-")
    assert snapshot(tmp_path) == {"a": b"1", "new": None, "new/b": b"2"}
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("a", "new", "new/b")}
    assert modes == {"a": 0o644, "new": 0o700, "new/b": 0o600}
    with pytest.raises(PkiError, match=r"already has a, new/b: try another$"):
        write_together(tmp_path, files, force=False, remedy="try another")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    """Or a service that runs as another user could not read its renewed key."""
    key = tmp_path / "key"
    key.write_bytes(b"former")
    os.chown(key, 1234, 2345)
    write_together(tmp_path, {key: Content(b"new", secret=True)}, force=True, remedy="-")
    found = key.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (1234, 2345, 0o600)
    assert key.read_bytes() == b"new"


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "key").symlink_to("theirs")
    files = {tmp_path / "key": Content(b"new", secret=True)}
    write_together(tmp_path, files, force=True, remedy="-")
    assert not (tmp_path / "key").is_symlink()
    assert snapshot(tmp_path) == {"key": b"new", "theirs": b"theirs"}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with locked(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing"):
        pass
