"""Programs of Debian trixie, in the folder that tests/peers/install-trixie has made.

They run under chroot, with a directory of their own in its /tmp; the network is the machine's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import environment
from tests.support.peers import CLIENT_S, Client, Server

DEFAULT_ROOT = "/var/cache/nbd-gateway/trixie"


class Trixie:
    """The folder, and a directory in it that both sides see: `outside` and `inside`."""

    def __init__(self, root: Path, outside: Path) -> None:
        self.root = root
        self.outside = outside
        self.inside = Path("/") / outside.relative_to(root)

    def command(self, *argv: str | Path) -> list[str]:
        return ["chroot", str(self.root), *map(str, argv)]

    def check(self, *argv: str | Path, **env: str) -> str:
        """Run a program that must succeed; what it printed."""
        done = subprocess.run(
            self.command(*argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_S,
            env={**environment(), **env},
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{done.args}: exit code {done.returncode}\n{said}"
        return done.stdout

    def client(self, through: Client) -> Client:
        """The same client, for programs that see only the inside."""
        certificates = through.certificates
        if certificates is not None:
            shutil.copytree(certificates, self.outside / "pki", dirs_exist_ok=True)
            certificates = self.inside / "pki"
        address = through.address.replace(str(self.outside), str(self.inside))
        return Client(address, certificates)

    def nbdsh(self, script: str, through: Client, **args: Any) -> dict[str, Any]:
        """Run a program for libnbd; what it reported."""
        prelude = """\
            import errno, json, os, nbd
            args = json.loads(os.environ["ARGS"])
            reported = {}
            def connect(*contexts, **settings):
                h = nbd.NBD()
                h.set_uri_allow_local_file(True)
                for name, value in settings.items():
                    getattr(h, "set_" + name)(value)
                for name in contexts:
                    h.add_meta_context(name)
                h.connect_uri(args["uri"])
                return h
            def failed(call, *a, **k):
                try:
                    call(*a, **k)
                except nbd.Error as error:
                    return errno.errorcode.get(error.errnum, error.errnum)
                return None
            """
        code = textwrap.dedent(prelude) + textwrap.dedent(script) + "\nprint(json.dumps(reported))"
        given = json.dumps({**args, "uri": self.client(through).uri}, default=str)
        found: dict[str, Any] = json.loads(self.check("python3", "-c", code, ARGS=given))
        return found

    def qemu_nbd(self, *args: str | Path) -> Server:
        """qemu-nbd on a Unix socket; to be entered."""
        place = Path(tempfile.mkdtemp(dir=self.outside))
        sock, pid = self.inside / place.name / "q.sock", self.inside / place.name / "q.pid"
        argv = self.command("qemu-nbd", "-t", "-e", "0", "-k", sock, f"--pid-file={pid}", *args)
        return Server([*argv], place / "q.sock", place / "q.pid")

    def nbdkit(self, *args: str | Path) -> Server:
        """nbdkit on a Unix socket; to be entered."""
        place = Path(tempfile.mkdtemp(dir=self.outside))
        sock, pid = self.inside / place.name / "k.sock", self.inside / place.name / "k.pid"
        argv = self.command("nbdkit", "-f", "-U", sock, "-P", pid, *args)
        return Server([*argv], place / "k.sock", place / "k.pid")


@contextmanager
def trixie() -> Iterator[Trixie]:
    """The folder, or a skipped test that says why there is none."""
    root = Path(os.environ.get("NBD_GATEWAY_TRIXIE", DEFAULT_ROOT))
    if not (root / ".complete").exists():
        pytest.skip(f"no Debian trixie in {root} (tests/peers/install-trixie makes it)")
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    outside = Path(tempfile.mkdtemp(prefix="nbd-gateway-", dir=root / "tmp"))
    outside.chmod(0o755)
    try:
        yield Trixie(root, outside)
    finally:
        shutil.rmtree(outside)
