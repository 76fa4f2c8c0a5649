"""The measurements: one client program against one server, and what came of it.

All raise Failed. The CPU time is that of the server alone, from before the client starts until it
has ended; so a connection or two are in it, the same for every server.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.kinds import Kind
from tests.bench.processes import Failed, run
from tests.bench.results import Sample
from tests.bench.servers import AREA_MIB, MIB, ZEROES_MIB, Server, Stage

SYSTEM_PYTHON = "/usr/bin/python3"  # the one that has Debian's nbd module
LIBNBD = Path(__file__).with_name("libnbd_client.py")
GRACE_S = 60.0  # beyond the time that a client should take
GIB = 1 << 30

IDLE_STEPS = (1, 100, 1000)
BUSY_CLIENTS = 100
PROCESSES = 2  # of clients, where one would be slower than the server
ZEROES_BLOCK, ZEROES_DEPTH = 4096, 32
SETTLE_S = 0.3  # for a server to be done with what it does behind the last reply


def _cpu_spent(server: Server, before: float | None, by: float) -> float | None:
    after = server.cpu_s()
    return None if before is None or after is None or not by else (after - before) / by


# ---------------------------------------------------------------- fio


def fio(
    server: Server, rw: str, block_kib: int, depth: int, jobs: int, seconds: float
) -> dict[str, Any]:
    """The side of fio's report that `rw` is about."""
    argv = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={rw}"]
    argv += [f"--bs={block_kib}k", f"--iodepth={depth}", f"--numjobs={jobs}", "--group_reporting"]
    argv += [_runtime(seconds), "--time_based", f"--size={AREA_MIB}M"]
    out = run([*argv, "--output-format=json"], seconds + GRACE_S)
    job = json.loads(out[out.index("{") :])["jobs"][0]
    if job["error"]:
        raise Failed(f"fio: error {job['error']}")
    side: dict[str, Any] = job["read" if "read" in rw else "write"]
    if not side["total_ios"]:
        raise Failed("fio: nothing was done")
    return side


def _runtime(seconds: float) -> str:
    return f"--runtime={seconds * 1000:.0f}ms"  # without a unit, half a second would be none


def operations(rw: str, depth: int, jobs: int) -> Callable[[Stage, Kind, float], Sample]:
    """Random access in blocks of 4 KiB. Value: operations per second."""

    def measure(stage: Stage, kind: Kind, seconds: float) -> Sample:
        server = stage.server(kind)
        before = server.cpu_s()
        side = fio(server, rw, 4, depth, jobs, seconds)
        cpu_s = _cpu_spent(server, before, side["total_ios"])
        return Sample(side["iops"], cpu_s, _latencies(side))

    return measure


def bulk(rw: str, block_kib: int, depth: int, jobs: int) -> Callable[[Stage, Kind, float], Sample]:
    """Sequential access. Value: MiB per second; CPU per GiB."""

    def measure(stage: Stage, kind: Kind, seconds: float) -> Sample:
        server = stage.server(kind)
        before = server.cpu_s()
        side = fio(server, rw, block_kib, depth, jobs, seconds)
        cpu_s = _cpu_spent(server, before, side["io_bytes"] / GIB)
        return Sample(side["iops"] * block_kib / 1024, cpu_s, _latencies(side))

    return measure


def _latencies(side: dict[str, Any]) -> dict[str, Any]:
    """In microseconds."""
    found = side.get("clat_ns", {}).get("percentile", {})
    wanted = {"p50_us": "50.000000", "p99_us": "99.000000"}
    latencies = {name: found[key] / 1000 for name, key in wanted.items() if key in found}
    return {"operations": side["total_ios"], **latencies}


# ---------------------------------------------------------------- nbdcopy


def copy_out(stage: Stage, kind: Kind, seconds: float) -> Sample:
    """The whole disk to nowhere, again and again. Value: MiB per second; CPU per GiB."""
    server = stage.server(kind)
    return _copies(server, [server.uri, "null:"], seconds)


def copy_in(stage: Stage, kind: Kind, seconds: float) -> Sample:
    """A file onto the disk. Value: as above."""
    server = stage.server(kind)
    return _copies(server, [str(stage.noise), server.uri], seconds)


def _copies(server: Server, arguments: list[str], seconds: float) -> Sample:
    before, start, count = server.cpu_s(), time.monotonic(), 0
    while not count or time.monotonic() - start < seconds:
        run(["nbdcopy", "--connections=1", *arguments], GRACE_S)
        count += 1
    took = time.monotonic() - start
    cpu_s = _cpu_spent(server, before, count * AREA_MIB * MIB / GIB)
    return Sample(count * AREA_MIB / took, cpu_s, {"copies": count})


# ---------------------------------------------------------------- libnbd


def libnbd(mode: str, server: Server, *args: float) -> dict[str, Any]:
    argv = [SYSTEM_PYTHON, str(LIBNBD), mode, server.uri, *map(str, args)]
    words: dict[str, Any] = json.loads(run(argv, 2 * GRACE_S))
    return words


def together(mode: str, server: Server, *args: float) -> list[dict[str, Any]]:
    """The same in PROCESSES processes at once."""
    argv = [SYSTEM_PYTHON, str(LIBNBD), mode, server.uri, *map(str, args)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(argv, **pipes) for _ in range(PROCESSES)]
    try:
        said = [process.communicate(timeout=2 * GRACE_S) for process in started]
    except subprocess.TimeoutExpired:
        raise Failed(f"not within {2 * GRACE_S:g} s") from None
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (_, err) in zip(started, said, strict=True):
        if process.returncode:
            raise Failed((err.strip().splitlines() or ["no message"])[-1])
    return [json.loads(out) for out, _ in said]


def handshakes(at_a_time: int) -> Callable[[Stage, Kind, float], Sample]:
    """Connect, TLS, NBD_OPT_GO, disconnect. Value: connections per second."""

    def measure(stage: Stage, kind: Kind, seconds: float) -> Sample:
        server = stage.server(kind)
        before = server.cpu_s()
        found = together("connections", server, at_a_time // PROCESSES, seconds)
        count = sum(one["connections"] for one in found)
        cpu_s = _cpu_spent(server, before, count)
        return Sample(count / max(one["seconds"] for one in found), cpu_s, {"connections": count})

    return measure


def first_byte(stage: Stage, kind: Kind, seconds: float) -> Sample:
    """From connect until the first 4 KiB are there, the median. Value: milliseconds."""
    server = stage.server(kind)
    before = server.cpu_s()
    times = libnbd("first-byte", server, seconds)["seconds"]
    cpu_s = _cpu_spent(server, before, len(times))
    return Sample(statistics.median(times) * 1000, cpu_s, {"connections": len(times)})


def zeroes(stage: Stage, kind: Kind, seconds: float) -> Sample:
    """ZEROES_MIB of zeroes in small NBD_CMD_WRITE_ZEROES. Value: requests per second."""
    server = stage.server(kind)
    before, count, took = server.cpu_s(), 0, 0.0
    while took < seconds:
        area = AREA_MIB * MIB, ZEROES_MIB * MIB
        found = libnbd("zeroes", server, *area, ZEROES_BLOCK, ZEROES_DEPTH)
        count += found["requests"]
        took += found["seconds"]
    return Sample(count / took, _cpu_spent(server, before, count), {"operations": count})


def crowd(clients: int) -> Callable[[Stage, Kind, float], Sample]:
    """All at once: connect, read 4 KiB, write 4 KiB, disconnect. Value: seconds for all."""

    def measure(stage: Stage, kind: Kind, seconds: float) -> Sample:
        server = stage.server(kind)
        before = server.cpu_s()
        found = together("crowd", server, clients // PROCESSES)
        if failed := sum(one["failed"] for one in found):
            reasons = sorted({reason for one in found for reason in one["reasons"]})
            raise Failed(f"{failed} of {clients} clients: {reasons[0]}")
        cpu_s = _cpu_spent(server, before, clients)
        return Sample(max(one["seconds"] for one in found), cpu_s)

    return measure


# ---------------------------------------------------------------- memory


def idle_memory(stage: Stage, kind: Kind, seconds: float) -> dict[int, Sample]:
    """By number of clients that are connected and silent. Value: KiB for each of them."""
    found = {}
    with stage.fresh(kind) as server:
        argv = [SYSTEM_PYTHON, str(LIBNBD), "idle", server.uri]
        alone = _settled_kib(server)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(argv, **pipes, stderr=subprocess.PIPE, text=True) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            assert client.stderr is not None
            try:
                for count in IDLE_STEPS:
                    client.stdin.write(f"{count}\n")
                    client.stdin.flush()
                    if not client.stdout.readline():
                        said = client.stderr.read().strip().splitlines() or ["no message"]
                        raise Failed(f"{count} clients: {said[-1]}")
                    kib = _settled_kib(server)
                    detail = {"server_kib": kib, "alone_kib": alone}
                    detail["threads"] = server.process.threads()
                    found[count] = Sample((kib - alone) / count, None, detail)
            finally:
                client.kill()
    return found


def _settled_kib(server: Server) -> int:
    time.sleep(SETTLE_S)
    return server.process.anonymous_kib()


def busy_memory(stage: Stage, kind: Kind, seconds: float) -> Sample:
    """The most that BUSY_CLIENTS take while each keeps four reads and writes of 64 KiB going."""
    with stage.fresh(kind, check_clients=False) as server:
        alone = most = _settled_kib(server)
        argv = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randrw"]
        argv += ["--bs=64k", "--iodepth=4", f"--numjobs={BUSY_CLIENTS}", "--thread"]
        argv += ["--group_reporting", "--time_based", f"--size={AREA_MIB}M"]
        argv += [_runtime(max(seconds, 2.0))]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(argv, **pipes, text=True) as client:
            try:
                end = time.monotonic() + seconds + GRACE_S
                while client.poll() is None:
                    most = max(most, server.process.anonymous_kib())
                    if time.monotonic() > end:
                        raise Failed("fio does not end")
                    time.sleep(0.1)
                assert client.stdout is not None
                if client.returncode:
                    said = client.stdout.read().strip().splitlines() or ["no message"]
                    raise Failed(f"fio: {said[-1]}")
            finally:
                client.kill()
        detail = {"server_kib": most, "alone_kib": alone}
        return Sample((most - alone) / BUSY_CLIENTS, None, detail)
