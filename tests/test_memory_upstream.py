"""gateway.memory_upstream: the demo's own NBD server, spoken to directly on its Unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import trio

from gateway.memory_upstream import MemoryUpstream, new_disk
from gateway.nbd.constants import TransmissionFlag
from tests.support.gateway import environment
from tests.support.peers import CLIENT_S, find
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    MAX_PAYLOAD,
    SIMPLE,
    SIMPLE_MAGIC,
    Cf,
    Cmd,
    Err,
    Info,
    Opt,
    RawClient,
    Rep,
    Request,
    Tf,
    info_data,
    option,
)

SIZE = 1 << 20
FEATURES = (
    Tf.HAS_FLAGS
    | Tf.SEND_FLUSH
    | Tf.SEND_FUA
    | Tf.SEND_TRIM
    | Tf.SEND_WRITE_ZEROES
    | Tf.SEND_CACHE
    | Tf.CAN_MULTI_CONN
)


class ReadOnly(MemoryUpstream):
    flags = MemoryUpstream.flags | TransmissionFlag.READ_ONLY


def uri_of(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={quote(str(path))}"


@contextlib.contextmanager
def serving(upstream: MemoryUpstream, path: Path) -> Iterator[str]:
    """Serve in a thread of its own; yields the URI of the default export."""
    started = threading.Event()
    scope = trio.CancelScope()
    tokens: list[trio.lowlevel.TrioToken] = []
    failed: list[BaseException] = []

    async def main() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(upstream.serve, str(path))
                started.set()

    def thread() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    runner = threading.Thread(target=thread)
    runner.start()
    started.wait()
    try:
        yield uri_of(path)
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            tokens[0].run_sync_soon(scope.cancel)
        runner.join()
    assert not failed, failed
    assert not path.exists()


@pytest.fixture
def upstream() -> MemoryUpstream:
    return MemoryUpstream({"": new_disk(SIZE), "scratch": bytearray(SIZE // 2)})


@pytest.fixture
def uri(upstream: MemoryUpstream, tmp_path: Path) -> Iterator[str]:
    with serving(upstream, tmp_path / "u.sock") as uri:
        yield uri


def opened(uri: str, name: bytes = b"") -> RawClient:
    """A client in transmission. Close it."""
    client = RawClient(uri)
    client.greet()
    client.go(name)
    return client


def answer(client: RawClient, request: Request) -> tuple[int, bytes]:
    """Error and data of the reply that comes next; it has to be the one to `request`."""
    magic, error, cookie = SIMPLE.unpack(client.recv_exactly(SIMPLE.size))
    assert (magic, cookie) == (SIMPLE_MAGIC, request.cookie)
    wanted = request.length if request.cmd == Cmd.READ and not error else 0
    return error, client.recv_exactly(wanted)


def ask(
    client: RawClient,
    cmd: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    payload: bytes = b"",
) -> tuple[int, bytes]:
    request = Request(cmd, offset, length or len(payload), 0xC0FFEE << 40, flags, payload)
    client.send(request.pack())
    return answer(client, request)


# ---------------------------------------------------------------- haggling


def test_greeting_offers_fixed_newstyle_without_zeroes(uri: str) -> None:
    with RawClient(uri) as client:
        assert client.greet() == C_FIXED | C_NO_ZEROES


def test_list_names_every_export(uri: str) -> None:
    with RawClient(uri) as client:
        client.greet()
        *exports, last = client.ask(Opt.LIST)
        assert last.type == Rep.ACK
        names = [struct.pack(">I", len(name)) + name for name in (b"", b"scratch")]
        assert [(one.type, one.data) for one in exports] == [(Rep.SERVER, name) for name in names]


@pytest.mark.parametrize("opt", [Opt.INFO, Opt.GO])
@pytest.mark.parametrize(("name", "size"), [(b"", SIZE), (b"scratch", SIZE // 2)])
def test_info_and_go_describe_the_export(uri: str, opt: Opt, name: bytes, size: int) -> None:
    with RawClient(uri) as client:
        client.greet()
        export = client.go(name, [Info.BLOCK_SIZE], opt=opt)
        assert (export.size, export.flags) == (size, FEATURES)
        assert export.block_sizes == (1, 4096, MAX_PAYLOAD)


def test_unknown_export_is_refused_and_another_may_be_asked_for(uri: str) -> None:
    with RawClient(uri) as client:
        client.greet()
        assert client.verdict(Opt.INFO, info_data(b"none")) == Rep.ERR_UNKNOWN
        assert client.verdict(Opt.GO, info_data(b"none")) == Rep.ERR_UNKNOWN
        assert client.go().size == SIZE


@pytest.mark.parametrize(
    ("flags", "zeroes"), [(C_FIXED, 124), (C_FIXED | C_NO_ZEROES, 0), (0, 124)]
)
def test_export_name_with_and_without_zeroes(uri: str, flags: int, zeroes: int) -> None:
    with RawClient(uri) as client:
        client.greet(flags)
        client.send(option(Opt.EXPORT_NAME, b"scratch"))
        expected = struct.pack(">QH", SIZE // 2, FEATURES) + bytes(zeroes)
        assert client.recv_exactly(len(expected)) == expected
        assert ask(client, Cmd.READ, 0, 512) == (0, bytes(512))


def test_export_name_of_an_unknown_export_closes(uri: str) -> None:
    with RawClient(uri) as client:
        client.greet()
        client.send(option(Opt.EXPORT_NAME, b"none"))
        assert client.recv_to_end() == b""


@pytest.mark.parametrize(
    ("opt", "data", "verdict"),
    [
        (Opt.STRUCTURED_REPLY, b"", Rep.ERR_UNSUP),
        (Opt.PEEK_EXPORT, b"payload", Rep.ERR_UNSUP),
        (4711, bytes(5000), Rep.ERR_UNSUP),
        (Opt.STARTTLS, b"", Rep.ERR_POLICY),
        (Opt.LIST, b"payload", Rep.ERR_INVALID),
        (Opt.SET_META_CONTEXT, bytes(8), Rep.ERR_INVALID),
    ],
)
def test_what_is_not_served_gets_an_error_and_stays_in_step(
    uri: str, opt: int, data: bytes, verdict: Rep
) -> None:
    with RawClient(uri) as client:
        client.greet()
        assert client.verdict(opt, data) == verdict
        assert client.go().size == SIZE


def test_abort_is_acknowledged_and_closes(uri: str) -> None:
    with RawClient(uri) as client:
        client.greet()
        assert client.verdict(Opt.ABORT) == Rep.ACK
        assert client.recv_to_end() == b""


def test_unknown_client_flags_close(uri: str) -> None:
    with RawClient(uri) as client:
        client.greet(C_FIXED | 1 << 7)
        assert client.recv_to_end() == b""


# ---------------------------------------------------------------- transmission


def test_written_bytes_are_read_by_every_client_of_the_export(uri: str) -> None:
    data = os.urandom(70_001)
    with opened(uri) as one, opened(uri) as other, opened(uri, b"scratch") as elsewhere:
        assert ask(one, Cmd.WRITE, 4093, payload=data) == (0, b"")
        assert ask(one, Cmd.FLUSH) == (0, b"")
        assert ask(other, Cmd.READ, 4092, len(data) + 2) == (0, b"\0" + data + b"\0")
        assert ask(elsewhere, Cmd.READ, 4093, len(data)) == (0, bytes(len(data)))


@pytest.mark.parametrize("cmd", [Cmd.TRIM, Cmd.WRITE_ZEROES])
def test_trim_and_write_zeroes_leave_zeroes(upstream: MemoryUpstream, uri: str, cmd: Cmd) -> None:
    upstream.exports[""][:] = b"x" * SIZE
    with opened(uri) as client:
        assert ask(client, cmd, 1, SIZE - 2) == (0, b"")
        assert ask(client, Cmd.READ, 0, SIZE) == (0, b"x" + bytes(SIZE - 2) + b"x")


def test_zeroing_more_than_one_step(tmp_path: Path) -> None:
    size = (3 << 20) + 5
    disk = bytearray(b"x" * size)
    with serving(MemoryUpstream({"": disk}), tmp_path / "u.sock") as uri, opened(uri) as client:
        assert ask(client, Cmd.WRITE_ZEROES, 2, size - 3, flags=Cf.NO_HOLE) == (0, b"")
    assert disk == b"xx" + bytes(size - 3) + b"x"


def test_fua_goes_with_every_command(uri: str) -> None:
    with opened(uri) as client:
        assert ask(client, Cmd.WRITE, 0, flags=Cf.FUA, payload=b"abc") == (0, b"")
        assert ask(client, Cmd.READ, 0, 4, flags=Cf.FUA) == (0, b"abc\0")
        for cmd in (Cmd.CACHE, Cmd.TRIM, Cmd.WRITE_ZEROES):
            assert ask(client, cmd, 0, 4096, flags=Cf.FUA) == (0, b"")
        assert ask(client, Cmd.FLUSH, flags=Cf.FUA) == (0, b"")


@pytest.mark.parametrize(
    ("cmd", "offset", "length", "flags", "error"),
    [
        (Cmd.READ, SIZE, 1, 0, Err.EINVAL),
        (Cmd.READ, SIZE - 1, 2, 0, Err.EINVAL),
        (Cmd.READ, (1 << 64) - 1, 2, 0, Err.EINVAL),
        (Cmd.WRITE_ZEROES, SIZE - 1, 2, 0, Err.ENOSPC),
        (Cmd.TRIM, SIZE - 1, 2, 0, Err.EINVAL),
        (Cmd.CACHE, SIZE - 1, 2, 0, Err.EINVAL),
        (Cmd.FLUSH, 512, 0, 0, Err.EINVAL),
        (Cmd.FLUSH, 0, 512, 0, Err.EINVAL),
        (Cmd.READ, 0, 512, Cf.DF, Err.EINVAL),
        (Cmd.READ, 0, 512, 1 << 15, Err.EINVAL),
        (Cmd.TRIM, 0, 512, Cf.NO_HOLE, Err.EINVAL),
        (Cmd.WRITE_ZEROES, 0, 512, Cf.FAST_ZERO, Err.EINVAL),
        (Cmd.BLOCK_STATUS, 0, 512, 0, Err.EINVAL),
        (77, 0, 512, 0, Err.EINVAL),
    ],
)
def test_errors(uri: str, cmd: int, offset: int, length: int, flags: int, error: Err) -> None:
    with opened(uri) as client:
        assert ask(client, cmd, offset, length, flags=flags) == (error, b"")
        assert ask(client, Cmd.READ, 0, 512) == (0, bytes(512))


def test_read_beyond_the_payload_limit_is_refused(tmp_path: Path) -> None:
    disks = MemoryUpstream({"": new_disk(2 * MAX_PAYLOAD)})
    with serving(disks, tmp_path / "u.sock") as uri, opened(uri) as client:
        assert ask(client, Cmd.READ, 0, MAX_PAYLOAD + 1) == (Err.EINVAL, b"")
        assert ask(client, Cmd.READ, 0, MAX_PAYLOAD) == (0, bytes(MAX_PAYLOAD))


@pytest.mark.parametrize(
    ("offset", "flags", "error"), [(SIZE - 1, 0, Err.ENOSPC), (0, Cf.DF, Err.EINVAL)]
)
def test_payload_of_a_refused_write_is_read_away(
    upstream: MemoryUpstream, uri: str, offset: int, flags: int, error: Err
) -> None:
    with opened(uri) as client:
        assert ask(client, Cmd.WRITE, offset, flags=flags, payload=b"x" * 99_999) == (error, b"")
        assert ask(client, Cmd.READ, SIZE - 1, 1) == (0, b"\0")
    assert upstream.exports[""][:] == bytes(SIZE)


def test_read_only_upstream_refuses_changes(tmp_path: Path) -> None:
    with (
        serving(ReadOnly({"": bytearray(SIZE)}), tmp_path / "u.sock") as uri,
        opened(uri) as client,
    ):
        assert ask(client, Cmd.WRITE, 0, payload=b"abc") == (Err.EPERM, b"")
        assert ask(client, Cmd.TRIM, 0, 512)[0] != 0
        assert ask(client, Cmd.WRITE_ZEROES, 0, 512)[0] != 0
        assert ask(client, Cmd.READ, 0, 3) == (0, bytes(3))


def test_requests_in_any_cuts(uri: str) -> None:
    """Pipelined with the option before them, and byte by byte."""
    write = Request(Cmd.WRITE, 7, 3, 1, payload=b"abc")
    read = Request(Cmd.READ, 6, 5, 2)
    with RawClient(uri) as client:
        client.greet()
        client.send(option(Opt.EXPORT_NAME) + write.pack() + read.pack())
        client.recv_exactly(10)
        assert answer(client, write) == (0, b"")
        assert answer(client, read) == (0, b"\0abc\0")
        for byte in write.pack() + read.pack():
            client.send(bytes([byte]))
        assert answer(client, write) == (0, b"")
        assert answer(client, read) == (0, b"\0abc\0")


@pytest.mark.parametrize(
    "request_", [Request(Cmd.DISC), Request(Cmd.WRITE, 0, MAX_PAYLOAD + 1)], ids=["disc", "huge"]
)
def test_connection_ends(uri: str, request_: Request) -> None:
    with opened(uri) as client:
        client.send(request_.pack())
        assert client.recv_to_end() == b""


def test_wrong_magic_closes(uri: str) -> None:
    with opened(uri) as client:
        client.send(Request(Cmd.READ, 0, 512).pack(magic=0x12345678))
        assert client.recv_to_end() == b""


def test_a_client_that_dies_harms_nobody(uri: str) -> None:
    with opened(uri) as survivor:
        beginnings = (b"", b"\0" * 2, Request(Cmd.WRITE, 0, 9, 1, payload=b"abc").pack())
        for sent in beginnings:
            with RawClient(uri) as client:
                client.send(sent)
            with opened(uri) as client:
                client.send(sent)
        assert ask(survivor, Cmd.READ, 512, 512) == (0, bytes(512))


def test_an_unwritten_disk_costs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    disk = new_disk(64 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 1000, "every page of 4 KiB was touched"
    assert len(disk) == 64 << 20


# ---------------------------------------------------------------- real clients


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [find(command[0]), *map(str, command[1:])],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.peers
def test_nbdinfo_finds_both_exports(uri: str) -> None:
    told = json.loads(run("nbdinfo", "--list", "--json", uri))
    assert (told["protocol"], told["structured"], told["TLS"]) == ("newstyle-fixed", False, False)
    assert [(one["export-name"], one["export-size"]) for one in told["exports"]] == [
        ("", SIZE),
        ("scratch", SIZE // 2),
    ]
    for feature in ("flush", "fua", "trim", "zero", "cache", "multi_conn"):
        assert told["exports"][0][f"can_{feature}"], feature


@pytest.mark.peers
def test_nbdcopy_there_and_back(upstream: MemoryUpstream, uri: str, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    there.write_bytes(os.urandom(SIZE // 2) + bytes(SIZE // 4) + os.urandom(SIZE // 4))
    run("nbdcopy", there, uri)
    assert upstream.exports[""][:] == there.read_bytes()
    run("nbdcopy", uri, back)
    assert back.read_bytes() == there.read_bytes()


@pytest.mark.peers
def test_qemu_io(uri: str) -> None:
    commands = (
        "write -P 0x41 0 512k",
        "write -f -P 0x42 1000 3000",
        "write -z 4096 4096",
        "discard 8192 4096",
        "flush",
        "read -P 0x41 0 1000",
        "read -P 0x42 1000 3000",
        "read -P 0 4096 8192",
        "read -P 0x41 16384 4096",
    )
    run("qemu-io", "-f", "raw", *(arg for one in commands for arg in ("-c", one)), uri)
