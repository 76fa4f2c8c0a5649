"""URIs that a client can paste."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from gateway.nbd.uri import tcp_uri, unix_uri

AWKWARD = ["", "disk", "a/b", "/a", "a b", "50%", "a?b#c", "Größe", "a&b=c+d", "\x1b[31m"]


@pytest.mark.parametrize(
    ("host", "port", "export", "tls", "uri"),
    [
        ("127.0.0.1", 41234, "", True, "nbds://127.0.0.1:41234/"),
        ("127.0.0.1", 41234, "disk", True, "nbds://127.0.0.1:41234/disk"),
        ("localhost", 10809, "disk", False, "nbd://localhost:10809/disk"),
        ("::1", 10809, "", True, "nbds://[::1]:10809/"),
        ("example.org", 1, "a/b c", True, "nbds://example.org:1/a%2Fb%20c"),
    ],
)
def test_tcp_uri(host: str, port: int, export: str, tls: bool, uri: str) -> None:
    assert tcp_uri(host, port, export, tls=tls) == uri


@pytest.mark.parametrize(
    ("path", "export", "tls", "uri"),
    [
        ("/run/nbd.sock", "", True, "nbds+unix:///?socket=/run/nbd.sock"),
        ("/run/nbd.sock", "disk", True, "nbds+unix:///disk?socket=/run/nbd.sock"),
        ("/run/nbd.sock", "disk", False, "nbd+unix:///disk?socket=/run/nbd.sock"),
        ("/tmp/a b&c#d", "x/y", False, "nbd+unix:///x%2Fy?socket=/tmp/a%20b%26c%23d"),
    ],
)
def test_unix_uri(path: str, export: str, tls: bool, uri: str) -> None:
    assert unix_uri(path, export, tls=tls) == uri


@pytest.mark.parametrize("export", AWKWARD)
def test_export_name_is_the_path_without_its_first_slash(export: str) -> None:
    for uri in (tcp_uri("::1", 1, export, tls=True), unix_uri("/s", export, tls=True)):
        parts = urlsplit(uri)
        assert unquote(parts.path) == f"/{export}"
        assert not parts.fragment


@pytest.mark.parametrize("path", ["/run/a", "/a b/c%41", "/a&socket=b", "/ü#?+"])
def test_socket_path_is_the_whole_query(path: str) -> None:
    query = parse_qs(urlsplit(unix_uri(path, "disk", tls=True)).query, strict_parsing=True)
    assert query == {"socket": [path]}


def test_socket_path_need_not_be_utf8() -> None:
    """The operating system's paths are bytes, which Python escapes as surrogates."""
    assert unix_uri("/run/\udce4", "", tls=True) == "nbds+unix:///?socket=/run/%E4"


def test_ipv6_address_and_port_are_told_apart() -> None:
    parts = urlsplit(tcp_uri("2001:db8::7", 10809, "", tls=True))
    assert (parts.hostname, parts.port) == ("2001:db8::7", 10809)
