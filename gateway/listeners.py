"""Listening sockets: TCP, Unix, and those that systemd hands over."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Self

from gateway.errors import ListenError, SettingsError
from gateway.nbd.uri import tcp_uri, unix_uri
from gateway.settings import Listen, ListenSystemd, ListenTCP, ListenUnix

logger = logging.getLogger(__name__)

_BACKLOG: Final = 1024  # the kernel caps it at net.core.somaxconn
_FIRST_FD: Final = 3  # sd_listen_fds(3)
_PORT_TRIES: Final = 20


@dataclass(slots=True)
class Listener:
    """What one `--listen` opened: one or more sockets. `close` it."""

    sockets: list[socket.socket]
    unlink: str | None = None  # a Unix socket file that we made
    _inode: tuple[int, int] | None = field(default=None, repr=False)

    def close(self) -> None:
        """Close the sockets, and remove the socket file if it is still the one that we made."""
        for sock in self.sockets:
            sock.close()
        path, self.unlink = self.unlink, None
        if path is not None and _inode(path) == self._inode:
            try:
                os.unlink(path)
            except OSError as error:  # the sessions are not to suffer for it
                logger.warning("cannot remove %s: %s", path, error.strerror)

    def uris(self, export: str, names: Iterable[str], *, tls: bool) -> list[str]:
        """What a client can paste. For a wildcard address the first of `names` is the host."""
        uris: list[str] = []
        for sock in self.sockets:
            address = sock.getsockname()
            if sock.family == socket.AF_UNIX:
                uris.append(unix_uri(os.fsdecode(address), export, tls=tls))
                continue
            host = address[0]
            if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
                host = next(iter(names), socket.gethostname())
            uris.append(tcp_uri(host, address[1], export, tls=tls))
        return list(dict.fromkeys(uris))


class Listeners:
    """All listeners of a gateway. A context manager: leaving it is `close`."""

    def __init__(self, listeners: list[Listener]) -> None:
        self._listeners = listeners

    @classmethod
    def open(
        cls,
        addresses: Iterable[Listen],
        *,
        local_only: bool,
        environ: Mapping[str, str],
        drop: Callable[[], None] = lambda: None,
    ) -> Self:
        """Open all or none. `local_only` admits loopback and Unix sockets only.

        `drop` gives privileges up. Only ports need them: it is called once these are bound, so a
        socket file belongs to who has to remove it at the end.
        Raises what `drop` raises, ListenError, and SettingsError for an address that `local_only`
        forbids.
        """
        wanted = list(enumerate(addresses))
        found: dict[int, Listener] = {}
        with ExitStack() as opened:
            for files in (False, True):
                for place, address in wanted:
                    if isinstance(address, ListenUnix) is not files:
                        continue
                    listener = _open(address, environ, local_only=local_only)
                    opened.callback(listener.close)
                    if local_only:
                        for sock in listener.sockets:
                            _check_local(sock)
                    found[place] = listener
                if not files:
                    drop()
            opened.pop_all()
            return cls([found[place] for place, _ in wanted])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all. Idempotent."""
        for listener in self._listeners:
            listener.close()

    @property
    def sockets(self) -> list[socket.socket]:
        return [sock for listener in self._listeners for sock in listener.sockets]

    def shared(self) -> Self:
        """The same sockets for a process that was forked from this one, to be closed there.

        The socket files stay: they are removed by the process that made them.
        """
        return type(self)([Listener(one.sockets) for one in self._listeners])

    def uris(self, export: str, names: Iterable[str], *, tls: bool) -> list[str]:
        """One NBD URI per address that is listened on."""
        names = list(names)
        return [uri for one in self._listeners for uri in one.uris(export, names, tls=tls)]


def _open(address: Listen, environ: Mapping[str, str], *, local_only: bool) -> Listener:
    match address:
        case ListenTCP():
            return _open_tcp(address, local_only=local_only)
        case ListenUnix(path):
            return _open_unix(path)
        case ListenSystemd(name):
            return _from_systemd(name, environ)


def _open_tcp(address: ListenTCP, *, local_only: bool) -> Listener:
    what = f"{address.host or ''}:{address.port}"
    if local_only and address.host is None:
        raise SettingsError(_NOT_LOCAL.format(what))
    for _ in range(_PORT_TRIES):
        opened: list[socket.socket] = []
        try:
            for family, sockaddr in _resolve(address, what):
                _bind_tcp(opened, family, sockaddr, address.port)
        except OSError as error:
            for sock in opened:
                sock.close()
            if error.errno == errno.EADDRINUSE and address.port == 0:
                continue  # the port that one family gave is taken in the other
            raise ListenError(f"cannot listen on {what}: {error.strerror}") from error
        if not opened:
            raise ListenError(f"cannot listen on {what}: this machine has no such addresses")
        return Listener(opened)
    raise ListenError(f"cannot listen on {what}: no port is free in all address families")


def _resolve(address: ListenTCP, what: str) -> list[tuple[int, tuple[str, int]]]:
    if address.host is None:
        return [(socket.AF_INET, ("0.0.0.0", 0)), (socket.AF_INET6, ("::", 0))]
    try:
        found = socket.getaddrinfo(
            address.host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except UnicodeError:
        raise SettingsError(f"--listen {what}: {address.host!r} is not a host name") from None
    except socket.gaierror as error:
        raise ListenError(f"cannot listen on {what}: {error.strerror}") from error
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))  # type: ignore[misc]


def _bind_tcp(
    opened: list[socket.socket], family: int, sockaddr: tuple[str, int], port: int
) -> None:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:  # a kernel without IPv6
            return
        raise
    opened.append(sock)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if opened[0] is not sock:
        port = opened[0].getsockname()[1]  # one port in all families
    try:
        sock.bind((sockaddr[0], port, *sockaddr[2:]))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and sockaddr[0] in ("::", "::1"):
            opened.remove(sock)  # IPv6 is compiled in and switched off
            sock.close()
            return
        raise
    sock.listen(_BACKLOG)


def _open_unix(path: str) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        why = error.strerror
        if error.errno == errno.EADDRINUSE:
            why = "the file exists; if no other server uses it, remove it"
        elif error.errno == errno.EACCES:
            why = f"user {os.geteuid()} may not make a file there: make the folder that user's"
        raise ListenError(f"cannot listen on unix:{path}: {why}") from error
    return Listener([sock], unlink=os.path.abspath(path), _inode=_inode(path))


def _from_systemd(name: str | None, environ: Mapping[str, str]) -> Listener:
    """sd_listen_fds_with_names(3). The sockets stay systemd's: their files are not removed."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        raise ListenError("--listen systemd: systemd has handed over no sockets (LISTEN_PID)")
    count = environ.get("LISTEN_FDS", "")
    if not count.isdigit():
        raise ListenError(f"--listen systemd: LISTEN_FDS is {count!r}")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    sockets = []
    for index in range(int(count)):
        if name is not None and (index >= len(names) or names[index] != name):
            continue
        sockets.append(_adopt(_FIRST_FD + index, behind=_FIRST_FD + int(count)))
    if not sockets:
        wanted = f" named {name!r}" if name else ""
        raise ListenError(f"--listen systemd: none of the sockets handed over{wanted}")
    return Listener(sockets)


def _adopt(fd: int, behind: int) -> socket.socket:
    """Our copy of it, numbered `behind` or later: none of those that are still to be looked at."""
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, behind))
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(f"--listen systemd: descriptor {fd}: {error.strerror}") from error
    if sock.type != socket.SOCK_STREAM or not listening:
        sock.close()
        raise ListenError(f"--listen systemd: descriptor {fd} is no listening stream socket")
    sock.setblocking(False)
    return sock


def _check_local(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        return
    host, port = sock.getsockname()[:2]
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise SettingsError(_NOT_LOCAL.format(f"{host}:{port}"))


_NOT_LOCAL: Final = (
    "--tls off: {} is neither loopback nor a Unix socket, and nothing would protect the disk "
    "there: use --listen 127.0.0.1:PORT, --listen [::1]:PORT or --listen unix:PATH"
)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
