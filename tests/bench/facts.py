"""The machine and the versions that a run's figures belong to."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import ssl
import subprocess
from pathlib import Path

from tests.bench.kinds import ROOT, START_S, in_root, trixie_root, version
from tests.bench.processes import Failed, run

Facts = dict[str, str | int]


def facts() -> Facts:
    """What can be found out; what cannot be is left out."""
    found: Facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cores": os.cpu_count() or 0,
        "usable cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": f"{platform.system()} {platform.release()}",
        "load at the start": load(),
        "Python": platform.python_version(),
        "OpenSSL": ssl.OPENSSL_VERSION.split()[1],
    }
    if priority := os.nice(0):
        found["nice"] = priority
    for package in ("trio", "cryptography"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if gnutls := _gnutls():
        found["GnuTLS"] = gnutls
    programs = {"nbdkit": "nbdkit", "qemu": "qemu-nbd", "fio": "fio", "libnbd": "nbdinfo"}
    for name, program in programs.items():
        with contextlib.suppress(Failed):
            found[name] = version([program, "--version"])
    with contextlib.suppress(Failed, OSError):
        trixie = in_root(trixie_root())
        found["trixie: nbdkit"] = version([*trixie, "nbdkit", "--version"])
        package = run([*trixie, "dpkg-query", "-W", "-f", "${Version}", "libgnutls30t64"], START_S)
        found["trixie: GnuTLS"] = package.partition("-")[0]
    if revision := _git("rev-parse", "--short=12", "HEAD"):
        changed = bool(_git("status", "--porcelain", "--", "gateway"))
        found["revision"] = revision + (" and changes" if changed else "")
    return found


def load() -> str:
    """Of the last minute: above what the bench itself makes, others were at work too."""
    return f"{os.getloadavg()[0]:.2f}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gnutls() -> str:
    with contextlib.suppress(OSError):
        check = ctypes.CDLL("libgnutls.so.30").gnutls_check_version
        check.restype = ctypes.c_char_p
        return str(check(None).decode())
    return ""


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
