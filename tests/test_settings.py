"""gateway.settings: what `--listen` takes, Unix sockets' paths, `--tls-dir`, rules that fit."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from gateway.access import ExportRules, Rule, Rules, parse_network
from gateway.errors import SettingsError
from gateway.nbd.upgrades import Upgrade
from gateway.settings import (
    Listen,
    ListenSystemd,
    ListenTCP,
    ListenUnix,
    Settings,
    TLSSettings,
    check_socket_path,
    parse_listen,
    tls_files,
)

LONGEST = "/" + 106 * "x"  # 107 bytes, and the final NUL


def wrong(text: str) -> str:
    """What is said of a `--listen` that must be refused: one line that begins with the flag."""
    with pytest.raises(SettingsError) as refused:
        parse_listen(text)
    message = str(refused.value)
    assert message.startswith("--listen")
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- --listen


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:10809", ListenTCP("127.0.0.1", 10809)),
        ("0.0.0.0:0", ListenTCP("0.0.0.0", 0)),
        ("disks.example.com:65535", ListenTCP("disks.example.com", 65535)),
        ("localhost:00080", ListenTCP("localhost", 80)),
        (":10809", ListenTCP(None, 10809)),
        (":0", ListenTCP(None, 0)),
        ("[::1]:10809", ListenTCP("::1", 10809)),
        ("[::]:0", ListenTCP("::", 0)),
        ("[2001:db8::1]:1", ListenTCP("2001:db8::1", 1)),
        ("[fe80::1%eth0]:1", ListenTCP("fe80::1%eth0", 1)),
        ("[::ffff:192.0.2.1]:1", ListenTCP("::ffff:192.0.2.1", 1)),
        ("unix:/run/nbd.sock", ListenUnix("/run/nbd.sock")),
        ("unix:relative/nbd.sock", ListenUnix("relative/nbd.sock")),
        ("unix:/with:colons:10809", ListenUnix("/with:colons:10809")),
        ("unix:[::1]:10809", ListenUnix("[::1]:10809")),
        (f"unix:{LONGEST}", ListenUnix(LONGEST)),
        ("systemd", ListenSystemd(None)),
        ("systemd:", ListenSystemd(None)),
        ("systemd:nbd", ListenSystemd("nbd")),
        ("systemd:80", ListenSystemd("80")),
    ],
)
def test_forms_of_listen(text: str, listen: Listen) -> None:
    assert parse_listen(text) == listen


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "10809", "localhost", "localhost:", "systemd-nbd", "unix"),
        *("localhost:http", "localhost:-1", "localhost:+1", "localhost:1.0", "localhost: 1"),
        *("localhost:65536", "localhost:99999", ":99999", "[::1]:99999"),
        *("localhost:\u0661", "localhost:\u00b2", "localhost:1_0", "localhost:0x10"),
        "UNIX:/run/nbd.sock",
        *("]:0", "a]:1", "[:0"),
    ],
)
def test_no_port(text: str) -> None:
    message = wrong(text)
    assert message.startswith(f"--listen {text}: ")
    assert "not an address" in message
    for form in ("HOST:PORT", ":PORT", "[V6]:PORT", "unix:PATH", "systemd"):
        assert form in message


@pytest.mark.parametrize("digits", [20, 5000])
def test_port_of_many_digits(digits: int) -> None:
    assert "not an address" in wrong(":" + digits * "1")


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("::1:10809", "[::1]:10809"),
        (":::10809", "[::]:10809"),
        ("2001:db8::1:10809", "[2001:db8::1]:10809"),
    ],
)
def test_ipv6_without_brackets_is_given_them(text: str, better: str) -> None:
    assert better in wrong(text)
    assert isinstance(parse_listen(better), ListenTCP)


@pytest.mark.parametrize("text", ["[::1]", "[::1", "[::1]10809", "[::1]:", "tcp://127.0.0.1:1"])
def test_advice_for_broken_addresses_can_be_followed(text: str) -> None:
    """A message that proposes an address proposes one that exists."""
    message = wrong(text)
    if "goes in brackets: " in message:
        assert isinstance(parse_listen(message.partition("goes in brackets: ")[2]), ListenTCP)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "", "::1::", "fe80", "::1]", "%eth0"])
def test_only_an_ipv6_address_goes_in_brackets(host: str) -> None:
    assert "is not an IPv6 address" in wrong(f"[{host}]:10809")


def test_socket_path_of_a_listener() -> None:
    assert "not a path" in wrong("unix:")
    assert "not a path" in wrong("unix:/run/\0nbd")
    message = wrong(f"unix:{LONGEST}x")
    assert "108 bytes" in message
    assert "107" in message


# ---------------------------------------------------------------- Unix socket paths


@pytest.mark.parametrize("path", [LONGEST, "x", "\u00e9" * 53 + "x", "\udcff" * 107])
def test_socket_paths_that_fit(path: str) -> None:
    check_socket_path("--socket", path)
    assert len(os.fsencode(path)) <= 107


@pytest.mark.parametrize("path", [LONGEST + "x", "\u00e9" * 54, "\udcff" * 108, 5000 * "x"])
def test_socket_paths_too_long(path: str) -> None:
    """Bytes are counted, not characters: that is what the address holds."""
    with pytest.raises(SettingsError, match=rf"^--socket: the path has {len(os.fsencode(path))} "):
        check_socket_path("--socket", path)


@pytest.mark.parametrize("path", ["", "a\0b", "\0abstract"])
def test_no_socket_paths(path: str) -> None:
    with pytest.raises(SettingsError, match=r"^--socket: not a path: "):
        check_socket_path("--socket", path)


def test_settings_look_at_the_upstream_path() -> None:
    assert Settings(LONGEST, None).socket == LONGEST
    with pytest.raises(SettingsError, match=r"^--socket: the path has 108 bytes"):
        Settings(LONGEST + "x", None)


# ---------------------------------------------------------------- Settings


@pytest.mark.parametrize("name", ["", "disk", "d/e f?&#", 4096 * "x", 2048 * "\u00e9", None])
def test_export_names(name: str | None) -> None:
    assert Settings("s", None, export=name).export == name


@pytest.mark.parametrize("name", [4097 * "x", 2048 * "\u00e9" + "x", "a\0b"])
def test_no_export_names(name: str) -> None:
    with pytest.raises(SettingsError, match=r"^--export: .*4096 bytes"):
        Settings("s", None, export=name)


def test_an_export_name_is_utf_8() -> None:
    """What a shell passes in another encoding comes as surrogates."""
    with pytest.raises(SettingsError, match=r"^--export: "):
        Settings("s", None, export="disk\udcff")


def test_defaults() -> None:
    settings = Settings("s", None)
    assert settings.listen == (ListenTCP(None, 10809),)
    assert settings.export == ""
    assert settings.read_only is False
    assert settings.oldstyle is False
    assert settings.upgrades == set(Upgrade)
    assert settings.max_connections == 100
    assert settings.workers == 1
    assert settings.handshake_timeout_s == 10
    assert settings.drain_timeout_s == 30
    assert settings.rules == Rules()
    assert settings.on_revoke == "close"
    assert settings.reload_interval_s == 10
    assert settings.config is None


def test_settings_do_not_change() -> None:
    settings = Settings("s", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.read_only = True  # type: ignore[misc]


def test_oldstyle_has_one_export_and_no_tls(tmp_path: Path) -> None:
    """Its clients cannot name an export, and cannot be asked for a certificate."""
    assert Settings("s", None, oldstyle=True, export="disk").oldstyle
    files = TLSSettings(tmp_path / "cert", tmp_path / "key", None)
    with pytest.raises(SettingsError, match=r"^--oldstyle has no TLS: .* --tls off"):
        Settings("s", files, oldstyle=True)
    with pytest.raises(SettingsError, match=r"^--oldstyle has one export .* --any-export"):
        Settings("s", None, oldstyle=True, export=None)


@pytest.mark.parametrize("flag", ["handshake-timeout", "drain-timeout", "reload-interval"])
@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_no_numbers_of_seconds(flag: str, seconds: float) -> None:
    field = flag.replace("-", "_") + "_s"
    with pytest.raises(SettingsError, match=f"^--{flag}: {seconds} is no number of seconds$"):
        Settings("s", None, **{field: seconds})  # type: ignore[arg-type]
    assert getattr(Settings("s", None, **{field: 0.0}), field) == 0  # type: ignore[arg-type]


# ---------------------------------------------------------------- TLSSettings

FILE = Path("file")


@pytest.mark.parametrize(("cert", "key", "flag"), [(None, FILE, "--cert"), (FILE, None, "--key")])
def test_a_certificate_has_a_key(cert: Path | None, key: Path | None, flag: str) -> None:
    with pytest.raises(SettingsError, match=f"^{flag} FILE is missing .*--tls-dir .*--psk-file"):
        TLSSettings(cert, key, None)


@pytest.mark.parametrize("field", ["cert", "key", "client_ca", "crl", "key_password"])
def test_pre_shared_keys_go_with_no_certificate(field: str) -> None:
    nothing = TLSSettings(None, None, None, psk=FILE)
    with pytest.raises(SettingsError, match=r"^--psk-file goes with no certificate, key, CA"):
        dataclasses.replace(nothing, **{field: FILE})


def test_a_crl_is_about_a_ca() -> None:
    with pytest.raises(SettingsError, match=r"^--crl goes with --client-ca, not with --allow-anon"):
        TLSSettings(FILE, FILE, None, FILE)


# ---------------------------------------------------------------- rules that nobody can fit

OFF, ANONYMOUS = None, TLSSettings(FILE, FILE, None)
CERTIFICATES, KEYS = TLSSettings(FILE, FILE, FILE), TLSSettings(None, None, None, psk=FILE)
TCP, UNIX, SYSTEMD = ListenTCP("::1", 0), ListenUnix("l"), ListenSystemd(None)
ABOUT = {  # a rule of each kind
    "cn": "cn=a",
    "dn": "dn=CN=a",
    "dns": "dns=a",
    "uri": "uri=a:b",
    "email": "email=a@b",
    "sha256": "sha256=" + 64 * "0",
    "spki": "spki=" + 64 * "0",
    "psk": "psk=a",
    "uid": "uid=0",
}
CERTIFICATE_KINDS = ABOUT.keys() - {"psk", "uid"}


def ways_to_use(rule: Rule) -> dict[str, Rules]:
    """Every place in which a rule may stand, and what is said to be its place."""
    return {
        "--allow": Rules(allow=(rule,)),
        "--deny": Rules(deny=(rule,)),
        "[[export]] 'a': ": Rules(exports=(ExportRules("a", read_write=(rule,)),)),
        "[[export]] 'b': ": Rules(exports=(ExportRules("b", read_only=(rule,)),)),
        "[[export]] 'c': ": Rules(
            exports=(ExportRules("d", (Rule.anybody(),)), ExportRules("c", deny=(rule,)))
        ),
    }


@pytest.mark.parametrize("kind", ABOUT)
@pytest.mark.parametrize(
    ("tls", "listen", "kinds"),
    [
        (OFF, (TCP,), set()),
        (OFF, (UNIX,), {"uid"}),
        (OFF, (SYSTEMD,), {"uid"}),
        (OFF, (UNIX, TCP), set()),
        (ANONYMOUS, (TCP,), set()),
        (ANONYMOUS, (UNIX,), {"uid"}),
        (ANONYMOUS, (SYSTEMD, UNIX), {"uid"}),
        (ANONYMOUS, (TCP, UNIX), set()),
        (CERTIFICATES, (TCP,), CERTIFICATE_KINDS),
        (CERTIFICATES, (UNIX,), {"uid", *CERTIFICATE_KINDS}),
        (CERTIFICATES, (TCP, UNIX), {"uid", *CERTIFICATE_KINDS}),
        (CERTIFICATES, (TCP, SYSTEMD), {"uid", *CERTIFICATE_KINDS}),
        (KEYS, (TCP,), {"psk"}),
        (KEYS, (UNIX,), {"psk", "uid"}),
        (KEYS, (TCP, SYSTEMD), {"psk", "uid"}),
    ],
)
def test_a_rule_is_about_what_clients_can_prove(
    tls: TLSSettings | None, listen: tuple[Listen, ...], kinds: set[str], kind: str
) -> None:
    """A rule that never matches is a gate that is open, or shut, for good: said at the start."""
    rule = Rule.parse("", ABOUT[kind])
    for place, rules in ways_to_use(rule).items():
        if kind in kinds:
            assert Settings("s", tls, listen, rules=rules).rules == rules
            continue
        with pytest.raises(SettingsError) as refused:
            Settings("s", tls, listen, rules=rules)
        assert str(refused.value).startswith(f"{place.strip()} {rule}: ")


@pytest.mark.parametrize(
    ("tls", "listen", "text", "remedy"),
    [
        (OFF, TCP, "cn=a", "--tls off"),
        (OFF, UNIX, "psk=a", "--tls off"),
        (ANONYMOUS, TCP, "cn=a", "--client-ca FILE"),
        (CERTIFICATES, TCP, "psk=a", "--psk-file FILE"),
        (KEYS, TCP, "cn=a", "psk=NAME"),
        (CERTIFICATES, TCP, "uid=0", "--listen unix:PATH"),
    ],
)
def test_remedies(tls: TLSSettings | None, listen: Listen, text: str, remedy: str) -> None:
    with pytest.raises(SettingsError, match=remedy):
        Settings("s", tls, (listen,), rules=Rules(allow=(Rule.parse("", text),)))


@pytest.mark.parametrize("flag", ["--allow-from", "--deny-from"])
def test_addresses_are_those_of_tcp_clients(flag: str) -> None:
    networks = (parse_network(flag, "192.0.2.0/24"),)
    rules = Rules(**{flag[2:].replace("-", "_"): networks})  # type: ignore[arg-type]
    for listen in ((TCP,), (UNIX, TCP), (SYSTEMD,)):
        assert Settings("s", None, listen, rules=rules).rules == rules
    with pytest.raises(SettingsError, match=f"^{flag} 192.0.2.0/24: .*--listen HOST:PORT"):
        Settings("s", None, (UNIX, UNIX), rules=rules)


def test_tables_say_which_exports_there_are() -> None:
    rules = Rules(exports=(ExportRules("disk"),))
    assert Settings("s", None, rules=rules, read_only=True).rules == rules
    with pytest.raises(SettingsError, match=r"^--any-export goes with no \[\[export\]\]"):
        Settings("s", None, rules=rules, export=None)
    with pytest.raises(SettingsError, match=r"^--oldstyle goes with no \[\[export\]\]"):
        Settings("s", None, rules=rules, oldstyle=True)


# ---------------------------------------------------------------- --tls-dir


def test_the_files_of_a_directory(tmp_path: Path) -> None:
    assert tls_files(tmp_path, anonymous=False, minimum="1.3") == TLSSettings(
        tmp_path / "server-cert.pem",
        tmp_path / "server-key.pem",
        tmp_path / "ca-cert.pem",
        None,
        "1.3",
    )


def test_a_crl_is_used_if_it_is_there(tmp_path: Path) -> None:
    crl = tmp_path / "ca-crl.pem"
    crl.touch()
    assert tls_files(tmp_path, anonymous=False, minimum="1.2").crl == crl


def test_a_crl_that_is_a_dangling_link_is_wanted_all_the_same(tmp_path: Path) -> None:
    crl = tmp_path / "ca-crl.pem"
    crl.symlink_to(tmp_path / "not-yet-there")
    assert tls_files(tmp_path, anonymous=False, minimum="1.2").crl == crl


def test_anonymous_clients_need_neither_ca_nor_crl(tmp_path: Path) -> None:
    (tmp_path / "ca-crl.pem").touch()
    found = tls_files(tmp_path, anonymous=True, minimum="1.2")
    assert found.client_ca is None
    assert found.crl is None


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_no_directory(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "tls"
    if kind == "a file":
        directory.touch()
    with pytest.raises(SettingsError, match=rf"^--tls-dir {directory}: not a directory$"):
        tls_files(directory, anonymous=False, minimum="1.2")


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize(
    ("connections", "workers", "shares"),
    [
        (100, 1, (100,)),
        (100, 2, (50, 50)),
        (3, 2, (2, 1)),
        (100, 3, (34, 33, 33)),
        (10, 4, (3, 3, 2, 2)),
        (2, 2, (1, 1)),
        (2, 5, (1, 1)),
        (1, 64, (1,)),
    ],
)
def test_workers_share_what_the_gateway_may_have(
    connections: int, workers: int, shares: tuple[int, ...]
) -> None:
    """All of it, in parts that differ by one at most; and there is no worker with nothing."""
    settings = Settings("/run/up", None, max_connections=connections, workers=workers)
    assert settings.shares == shares
    assert sum(shares) == connections


@pytest.mark.parametrize(
    ("field", "flag"), [("workers", "--workers"), ("max_connections", "--max-")]
)
@pytest.mark.parametrize("number", [0, -1])
def test_none_is_too_few(field: str, flag: str, number: int) -> None:
    with pytest.raises(SettingsError, match=f"^{flag}.*: {number} is less than 1$"):
        Settings("/run/up", None, **{field: number})  # type: ignore[arg-type]
