"""`make bench-quick`: the gateway beside nbdkit's nbd plugin doing the same job, as ratios.

Both stand with TLS in front of the same nbdkit memory disk, filled with bytes that are no holes;
fio's nbd engine (libnbd, GnuTLS) is the client of both. The two are measured in turn, several
rounds; each figure is the median of the rounds' ratios. Client, server and disk share the cores,
so CPU seconds per operation are as telling as operations per second. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway import certs

DISK_MIB = 256
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Case:
    name: str
    rw: str
    block: str
    depth: int


CASES = (
    Case("4 KiB random read, depth 32", "randread", "4k", 32),
    Case("4 KiB random write, depth 32", "randwrite", "4k", 32),
    Case("4 KiB random read, depth 1", "randread", "4k", 1),
    Case("4 KiB random write, depth 1", "randwrite", "4k", 1),
    Case("256 KiB sequential read, depth 16", "read", "256k", 16),
    Case("256 KiB sequential write, depth 16", "write", "256k", 16),
)


@dataclass(frozen=True)
class Server:
    """One program in front of the disk."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def uri(self) -> str:
        return f"nbds://localhost:{self.port}/"

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


@dataclass(frozen=True)
class Sample:
    per_second: float
    cpu_s_per_operation: float


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for(uri: str) -> None:
    deadline = time.monotonic() + 10
    while subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode:
        if time.monotonic() > deadline:
            sys.exit(f"nbdinfo cannot open {uri} (with certificates in /etc/pki/libnbd it insists)")


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[list[Server]]:
    tls = folder / "tls"
    certs.init(tls)
    disk = str(folder / "disk.sock")
    with contextlib.ExitStack() as stack:
        stack.enter_context(running("nbdkit", "-f", "-U", disk, "memory", f"{DISK_MIB}M"))
        wait_for(f"nbd+unix:///?socket={disk}")
        noise = folder / "noise"
        noise.write_bytes(os.urandom(1 << 20) * DISK_MIB)
        subprocess.run(["nbdcopy", noise, f"nbd+unix:///?socket={disk}"], check=True)
        noise.unlink()
        ports = free_port(), free_port()
        gateway = [sys.executable, "-m", "gateway", "--tls-dir", str(tls), "--allow-anonymous"]
        gateway += ["--socket", disk, "--listen", f"127.0.0.1:{ports[0]}", "--log-level", "error"]
        nbdkit = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(ports[1]), "--tls=require"]
        nbdkit += [f"--tls-certificates={tls}", "nbd", f"socket={disk}"]
        found = [
            Server("gateway", ports[0], stack.enter_context(running(*gateway))),
            Server("nbdkit", ports[1], stack.enter_context(running(*nbdkit))),
        ]
        for server in found:
            wait_for(server.uri)
        yield found


def measure(server: Server, case: Case, seconds: float) -> Sample:
    command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}"]
    command += [f"--rw={case.rw}", f"--bs={case.block}", f"--iodepth={case.depth}"]
    command += [f"--runtime={seconds}", "--time_based", f"--size={DISK_MIB}M"]
    before = server.cpu_s()
    done = subprocess.run(
        [*command, "--output-format=json"], check=True, capture_output=True, text=True
    )
    cpu_s = server.cpu_s() - before
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = job["read" if "read" in case.rw else "write"]
    return Sample(side["iops"], cpu_s / side["total_ios"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1, help="of each measurement")
    options = parser.parse_args()
    if missing := [
        name for name in ("fio", "nbdkit", "nbdcopy", "nbdinfo") if not shutil.which(name)
    ]:
        sys.exit(f"not installed: {', '.join(missing)} (tests/peers/install gets them)")
    print(f"{facts()}\n{options.rounds} rounds of {options.seconds:g} s a case, ratios to nbdkit\n")
    print("| case | nbdkit = 1.0 | lowest to highest | CPU per operation |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as (gateway, nbdkit):
        for case in CASES:
            speed, cpu = [], []
            for number in range(options.rounds):
                pair = (gateway, nbdkit) if number % 2 else (nbdkit, gateway)
                sample = {one.name: measure(one, case, options.seconds) for one in pair}
                ours, theirs = sample["gateway"], sample["nbdkit"]
                speed.append(ours.per_second / theirs.per_second)
                cpu.append(ours.cpu_s_per_operation / theirs.cpu_s_per_operation)
            print(
                f"| {case.name} | {statistics.median(speed):.2f} | {min(speed):.2f} to "
                f"{max(speed):.2f} | {statistics.median(cpu):.2f} |",
                flush=True,
            )


def facts() -> str:
    version = subprocess.run(["nbdkit", "--version"], capture_output=True, text=True).stdout.strip()
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"{ssl.OPENSSL_VERSION.rpartition(' ')[0].rpartition(' ')[0].rpartition(' ')[0]}, {version}"
    )


if __name__ == "__main__":
    main()
