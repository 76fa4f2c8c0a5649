"""nbd-gateway: TLS and client certificates in front of any local NBD server."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nbd-gateway")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+checkout"
