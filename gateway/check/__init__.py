"""`nbd-gateway check`: would the gateway start with this, and do what was meant? A line a verdict.

It reads files and looks at the machine, and changes nothing: it binds no port that is asked for,
and dials nobody. Without anything bad it ends with what a start does, `load_trust`, so that what it
calls good does start.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Callable
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from gateway.certs import CA_KEY
from gateway.check import certs as check_certs
from gateway.check import crl as check_crl
from gateway.check.files import check_modes
from gateway.check.keys import check_key, check_psk
from gateway.check.report import Level, Report
from gateway.check.rules import check_rules
from gateway.check.user import acting_as_user, check_user, uid_of
from gateway.errors import GatewayError
from gateway.rule import ANYBODY
from gateway.settings import (
    Listen,
    ListenSystemd,
    ListenTCP,
    ListenUnix,
    Settings,
    TLSSettings,
)
from gateway.trust import load_trust

_OTHER_DESCRIPTORS: Final = 64  # as the server reckons: listeners, log, epoll, ...


def run(settings: Settings, say: Callable[[str], None], now: datetime | None = None) -> int:
    """Say a verdict a line, and the sum. Returns the exit code: 0, or 1 if something is bad.

    `now` is what dates are measured by, but for those that a start looks at.
    """
    report = Report(now)
    if settings.tls is None:
        report.warn("--tls off", "whoever reaches the listeners may open the export")
    elif settings.tls.psk is not None:
        check_psk(report, settings.tls.psk, settings.rules)
    else:
        with report.part("certificates"):
            _check_certificates(report, settings, settings.tls)
    if settings.tls is not None and settings.tls.minimum == "1.3":
        report.warn("--tls-min 1.3", "locks nbd-client out, which speaks TLS 1.2 unless told more")
    with report.part("modes and owners"):
        _check_modes(report, settings)
    if settings.user is not None:
        with report.part("--user"):
            check_user(report, settings.user, _files(settings))
    with report.part("rules"):
        check_rules(report, settings.rules)
        _check_access(report, settings)
    for listen in dict.fromkeys(settings.listen):
        if settings.listen.count(listen) > 1 and not _any_port(listen):
            report.bad(f"--listen {_written(listen)}", "there twice: the second cannot be opened")
        if isinstance(listen, ListenSystemd):
            report.ok(f"--listen {_written(listen)}", "what systemd hands over is not known here")
        elif isinstance(listen, ListenTCP):
            with report.part(f"--listen {listen.host or ''}:{listen.port}"):
                _check_address(report, listen, local_only=settings.tls is None)
        elif isinstance(listen, ListenUnix):
            with report.part(f"--listen unix:{listen.path}"):
                with acting_as_user(settings.user):
                    _check_socket_file(report, listen.path)
    with report.part(f"--socket {settings.socket}"):
        with acting_as_user(settings.user):
            _check_upstream(report, settings.socket)
    with report.part("--max-connections"):
        _check_descriptors(report, settings)
    with report.part("start"):
        _try_to_load(report, settings)
    for line in report.lines():
        say(line)
    return 1 if report.count(Level.BAD) else 0


def _try_to_load(report: Report, settings: Settings) -> None:
    """The last word: what a start does with the files."""
    try:
        load_trust(settings)
    except GatewayError as refused:
        report.bad("start", f"the gateway refuses it: {refused}")
    else:
        report.ok("start", "the gateway takes these files and rules")


# ---------------------------------------------------------------- certificates and keys


def _check_certificates(report: Report, settings: Settings, tls: TLSSettings) -> None:
    assert tls.cert is not None
    assert tls.key is not None  # both: TLSSettings sees to it
    chain = check_certs.load(report, tls.cert, "--cert")
    cas: check_certs.Certificates | None = None
    if tls.client_ca is not None:
        cas = check_certs.load(report, tls.client_ca, "--client-ca")
    check_certs.check_server(report, tls.cert, chain, cas)
    with report.part(tls.cert):
        if chain:
            hosts, machine = _names_listened_on(settings)
            check_certs.check_listened(report, tls.cert, chain[0], hosts, machine)
    with report.part(tls.key):
        check_key(report, tls, chain)
    if tls.client_ca is None or cas is None:
        return
    check_certs.check_cas(report, tls.client_ca, cas)
    lists = [(tls.client_ca, one) for one in check_crl.in_ca_file(report, tls.client_ca)]
    if tls.crl is not None:
        lists += [(tls.crl, one) for one in check_crl.load(report, tls.crl)]
    if lists:
        check_crl.check_crls(report, lists, cas, chain)
    elif tls.crl is None:
        report.ok("--crl", "there is none: a certificate is good until it expires")


def _names_listened_on(settings: Settings) -> tuple[list[str], str | None]:
    """The hosts that --listen names, and this machine's name if it stands for all addresses."""
    hosts: list[str] = []
    everywhere = False
    for listen in settings.listen:
        if isinstance(listen, ListenSystemd):
            everywhere = True
        elif isinstance(listen, ListenTCP):
            host = listen.host
            if host is None or _is_unspecified(host):
                everywhere = True
            elif host not in hosts:
                hosts.append(host)
    return hosts, socket.gethostname() if everywhere else None


def _is_unspecified(host: str) -> bool:
    return check_certs.is_address(host) and ip_address(host).is_unspecified


# ---------------------------------------------------------------- who enters, what is there


def _check_modes(report: Report, settings: Settings) -> None:
    tls = settings.tls
    secret = [] if tls is None else [tls.key, tls.key_password, tls.psk]
    # What does not exist has been said, or is for the start to say.
    there = [path for path in _files(settings) if path.exists()]
    check_modes(report, there, [path for path in there if path in secret], uid_of(settings.user))
    for folder in dict.fromkeys(path.parent for path in there):
        if (key := folder / CA_KEY).exists():
            report.warn(key, "the CA's key, by which anybody is let in: keep it on another machine")


def _files(settings: Settings) -> list[Path]:
    """All that a start reads."""
    tls, files = settings.tls, [settings.config]
    if tls is not None:
        files += [tls.cert, tls.key, tls.key_password, tls.client_ca, tls.crl, tls.psk]
    return [path for path in files if path is not None]


def _check_access(report: Report, settings: Settings) -> None:
    """Say what stands when there are no rules: it is easily more than was meant."""
    rules, tls = settings.rules, settings.tls
    for export in rules.exports:
        for do, listed in (("write", export.read_write), ("read", export.read_only)):
            if any(rule.kind == ANYBODY for rule in listed):
                report.ok(f'export "{export.name}"', f"all who may enter may {do}")
    people = [rule for one in rules.exports for rule in (*one.read_write, *one.read_only)]
    if rules.allow or any(rule.kind != ANYBODY for rule in people):
        return
    if tls is None:
        return  # said already
    if tls.psk is not None:
        report.ok("access", "whoever has a key of --psk-file may enter")
    elif tls.client_ca is None:
        report.warn("--allow-anonymous", "everybody may enter, without a certificate")
    else:
        report.ok("access", f"whoever has a certificate of {tls.client_ca} may enter: no --allow")


def _any_port(listen: Listen) -> bool:
    """Whether it is another address each time, or as many as there are."""
    return isinstance(listen, ListenSystemd) or (isinstance(listen, ListenTCP) and not listen.port)


def _written(listen: Listen) -> str:
    match listen:
        case ListenTCP(host, port):
            return f"{host or ''}:{port}"
        case ListenUnix(path):
            return f"unix:{path}"
        case ListenSystemd(name):
            return f"systemd:{name}" if name else "systemd"


def _check_address(report: Report, listen: ListenTCP, *, local_only: bool) -> None:
    what = f"--listen {listen.host or ''}:{listen.port}"
    if listen.host is None:
        if local_only:
            report.bad(what, "--tls off: all addresses are more than loopback; name 127.0.0.1")
        return
    try:
        found = socket.getaddrinfo(listen.host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (UnicodeError, socket.gaierror) as error:
        report.bad(what, f"no address is known for {listen.host!r}: {error}")
        return
    for family, kind, _, _, address in found:
        host = str(address[0])
        if local_only and not ip_address(host.partition("%")[0]).is_loopback:
            report.bad(what, f"--tls off: {host} is neither loopback nor a Unix socket")
            return
        with socket.socket(family, kind) as sock:
            try:
                sock.bind(address)  # any free port: only the address is in question
            except OSError as error:
                if not (family == socket.AF_INET6 and host in ("::", "::1")):  # switched off
                    report.bad(what, f"{host} is not to be had on this machine: {error.strerror}")
                    return
    report.ok(what, "an address of this machine")


def _check_socket_file(report: Report, path: str) -> None:
    what, folder = f"--listen unix:{path}", os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        report.bad(what, f"{folder} is no folder: make it, or have systemd do so")
    elif not os.path.lexists(path):
        if os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            report.ok(what, "can be made")
        else:
            report.bad(what, f"no permission to make a file in {folder}")
    elif stat.S_ISSOCK(os.lstat(path).st_mode):
        report.warn(what, "there already: fine if by the gateway that runs now, else remove it")
    else:
        report.bad(what, "there is a file that is no socket: remove it, or choose another path")


def _check_upstream(report: Report, path: str) -> None:
    """Looked at, never dialled: qemu-nbd takes one client only and ends after it."""
    what = f"--socket {path}"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        report.warn(what, "not there: clients are refused until the NBD server is started")
        return
    if not stat.S_ISSOCK(mode):
        report.bad(what, "no socket: name the one that the NBD server listens on")
    elif not os.access(path, os.W_OK, effective_ids=True):
        report.bad(what, "no permission to connect: the gateway's user needs it for writing")
    else:
        report.ok(what, "a socket")


def _check_descriptors(report: Report, settings: Settings) -> None:
    needed = 2 * settings.shares[0] + _OTHER_DESCRIPTORS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        report.warn(
            "--max-connections",
            f"{settings.shares[0]} clients in a process need {needed} descriptors, and {hard} are "
            "allowed: raise LimitNOFILE= or ulimit -n, or take fewer clients or more --workers",
        )
    else:
        report.ok("--max-connections", f"{needed} descriptors are needed, and to be had")
