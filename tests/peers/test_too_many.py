"""Too many connections of one certificate: what each client prints, and that it gets in later."""

from __future__ import annotations

import contextlib

from tests.peers.bench import Bench
from tests.support.peers import check, run, said
from tests.support.rawclient import RawClient, tls_context
from tests.support.trixie import Trixie


def test_each_program_is_told(bench: Bench) -> None:
    front = bench.gateway(
        bench.nbdkit("memory", "1M"), "--limit", "clients-per-identity=2", "--workers", "2"
    )
    words = "too many connections of CN=client sha256:"
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(RawClient(front.gateway.uri)) for _ in range(2)]
        for one in held:
            one.greet()
            one.start_tls(tls_context(front.pki))
            one.go()
        client = front.client()
        for command, expected in (
            (["nbdinfo", client.uri], "Operation not supported"),  # libnbd 1.14: no server's text
            (["qemu-img", "info", *client.qemu()], words),
            ([*client.nbd_client(), "-nonetlink", "/dev/null"], words),
        ):
            logged = len(front.gateway.log())
            done = run(*command)
            assert done.returncode != 0, f"{command[0]} got in: {said(done)}"
            assert expected in said(done), f"{command[0]} says:\n{said(done)}"
            front.gateway.wait_log(rf"closed: .*\(too_many_clients: {words}", after=logged)
    front.gateway.wait_log(": closed: client left without a word.*\n.*: closed: client left")
    assert check("nbdinfo", "--size", front.client().uri).strip() == str(1 << 20)


def test_a_newer_nbdinfo_has_the_words(bench: Bench, newer: Trixie) -> None:
    front = bench.gateway(bench.nbdkit("memory", "1M"), "--limit", "clients-per-identity=1")
    with RawClient(front.gateway.uri) as held:
        held.greet()
        held.start_tls(tls_context(front.pki))
        held.go()
        client = newer.client(front.client())
        done = newer.run("nbdinfo", client.uri)
        assert done.returncode != 0
        assert "too many connections of CN=client sha256:" in said(done)
