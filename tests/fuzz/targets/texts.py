"""What people write: rules, files, addresses. What is wrong is said in words, and nothing else."""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from gateway import psk as psk_file
from gateway.access import Rule, Rules, parse_network
from gateway.config import read_config
from gateway.errors import GatewayError, SettingsError
from gateway.identity import Identity
from gateway.limits import Limits
from gateway.nbd.uri import tcp_uri, unix_uri
from gateway.pki_keys import PkiError
from gateway.revocations import parse_record, record_of
from gateway.settings import (
    MAX_SOCKET_PATH,
    Listen,
    ListenSystemd,
    ListenTCP,
    ListenUnix,
    check_export_name,
    parse_listen,
)
from tests.fuzz.source import require

_SHORTEST_SECRET = 12  # characters of a key that are not to be seen in a message

_PEOPLE = (
    Identity(),
    Identity.of_psk("vm1"),
    Identity(uid=0, gid=0),
    Identity(
        common_name="vm1",
        common_names=("vm1",),
        subject="CN=vm1,O=Example",
        rdns=("2.5.4.10=Example", "2.5.4.3=vm1"),
        dns=("vm1.example.org", "*.example.org", "a"),
        uris=("spiffe://example.org/disks/vm1", "urn:x", "http://u@h:1/a%2Fb?q#f", "x"),
        emails=("vm1@example.org", "a@b@c", "@"),
        sha256="ab" * 32,
        twins=("cd" * 32,),
        spki="ef" * 32,
    ),
    Identity(common_names=("a*", "\u202evm1", "."), rdns=("2.5.4.3=a\\+b",), dns=("", ".", "..")),
)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Lets pass what a user is told."""
    try:
        yield
    except (SettingsError, PkiError) as wrong:
        require(str(wrong), "no words")


def rules(data: bytes) -> object:
    """One rule, against some people."""
    text = data.decode(errors="surrogateescape")
    try:
        rule = Rule.parse("--allow", text)
    except SettingsError as wrong:
        said = str(wrong)
        require(said.startswith("--allow "), "another flag", said)
        require(said.isprintable() and "\n" not in said, "not one line", said)
        return None
    require(str(rule) == text and text.isprintable(), "another text", rule)
    require(Rule.parse("--deny", text) == rule, "not the same again", text)
    require(rule.kind == text.partition("=")[0], "another kind", rule)
    for person in _PEOPLE:
        matches = rule.matches(person)
        require(rule.denies(person) or not matches, "let in, and not kept out", text, person)
        grant = Rules(allow=(rule,), deny=(rule,)).grant(person)
        require(not grant.may_enter, "deny wins, always", text, person)
        require(Rules(allow=(rule,)).grant(person).may_enter == matches, "let in by luck", text)
    require(not rule.matches(Identity()), "nobody is somebody", text)
    return rule


def config(data: bytes) -> object:
    """A file of --config."""
    path = _file("config")
    path.write_bytes(data)
    try:
        found = read_config(path)
    except SettingsError as wrong:
        require("--config" in str(wrong), "another flag", wrong)
        return None
    require(data.strip(), "an empty file is no file")
    for person in _PEOPLE:
        grant = found.rules.grant(person)
        denied = any(rule.denies(person) for rule in found.rules.deny)
        allowed = any(rule.matches(person) for rule in found.rules.allow)
        if grant.may_enter:
            require(not denied and (allowed or not found.rules.allow), "let in", person)
        for name, _ in grant.exports or ():
            export = next(one for one in found.rules.exports if one.name == name)
            require(not any(rule.denies(person) for rule in export.deny), "denied", name)
            lists = (*export.read_write, *export.read_only)
            require(any(rule.matches(person) for rule in lists), "opened by luck", name)
    for one in found.rules.exports:
        require(one.read_write or one.read_only, "an export for nobody, or for all", one)
    Limits.of((), found.limits)
    return found


@cache
def _file(name: str) -> Path:
    """One file for this process, in memory where there is such a place."""
    shm = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="nbd-fuzz-", dir=shm if shm.is_dir() else None)
    path = Path(folder) / name
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return path


def psk(data: bytes) -> object:
    """A file of pre-shared keys, as bytes."""
    try:
        keys = psk_file.parse(Path("keys"), data)
    except SettingsError as wrong:
        said = str(wrong)
        require(said.isprintable(), "not one line", said)
        _check_no_secret(data, said)
        return None
    lines = [one for one in data.split(b"\n") if one and (one[:1] != b"#" or b":" in one)]
    require(len(keys.fingerprints) == len(lines), "a line is lost, or two are one", lines)
    for name, line in zip(keys.fingerprints, lines, strict=True):
        key = bytes.fromhex(line.partition(b":")[2].decode())
        require(keys.find(name) == key, "another key", name)
        require(psk_file.MIN_KEY <= len(key) <= psk_file.MAX_KEY, "an odd length", name)
        require(name == name.strip() and name, "an odd name", name)
        require(keys.find(name + "x") not in (key, keys.find(name + "x")), "no decoy", name)
    require(str(keys) == f"{len(lines)} pre-shared keys", "says more than how many", str(keys))
    return keys


def _check_no_secret(data: bytes, said: str) -> None:
    for line in data.split(b"\n"):
        for half in line.split(b":"):
            shown = half.decode(errors="replace")
            require(len(shown) < _SHORTEST_SECRET or shown not in said, "shows it", said)


def addresses(data: bytes) -> object:
    """Whatever is a place: to listen, a network, an export; and bounds, and a record."""
    kind, rest = data[:1], data[1:]
    text = rest.decode(errors="surrogateescape")
    match kind[0] % 6 if kind else 0:
        case 0:
            return _listen(text)
        case 1:
            return _network(text)
        case 2:
            return _uri(text)
        case 3:
            with _refusing():
                return Limits.of(text.split("\n"))
        case 4:
            return _record(rest)
        case _:
            return _admits(text)
    return None


def _listen(text: str) -> Listen | None:
    with _refusing():
        found = parse_listen(text)
        match found:
            case ListenTCP(host, port):
                require(0 <= port < 1 << 16, "no port", port)
                require(host is None or (host and not set(host) & {"[", "]"}), "no host", host)
                if host is not None and ":" in host:
                    ipaddress.IPv6Address(host.partition("%")[0])
                require(text.endswith(text.rpartition(":")[2]), "another port", text)
            case ListenUnix(path):
                raw = path.encode(errors="surrogateescape")
                require(0 < len(raw) <= MAX_SOCKET_PATH and b"\0" not in raw, "no path", path)
            case ListenSystemd(name):
                require(name is None or text == f"systemd:{name}", "another name", name)
        return found
    return None


def _network(text: str) -> object:
    with _refusing():
        network = parse_network("--allow-from", text)
        first = str(network.network_address)
        rules = Rules(allow_from=(network,))
        require(rules.admits(first), "does not admit its own", text)
        require(not Rules(deny_from=(network,)).admits(first), "admits whom it denies", text)
        if isinstance(network, ipaddress.IPv4Network):
            require(rules.admits(f"::ffff:{first}"), "another door for IPv4", text)
        return network
    return None


def _admits(text: str) -> object:
    """An address as the kernel gives it; whatever else comes is a ValueError."""
    rules = Rules(
        allow_from=(ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")),
        deny_from=(ipaddress.ip_network("10.1.0.0/16"),),
    )
    try:
        admits = rules.admits(text)
    except ValueError:
        return None
    ip = ipaddress.ip_address(text.partition("%")[0])
    plain = getattr(ip, "ipv4_mapped", None) or ip
    require(not (admits and str(plain).startswith("10.1.")), "admits whom it denies", text)
    return admits


def _uri(text: str) -> object:
    """A URI has in it what was put in, whatever that is."""
    try:
        check_export_name("--export", text)
    except SettingsError:
        return None
    for tls in (False, True):
        uri = tcp_uri("::1", 10809, text, tls=tls)
        parts = urlsplit(uri)
        require((parts.hostname, parts.port) == ("::1", 10809), "another place", uri)
        require(unquote(parts.path[1:]) == text and not parts.query, "another export", uri)
        require(parts.scheme == ("nbds" if tls else "nbd"), "another scheme", uri)
        uri = unix_uri(f"/run/{text}", text, tls=tls)
        parts = urlsplit(uri)
        socket = parse_qs(parts.query, strict_parsing=True)["socket"]
        require(socket == [f"/run/{text}"], "another socket", uri)
        require(unquote(parts.path[1:]) == text, "another export", uri)
        require(uri.isascii() and uri.isprintable(), "not to be pasted", uri)
    return text


def _record(data: bytes) -> object:
    try:
        entries = parse_record(data, Path("revoked"))
    except GatewayError as wrong:
        require(str(wrong).isprintable(), "not one line", wrong)
        return None
    lines = [one for one in data.decode(errors="replace").split("\n") if one.strip()]
    lines = [one for one in lines if not one.startswith("#")]
    require(len(entries) == len(lines), "a line is lost", lines)
    again = parse_record(record_of(entries), Path("revoked"))
    require([one[:2] for one in again] == [one[:2] for one in entries], "not the same again")
    return entries
