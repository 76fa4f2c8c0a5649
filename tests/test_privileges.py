"""gateway.privileges: another user for good, and no memory on any disk. Each in a process of its
own, since there is no way back."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.privileges import Account, account_of, acting_as
from tests.support.gateway import ROOT, environment

NOBODY = pwd.getpwnam("nobody")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
BEGIN = "from gateway.privileges import *\nfrom gateway import privileges as p\nimport os\n"


UID, GID = NOBODY.pw_uid, NOBODY.pw_gid
AS_NOBODY = f"os.setgroups([]); os.setresgid(*[{GID}] * 3); os.setresuid(*[{UID}] * 3)\n"


def said(code: str) -> str:
    """What a Python says that does this."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)


# ---------------------------------------------------------------- whom


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("text", "uid", "gid"),
    [
        ("nobody", NOBODY.pw_uid, NOBODY.pw_gid),
        (str(NOBODY.pw_uid), NOBODY.pw_uid, NOBODY.pw_gid),
        ("nobody:daemon", NOBODY.pw_uid, 1),
        ("nobody:1", NOBODY.pw_uid, 1),
        ("54321:54322", 54321, 54322),
    ],
)
def test_who_is_meant(text: str, uid: int, gid: int) -> None:
    account = account_of(text)
    assert (account.uid, account.gid) == (uid, gid)
    assert account.groups == (gid,), "no group of root's stays"


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is USER or USER:GROUP"),
        (":nogroup", "it is USER or USER:GROUP"),
        ("nobody:", "it is USER or USER:GROUP"),
        ("no-such-user", "there is no such user"),
        ("nobody:no-such-group", "there is no group 'no-such-group'"),
        ("root", "that is root itself"),
        ("0", "that is root itself"),
        ("00:1", "that is root itself"),
        ("54321", "no user has this number, so say the group: 54321:GID"),
        ("-1", "there is no such user"),
        ("4294967295:1", "there is no such user"),  # what the kernel takes for "leave it"
        ("nobody:4294967295", "there is no group"),
        ("no\0body", "there is no such user"),
    ],
)
def test_who_is_nobody(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        account_of(text)


def test_only_root_becomes_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 54321)
    monkeypatch.setattr("os.getegid", lambda: 54322)
    with pytest.raises(SettingsError, match="only root can become another user"):
        account_of("nobody")
    assert account_of("54321:54322").uid == 54321, "that one already"


# ---------------------------------------------------------------- for good


@needs_root
def test_nothing_of_root_is_left() -> None:
    text = said("become(account_of('nobody'))\nprint(open('/proc/self/status').read())")
    lines = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert lines["Uid"].split() == [str(NOBODY.pw_uid)] * 4
    assert lines["Gid"].split() == [str(NOBODY.pw_gid)] * 4
    assert lines["Groups"].split() == [str(NOBODY.pw_gid)]
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(lines[kind], 16) == 0, kind
    assert lines["NoNewPrivs"] == "1"


@needs_root
def test_keys_are_in_no_core_dump_afterwards() -> None:
    """A change of user would allow them again; 3 is PR_GET_DUMPABLE."""
    dumpable = "print(p._libc.prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))"
    assert said(f"become(account_of('nobody'))\n{dumpable}") == "0 (0, 0)\n"
    assert said(f"no_core_dumps()\n{dumpable}") == "0 (0, 0)\n"
    assert said(f"{AS_NOBODY}no_core_dumps()\n{dumpable}") == "0 (0, 0)\n"
    assert said(f"no_core_dumps()\nif not os.fork(): {dumpable}\nos.wait()") == "0 (0, 0)\n"


@needs_root
@pytest.mark.parametrize(
    "sabotage",
    [
        "os.setresuid = lambda *ids: None",
        "os.setresgid = lambda *ids: None",
        "os.setresuid = lambda *ids: os.seteuid(ids[0])",
        # PR_SET_KEEPCAPS, and nobody who lays them down
        "p._libc.prctl(8, 1, 0, 0, 0); c = p._call; "
        "p._call = lambda name, *a: name == 'capset' or c(name, *a)",
        "c = p._call; p._call = lambda name, *a: a[:1] == (38,) or c(name, *a)",
    ],
)
def test_what_is_left_is_seen(sabotage: str) -> None:
    code = f"{sabotage}\ntry: become(account_of('nobody'))\nexcept GatewayError as e: print(e)"
    assert said(code) == "--user nobody: root's privileges are not gone: not serving\n"


@needs_root
def test_capabilities_that_were_to_be_kept_are_laid_down() -> None:
    said("p._libc.prctl(8, 1, 0, 0, 0)\nbecome(account_of('nobody'))")


@needs_root
def test_a_kernel_that_refuses() -> None:
    code = "os.setgroups = lambda ids: (_ for _ in ()).throw(PermissionError(1, 'not permitted'))"
    text = said(f"{code}\ntry: become(account_of('nobody'))\nexcept SettingsError as e: print(e)")
    assert text.startswith("--user nobody: not permitted: root needs CAP_SETUID and CAP_SETGID")


@needs_root
def test_who_is_that_user_already() -> None:
    """Under a service manager the flag does no harm."""
    said(f"{AS_NOBODY}become(account_of('nobody'))\nassert os.getuid() != 0")


# ---------------------------------------------------------------- for a moment


@needs_root
def test_acting_as_somebody(tmp_path: Path) -> None:
    """Root's files are closed then, and open again afterwards."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    before = (os.getresuid(), os.getresgid(), os.getgroups())
    with acting_as(account_of("nobody:daemon")):
        assert (os.geteuid(), os.getegid(), os.getgroups()) == (NOBODY.pw_uid, 1, [1])
        with pytest.raises(PermissionError):
            secret.read_text()
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == before
    assert secret.read_text() == "x"


@needs_root
def test_an_error_meanwhile_leaves_nobody_behind() -> None:
    before = (os.getresuid(), os.getresgid(), os.getgroups())
    with pytest.raises(ZeroDivisionError), acting_as(Account("nobody", 65534, 65534, (65534,))):
        raise ZeroDivisionError
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == before
