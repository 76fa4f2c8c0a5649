"""Requests in parallel, answered in any order: each reply finds its request.

The upstream's scripts wait at a FIFO for each request, and the client opens these one by one: so
the order is the test's, whatever the machine does.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from textwrap import dedent

import pytest

from tests.peers.bench import Bench, Front
from tests.support.peers import nbdsh

BLOCK = 4096
COUNT = 12

CLIENT = """
def opened(name):
    # A FIFO can be opened for writing without waiting once somebody waits to read from it.
    try:
        os.close(os.open(os.path.join(args["gates"], name), os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO, error
        return False
    return True
def wait(condition, *handles):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        for h in handles:
            h.poll(2)
def content(offset, length):
    return ((b"%015d\\n" % offset) * (length // 16 + 1))[:length]
"""


class Gates:
    """A gateway in front of an upstream whose requests each wait at the FIFO KIND-OFFSET."""

    def __init__(self, bench: Bench, *flags: str) -> None:
        self.path = bench.directory()
        wait = f': < "{self.path}'
        server = bench.nbdkit(
            *("-t", "32", *flags, "eval", "thread_model=echo parallel", "get_size=echo 64M"),
            *("can_write=exit 0", "can_flush=exit 0", "can_trim=exit 0"),
            f'pread={wait}/read-$4"; yes "$(printf %015d "$4")" | head -c "$3"',
            f'pwrite=cat > "{self.path}/written-$4"; {wait}/write-$4"',
            f'trim={wait}/trim-$4"',
            f'flush={wait}/flush"',
        )
        self.front: Front = bench.gateway(server)

    def add(self, *names: str) -> None:
        for name in names:
            os.mkfifo(self.path / name)


STYLES = pytest.mark.parametrize(
    ("structured", "flags"),
    [(True, []), (False, []), (True, ["--no-sr"])],
    ids=["chunks", "simple", "chunks-made-of-simple"],
)


@STYLES
def test_reads_answered_in_an_order_of_the_upstream(
    bench: Bench, structured: bool, flags: list[str]
) -> None:
    gates = Gates(bench, *flags)
    lengths = [random.Random(n).choice([512, 4096, 70_000, 1 << 20]) for n in range(COUNT)]
    gates.add(*(f"read-{n << 20}" for n in range(COUNT)))
    script = """
    h = connect(request_structured_replies=args["structured"])
    buffers = [nbd.Buffer(length) for length in args["lengths"]]
    done = []
    def finished(n, error):
        done.append(n)
        return 0
    cookies = [h.aio_pread(buffer, n << 20, lambda error, n=n: finished(n, error))
               for n, buffer in enumerate(buffers)]
    early = []
    for n in args["order"]:
        wait(lambda: opened(f"read-{n << 20}"), h)
        wait(lambda: n in done, h)
        early += [done] if len(done) != args["order"].index(n) + 1 else []
    right = [buffer.to_bytearray() == content(n << 20, length)
             for n, (buffer, length) in enumerate(zip(buffers, args["lengths"]))]
    for cookie in cookies:
        h.aio_command_completed(cookie)
    h.shutdown()
    report(done=done, early=early, right=all(right))
    """
    for order in (list(range(COUNT))[::-1], random.Random(5).sample(range(COUNT), COUNT)):
        seen = nbdsh(
            CLIENT + dedent(script),
            gates.front.client(),
            structured=structured,
            lengths=lengths,
            gates=gates.path,
            order=order,
        )
        assert seen == {"done": order, "early": [], "right": True}


def test_commands_of_all_kinds_overtake_each_other(bench: Bench) -> None:
    """A flush behind a write, a read behind a flush: nothing waits for what came before it."""
    gates = Gates(bench)
    gates.add("write-0", "flush", f"read-{BLOCK}", f"trim-{2 * BLOCK}", f"write-{3 * BLOCK}")
    script = """
    h = connect()
    done = []
    def note(name):
        def finished(error):
            done.append([name, error.value])
            return 1
        return finished
    payload = {n: nbd.Buffer.from_bytearray(bytearray(content(n, 100_000))) for n in (0, 12288)}
    into = nbd.Buffer(4096)
    h.aio_pwrite(payload[0], 0, note("write-0"))
    h.aio_flush(note("flush"))
    h.aio_pread(into, 4096, note("read-4096"))
    h.aio_trim(4096, 8192, note("trim-8192"))
    h.aio_pwrite(payload[12288], 12288, note("write-12288"))
    order = ["write-12288", "trim-8192", "flush", "read-4096", "write-0"]
    for n, name in enumerate(order):
        wait(lambda: opened(name), h)
        wait(lambda: len(done) > n, h)
    h.shutdown()
    right = into.to_bytearray() == content(4096, 4096)
    report(done=done == [[name, 0] for name in order], read=right)
    """
    seen = nbdsh(CLIENT + dedent(script), gates.front.client(), gates=gates.path)
    assert seen == {"done": True, "read": True}
    for offset in (0, 3 * BLOCK):
        written = (gates.path / f"written-{offset}").read_bytes()
        assert written == (b"%015d\n" % offset * 6251)[:100_000]


def test_errors_out_of_order(bench: Bench) -> None:
    gates = bench.directory()
    server = bench.nbdkit(
        *("-t", "32", "eval", "thread_model=echo parallel", "get_size=echo 64M"),
        f'pread=: < "{gates}/read-$4"; test $(($4 >> 20 & 1)) = 0 || '
        "{ test $(($4 >> 20 & 2)) = 0 && echo EIO >&2 || echo ENOMEM >&2; exit 1; }; "
        'yes "$(printf %015d "$4")" | head -c "$3"',
    )
    for n in range(COUNT):
        os.mkfifo(gates / f"read-{n << 20}")
    script = """
    h = connect()
    buffers = [nbd.Buffer(4096) for _ in range(args["count"])]
    seen = {}
    def finished(n, error):
        seen[n] = errno.errorcode[error.value] if error.value else bool(
            buffers[n].to_bytearray() == content(n << 20, 4096))
        return 1
    for n, buffer in enumerate(buffers):
        h.aio_pread(buffer, n << 20, lambda error, n=n: finished(n, error))
    for n in args["order"]:
        wait(lambda: opened(f"read-{n << 20}"), h)
    wait(lambda: len(seen) == args["count"], h)
    h.shutdown()
    report(seen=[seen[n] for n in range(args["count"])])
    """
    seen = nbdsh(
        CLIENT + dedent(script),
        bench.gateway(server).client(),
        gates=gates,
        count=COUNT,
        order=random.Random(8).sample(range(COUNT), COUNT),
    )
    assert seen == {"seen": [True, "EIO", True, "ENOMEM"] * (COUNT // 4)}


def test_clients_do_not_wait_for_each_other(bench: Bench) -> None:
    """What one client waits for holds up nobody else, not even with the same cookies."""
    gates = Gates(bench)
    gates.add(*(f"read-{n << 20}" for n in range(6)))
    script = """
    handles = [connect() for _ in range(3)]
    done = []
    buffers = [nbd.Buffer(200_000) for _ in range(6)]
    def finished(n):
        done.append(n)
        return 1
    for n, buffer in enumerate(buffers):
        handles[n % 3].aio_pread(buffer, n << 20, lambda error, n=n: finished(n))
    order = [4, 2, 0, 5, 3, 1]
    for n in order:
        wait(lambda: opened(f"read-{n << 20}"), *handles)
        wait(lambda: n in done, *handles)
    for h in handles:
        h.shutdown()
    right = [buffer.to_bytearray() == content(n << 20, 200_000) for n, buffer in enumerate(buffers)]
    report(done=done == order, right=all(right))
    """
    seen = nbdsh(CLIENT + dedent(script), gates.front.client(), gates=gates.path)
    assert seen == {"done": True, "right": True}


def test_a_reply_while_the_payload_of_a_write_is_on_its_way(bench: Bench, tmp_path: Path) -> None:
    """Replies of any size go out while the client still sends; and the write is whole."""
    gates = Gates(bench)
    gates.add(f"read-{1 << 20}", "write-0")
    script = """
    h = connect()
    length = 30 << 20
    payload = nbd.Buffer.from_bytearray(bytearray(content(7, length)))
    into = nbd.Buffer(20 << 20)
    done = []
    def note(name):
        def finished(error):
            done.append(name)
            return 1
        return finished
    h.aio_pread(into, 1 << 20, note("read"))
    h.aio_pwrite(payload, 0, note("write"))
    wait(lambda: opened("read-1048576"), h)
    wait(lambda: "read" in done, h)
    wait(lambda: opened("write-0"), h)
    wait(lambda: "write" in done, h)
    h.shutdown()
    report(done=done, right=into.to_bytearray() == content(1 << 20, 20 << 20))
    """
    seen = nbdsh(CLIENT + dedent(script), gates.front.client(), gates=gates.path)
    assert seen == {"done": ["read", "write"], "right": True}
    written = (gates.path / "written-0").read_bytes()
    assert len(written) == 30 << 20
    assert written == (b"%015d\n" % 7) * (len(written) // 16)
