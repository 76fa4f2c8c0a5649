"""The files that trust is made of, each read whole into memory, and all of one moment."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import SettingsError
from gateway.settings import TLSSettings

MAX_BYTES: Final = 16 << 20  # ours: a CRL of a hundred thousand entries has four MiB
_TRIES: Final = 5  # to read the same twice


@dataclass(frozen=True, slots=True)
class File:
    """A file that a flag names, and what was in it."""

    flag: str
    path: Path
    data: bytes

    def wrong(self, what: str) -> SettingsError:
        """An error about it, to be raised."""
        return SettingsError(f"{self.flag}: {self.path} {what}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is in all the files of the settings; None for those that are not used."""

    cert: File | None = None
    key: File | None = None
    key_password: File | None = None
    client_ca: File | None = None
    crl: File | None = None
    psk: File | None = None

    @classmethod
    def take(cls, settings: TLSSettings | None) -> Snapshot:
        """Read them. Blocks. Raises SettingsError that names the flag and the file.

        Each is read twice: else, while a folder is swapped for another one, it could be the
        certificate of before with the key of after.
        """
        if settings is None:
            return cls()
        before = cls._read(settings)
        for _ in range(_TRIES):
            after = cls._read(settings)
            if after == before:
                return after
            before = after
        raise SettingsError("the TLS files change all the time: they cannot be read as one set")

    @classmethod
    def _read(cls, settings: TLSSettings) -> Snapshot:
        return cls(
            cert=_file("--cert", settings.cert),
            key=_file("--key", settings.key),
            key_password=_file("--key-password-file", settings.key_password),
            client_ca=_file("--client-ca", settings.client_ca),
            crl=_file("--crl", settings.crl),
            psk=_file("--psk-file", settings.psk),
        )

    @property
    def digests(self) -> Mapping[str, bytes]:
        """SHA-256 of each file, by its flag."""
        files = (self.cert, self.key, self.key_password, self.client_ca, self.crl, self.psk)
        return {one.flag: hashlib.sha256(one.data).digest() for one in files if one is not None}


def _file(flag: str, path: Path | None) -> File | None:
    return None if path is None else File(flag, path, _read(flag, path))


def _read(flag: str, path: Path) -> bytes:
    """Not from a pipe or a device: that would be waited for, and cannot be read again."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SettingsError(f"{flag}: {path} is no regular file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{flag}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise SettingsError(f"{flag}: cannot read {str(path)!r}: {error}") from None
    if len(data) > MAX_BYTES:
        raise SettingsError(f"{flag}: {path} is larger than {MAX_BYTES >> 20} MiB")
    return data


@contextlib.contextmanager
def as_path(data: bytes) -> Iterator[str]:
    """A path under which these bytes can be read, for who takes nothing but paths.

    In memory, for this process only: what was checked is what is used.
    """
    fd = os.memfd_create("nbd-gateway", os.MFD_CLOEXEC)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{fd}"
