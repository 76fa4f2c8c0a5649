"""What must be the same through the gateway as without it, and takes more than one question.

See test_fidelity.py for everything that can be asked.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.peers.bench import MIB, SIZE, Bench
from tests.support.peers import Client, Server, check, nbdsh
from tests.support.trixie import Trixie

BLOCKS = ("blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=1M")


def policy(action: str) -> list[str]:
    return [
        "--filter=blocksize-policy",
        "memory",
        "4M",
        *BLOCKS,
        f"blocksize-error-policy={action}",
    ]


def export(client: Client) -> dict[str, Any]:
    """What nbdinfo says of one export, without what must differ."""
    (told,) = json.loads(check("nbdinfo", "--json", client.uri))["exports"]
    del told["uri"]
    return dict(told)


def exports(bench: Bench) -> Server:
    """Two exports, of which the second has a description."""
    directory = bench.directory()
    for name, size in (("a", 1 << 20), ("b ü", 2 << 20)):
        with (directory / name).open("wb") as file:
            file.truncate(size)
    names = ["exportname=a", "exportname=b ü", "exportname-list=explicit"]
    described = ['exportdesc=script:if [ "$name" != a ]; then echo Größeres; fi']
    return bench.nbdkit(
        "--filter=exportname", "file", f"dir={directory}", *names, "exportname-strict=1", *described
    )


def test_the_one_export_of_many(bench: Bench) -> None:
    """With --export it has two names for clients, and looks the same under both."""
    front = bench.gateway(exports(bench), "--export", "b ü")
    direct = export(front.direct("b ü"))
    assert direct["export-size"] == 2 * MIB
    assert direct["description"] == "Größeres"
    assert export(front.client("b ü")) == direct
    assert export(front.client("")) | {"export-name": "b ü"} == direct
    listed = json.loads(check("nbdinfo", "--json", "--list", front.client().uri))["exports"]
    assert [one["export-name"] for one in listed] == ["b ü"]


def test_a_write_without_the_flag_that_it_must_have(newer: Trixie, pki: Path) -> None:
    """With extended headers qemu's client leaves NBD_CMD_FLAG_PAYLOAD_LEN out, and its server does
    not mind."""
    script = """
    h = connect(strict_mode=0)
    h.pwrite(b"x" * 4096, 0)
    h.pwrite(b"y" * 512, 4096, nbd.CMD_FLAG_FUA)
    report(extended=h.get_extended_headers_negotiated(), data=h.pread(8192, 0).hex())
    h.shutdown()
    """
    with contextlib.ExitStack() as stack:
        bench = Bench(newer.directory(), pki, stack)
        server = stack.enter_context(newer.qemu_nbd("-f", "raw", bench.image(MIB)))
        front = bench.gateway(server)
        through = newer.nbdsh(script, front.client())
        assert through == newer.nbdsh(script, front.direct())
        assert through == {
            "extended": True,
            "data": (b"x" * 4096 + b"y" * 512 + bytes(3584)).hex(),
        }


def test_the_size_is_not_taken_from_nbd_opt_info(bench: Bench) -> None:
    # nbd-server 3.24 answers NBD_OPT_INFO with size 0 and only NBD_OPT_GO with the true one.
    front = bench.plain_gateway(bench.nbd_server(bench.image(SIZE)), "--export", "disk")
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.set_opt_mode(True)
    h.connect_uri(args["uri"])
    h.opt_info()
    h.opt_go()
    report(size=h.get_size(), last=failed(h.pread, 512, h.get_size() - 512))
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"size": SIZE, "last": None}


@pytest.mark.parametrize("action", ["allow", "error"])
def test_block_sizes_are_enforced(bench: Bench, action: str) -> None:
    front = bench.plain_gateway(bench.nbdkit(*policy(action)))
    script = """
    h = connect(strict_mode=0)
    report(
        sizes=[h.get_block_size(i) for i in range(3)],
        aligned=failed(h.pread, 4096, 4096),
        unaligned_offset=failed(h.pread, 4096, 512),
        unaligned_length=failed(h.pread, 512, 0),
        unaligned_write=failed(h.pwrite, b"x" * 512, 0),
        still=failed(h.pread, 65536, 0),
    )
    h.shutdown()
    """
    reported = nbdsh(script, front.client())
    assert reported.pop("sizes") == [4096, 65536, MIB]
    assert reported.pop("aligned") is None
    assert reported.pop("still") is None
    assert set(reported.values()) == {"EINVAL"}


def test_a_client_that_does_not_ask_for_block_sizes(bench: Bench) -> None:
    front = bench.plain_gateway(bench.nbdkit(*policy("error")))
    script = """
    h = connect(strict_mode=0, request_block_size=False)
    report(aligned=failed(h.pread, 4096, 4096), unaligned=failed(h.pwrite, b"x" * 512, 0),
           still=failed(h.pwrite, b"x" * 4096, 0))
    h.shutdown()
    """
    reported = nbdsh(script, front.client())
    assert reported == {"aligned": None, "unaligned": "EINVAL", "still": None}


def test_qemu_keeps_to_block_sizes(bench: Bench) -> None:
    front = bench.plain_gateway(bench.nbdkit(*policy("error")))
    words = ["-c", "write -P 7 512 1k", "-c", "read -P 7 512 1k", "-c", "read -P 0 0 512"]
    client = front.client()
    printed = check("qemu-io", *client.qemu_object(), *words, *client.qemu()[-2:])
    assert "failed" not in printed.lower(), printed
