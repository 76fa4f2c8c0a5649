"""One frozen object with everything that a user can set; every check happens when it is built."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from gateway.access import Rule, Rules
from gateway.errors import SettingsError
from gateway.limits import Limits
from gateway.nbd.constants import MAX_STRING
from gateway.nbd.upgrades import ALL_UPGRADES, Upgrade
from gateway.rule import ANYBODY

OLDSTYLE_NEEDS: Final = (
    "--oldstyle has no TLS: it goes with --tls off, on loopback and Unix sockets"
)
DEFAULT_PORT: Final = 10809  # IANA's, proto.md, "Newstyle negotiation"
MAX_SOCKET_PATH: Final = 107  # bytes in sockaddr_un, less the final NUL

TLS_DIR_CERT, TLS_DIR_KEY = "server-cert.pem", "server-key.pem"
TLS_DIR_CA, TLS_DIR_CRL = "ca-cert.pem", "ca-crl.pem"


@dataclass(frozen=True, slots=True)
class ListenTCP:
    """`host` None: all addresses of this machine. Port 0: the kernel picks one."""

    host: str | None
    port: int


@dataclass(frozen=True, slots=True)
class ListenUnix:
    path: str


@dataclass(frozen=True, slots=True)
class ListenSystemd:
    """Sockets that systemd has opened; with a name only those of that FileDescriptorName=."""

    name: str | None


Listen = ListenTCP | ListenUnix | ListenSystemd


@dataclass(frozen=True, slots=True)
class TLSSettings:
    """Files, all PEM but `psk` and `key_password`; either certificates or pre-shared keys.

    With `psk` every other file is None: a gateway that had a certificate too would let in whoever
    asks for that. Without, `client_ca` None means that anyone may enter, said aloud with
    `--allow-anonymous`.
    """

    cert: Path | None
    key: Path | None
    client_ca: Path | None
    crl: Path | None = None
    minimum: Literal["1.2", "1.3"] = "1.2"
    key_password: Path | None = None  # what opens `key`, in one line
    psk: Path | None = None  # `user:hex` lines, as psktool writes them

    def __post_init__(self) -> None:
        others = (self.cert, self.key, self.key_password, self.client_ca, self.crl)
        if self.psk is not None:
            if any(others):
                raise SettingsError("--psk-file goes with no certificate, key, CA or CRL")
            return
        for flag, value in (("--cert", self.cert), ("--key", self.key)):
            if value is None:
                raise SettingsError(
                    f"{flag} FILE is missing (or --tls-dir DIR for all the files, or --psk-file "
                    "FILE for pre-shared keys)"
                )
        if self.crl is not None and self.client_ca is None:
            raise SettingsError(
                "--crl goes with --client-ca, not with --allow-anonymous: without client "
                "certificates there is none to be revoked"
            )


@dataclass(frozen=True, slots=True)
class Settings:
    """What one gateway runs with. `tls` None is `--tls off`: loopback and Unix sockets only."""

    socket: str
    tls: TLSSettings | None
    listen: tuple[Listen, ...] = (ListenTCP(None, DEFAULT_PORT),)
    export: str | None = ""  # None: --any-export; with rules.exports: of which a URI is printed
    read_only: bool = False
    oldstyle: bool = False  # the oldstyle handshake, and no other
    upgrades: frozenset[Upgrade] = ALL_UPGRADES  # what an upstream that lacks it is helped with
    max_connections: int = 100  # of the whole gateway, however many workers there are
    workers: int = 1  # processes, at most one a connection
    handshake_timeout_s: float = 10.0  # accept until GO is granted, TLS included
    drain_timeout_s: float = 30.0
    rules: Rules = field(default_factory=Rules)
    on_revoke: Literal["close", "keep"] = "close"  # a session whose client may no longer enter
    reload_interval_s: float = 10.0  # how often files are looked at; 0: at SIGHUP only
    config: Path | None = None  # where some of the rules are from, for messages
    limits: Limits = field(default_factory=Limits)
    reconnect_s: float = 0.0  # how long a lost upstream is dialled anew; 0: not at all
    user: str | None = None  # USER[:GROUP] to become once files are read and sockets bound

    def __post_init__(self) -> None:
        check_socket_path("--socket", self.socket)
        if self.oldstyle and self.tls is not None:
            raise SettingsError(OLDSTYLE_NEEDS)
        if self.oldstyle and self.export is None:
            raise SettingsError("--oldstyle has one export without a name: not with --any-export")
        if self.rules.exports and (self.oldstyle or self.export is None):
            flag = "--oldstyle" if self.oldstyle else "--any-export"
            raise SettingsError(f"{flag} goes with no [[export]]: leave one or the other out")
        for flag, number in (
            ("--max-connections", self.max_connections),
            ("--workers", self.workers),
        ):
            if number < 1:
                raise SettingsError(f"{flag}: {number} is less than 1")
        for flag, seconds in (
            ("--handshake-timeout", self.handshake_timeout_s),
            ("--drain-timeout", self.drain_timeout_s),
            ("--reload-interval", self.reload_interval_s),
            ("--reconnect", self.reconnect_s),
        ):
            if not 0 <= seconds < math.inf:  # NaN neither
                raise SettingsError(f"{flag}: {seconds} is no number of seconds")
        check_export_name("--export", self.export or "")
        self._check_rules()

    @property
    def shares(self) -> tuple[int, ...]:
        """How many clients each worker may have at a time: one entry a process, largest first.

        They differ by one at most, and their sum is `max_connections`.
        """
        count = min(self.workers, self.max_connections)
        share, rest = divmod(self.max_connections, count)
        return tuple(share + (index < rest) for index in range(count))

    def _check_rules(self) -> None:
        """A rule that can never match is a gate that somebody believes in: refused."""
        tcp = any(not isinstance(one, ListenUnix) for one in self.listen)  # or what systemd has
        for flag, networks in (
            ("--allow-from", self.rules.allow_from),
            ("--deny-from", self.rules.deny_from),
        ):
            if networks and not tcp:
                raise SettingsError(
                    f"{flag} {networks[0]}: no client has an address here: it goes with "
                    "--listen HOST:PORT"
                )
        for where, rule in _all_rules(self.rules):
            if wrong := self._why_never(rule.kind):
                raise SettingsError(f"{where} {rule}: {wrong}")

    def _why_never(self, kind: str) -> str:
        """Why no client can have what rules of this kind are about, and the remedy; or nothing."""
        tls = self.tls
        if kind == ANYBODY:
            return ""
        if kind == "uid":
            if all(isinstance(one, ListenTCP) for one in self.listen):
                return "only clients of a Unix socket have a uid: it goes with --listen unix:PATH"
            proves = tls is not None and (tls.client_ca or tls.psk)
            if not proves and any(isinstance(one, ListenTCP) for one in self.listen):
                return (
                    "nothing is known of clients that come by TCP: leave --listen HOST:PORT out, "
                    "or ask for certificates with --client-ca FILE"
                )
            return ""
        if tls is None:
            return "--tls off proves nothing: only uid= rules, with --listen unix:PATH"
        if kind == "psk":
            return (
                "" if tls.psk else "clients use no pre-shared keys here: it needs --psk-file FILE"
            )
        if tls.psk:
            return "clients of --psk-file have no certificates: use psk=NAME"
        if tls.client_ca is None:
            return "--allow-anonymous asks for no certificates: use --client-ca FILE in its place"
        return ""


def _all_rules(rules: Rules) -> Iterator[tuple[str, Rule]]:
    """With where each is from, in words."""
    yield from (("--allow", rule) for rule in rules.allow)
    yield from (("--deny", rule) for rule in rules.deny)
    for export in rules.exports:
        for rule in (*export.read_write, *export.read_only, *export.deny):
            yield f"[[export]] {export.name!r}:", rule


def check_export_name(where: str, name: str) -> None:
    """Raises SettingsError that begins with `where` if no export can have this name."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"{where}: an export's name is UTF-8, and this is not") from None
    if len(encoded) > MAX_STRING or b"\0" in encoded:
        raise SettingsError(f"{where}: an export's name has at most {MAX_STRING} bytes and no NUL")


def check_socket_path(flag: str, path: str) -> None:
    """Raises SettingsError if no Unix socket can have this path."""
    length = len(path.encode(errors="surrogateescape"))
    if not length or "\0" in path:
        raise SettingsError(f"{flag}: not a path: {path!r}")
    if length > MAX_SOCKET_PATH:
        raise SettingsError(
            f"{flag}: the path has {length} bytes, and a Unix socket's address holds "
            f"{MAX_SOCKET_PATH}: use a shorter or a relative path"
        )


def parse_listen(text: str) -> Listen:
    """`HOST:PORT`, `:PORT`, `[V6]:PORT`, `unix:PATH`, `systemd[:NAME]`. Raises SettingsError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        check_socket_path("--listen", path)
        return ListenUnix(path)
    if text == "systemd" or text.startswith("systemd:"):
        return ListenSystemd(text.partition(":")[2] or None)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_v6(host):
            raise SettingsError(f"--listen {text}: {host!r} is not an IPv6 address")
    elif _is_v6(host):
        raise SettingsError(f"--listen {text}: an IPv6 address goes in brackets: [{host}]:{port}")
    elif any(char in host for char in ":[]"):
        colon = ""
    if not colon or not (
        port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16
    ):
        raise SettingsError(
            f"--listen {text}: not an address: "
            "use HOST:PORT, :PORT, [V6]:PORT, unix:PATH or systemd"
        )
    return ListenTCP(host or None, int(port))


def _is_v6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def tls_files(directory: Path, *, anonymous: bool, minimum: Literal["1.2", "1.3"]) -> TLSSettings:
    """The files of a directory as QEMU, nbdkit and libnbd name them. Raises SettingsError.

    A `ca-crl.pem` is used if it is there. With `anonymous` the CA is not needed.
    """
    try:
        is_directory = directory.is_dir()
    except OSError as error:  # no way to it, for one
        raise SettingsError(f"--tls-dir: cannot read {directory}: {error.strerror}") from error
    if not is_directory:
        raise SettingsError(f"--tls-dir {directory}: not a directory")
    crl = directory / TLS_DIR_CRL
    return TLSSettings(
        cert=directory / TLS_DIR_CERT,
        key=directory / TLS_DIR_KEY,
        client_ca=None if anonymous else directory / TLS_DIR_CA,
        # A link that leads nowhere is a CRL that is missing, not one that nobody wanted.
        crl=crl if os.path.lexists(crl) and not anonymous else None,
        minimum=minimum,
    )
