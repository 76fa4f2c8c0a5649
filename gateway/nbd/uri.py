"""NBD URIs, as clients take them. doc/uri.md of the NBD project."""

from __future__ import annotations

from urllib.parse import quote


def tcp_uri(host: str, port: int, export: str, *, tls: bool) -> str:
    """`nbds://HOST:PORT/EXPORT`. An IPv6 address gets its brackets here."""
    if ":" in host:
        host = f"[{host}]"
    return f"{'nbds' if tls else 'nbd'}://{host}:{port}/{quote(export, safe='')}"


def unix_uri(path: str, export: str, *, tls: bool) -> str:
    """`nbds+unix:///EXPORT?socket=PATH`."""
    scheme = "nbds+unix" if tls else "nbd+unix"
    return f"{scheme}:///{quote(export, safe='')}?socket={quote(path, errors='surrogateescape')}"
