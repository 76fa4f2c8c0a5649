"""How files of certificates and keys are written: all of them or none, and only one run at a time.

Everything is made in memory first. Each file then gets a temporary name in its own folder,
exclusively and with its final mode from the first moment, and only when all are safely on the disk
are they renamed, one by one. A former file is moved aside, not overwritten, until the last new one
is in place. Every step puts its own inverse on a stack, so that an error at any step leaves
the folder as it was; signals wait meanwhile. The temporary names are fixed, and so they also
serve as a lock: two runs at once, or one after a run that was killed, cannot mix their files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from gateway import signals
from gateway.pki_keys import PkiError


class Content(NamedTuple):
    """What goes into one file. `secret`: for its owner only (0600), else for all to read (0644)."""

    data: bytes
    secret: bool = False


def write_together(
    directory: Path, files: Mapping[Path, Content], *, force: bool, remedy: str
) -> None:
    """All the files, or none, in this order. Missing folders are made, those below `directory`
    with mode 0700.

    A file that replaces one keeps its owner: who renews the key of a service as root must not lock
    the service out. Without `force` nothing is replaced, and the error ends with `remedy`.
    Raises PkiError, after which everything is as it was unless the text says otherwise.
    """
    with signals.held():
        _write_together(directory, files, force=force, remedy=remedy)


def _write_together(
    directory: Path, files: Mapping[Path, Content], *, force: bool, remedy: str
) -> None:
    stuck: list[OSError] = []  # steps that could not be undone
    former: list[Path] = []

    def attempt(step: Callable[..., object], *args: object) -> None:
        try:
            step(*args)
        except OSError as error:
            stuck.append(error)

    try:
        with contextlib.ExitStack() as undo:
            _refuse_what_is_there(directory, files, force=force, remedy=remedy)
            for folder in _missing_folders(files):
                folder.mkdir(mode=0o700 if folder.is_relative_to(directory) else 0o755)
                undo.callback(attempt, folder.rmdir)
            for path, content in files.items():
                mode = 0o600 if content.secret else 0o644
                descriptor = _open_new(_new(path), mode)
                undo.callback(attempt, _new(path).unlink, True)
                with open(descriptor, "wb") as out:
                    os.fchmod(descriptor, mode)  # the umask took its share
                    _keep_owner(descriptor, path)
                    out.write(content.data)
                    out.flush()
                    os.fsync(descriptor)
            # Once more: another run may have finished before we held the temporary names.
            _refuse_what_is_there(directory, files, force=force, remedy=remedy)
            for path in files:
                if os.path.lexists(path):
                    path.rename(_old(path))
                    undo.callback(attempt, _old(path).rename, path)
                    former.append(_old(path))
                _new(path).rename(path)
                undo.callback(attempt, path.unlink)
            for folder in {path.parent for path in files}:
                _sync_folder(folder)
            undo.pop_all()
    except OSError as error:
        what = f"cannot write the certificates in {directory}: {in_words(error)}"
        if not stuck:
            raise PkiError(f"{what}; nothing was changed") from error
        raise PkiError(
            f"{what}; and not all could be put back ({in_words(stuck[0])}): rename each .NAME.old "
            f"in {directory} and in its folder ca to NAME, and remove each .NAME.new"
        ) from error
    try:
        for path in former:
            path.unlink()
    except OSError as error:
        raise PkiError(
            f"the new certificates are in place, but remove each .NAME.old in {directory} and in "
            f"its folder ca by hand, they are the former ones: {in_words(error)}"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one run at a time read something in this folder and write it back changed.

    Waits for the other. Raises OSError if there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_left_over(path: Path) -> bool:
    """Whether this is a temporary name, of a run that is at work or was killed."""
    return path.name.startswith(".") and path.name.endswith((".new", ".old"))


def in_words(error: OSError) -> str:
    """What went wrong, and with which file."""
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _refuse_what_is_there(
    directory: Path, files: Iterable[Path], *, force: bool, remedy: str
) -> None:
    if directory.exists() and not directory.is_dir():
        raise PkiError(f"{directory} is a file, not a folder")
    there = [path for path in files if os.path.lexists(path)]
    if there and not force:
        names = ", ".join(str(path.relative_to(directory)) for path in there)
        raise PkiError(f"{directory} already has {names}: {remedy}")
    for path in files:
        if path.is_dir():
            raise PkiError(f"{path} is a folder, not a file")
        if os.path.lexists(_old(path)):
            raise PkiError(
                f"{_old(path)} was left by a run that was cut short: rename it to {path.name} to "
                "have the former file back, or remove it"
            )


def _missing_folders(files: Iterable[Path]) -> list[Path]:
    """Those to make, parents first."""
    wanted = {folder for path in files for folder in path.parents if not folder.exists()}
    return sorted(wanted, key=lambda folder: len(folder.parts))


def _open_new(path: Path, mode: int) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise PkiError(
            f"{path} exists: another run is at work, or one was cut short; if so, remove it"
        ) from None


def _keep_owner(descriptor: int, former: Path) -> None:
    try:
        found = former.lstat()
    except FileNotFoundError:
        return
    ours = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and (found.st_uid, found.st_gid) != (ours.st_uid, ours.st_gid):
        os.fchown(descriptor, found.st_uid, found.st_gid)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
