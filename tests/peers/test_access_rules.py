"""One export that one client may write and another only read; lists that differ by client."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import people as rig
from tests.peers.bench import MIB, Bench, Front
from tests.peers.people import People
from tests.support.peers import Client, check, nbdsh, run, said

people = rig.people

RULES = """\
deny = ["cn=somebody-else"]

[[export]]
name = "shared"
read-write = ["cn=writer"]
read-only = ["cn=reader"]

[[export]]
name = "private"
read-write = ["cn=writer"]

[[export]]
name = "archive"
read-only = ["cn=reader", "cn=writer"]
"""
LISTS = {"writer": ["shared", "private", "archive"], "reader": ["shared", "archive"]}
WRITES = """
h = connect(strict_mode=0)
report(
    read_only=h.is_read_only(),
    write=failed(h.pwrite, b"x" * 65536, 4096),
    fua=failed(h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_FUA),
    large=failed(h.pwrite, b"x" * (2 << 20), 0),
    zero=failed(h.zero, 4096, 0),
    trim=failed(h.trim, 4096, 0),
    read=bytes(h.pread(4, 0)).decode(),
)
h.shutdown()
"""


@pytest.fixture
def bench(tmp_path: Path, people: People) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(tmp_path, people.tls_dir, stack)


@pytest.fixture
def image(bench: Bench) -> Path:
    path = bench.image(16 * MIB)
    with path.open("r+b") as file:
        file.write(b"data" * 1024)
    return path


@pytest.fixture
def front(bench: Bench, image: Path, tmp_path: Path) -> Front:
    """All names lead to the same disk; of "archive" the server does not speak by itself."""
    rules = tmp_path / "rules.toml"
    rules.write_text(RULES)
    names = [f"exportname={name}" for name in ("private", "unheard-of", "shared", "archive")]
    server = bench.nbdkit(
        *("--filter=exportname", "file", image, *names),
        *("exportname-list=explicit", "exportdesc=fixed:of this server"),
    )
    return bench.gateway(server, "--config", rules)


def client(front: Front, people: People, who: str, export: str = "") -> Client:
    return Client(front.gateway.uri, people.certificates(who)).with_export(export)


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_each_sees_what_it_may_open(front: Front, people: People, who: str) -> None:
    """In the order of the rules, in the words of the server."""
    one = client(front, people, who)
    listed = json.loads(check("nbdinfo", "--list", "--json", one.uri))["exports"]
    assert [export["export-name"] for export in listed] == LISTS[who]
    assert {export["description"] for export in listed} == {"of this server"}
    assert [export["is_read_only"] for export in listed] == [
        who == "reader" or export["export-name"] == "archive" for export in listed
    ]
    printed = check(*one.nbd_client("-l"))
    assert printed.splitlines()[1:] == [f"{name}: of this server" for name in LISTS[who]]
    printed = check(
        *("qemu-nbd", "--list", "--bind", "127.0.0.1", "--port", str(front.gateway.port)),
        *(*one.qemu_object(), "--tls-creds", "tls0"),
    )
    assert re.findall(r"export: '(.*)'", printed) == LISTS[who]


def test_who_may_open_nothing_gets_no_list(front: Front, people: People) -> None:
    one = client(front, people, "stranger")
    done = run("nbdinfo", "--list", one.uri)
    assert done.returncode != 0
    assert not re.search("shared|private|archive|unheard", said(done))
    done = run(*one.nbd_client("-l"))
    assert "CN=stranger sha256:" in said(done)
    assert not re.search("shared|private|archive|unheard", said(done))


def test_one_writes_what_another_reads(front: Front, people: People, image: Path) -> None:
    """At the same time, on the same export."""
    reader = client(front, people, "reader", "shared")
    before = image.read_bytes()
    reported = nbdsh(WRITES, reader)
    refused = ("write", "fua", "large", "zero", "trim")
    assert reported == {"read_only": True, "read": "data", **dict.fromkeys(refused, "EPERM")}
    assert image.read_bytes() == before
    reported = nbdsh(
        """
        reader = connect()
        writer = connect(uri=args["writer"])
        report(read_only=[reader.is_read_only(), writer.is_read_only()])
        for number in range(64):
            writer.pwrite(bytes([number]) * 4096, 4096 * number, nbd.CMD_FLAG_FUA)
            assert reader.pread(4096, 4096 * number) == bytes([number]) * 4096
        report(write=failed(reader.pwrite, b"x" * 512, 0, 0))
        writer.zero(4096, 0)
        assert reader.pread(4096, 0) == bytes(4096)
        """,
        reader,
        writer=client(front, people, "writer", "shared").uri,
    )
    assert reported["read_only"] == [True, False]
    assert reported["write"] in ("EPERM", "EINVAL")  # libnbd itself says so
    assert image.read_bytes()[4096 * 63 :][:4096] == bytes([63]) * 4096


def test_programs_that_write(front: Front, people: People, tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(b"new!" * (MIB // 4))
    for export, may in (("shared", True), ("archive", False)):
        assert (
            run("nbdcopy", source, client(front, people, "writer", export).uri).returncode == 0
        ) is may
    done = run("nbdcopy", source, client(front, people, "reader", "shared").uri)
    assert done.returncode != 0
    assert "read-only" in said(done) or "not permitted" in said(done)
    one = client(front, people, "reader", "shared")
    printed = check("qemu-io", "-r", *one.qemu_object(), "-c", "read -P 0x6e 0 1", *one.qemu()[-2:])
    assert "read 1/1" in printed
    assert "Pattern verification failed" not in printed


@pytest.mark.parametrize("name", ["private", "unheard-of", "nowhere", "", "Shared", "archive2"])
def test_not_allowed_and_not_there_look_the_same(front: Front, people: People, name: str) -> None:
    one = client(front, people, "reader", name)
    dialled = front.server.log().count("connection from")
    done = run("qemu-img", "info", *one.qemu())
    assert "server reported: no such export here, or it is not yours to open" in said(done)
    info = run("nbdinfo", one.uri)
    assert "No such file or directory for " in said(info)
    copy = run("nbdcopy", one.uri, "null:")
    assert copy.returncode != 0
    old = run(*one.nbd_client("-N", name), "-nonetlink", "/dev/null")
    assert "no such export here, or it is not yours to open" in said(old)
    assert front.server.log().count("connection from") == dialled
    assert nbdsh(
        """
        h = nbd.NBD()
        h.set_uri_allow_local_file(True)
        h.set_opt_mode(True)
        h.connect_uri(args["uri"])
        report(info=failed(h.opt_info), go=failed(h.opt_go))
        h.opt_abort()
        """,
        one,
    ) == {"info": "ENOENT", "go": "ENOENT"}


def test_rules_on_a_unix_socket(bench: Bench, people: People, tmp_path: Path) -> None:
    """With --tls off nothing is proved but what the kernel says."""
    mine, others = f"uid={os.getuid()}", f"uid={os.getuid() + 1}"
    for rule, may in ((mine, True), (others, False)):
        path = tmp_path / f"{may}.sock"
        front = bench.gateway(
            bench.nbdkit("memory", "1M"), "--tls", "off", "--allow", rule, listen=f"unix:{path}"
        )
        done = run("nbdinfo", front.gateway.uri)
        assert (done.returncode == 0) is may, said(done)
        line = front.gateway.wait_log(": open: .*" if may else ": closed: client not allowed .*")
        assert f"uid:{os.getuid()}" in line[0]
