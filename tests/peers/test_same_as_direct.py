"""What a client can learn of an export is the same through the gateway as without it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.peers.bench import MIB, SIZE, UPSTREAMS, Bench
from tests.support.peers import Client, NbdServer, Server, check, nbdsh

BLOCKS = ("blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=1M")


def policy(action: str) -> list[str]:
    return [
        "--filter=blocksize-policy",
        "memory",
        "4M",
        *BLOCKS,
        f"blocksize-error-policy={action}",
    ]


VARIANTS: dict[str, Any] = {
    **UPSTREAMS,
    "read-only": lambda bench: bench.nbdkit("-r", "memory", "1M"),
    "qemu-read-only": lambda bench: bench.qemu_nbd("-r", "-f", "raw", bench.image(MIB)),
    "no-features": lambda bench: bench.nbdkit(
        *("--filter=nozero", "--filter=noextents", "--filter=nocache", "--filter=multi-conn"),
        *("split", bench.image(MIB), "cachemode=none", "multi-conn-mode=disable"),
    ),
    "block-sizes": lambda bench: bench.nbdkit(*policy("allow")),
    "description": lambda bench: bench.qemu_nbd(
        "-D", "Grüße & <angle> brackets", "-f", "raw", bench.image(MIB)
    ),
    "rotational": lambda bench: bench.nbdkit(
        "--filter=swab", "file", bench.image(MIB), "swab-bits=8"
    ),
    "empty": lambda bench: bench.nbdkit("memory", "0"),
    "pattern": lambda bench: bench.nbdkit("pattern", "5G"),
}


NO_OPTIONS = ("nbdkit-oldstyle", "nbdkit-mask-handshake-0", "nbdkit-mask-handshake-2")


def told(client: Client, *flags: str) -> Any:
    """What nbdinfo says, without what must differ."""
    document = json.loads(check("nbdinfo", "--json", *flags, client.uri))
    assert document.pop("TLS") is (client.certificates is not None)
    assert document.pop("protocol").startswith(
        "newstyle" if client.certificates else ("newstyle", "oldstyle")
    )
    for export in document["exports"]:
        export.pop("uri")
    return document


@pytest.mark.parametrize("variant", VARIANTS)
def test_nbdinfo_says_the_same(bench: Bench, variant: str) -> None:
    server: Server = VARIANTS[variant](bench)
    name = "disk" if isinstance(server, NbdServer) else ""
    front = bench.plain_gateway(server, "--export", name)
    assert told(front.client(name)) == told(front.direct(name))
    # A server without options cannot be asked for a list; the gateway has one all the same.
    listing = "--no-content" if variant in NO_OPTIONS else "--list"
    assert told(front.client(name), "--list") == told(front.direct(name), listing)


@pytest.mark.parametrize("variant", VARIANTS)
def test_libnbd_negotiates_the_same(bench: Bench, variant: str) -> None:
    server: Server = VARIANTS[variant](bench)
    name = "disk" if isinstance(server, NbdServer) else ""
    front = bench.plain_gateway(server, "--export", name)
    script = """
    out = {}
    for structured in (True, False):
        h = connect(request_structured_replies=structured, full_info=True)
        out[str(structured)] = {
            "size": h.get_size(), "structured": h.get_structured_replies_negotiated(),
            "read-only": h.is_read_only(), "rotational": h.is_rotational(),
            "blocks": [h.get_block_size(i) for i in range(3)],
            **{name: getattr(h, "can_" + name)() for name in (
                "cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")},
            "first": h.pread(4096, 0).hex() if h.get_size() else "",
        }
        h.shutdown()
    report(**out)
    """
    assert nbdsh(script, front.client(name)) == nbdsh(script, front.direct(name))


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
