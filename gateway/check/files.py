"""Part of `check`: who else can read or replace the files that the gateway is trusted by.

Whoever can write a folder on the way to a file can put another file there, and a symbolic link has
two ways: its own and that of what it leads to.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
import struct
from pathlib import Path
from typing import Final, NamedTuple

from gateway.check.report import Report
from gateway.errors import SettingsError
from gateway.snapshot import MAX_BYTES

_MAX_LINKS: Final = 40  # the kernel's own limit, path_resolution(7)

_R, _W = 4, 2
# acl(5) as the kernel hands it out: a version, then tag, permissions and id of each entry.
_ACL: Final = "system.posix_acl_access"
_ACL_HEAD, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_USER, _GROUP_OBJ, _GROUP, _MASK = 0x02, 0x04, 0x08, 0x10


class Given(NamedTuple):
    """What others than the owner may do: bits of rwx."""

    group: int
    others: int


def read(path: Path) -> bytes:
    """A file's content. Raises OSError, and SettingsError for what is no file: a pipe or a device
    would be waited for, and the gateway has to be able to read it again."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise SettingsError("is no regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise SettingsError(f"is larger than {MAX_BYTES >> 20} MiB: hardly the file that is meant")
    return data


def check_modes(report: Report, files: list[Path], secret: list[Path], us: int) -> None:
    """Nobody but root and `us`, the user that the gateway runs as, may write any of the files, nor
    read those that are secret."""
    folders: dict[str, None] = {}
    before = len(report.verdicts)
    for path in dict.fromkeys(files):
        with report.part(path):
            on_the_way, end = resolve(os.fspath(path))
            folders.update(dict.fromkeys(on_the_way))
            _check_file(report, path, end, us, secret=path in secret)
    for folder in folders:
        with report.part(folder):
            _check_folder(report, folder, us)
    if len(report.verdicts) == before and folders:
        count = len(set(files))
        report.ok("modes and owners", f"{count} files, {len(folders)} folders on the way to them")


def _check_file(report: Report, path: Path, end: str, us: int, *, secret: bool) -> None:
    found = os.stat(end)
    if stat.S_ISREG(found.st_mode):  # what else it may be is said where it is read
        given = granted(end, found, us)
        _check_owner(report, path, found, us)
        _check_writers(report, path, found, given)
        if secret and given.others & _R:
            report.bad(
                path,
                f"everybody can read it: chmod 0600 {end}, and make a new one: it may be known",
            )
        elif secret and given.group & _R:
            group = f"group {found.st_gid}"
            report.warn(path, f"can be read by {group} too: chmod 0600 {end}, if it need not be")


def _check_folder(report: Report, folder: str, us: int) -> None:
    found = os.stat(folder)
    _check_owner(report, folder, found, us)
    # In a folder with the sticky bit, as /tmp, a file is its owner's to replace only.
    if not found.st_mode & stat.S_ISVTX:
        _check_writers(report, folder, found, granted(folder, found, us))


def _check_owner(report: Report, what: object, found: os.stat_result, us: int) -> None:
    if found.st_uid in (0, us):
        return
    text = f"belongs to {_user(found.st_uid)}, who can change it"
    if us == 0:  # it is not said whom the gateway will run as
        report.warn(what, f"{text}: fine if the gateway runs as that user, else chown it")
    else:
        report.bad(what, f"{text}: it has to be root's or {_user(us)}'s, use chown")


def _check_writers(report: Report, what: object, found: os.stat_result, given: Given) -> None:
    if given.others & _W:
        report.bad(what, "everybody can write there, and so decide who enters: chmod o-w")
    elif given.group & _W:
        report.warn(what, f"group {found.st_gid} can write there: chmod g-w, if it need not")


def resolve(path: str) -> tuple[list[str], str]:
    """The folders that have a say in what `path` leads to, and where it ends. Raises OSError."""
    folders: dict[str, None] = {"/": None}
    here, links = "/", 0
    rest = os.path.join(os.getcwd(), path).split("/")[::-1]
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        step = os.path.dirname(here) if part == ".." else os.path.join(here, part)
        if stat.S_ISLNK(os.lstat(step).st_mode):
            if (links := links + 1) > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(step)
            rest += target.split("/")[::-1]
            here = "/" if target.startswith("/") else here
            continue
        here = step
        if rest:
            folders[here] = None
    return list(folders), here


def granted(path: str, found: os.stat_result, us: int) -> Given:
    """What others than the owner and `us` may do with a file or folder, by its mode or its ACL.

    With an ACL the group's bits of the mode are only the most that an entry can give: systemd
    hands out credentials with 0440 that way, which nobody but one user can read.
    """
    owning = 0 if found.st_gid == 0 else 7  # root's own group is root
    plain = Given(found.st_mode >> 3 & owning, found.st_mode & 7)
    try:
        raw = os.getxattr(path, _ACL)
    except OSError:
        return plain
    mask, group = 7, 0
    entries = list(_ACL_ENTRY.iter_unpack(raw[_ACL_HEAD.size :]))
    for tag, bits, who in entries:
        if tag == _MASK:
            mask = bits
        elif tag == _GROUP_OBJ:
            group |= bits & owning
        elif tag == _GROUP:
            group |= bits
        elif tag == _USER and who not in (0, us) and us != 0:
            group |= bits
    return Given(group & mask, plain.others)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
