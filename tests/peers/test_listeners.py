"""Where and how clients connect: IPv6, several listeners, clients of an older kind, TLS off."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.peers.bench import MIB, Bench
from tests.support.gateway import Gateway
from tests.support.peers import Client, check, nbdsh, run, said


def test_ipv6(bench: Bench) -> None:
    front = bench.gateway(bench.nbdkit("memory", "1M"), listen="[::1]:0")
    assert front.gateway.uri == f"nbds://[::1]:{front.gateway.port}/"
    assert check("nbdinfo", "--size", front.client().uri) == f"{MIB}\n"
    assert "1 MiB" in check("qemu-img", "info", *front.client().qemu())


def test_several_listeners(bench: Bench) -> None:
    path = bench.directory() / "gateway.sock"
    server = bench.nbdkit("memory", "1M")
    listens = ["127.0.0.1:0", "[::1]:0", f"unix:{path}"]
    flags = [flag for address in listens for flag in ("--listen", address)]
    with Gateway("--tls-dir", bench.pki, "--socket", server.socket, *flags) as gateway:
        assert [urlsplit(uri).scheme for uri in gateway.uris] == ["nbds", "nbds", "nbds+unix"]
        for uri in gateway.uris:
            assert check("nbdinfo", "--size", Client(uri, bench.pki).uri) == f"{MIB}\n"
        assert path.is_socket()
        assert gateway.log().count(": open: ") == 3
    assert not path.exists(), "a socket is left behind"


def test_a_port_that_is_taken(bench: Bench) -> None:
    front = bench.gateway(bench.nbdkit("memory", "1M"))
    taken = f"127.0.0.1:{front.gateway.port}"
    with pytest.raises(AssertionError, match=r"(?s)exit code 1.*in use"):
        bench.gateway(front.server, listen=taken)
    check("nbdinfo", front.client().uri)


FIXED, NO_ZEROES = 1, 2


@pytest.mark.parametrize("flags", [FIXED, FIXED | NO_ZEROES])
def test_client_handshake_flags(bench: Bench, flags: int) -> None:
    front = bench.gateway(bench.nbdkit("memory", "1M"))
    script = """
    h = connect(handshake_flags=args["flags"])
    report(size=h.get_size(), tls=h.get_tls_negotiated(), read=failed(h.pread, 512, 0))
    h.shutdown()
    """
    reported = nbdsh(script, front.client(), flags=flags)
    assert reported == {"size": MIB, "tls": True, "read": None}


@pytest.mark.parametrize("flags", [0, NO_ZEROES])
def test_client_that_is_not_fixed_newstyle_cannot_have_tls(bench: Bench, flags: int) -> None:
    front = bench.gateway(bench.nbdkit("memory", "1M"))
    script = """
    report(no=failed(connect, handshake_flags=args["flags"]))
    """
    assert nbdsh(script, front.client(), flags=flags)["no"] is not None
    assert nbdsh(script, front.plain_client(), flags=flags)["no"] is not None
    assert ": open: " not in front.gateway.log()


@pytest.mark.parametrize("flags", [0, NO_ZEROES, FIXED, FIXED | NO_ZEROES])
def test_without_tls_every_newstyle_client_is_served(bench: Bench, flags: int) -> None:
    """Without NBD_FLAG_C_FIXED_NEWSTYLE libnbd says NBD_OPT_EXPORT_NAME and nothing else."""
    server = bench.qemu_nbd("-x", "disk", "-f", "raw", bench.image(MIB))
    front = bench.gateway(server, "--export", "disk", "--tls", "off")
    script = """
    for name in ("disk", ""):
        h = nbd.NBD()
        h.set_handshake_flags(args["flags"])
        h.set_export_name(name)
        h.connect_tcp("127.0.0.1", args["port"])
        h.pwrite(b"x" * 512, 1024)
        report(**{name or "default": [h.get_size(), h.get_protocol(), h.pread(2, 1535).hex()]})
        h.shutdown()
    h = nbd.NBD()
    h.set_handshake_flags(args["flags"])
    h.set_export_name("other")
    report(other=failed(h.connect_tcp, "127.0.0.1", args["port"]))
    """
    client = front.plain_client()
    reported = nbdsh(script, client, flags=flags, port=str(front.gateway.port))
    kind = "newstyle-fixed" if flags & FIXED else "newstyle"
    assert reported["disk"] == reported["default"] == [MIB, kind, "7800"]
    assert reported["other"] is not None


def test_client_that_would_like_tls_where_there_is_none(bench: Bench) -> None:
    front = bench.gateway(bench.nbdkit("memory", "1M"), "--tls", "off")
    script = """
    h = connect(tls=nbd.TLS_ALLOW)
    report(tls=h.get_tls_negotiated(), size=h.get_size())
    h.shutdown()
    """
    assert nbdsh(script, front.plain_client()) == {"tls": False, "size": MIB}
    wants_tls = Client(front.gateway.uri.replace("nbd:", "nbds:"), bench.pki)
    done = run("qemu-img", "info", *wants_tls.qemu())
    assert done.returncode != 0
    assert "server reported: TLS is off on this listener" in said(done), said(done)
