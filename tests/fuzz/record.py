"""Records real programs, and makes inputs of what they have said: `python -m tests.fuzz.record`.

No TLS, so that the bytes are the options themselves. Payloads are left out but for their length.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz import findings, samples, seeds
from tests.fuzz.recording import Proxy
from tests.support.peers import Client, Nbdkit, NbdServer, QemuNbd, Server, nbdsh, run

_SIZE = 1 << 20
_SHELL = """
h = connect()
import os
if h.can_df(): h.pread_structured(1024, 0, lambda *a: 0, nbd.CMD_FLAG_DF)
h.pread(512, 4096)
if not h.is_read_only():
    h.pwrite(b"x" * 512, 0)
    if h.can_flush(): h.flush()
    if h.can_fua(): h.pwrite(b"y" * 8, 512, nbd.CMD_FLAG_FUA)
    if h.can_trim(): h.trim(4096, 8192)
    if h.can_zero(): h.zero(4096, 16384, nbd.CMD_FLAG_NO_HOLE)
    if h.can_fast_zero(): failed(h.zero, 4096, 16384, nbd.CMD_FLAG_FAST_ZERO)
if h.can_cache(): h.cache(512, 0)
h.set_strict_mode(0)
failed(h.pread, 512, h.get_size())
failed(h.pwrite, b"z" * 512, h.get_size())
h.shutdown()
"""
_META = """
h = nbd.NBD()
h.set_opt_mode(True)
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:")
h.connect_uri(args["uri"])
failed(h.opt_list, lambda *a: 0)
failed(h.opt_list_meta_context, lambda *a: 0)
failed(h.opt_info)
h.opt_go()
for flags in (0, nbd.CMD_FLAG_REQ_ONE):
    failed(h.block_status, h.get_size(), 0, lambda *a: 0, flags)
asked = [h.aio_pread(nbd.Buffer(512), at * 512) for at in range(6)]
until(h, lambda: not h.aio_in_flight())
h.shutdown()
"""
_OPTIONS = """
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(args["uri"])
h.set_export_name("other")
failed(h.opt_info)
h.set_export_name("")
failed(h.opt_starttls) if hasattr(h, "opt_starttls") else None
failed(h.opt_info)
h.opt_abort()
"""
_NO_CHUNKS = """
h = connect(request_structured_replies=False)
h.pread(512, 0)
failed(h.pread, 512, h.get_size())
h.shutdown()
"""


def _servers(folder: Path) -> Iterator[tuple[str, Callable[[Path], Server]]]:
    image, name = folder / "disk.img", "disk"
    image.write_bytes(b"data" * 16384 + bytes(_SIZE - 65536))
    qcow = folder / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", qcow, "1M")
    run("qemu-img", "bitmap", "--add", qcow, "b0")
    yield "nbdkit", lambda at: Nbdkit(at, "memory", "1M")
    yield "nbdkit file", lambda at: Nbdkit(at, "-r", "file", image)
    yield "nbdkit oldstyle", lambda at: Nbdkit(at, "-o", "memory", "1M")
    yield "nbdkit --no-sr", lambda at: Nbdkit(at, "--no-sr", "memory", "1M")
    policy = ("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512")
    yield "nbdkit blocks", lambda at: Nbdkit(at, *policy, "blocksize-maximum=64k")
    error = ("--filter=error", "memory", "1M", "error-rate=50%", "error=ENOSPC")
    yield "nbdkit errors", lambda at: Nbdkit(at, *error)
    yield (
        "nbdkit exports",
        lambda at: Nbdkit(at, "--filter=exportname", "memory", "1M", "exportname=a"),
    )
    yield "qemu-nbd", lambda at: QemuNbd(at, "-f", "raw", image)
    yield (
        "qemu-nbd bitmap",
        lambda at: QemuNbd(at, "-f", "qcow2", "-B", "b0", "-A", "-x", name, qcow),
    )
    yield "nbd-server", lambda at: NbdServer(at, image, name=name)


def _clients(uri: str, scratch: Path) -> Iterator[Callable[[], object]]:
    client = Client(uri)
    for words in (
        ("nbdinfo", uri),
        ("nbdinfo", "--list", uri),
        ("nbdinfo", "--map", uri),
        ("nbdinfo", "--size", uri),
        ("nbdcopy", "--request-size=65536", uri, "null:"),
        ("qemu-img", "info", *client.qemu()),
        ("qemu-img", "map", "--output=json", *client.qemu()),
        ("fio", *_fio(client)),
    ):
        yield lambda words=words: run(*words, timeout_s=20, cwd=scratch)  # type: ignore[misc]
    works = ["read 0 512", "write 0 512", "write -f 512 512", "flush", "discard 0 4k"]
    works += ["write -z 4k 4k", "write -zu 8k 4k", "aio_read 0 4k", "aio_write 4k 4k", "aio_flush"]
    flags = [part for work in works for part in ("-c", work)]
    yield lambda: run("qemu-io", *client.qemu(), *flags, timeout_s=20)
    yield lambda: run("qemu-io", "-r", *client.qemu(), "-c", "read 0 512", timeout_s=20)
    socket = uri.partition("socket=")[2]
    yield lambda: run("nbd-client", "-l", "-unix", socket, timeout_s=20)
    yield lambda: run("nbd-client", "-unix", socket, "-l", timeout_s=20)
    for script in (_SHELL, _META, _OPTIONS, _NO_CHUNKS):
        yield lambda script=script: nbdsh(script, client)  # type: ignore[misc]


def _fio(client: Client) -> list[str]:
    return [
        *("--name=x", "--ioengine=nbd", f"--uri={client.uri}", "--rw=randrw", "--bs=512"),
        *("--size=16k", "--iodepth=4", "--verify=crc32c", "--output=/dev/null"),
    ]


def record(folder: Path) -> None:
    """Run everything in front of everything. What a program has against it does not matter."""
    with tempfile.TemporaryDirectory(prefix="nbd-fuzz-") as scratch:
        for number, (name, start) in enumerate(_servers(Path(scratch))):
            at = Path(scratch) / str(number)
            at.mkdir()
            with start(at) as server, Proxy(at / "proxy", server.socket) as proxy:
                export = "disk" if name in ("qemu-nbd bitmap", "nbd-server") else ""
                for work in _clients(f"nbd+unix:///{export}?socket={at / 'proxy'}", at):
                    with contextlib.suppress(Exception):
                        work()
            count = 0
            for one in proxy.records:
                for target, seed in seeds.of_record(one):
                    count += seeds.write(folder, target, [seed])
            print(f"{name}: {len(proxy.records)} connections, {count} new inputs", flush=True)
    for target, made in samples.all_of_them():
        seeds.write(folder, target, made)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.record", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=findings.CORPUS)
    record(parser.parse_args().corpus)


if __name__ == "__main__":
    main()
