"""Part of `check`: `--user`. Whoever the gateway becomes has to be able to go on without root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gateway.check.files import read
from gateway.check.report import Report
from gateway.errors import SettingsError
from gateway.privileges import account_of, acting_as


def check_user(report: Report, user: str, files: list[Path]) -> None:
    """A start reads the files as root, a reload as `user`. Raises SettingsError for whom nobody can
    become, and OSError."""
    account = account_of(user)
    closed = 0
    with acting_as(account):
        for path in files:
            try:
                read(path)
            except PermissionError:
                closed += 1
                report.warn(
                    path,
                    f"{account.name} cannot read it, so the gateway starts with it, but refuses "
                    "every reload: give that user's group the right to read it, and a way there",
                )
            except (OSError, SettingsError):
                pass  # said where the file is looked at
    if not closed:
        report.ok(f"--user {user}", f"{account}, can read the files again for a reload")


def uid_of(user: str | None) -> int:
    """Whose the files may be, beside root's: of us, unless the gateway becomes another."""
    if user is not None:
        with contextlib.suppress(SettingsError):  # said in `check_user`
            return account_of(user).uid
    return os.geteuid()


@contextlib.contextmanager
def acting_as_user(user: str | None) -> Iterator[None]:
    """What is done here is done as that user. One whom nobody can become has been said."""
    with contextlib.ExitStack() as stack:
        if user is not None:
            with contextlib.suppress(SettingsError):
                stack.enter_context(acting_as(account_of(user)))
        yield
