"""Least privilege: `--user`, and no memory of a process that holds keys on any disk.

What needs root is done first: files are read and ports bound. Then this process becomes another
user for good, which is tried before it is believed.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import resource
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import GatewayError, SettingsError

# prctl(2)
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
# capget(2): version 3, of this process; then effective, permitted and inheritable, twice 32 bits.
_CAP_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)
_NO_CAPS: Final = bytes(24)
_CAPS_LEFT: Final = ("CapInh:", "CapPrm:", "CapEff:", "CapAmb:")  # in proc_pid_status(5)
_MOST: Final = (1 << 32) - 2  # the last number means "none" to the kernel

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Account:
    """Whom to become. `name` is the user as it was given, for messages."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]  # supplementary ones; those of the user, or the one that was given

    def __str__(self) -> str:
        return f"user {self.name} ({self.uid}), group {self.gid}"


def account_of(text: str) -> Account:
    """`USER[:GROUP]`, each a name or a number. Raises SettingsError, also if it is not for us to
    become that one."""
    name, colon, group = text.partition(":")
    if not name or (colon and not group):
        raise SettingsError(f"--user {text!r}: it is USER or USER:GROUP")
    user = _user(name)
    if user is None and not _is_number(name):
        raise SettingsError(f"--user {name}: there is no such user")
    uid = int(name) if user is None else user.pw_uid
    if uid == 0:
        raise SettingsError(f"--user {name}: that is root itself: name a user without privileges")
    if colon:
        gid = _group(group)
        groups: tuple[int, ...] = (gid,)
    elif user is None:
        raise SettingsError(f"--user {name}: no user has this number, so say the group: {name}:GID")
    else:
        gid = user.pw_gid
        groups = tuple(os.getgrouplist(user.pw_name, gid))
    account = Account(name, uid, gid, groups)
    us = os.geteuid()
    if us != 0 and (us, os.getegid()) != (uid, gid):
        raise SettingsError(f"--user {text}: only root can become another user, and this is not it")
    return account


def become(account: Account) -> None:
    """Be this user from now on, without a way back. Of a process with one thread.

    Raises SettingsError if the kernel refuses, and GatewayError if there is a way back after all;
    either way nobody may be served.
    """
    if os.geteuid() == 0:
        try:
            os.setgroups(account.groups)
            os.setresgid(account.gid, account.gid, account.gid)
            os.setresuid(account.uid, account.uid, account.uid)
        except OSError as error:
            raise SettingsError(
                f"--user {account.name}: {error.strerror}: root needs CAP_SETUID and CAP_SETGID "
                "for it, and the user has to be known in this user namespace"
            ) from None
    # The kernel takes them from who leaves root behind, unless it was told not to.
    _call("capset", _CAP_HEADER, _NO_CAPS)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _prove(account)
    no_core_dumps()  # a change of user undoes it


def no_core_dumps() -> None:
    """Never write this process's memory to a disk, nor let its user look into it. Idempotent.

    Processes that are forked have it, those that are executed have the limit only. To be said again
    after a change of user. Raises GatewayError.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit alone is none for a core_pattern that is a program.
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


@contextlib.contextmanager
def acting_as(account: Account) -> Iterator[None]:
    """Be this user for a moment, as far as access to files is concerned. Of a process with one
    thread. Raises OSError."""
    if os.geteuid() != 0:
        yield  # that one already, as `account_of` has seen to
        return
    groups, gid = os.getgroups(), os.getegid()
    try:
        os.setgroups(account.groups)
        os.setegid(account.gid)
        os.seteuid(account.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)
        no_core_dumps()


def warning() -> str:
    """What is to be said of a start without `--user`; empty if nothing is."""
    if os.geteuid() != 0:
        return ""
    return (
        "running as root: --user USER gives that up once files are read and ports bound, or have "
        "a service manager start the gateway as another user"
    )


def remedy(wrong: Exception, user: str | None) -> str:
    """What to add to an error of a reload: files of the start may be root's to read only."""
    if user is None or not isinstance(wrong.__cause__, PermissionError):
        return ""
    name = user.partition(":")[0]
    return f"; make it, and the folders on the way, readable by {name} (--user), or restart"


def _prove(account: Account) -> None:
    """Raises GatewayError if anything of what we were is left."""
    uid, gid = account.uid, account.gid
    wrong = os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid)
    for undo in (os.setuid, os.seteuid):
        with contextlib.suppress(PermissionError):
            undo(0)
            wrong = True
    status = Path("/proc/self/status").read_text().splitlines()
    for line in status:
        name, _, value = line.partition("\t")
        wrong |= name in _CAPS_LEFT and int(value, 16) != 0
    if wrong or "NoNewPrivs:\t1" not in status:
        raise GatewayError(f"--user {account.name}: root's privileges are not gone: not serving")


def _call(name: str, *args: object) -> None:
    """A function of libc that returns -1 for an error. Raises GatewayError."""
    values = [ctypes.c_ulong(one) if isinstance(one, int) else one for one in args]
    if getattr(_libc, name)(*values) == -1:
        why = os.strerror(ctypes.get_errno())
        raise GatewayError(f"cannot give up privileges: {name}: {why}")


def _user(name: str) -> pwd.struct_passwd | None:
    """By its name, which may be a number; then by its number."""
    try:
        return pwd.getpwnam(name)
    except (KeyError, ValueError):  # ValueError: a NUL in it
        pass
    try:
        return pwd.getpwuid(int(name)) if _is_number(name) else None
    except KeyError:
        return None


def _group(name: str) -> int:
    """Raises SettingsError."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        if _is_number(name):
            return int(name)
    raise SettingsError(f"--user: there is no group {name!r}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MOST
