"""`python -m tests.bench.idle [CLIENTS [WORKERS]] [--json FILE]`: what idle clients cost.

Up to 10 000 of them, with two workers, unless there is another word.

Each is connected with TLS and a certificate and has a connection of its own to the disk, an nbdkit
of one thread a connection. Then it is silent. At each step: the gateway's memory a client, what it
spends on CPU while nobody says anything, and how long one more client takes to read 4 KiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gateway import certs
from tests.bench.clients import LIBNBD, SYSTEM_PYTHON
from tests.bench.processes import Failed, Process, run

ROOT = Path(__file__).resolve().parents[2]
STEPS = (1000, 2500, 5000, 7500, 10_000)
CLIENT_PROCESSES = 4
QUIET_S = 3.0
START_S = 15.0


class Crowd:
    """A process that holds connections. libnbd's handles are large, so there are several."""

    def __init__(self, uri: str) -> None:
        argv = [SYSTEM_PYTHON, str(LIBNBD), "idle", uri]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._popen = subprocess.Popen(argv, **pipes, stderr=subprocess.PIPE, text=True)

    def ask(self, clients: int) -> None:
        """So many are to be connected."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{clients}\n")
        self._popen.stdin.flush()

    def wait(self) -> None:
        """Until they are. Raises Failed."""
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        if not self._popen.stdout.readline():
            said = self._popen.stderr.read().strip().splitlines() or ["no message"]
            raise Failed(f"clients: {said[-1]}")

    def stop(self) -> None:
        self._popen.kill()
        self._popen.wait()


def measure(most: int, workers: int) -> list[dict[str, Any]]:
    """What was found at each step, which is printed too. Raises Failed."""
    steps: list[dict[str, Any]] = []
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # nbdkit and the clients inherit it
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        here = Path(folder)
        certs.init(here / "tls")
        disk, port_file = here / "disk.sock", here / "gateway.log"
        nbdkit = Process(["nbdkit", "-f", "-t", "1", "-U", disk, "memory", "64M"], here / "log")
        stack.callback(nbdkit.stop)
        nbdkit.wait_until(disk.exists, "nbdkit does not start", START_S)
        argv = [sys.executable, "-m", "gateway", "--tls-dir", here / "tls", "--socket", disk]
        argv += ["--listen", "127.0.0.1:0", "--log-level", "warning"]
        argv += ["--max-connections", str(most + 10), "--workers", str(workers)]
        # They come from one address, with one certificate.
        argv += ["--limit", "clients-per-identity=0", "--limit", "handshake-rate=0"]
        gateway = Process(argv, port_file, cwd=ROOT)
        stack.callback(gateway.stop)
        gateway.wait_until(lambda: "nbds://" in port_file.read_text(), "no gateway", START_S)
        words = port_file.read_text().splitlines()
        uri = next(line for line in words if line.startswith("nbds://"))
        for line in words:
            if line != uri:
                print(line, file=sys.stderr)  # such as a warning about descriptors
        uri += f"?tls-certificates={here / 'tls'}"
        run(["nbdinfo", "--size", uri], START_S)
        alone = gateway.anonymous_kib()
        crowds = [Crowd(uri) for _ in range(CLIENT_PROCESSES)]
        for crowd in crowds:
            stack.callback(crowd.stop)
        print("| idle clients | memory of the gateway | per client | CPU while idle | one more |")
        print("|---|---|---|---|---|", flush=True)
        for count in [*(step for step in STEPS if step < most), most]:
            for index, crowd in enumerate(crowds):
                crowd.ask(count // len(crowds) + (index < count % len(crowds)))
            for crowd in crowds:
                crowd.wait()
            time.sleep(1.0)  # for what is done behind the last reply
            before = gateway.cpu_s()
            time.sleep(QUIET_S)
            idle = (gateway.cpu_s() - before) / QUIET_S
            kib = gateway.anonymous_kib()
            first = json.loads(run([SYSTEM_PYTHON, LIBNBD, "first-byte", uri, "0.5"], START_S))
            took = sorted(first["seconds"])[len(first["seconds"]) // 2]
            print(
                f"| {count} | {kib / 1024:.0f} MiB | {(kib - alone) / count:.1f} KiB "
                f"| {100 * idle:.1f} % of a core | {1000 * took:.1f} ms |",
                flush=True,
            )
            found = {"mib": kib / 1024, "idle_cpu": idle, "one_more_s": took}
            steps.append({"clients": count, **found})
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.idle", description=__doc__)
    parser.add_argument("clients", type=int, nargs="?", default=10_000)
    parser.add_argument("workers", type=int, nargs="?", default=2)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args()
    if args.clients < 1:
        parser.error(f"{args.clients} clients are none")
    try:
        steps = measure(args.clients, args.workers)
    except Failed as failed:
        sys.exit(f"bench-idle: {failed}")
    if args.json:
        args.json.write_text(json.dumps({"workers": args.workers, "steps": steps}, indent=1))


if __name__ == "__main__":
    main()
