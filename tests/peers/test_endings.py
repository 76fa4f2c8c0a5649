"""Somebody goes away in the middle: the upstream, the client, or the gateway itself."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.support.peers import check, find, nbdsh, run, start_nbdsh, wait_until

SLOW = (
    "eval",
    "thread_model=echo parallel",
    "get_size=echo 4M",
    "can_write=exit 0",
    "can_flush=exit 0",
    "flush=exit 0",
)


class Slow:
    """A gateway in front of an upstream that answers nothing beyond its first MiB, until the file
    `gate` is there."""

    def __init__(self, bench: Bench) -> None:
        directory = bench.directory()
        self.gate = directory / "gate"
        self.log = directory / "nbdkit.log"
        wait = f'if [ "$4" -ge {MIB} ]; then while [ ! -e {self.gate} ]; do sleep 0.05; done; fi'
        self.server = bench.nbdkit(
            *("-v", "--filter=log", *SLOW),
            f'pread={wait}; head -c "$3" /dev/zero',
            f"pwrite=cat > /dev/null; {wait}",
            f"logfile={self.log}",
        )
        self.front: Front = bench.gateway(self.server)

    def wait_for_requests(self, count: int) -> None:
        """Until so many requests are with the upstream."""
        request = re.compile(r" (Read|Write) id=\d+ offset=\S+ count=.*\.\.\.\n")
        wait_until(lambda: len(request.findall(self.log.read_text())) >= count, f"{count} requests")

    def disconnects(self) -> int:
        """Connections that ended with NBD_CMD_DISC, as the protocol wants it."""
        return self.server.log().count("client sent NBD_CMD_DISC, closing connection")

    def hang_ups(self) -> int:
        """Connections that ended without."""
        return self.server.log().count("client closed input socket, closing connection")


@pytest.fixture
def slow(bench: Bench) -> Slow:
    return Slow(bench)


@pytest.mark.parametrize("structured", [True, False], ids=["sr", "no-sr"])
def test_upstream_killed_with_requests_in_flight(bench: Bench, structured: bool) -> None:
    slow = Slow(bench)
    script = """
    h = connect(request_structured_replies=args["structured"])
    buffers = [nbd.Buffer(65536) for _ in range(8)]
    cookies = [h.aio_pread(b, (1 << 20) + 65536 * i) for i, b in enumerate(buffers)]
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(512)), 2 << 20))
    results = []
    def done(cookie):
        try:
            return h.aio_command_completed(cookie) and results.append("ok") is None
        except nbd.Error as error:
            results.append(errno.errorcode[error.errnum])
            return True
    until(h, lambda: done(cookies[0]))
    for cookie in cookies[1:]:
        until(h, lambda: done(cookie))
    report(results=results)
    report(later=[failed(h.pread, 512, 0), failed(h.pwrite, b"x", 0), failed(h.flush)])
    h.shutdown()
    """
    with start_nbdsh(script, slow.front.client(), structured=structured) as client:
        slow.wait_for_requests(9)
        slow.server.kill()
        output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    assert output.splitlines()[0] == '{"results": [' + ", ".join(['"ESHUTDOWN"'] * 9) + "]}"
    assert output.splitlines()[1] == '{"later": ["ESHUTDOWN", "ESHUTDOWN", "ESHUTDOWN"]}'
    slow.front.gateway.wait_log("closed: upstream lost")

    slow.server.start()
    check("nbdinfo", slow.front.client().uri)


def test_upstream_killed_while_the_client_is_idle(slow: Slow) -> None:
    script = """
    h = connect()
    h.pread(512, 0)
    report(ready=True)
    deadline = time.monotonic() + 30
    while not os.path.exists(args["killed"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    report(later=failed(h.pread, 512, 0))
    """
    killed = slow.log.with_name("killed")
    with start_nbdsh(script, slow.front.client(), killed=killed) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == '{"ready": true}\n'
        slow.server.kill()
        killed.touch()
        output, errors = client.communicate(timeout=60)
    assert output == '{"later": "ESHUTDOWN"}\n', errors
    slow.front.gateway.wait_log("closed: upstream lost")


def test_copy_with_the_upstream_killed(bench: Bench, pictures: tuple[Path, Path]) -> None:
    picture, _ = pictures
    log = bench.directory() / "nbdkit.log"
    server = bench.nbdkit(
        *("--filter=log", "--filter=rate", "memory", "16M", f"logfile={log}", "rate=8M")
    )
    front = bench.gateway(server)
    with subprocess.Popen(
        [find("nbdcopy"), picture, front.client().uri],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as copy:
        wait_until(lambda: log.read_text().count("...Write") > 3, "the copy to be on its way")
        server.kill()
        _, errors = copy.communicate(timeout=60)
    assert copy.returncode != 0
    assert "failed" in errors, errors
    front.gateway.wait_log("closed: upstream lost")
    server.start()
    assert run("nbdinfo", front.client().uri).returncode == 0


def test_client_killed_between_requests(slow: Slow) -> None:
    script = """
    h = connect()
    h.pread(512, 0)
    report(ready=True)
    time.sleep(60)
    """
    with start_nbdsh(script, slow.front.client()) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == '{"ready": true}\n'
        client.kill()
    slow.front.gateway.wait_log("closed: client left without a word")
    wait_until(lambda: slow.disconnects() + slow.hang_ups(), "the upstream to see the end")
    assert (slow.disconnects(), slow.hang_ups()) == (1, 0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_client_killed_with_requests_in_flight(slow: Slow, how: signal.Signals) -> None:
    script = """
    h = connect()
    buffers = [nbd.Buffer(65536) for _ in range(8)]
    cookies = [h.aio_pread(b, (1 << 20) + 65536 * i) for i, b in enumerate(buffers)]
    until(h, lambda: False)
    """
    with start_nbdsh(script, slow.front.client()) as client:
        slow.wait_for_requests(8)
        client.send_signal(how)
    slow.gate.touch()  # what was asked is still done
    slow.front.gateway.wait_log("closed: client left without a word")
    wait_until(lambda: slow.disconnects() + slow.hang_ups(), "the upstream to see the end")
    assert (slow.disconnects(), slow.hang_ups()) == (1, 0)
    check("nbdinfo", slow.front.client().uri)


def test_client_killed_in_the_middle_of_a_write(bench: Bench) -> None:
    """Half a payload cannot be taken back: what came behind it would be taken for data. So the
    upstream connection is closed without NBD_CMD_DISC, and the write does not happen."""
    server = bench.nbdkit("-v", "memory", "64M")
    front = bench.gateway(server)
    script = """
    h = connect()
    h.pread(512, 0)
    data = nbd.Buffer.from_bytearray(bytearray(b"x" * (32 << 20)))
    h.aio_pwrite(data, 0)
    report(unfinished=bool(h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE))
    os.kill(os.getpid(), 9)
    """
    with start_nbdsh(script, front.client()) as client:
        output, _ = client.communicate(timeout=60)
    assert output == '{"unfinished": true}\n'
    front.gateway.wait_log("closed: client left without a word")
    wait_until(lambda: "read data: NBD_CMD_WRITE" in server.log(), "the upstream to see the end")
    assert "client sent NBD_CMD_DISC" not in server.log()
    first = "h = connect(); report(first=list(h.pread(4, 0))); h.shutdown()"
    assert nbdsh(first, front.client()) == {"first": [0, 0, 0, 0]}


def test_orderly_goodbye_is_passed_on(slow: Slow) -> None:
    nbdsh("h = connect(); h.pread(512, 0); h.shutdown(); report()", slow.front.client())
    slow.front.gateway.wait_log("closed: client disconnected")
    wait_until(lambda: slow.disconnects() + slow.hang_ups(), "the upstream to see the end")
    assert (slow.disconnects(), slow.hang_ups()) == (1, 0)


def test_goodbye_behind_requests_in_flight(slow: Slow) -> None:
    """NBD_CMD_DISC waits for what was asked before it."""
    script = """
    h = connect()
    buffer = nbd.Buffer(4096)
    cookie = h.aio_pread(buffer, 1 << 20)
    h.aio_disconnect()
    until(h, lambda: h.aio_command_completed(cookie))
    report(done=True)
    """
    with start_nbdsh(script, slow.front.client()) as client:
        slow.wait_for_requests(1)
        slow.gate.touch()
        output, errors = client.communicate(timeout=60)
    assert output == '{"done": true}\n', errors
    slow.front.gateway.wait_log("closed: client disconnected")


def test_sigterm_lets_requests_in_flight_finish(slow: Slow) -> None:
    script = """
    h = connect()
    buffer = nbd.Buffer(4096)
    cookie = h.aio_pread(buffer, 1 << 20)
    until(h, lambda: h.aio_command_completed(cookie))
    report(later=failed(h.pread, 512, 0))
    """
    gateway = slow.front.gateway
    with start_nbdsh(script, slow.front.client()) as client:
        slow.wait_for_requests(1)
        gateway.terminate()
        gateway.wait_log("listeners closed")
        assert run("nbdinfo", slow.front.client().uri).returncode != 0
        assert gateway.alive(), "it did not wait for the request"
        slow.gate.touch()
        output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    assert output in (
        '{"later": "ESHUTDOWN"}\n',
        '{"later": "ENOTCONN"}\n',
        '{"later": "EINVAL"}\n',
    )
    assert gateway.wait() == 0
    wait_until(lambda: slow.disconnects(), "a last word to the upstream")
    assert slow.hang_ups() == 0


def test_sigterm_cuts_what_outlasts_the_drain_timeout(bench: Bench) -> None:
    slow = Slow(bench)
    front = bench.gateway(slow.server, "--drain-timeout", "0.5")
    front.gateway.exit_code = 1  # not a drained end
    script = """
    h = connect()
    report(read=failed(h.pread, 512, 1 << 20))
    """
    with start_nbdsh(script, front.client()) as client:
        slow.wait_for_requests(1)
        front.gateway.terminate()
        output, errors = client.communicate(timeout=60)
        assert front.gateway.wait() == 1, front.gateway.log()
    assert output in ('{"read": "ESHUTDOWN"}\n', '{"read": "ENOTCONN"}\n'), errors


def test_many_reads_and_the_client_gone(bench: Bench) -> None:
    """nbdkit 1.32 aborts when a connection is closed under its replies; so none ever is."""
    front = bench.gateway(bench.nbdkit("memory", "64M"))
    script = """
    h = connect()
    for number in range(20):
        h.aio_pread(nbd.Buffer(1 << 20), number << 20)
    report(asked=True)
    os.kill(os.getpid(), 9)
    """
    witness = """
    h = connect()
    h.pwrite(b"here", 0)
    report(read=bytes(h.pread(4, 0)).decode())
    """
    for _ in range(5):
        with start_nbdsh(script, front.client()) as process:
            process.wait(timeout=30)
        front.gateway.wait_log(": closed: ")
        assert nbdsh(witness, front.client())["read"] == "here"


def test_many_reads_and_the_client_gone_within_a_write(bench: Bench) -> None:
    """As above, with half a payload sent: the end may come only behind the replies."""
    front = bench.gateway(bench.nbdkit("memory", "64M"))
    script = """
    h = connect()
    for number in range(20):
        h.aio_pread(nbd.Buffer(1 << 20), number << 20)
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(32 << 20)), 0)
    report(asked=True)
    os.kill(os.getpid(), 9)
    """
    for _ in range(5):
        with start_nbdsh(script, front.client()) as process:
            process.wait(timeout=30)
        front.gateway.wait_log(": closed: ")
        assert nbdsh("report(size=connect().get_size())", front.client())["size"] == 64 * MIB


def test_many_reads_and_the_gateway_cut_short(bench: Bench) -> None:
    """The same at a drain that runs out: the upstream outlives the gateway."""
    server = bench.nbdkit("memory", "64M")
    front = bench.gateway(server, "--drain-timeout", "0")
    script = """
    h = connect()
    for number in range(20):
        h.aio_pread(nbd.Buffer(1 << 20), number << 20)
    report(asked=True)
    time.sleep(60)
    """
    with start_nbdsh(script, front.client()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == '{"asked": true}\n'
        front.gateway.exit_code = 1
        front.gateway.terminate()
        assert front.gateway.wait() == 1
        process.kill()
    check("nbdinfo", server.uri())
