"""`make bench-layers`: what each layer of the data plane costs, so that a slow one shows.

A stub client and a stub upstream, each a process of its own, exchange requests and replies through
a layer that runs in this process: its CPU time is what counts, theirs is not in it. The client's
side is TCP on loopback and the upstream's a Unix socket, as in real life. The walks, which do no
I/O, are run over prepared buffers. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import trio

from gateway import certs
from gateway.nbd.constants import SIMPLE_REPLY_MAGIC, Cmd, TransmissionFlag
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import Transmission
from gateway.nbd.wire import REQUEST, SIMPLE_REPLY, U64
from gateway.relay import Relay
from gateway.settings import TLSSettings
from gateway.tls import server_context
from gateway.transport import Channel
from tests.bench.layer_peers import Workload, client, upstream
from tests.bench.report import short, table

BUFFER = 256 << 10
MIB = 1 << 20
WALK_ROUNDS = 2000
GIVE_UP_S = 60.0
COOKIE_AT = 8  # in a request; in a simple reply too

WORKLOADS = (
    Workload("4 KiB read, depth 1", Cmd.READ, 4096, 1),
    Workload("4 KiB read, depth 32", Cmd.READ, 4096, 32),
    Workload("4 KiB write, depth 1", Cmd.WRITE, 4096, 1),
    Workload("4 KiB write, depth 32", Cmd.WRITE, 4096, 32),
    Workload("256 KiB read, depth 16", Cmd.READ, 256 << 10, 16),
    Workload("256 KiB write, depth 16", Cmd.WRITE, 256 << 10, 16),
)


# ---------------------------------------------------------------- layers between two peers

Serve = Callable[[Channel, Channel], Awaitable[None]]
"""Serves until the client has left; both channels are open, and stay so."""


async def bare_copy(near: Channel, far: Channel) -> None:
    """Nothing but recv_into and send on the sockets."""

    async def pump(source: socket.socket, sink: socket.socket) -> None:
        view = memoryview(bytearray(BUFFER))
        while True:
            try:
                count = source.recv_into(view)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(source)
                continue
            if not count:
                nursery.cancel_scope.cancel()  # a peer leaves when all is answered, not before
                return
            sent = 0
            while sent < count:
                try:
                    sent += sink.send(view[sent:count])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(sink)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, near.socket, far.socket)
        nursery.start_soon(pump, far.socket, near.socket)


async def channel_copy(near: Channel, far: Channel) -> None:
    """What `transport` does, and nothing else."""

    async def pump(source: Channel, sink: Channel) -> None:
        view = memoryview(bytearray(BUFFER))
        while not source.eof:
            await source.readable()
            if count := source.fill(view, probe=False):
                await sink.send_all(view[:count])
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, near, far)
        nursery.start_soon(pump, far, near)


async def relay(near: Channel, far: Channel) -> None:
    """The whole data plane."""
    flags = TransmissionFlag.HAS_FLAGS
    whole = Relay(near, far, Transmission(Terms("", 1 << 40, flags)))
    await whole.run()
    await whole.aclose()


@dataclass(frozen=True)
class Layer:
    name: str
    serve: Serve
    tls: bool


LAYERS = (
    Layer("copy: recv_into, send", bare_copy, False),
    Layer("copy, by Channel", channel_copy, False),
    Layer("copy, by TLSChannel", channel_copy, True),
    Layer("Relay without TLS", relay, False),
    Layer("Relay with TLS: the whole gateway", relay, True),
)


def through(layer: Layer, workload: Workload, seconds: float, pki: Path) -> float:
    """CPU seconds of this process per operation."""
    fork = multiprocessing.get_context("fork")
    report, reporter = fork.Pipe(duplex=False)
    near, client_end = _tcp_pair()
    far, upstream_end = socket.socketpair()
    certificates = pki if layer.tls else None
    ends = near, far, report, client_end, upstream_end
    peers = [
        fork.Process(
            target=_only,
            args=(ends, client, client_end, workload, seconds, certificates, reporter),
        ),
        fork.Process(target=_only, args=(ends, upstream, upstream_end, workload)),
    ]
    for peer in peers:
        peer.start()
    for end in (client_end, upstream_end, reporter):
        end.close()
    try:
        cpu_s = trio.run(_serve, layer, near, far, pki)
        return cpu_s / _operations(report)
    finally:
        for sock in (near, far):
            sock.close()
        for peer in peers:
            peer.terminate()
            peer.join()


def _only(
    ends: Sequence[socket.socket | Connection],
    work: Callable[..., None],
    own: socket.socket,
    *args: object,
) -> None:
    """In a child: ends that are not its own must not stay open in it."""
    for end in ends:
        if end is not own:
            end.close()
    work(own, *args)


def _operations(report: Connection) -> int:
    if not report.poll(10):
        raise RuntimeError("the stub client does not say what it has done")
    count: int = report.recv()
    return count


async def _serve(layer: Layer, near: socket.socket, far: socket.socket, pki: Path) -> float:
    channel = Channel(near)
    if layer.tls:
        files = TLSSettings(pki / "server-cert.pem", pki / "server-key.pem", None)
        channel = await channel.start_tls(server_context(files))
    gc.collect()
    before = time.process_time()
    with trio.fail_after(GIVE_UP_S):
        await layer.serve(channel, Channel(far))
    spent = time.process_time() - before
    channel.close()
    return spent


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


# ---------------------------------------------------------------- the walks alone


def walks(workload: Workload) -> tuple[float, float]:
    """Seconds per operation of `Transmission.requests` and of `replies`, the fastest of many.

    The buffers hold `workload.depth` messages, or as many as there is room for in BUFFER.
    """
    writes = workload.command == Cmd.WRITE
    request_size = REQUEST.size + (workload.length if writes else 0)
    reply_size = SIMPLE_REPLY.size + (0 if writes else workload.length)
    batch = max(1, min(workload.depth, BUFFER // max(request_size, reply_size)))
    requests = bytearray(batch * request_size)
    replies = bytearray(batch * reply_size)
    for i in range(batch):
        head = workload.request(i)
        requests[i * request_size : i * request_size + len(head)] = head
    transmission = Transmission(Terms("", 1 << 40, TransmissionFlag.HAS_FLAGS))
    times: tuple[list[int], list[int]] = ([], [])
    clock = time.perf_counter_ns
    for _ in range(WALK_ROUNDS):
        start = clock()
        used, _pieces = transmission.requests(requests, 0, len(requests))
        times[0].append(clock() - start)
        assert used == len(requests), "the stub's requests are not what the walk takes"
        for i in range(batch):  # the upstream's part
            (cookie,) = U64.unpack_from(requests, i * request_size + COOKIE_AT)
            SIMPLE_REPLY.pack_into(replies, i * reply_size, SIMPLE_REPLY_MAGIC, 0, cookie)
        start = clock()
        used, _pieces = transmission.replies(replies, 0, len(replies))
        times[1].append(clock() - start)
        assert used == len(replies), "the stub's replies are not what the walk takes"
    there, back = (min(one) / batch / 1e9 for one in times)
    return there, back


# ---------------------------------------------------------------- the tables


def measure(seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU seconds per operation: by layer, then by workload."""
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pki = Path(folder) / "pki"
        certs.init(pki, ("localhost",))
        for number in range(rounds):
            for workload in WORKLOADS:
                for layer in LAYERS:
                    print(f"round {number + 1}: {workload.name}: {layer.name}", file=sys.stderr)
                    cell = found.setdefault(layer.name, {}).setdefault(workload.name, [])
                    cell.append(through(layer, workload, seconds, pki))
                for name, spent in zip(
                    ("request walk alone", "reply walk alone"), walks(workload), strict=True
                ):
                    found.setdefault(name, {}).setdefault(workload.name, []).append(spent)
    return {
        name: {workload: statistics.median(cell) for workload, cell in row.items()}
        for name, row in found.items()
    }


def tables(found: dict[str, dict[str, float]]) -> str:
    """Microseconds of CPU per operation, and per MiB of payload."""
    sizes = {workload.name: workload.length for workload in WORKLOADS}
    texts = []
    for unit, counts in (
        ("operation", dict.fromkeys(sizes, 1.0)),
        ("MiB", {name: MIB / size for name, size in sizes.items()}),
    ):
        rows = [[f"us of CPU per {unit}", *sizes]]
        for layer, row in found.items():
            rows.append([layer, *(short(row[name] * 1e6 * counts[name]) for name in sizes)])
        texts.append(table(rows))
    return "\n\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    found = measure(options.seconds, options.rounds)
    print(tables(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
