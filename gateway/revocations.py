"""The record of revoked certificates, as text: serial number, since when, and whose it was."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from gateway.pki_keys import PkiError

_HEAD: Final = (
    "# Revoked: serial number, since when, and whose it was. `certs revoke` adds to it.\n"
)
_WHEN: Final = "%Y-%m-%dT%H:%M:%SZ"
# A serial number has up to 20 bytes (RFC 5280); a time is only what `record_of` would write again.
_LINE: Final = re.compile(
    r"(0x[0-9a-f]{1,40}) ([1-9][0-9]{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ)(?: (.*))?", re.ASCII
)


class Entry(NamedTuple):
    """One certificate that is revoked."""

    serial: int
    since: datetime
    whose: str  # RFC 4514, for people; "" where only the serial number was known


def record_of(entries: Iterable[Entry]) -> bytes:
    """The record's text: one line an entry."""
    lines = [
        f"{each.serial:#x} {each.since.astimezone(UTC):{_WHEN}} {_shown(each.whose)}".rstrip()
        for each in entries
    ]
    return "".join([_HEAD, *(f"{line}\n" for line in lines)]).encode()


def parse_record(text: bytes, path: Path) -> tuple[Entry, ...]:
    """What `record_of` wrote. Raises PkiError for anything else: a line that was not understood
    would be a certificate that is good again.
    """
    entries = []
    for number, line in enumerate(text.decode(errors="replace").split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        try:
            since = datetime.strptime(found[2] if found else "", _WHEN).replace(tzinfo=UTC)
        except ValueError:
            found = None
        if found is None:
            raise PkiError(
                f"{path}, line {number}: not a serial number and a time as in "
                "`0x1f 2030-01-31T12:00:00Z CN=vm1`"
            )
        entries.append(Entry(int(found[1], 16), since, found[3] or ""))
    return tuple(entries)


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
