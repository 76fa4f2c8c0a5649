"""Requests in flight: out of order, in great number, on many connections."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers.bench import MIB, SIZE, Bench, same
from tests.support.gateway import Gateway, descriptors_of
from tests.support.peers import check, nbdsh, start_nbdsh


def test_a_later_request_overtakes_a_slow_one(bench: Bench) -> None:
    """The upstream answers the first read only after all the others have come back."""
    gate = bench.directory() / "gate"
    server = bench.nbdkit(
        "eval",
        "thread_model=echo parallel",
        "get_size=echo 1M",
        f'pread=if [ "$4" = 0 ]; then while [ ! -e {gate} ]; do sleep 0.05; done; fi; '
        'head -c "$3" /dev/zero',
    )
    front = bench.gateway(server)
    script = """
    h = connect()
    buffers = [nbd.Buffer(4096) for _ in range(9)]
    slow = h.aio_pread(buffers[0], 0)
    quick = [h.aio_pread(buffer, 4096 * i) for i, buffer in enumerate(buffers[1:], 1)]
    for cookie in quick:
        until(h, lambda: h.aio_command_completed(cookie))
    early = h.aio_command_completed(slow)
    open(args["gate"], "w").close()
    until(h, lambda: h.aio_command_completed(slow))
    report(early=early, in_flight=h.aio_in_flight())
    h.shutdown()
    """
    assert nbdsh(script, front.client(), gate=gate) == {"early": False, "in_flight": 0}


@pytest.mark.parametrize("structured", [True, False])
def test_a_thousand_requests_in_flight(bench: Bench, structured: bool) -> None:
    front = bench.gateway(bench.nbdkit("memory", f"{SIZE}"))
    script = """
    h = connect(request_structured_replies=args["structured"])
    block = 16384
    count = h.get_size() // block
    def go(issue):
        cookies = [issue(i) for i in range(count)]
        for cookie in cookies:
            until(h, lambda: h.aio_command_completed(cookie))
    data = [bytearray(i.to_bytes(4, "big") * (block // 4)) for i in range(count)]
    kept = [nbd.Buffer.from_bytearray(d) for d in data]
    back = [nbd.Buffer(block) for _ in range(count)]
    go(lambda i: h.aio_pwrite(kept[i], i * block))
    go(lambda i: h.aio_pread(back[i], i * block))
    report(count=count, wrong=[i for i in range(count) if back[i].to_bytearray() != data[i]])
    h.shutdown()
    """
    reported = nbdsh(script, front.client(), structured=structured)
    assert reported == {"count": 1024, "wrong": []}


def test_reads_and_writes_of_mixed_sizes_at_once(bench: Bench) -> None:
    """Long writes in one direction while long reads fill the other: nobody waits for the other."""
    front = bench.gateway(bench.nbdkit("memory", "128M"))
    script = """
    h = connect()
    import random
    source = random.Random(3)
    half = h.get_size() // 2
    content, at, expected = {}, 0, []
    while at < half:
        size = min(half - at, source.choice([1, 512, 4096, 65536, 1 << 20, 4 << 20]))
        content[at] = source.randbytes(size)
        at += size
    for offset, data in content.items():
        h.pwrite(data, offset)
    pending = []
    for offset, data in content.items():
        into = nbd.Buffer(len(data))
        pending.append((h.aio_pread(into, offset), into, data))
        copy = nbd.Buffer.from_bytearray(bytearray(data))
        pending.append((h.aio_pwrite(copy, half + offset), copy, data))
    for cookie, buffer, _ in pending:
        until(h, lambda: h.aio_command_completed(cookie))
    same = all(buffer.to_bytearray() == data for _, buffer, data in pending)
    written = all(h.pread(len(data), half + offset) == data for offset, data in content.items())
    report(same=same, written=written)
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"same": True, "written": True}


def test_eight_connections_of_nbdcopy(
    bench: Bench, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    picture, _ = pictures
    log = tmp_path / "nbdkit.log"
    image = bench.image(SIZE)
    front = bench.gateway(bench.nbdkit("--filter=log", "file", image, f"logfile={log}"))
    many = ["--connections=8", "--threads=8", "--requests=16", "--request-size=65536"]
    check("nbdcopy", *many, "--flush", picture, front.client().uri)
    assert same(picture, image)
    check("nbdcopy", *many, front.client().uri, tmp_path / "down")
    assert same(picture, tmp_path / "down")
    # One upstream connection per client connection, neither more nor fewer.
    clients = front.gateway.log().count(": open: ")
    assert clients >= 16
    assert log.read_text().count("Preconnect id=") == clients * 2  # each is logged with its return
    assert log.read_text().count(" Connect ") == clients


def test_a_flush_covers_what_another_connection_wrote(bench: Bench, tmp_path: Path) -> None:
    """NBD_FLAG_CAN_MULTI_CONN is the upstream's promise, and is only passed on."""
    yes = bench.gateway(bench.nbdkit("memory", "1M"))
    no = bench.gateway(
        bench.nbdkit("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable")
    )
    script = """
    first, second = connect(), connect()
    first.pwrite(b"seen" * 128, 0)
    if second.can_multi_conn():
        second.flush()
    report(multi=second.can_multi_conn(), seen=bytes(second.pread(4, 0)).decode())
    first.shutdown()
    second.shutdown()
    """
    assert nbdsh(script, yes.client()) == {"multi": True, "seen": "seen"}
    assert nbdsh(script, no.client()) == {"multi": False, "seen": "seen"}


def test_many_clients_with_their_own_data(bench: Bench) -> None:
    """Thirty clients at once: no reply ever goes to another one."""
    front = bench.gateway(bench.nbdkit("memory", f"{30 * MIB}"))
    script = """
    import random
    me = args["me"]
    h = connect()
    source = random.Random(me)
    wrong = 0
    for _ in range(50):
        offset = (me << 20) + source.randrange(0, (1 << 20) - 8192)
        data = source.randbytes(source.randint(1, 8192))
        h.pwrite(data, offset)
        wrong += h.pread(len(data), offset) != data
    report(wrong=wrong)
    h.shutdown()
    """
    clients = [start_nbdsh(script, front.client(), me=me) for me in range(30)]
    try:
        answers = [client.communicate(timeout=90) for client in clients]
    finally:
        for client in clients:
            client.kill()
            client.wait()
    assert [answer for answer in answers if answer != ('{"wrong": 0}\n', "")] == []


def test_one_connection_after_another(bench: Bench) -> None:
    """Nothing is left behind by a client: neither descriptors nor upstream connections."""
    front = bench.gateway(bench.nbdkit("memory", "1M"))
    script = """
    for _ in range(20):
        h = connect()
        h.pread(512, 0)
        h.shutdown()
    report()
    """

    def descriptors(gateway: Gateway) -> int:
        return len(descriptors_of(gateway.pid))

    nbdsh(script, front.client())
    front.gateway.wait_log(r"\[20\] .*closed: ")
    before = descriptors(front.gateway)
    nbdsh(script, front.client())
    front.gateway.wait_log(r"\[40\] .*closed: ")
    assert descriptors(front.gateway) <= before
