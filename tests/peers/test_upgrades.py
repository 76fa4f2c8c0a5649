"""Servers that lack features, behind a gateway that adds them; and without, as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.support.peers import Client, Server, check, nbdsh

SIZE = 64 * MIB

POOR: dict[str, list[str]] = {
    "no-zero": ["--filter=nozero"],
    "no-fua": ["--filter=fua"],
    "no-sr": ["--no-sr"],
    "64k": [
        "--filter=blocksize-policy",
        "blocksize-error-policy=error",
        "blocksize-preferred=4096",
        "blocksize-maximum=65536",
    ],
}
POOR["all-of-it"] = [
    *("--no-sr", "--filter=blocksize-policy", "--filter=fua", "--filter=nozero"),
    *POOR["64k"][1:],
]


def poor(bench: Bench, what: str, *more: str | Path) -> tuple[Server, Path]:
    """An nbdkit that lacks something, and its disk."""
    image = bench.image(SIZE)
    flags = [one for one in POOR[what] if one.startswith("-")]
    settings = [one for one in POOR[what] if not one.startswith("-")]
    return bench.nbdkit(*flags, *more, "file", image, *settings), image


WORK = """
import random
h = connect()
reported = {
    "structured": h.get_structured_replies_negotiated(), "zero": h.can_zero(), "fua": h.can_fua(),
    "fast": h.can_fast_zero(), "df": h.can_df(), "max": h.get_block_size(nbd.SIZE_MAXIMUM),
}
source = random.Random(7)
model = bytearray(args["size"])
def put(offset, data, flags=0):
    h.pwrite(data, offset, flags)
    model[offset:offset + len(data)] = data
put(0, source.randbytes(8 << 20))
put(10_000_001, source.randbytes(1_234_567), nbd.CMD_FLAG_FUA)
for offset, length, flags in ((4097, 3_000_000, 0), (9 << 20, 4 << 20, nbd.CMD_FLAG_FUA),
                              (5_000_000, 1, nbd.CMD_FLAG_NO_HOLE)):
    h.zero(length, offset, flags)
    model[offset:offset + length] = bytes(length)
cookies = []
for n in range(64):
    data = source.randbytes(200_000)
    offset = (20 << 20) + n * 200_000
    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    cookies.append(h.aio_pwrite(buffer, offset, flags=nbd.CMD_FLAG_FUA))
    model[offset:offset + len(data)] = data
until(h, lambda: h.aio_in_flight() == 0)
assert all(h.aio_command_completed(one) for one in cookies)
for offset, length in ((0, 32 << 20), (4095, 70_000), (1, 511), (args["size"] - 1, 1)):
    assert h.pread(length, offset) == model[offset:offset + length], (offset, length)
reported["fast zero"] = failed(h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO) if reported["fast"] else ""
h.flush()
with open(args["model"], "wb") as file:
    file.write(model)
h.shutdown()
report(**reported)
"""


@pytest.mark.parametrize("what", POOR)
def test_same_bytes_on_the_disk(bench: Bench, what: str, tmp_path: Path) -> None:
    server, image = poor(bench, what)
    front = bench.gateway(server)
    model = tmp_path / "model"
    seen = nbdsh(WORK, front.client(), size=SIZE, model=model)
    assert (seen["structured"], seen["zero"], seen["fua"], seen["df"]) == (True,) * 4
    assert seen["max"] >= 32 * MIB or what in ("no-zero", "no-fua", "no-sr")  # none advertised
    if what in ("no-zero", "all-of-it"):
        assert seen["fast zero"] == "ENOTSUP"
    assert image.read_bytes() == model.read_bytes()


def test_server_gets_only_what_it_can(bench: Bench, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server, _ = poor(bench, "all-of-it", "--filter=log")
    server.argv.append(f"logfile={log}")
    server.kill()
    server.start()
    nbdsh(WORK, bench.gateway(server).client(), size=SIZE, model=tmp_path / "model")
    lines = [line for line in log.read_text().splitlines() if " connection=" in line]
    counts = [
        int(word.removeprefix("count="), 16)
        for line in lines
        for word in line.split()
        if word.startswith("count=") and (" Read " in line or " Write " in line)
    ]
    assert counts
    assert max(counts) <= 65536
    assert not [line for line in lines if " Zero " in line or "fua=1" in line]
    assert [line for line in lines if " Flush " in line]


@pytest.mark.parametrize(
    ("what", "name", "key", "without"),
    [
        ("no-zero", "write-zeroes", "zero", False),
        ("no-sr", "structured-replies", "structured", False),
        ("64k", "block-size", "max", 65536),
    ],
)
def test_upgrade_can_be_switched_off(
    bench: Bench, what: str, name: str, key: str, without: object
) -> None:
    server, _ = poor(bench, what)
    script = """
    h = connect()
    report(zero=h.can_zero(), structured=h.get_structured_replies_negotiated(),
           max=h.get_block_size(nbd.SIZE_MAXIMUM))
    h.shutdown()
    """
    client = bench.gateway(server, "--no-upgrade", name).client()
    assert nbdsh(script, client)[key] == without
    assert nbdsh(script, bench.gateway(server).client())[key] != without


def test_holes_of_a_simple_server_cost_little(bench: Bench) -> None:
    server, _ = poor(bench, "no-sr")
    front = bench.gateway(server)
    script = """
    h = connect()
    kinds = []
    h.pread_structured(32 << 20, 0, lambda data, offset, kind, error: kinds.append(kind))
    one = []
    h.pread_structured(1 << 16, 0, lambda *part: one.append(part[2]), nbd.CMD_FLAG_DF)
    report(holes=set(kinds) == {nbd.READ_HOLE}, one=len(one))
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"holes": True, "one": 1}
    front.gateway.stop()
    (closed,) = [line for line in front.gateway.log().splitlines() if " closed: " in line]
    assert int(closed.split(" bytes in, ")[1].split()[0]) < 100_000


def chain(bench: Bench, server: Server, *inner: str) -> Client:
    """A gateway in front of a gateway."""
    path = bench.directory() / "inner.sock"
    bench.gateway(server, "--tls", "off", *inner, listen=f"unix:{path}")

    class Inner:
        socket = path

    return bench.gateway(Inner()).client()  # type: ignore[arg-type]


CHAINS: dict[str, Callable[[Bench, Server], Client]] = {
    "newstyle": lambda bench, server: chain(bench, server),
    "oldstyle": lambda bench, server: chain(bench, server, "--oldstyle"),
}


@pytest.mark.parametrize("how", CHAINS)
@pytest.mark.parametrize("what", ["no-zero", "all-of-it"])
def test_gateway_in_front_of_a_gateway(bench: Bench, what: str, how: str, tmp_path: Path) -> None:
    server, image = poor(bench, what)
    model = tmp_path / "model"
    seen = nbdsh(WORK, CHAINS[how](bench, server), size=SIZE, model=model)
    assert (seen["structured"], seen["zero"], seen["fua"]) == (True,) * 3
    assert image.read_bytes() == model.read_bytes()


# -- a client that knows only the oldstyle handshake

BEHIND: dict[str, Callable[[Bench, Path], Server]] = {
    "nbdkit": lambda bench, image: bench.nbdkit("file", image),
    "nbdkit-oldstyle": lambda bench, image: bench.nbdkit("-o", "--filter=nozero", "split", image),
    "qemu-nbd": lambda bench, image: bench.qemu_nbd("-f", "raw", image),
}


def oldstyle(bench: Bench, server: Server, listen: str) -> Front:
    return bench.gateway(server, "--tls", "off", "--oldstyle", listen=listen)


@pytest.mark.parametrize("where", ["tcp", "unix"])
@pytest.mark.parametrize("behind", BEHIND)
def test_oldstyle_clients(bench: Bench, behind: str, where: str, tmp_path: Path) -> None:
    image, copy = bench.image(SIZE), tmp_path / "copy"
    listen = "127.0.0.1:0" if where == "tcp" else f"unix:{bench.directory() / 'front.sock'}"
    front = oldstyle(bench, BEHIND[behind](bench, image), listen)
    client = Client(front.gateway.uri)
    assert "oldstyle" in check("nbdinfo", client.uri)
    picture = tmp_path / "picture"
    picture.write_bytes(bytes(range(256)) * (SIZE // 512) + bytes(SIZE // 2))
    check("nbdcopy", picture, client.uri)
    assert image.read_bytes() == picture.read_bytes()
    check("nbdcopy", client.uri, copy)
    assert copy.read_bytes() == picture.read_bytes()
    check("qemu-io", "-c", "write -P 7 1M 64k", *client.qemu())
    check("qemu-img", "convert", *client.qemu(), "-O", "raw", copy)
    assert copy.read_bytes() == image.read_bytes()
    assert image.read_bytes()[MIB : MIB + 65536] == b"\7" * 65536


def test_oldstyle_client_without_a_server_is_hung_up_on(bench: Bench) -> None:
    server = bench.nbdkit("memory", "1M")
    front = oldstyle(bench, server, "127.0.0.1:0")
    server.kill()
    with pytest.raises(AssertionError):
        check("nbdinfo", Client(front.gateway.uri).uri)
    front.gateway.wait_log("the NBD server behind cannot be reached")
