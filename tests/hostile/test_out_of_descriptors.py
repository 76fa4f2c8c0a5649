"""A real process with too few descriptors: what needs one more fails with a reason, the rest goes
on, and all is well again as soon as there are some."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.peers import wait_until
from tests.support.rawclient import Opt, RawClient, Rep, info_data, tls_context
from tests.workers_rig import Patched, leave, read_works

LIMIT = 26
PATCH = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


@pytest.fixture
def running(pki: Path, fake: FakeUpstream) -> Iterator[Patched]:
    where = ("--socket", fake.path, "--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0")
    flags = ("--handshake-timeout", "60", "--reload-interval", "0")
    with Patched(PATCH, "--tls-dir", pki, *where, *flags) as running:
        wait_until(lambda: len(running.uris) == 2, "the gateway to start")
        yield running
        running.process.terminate()
        assert running.ends() == 0, running.log()
        assert "Traceback" not in running.log()
        assert " ERROR " not in running.log()


def inside(uri: str, pki: Path) -> RawClient:
    client = RawClient(uri)
    client.greet()
    client.start_tls(tls_context(pki))
    return client


def test_the_upstream_cannot_be_dialled(running: Patched, pki: Path, fake: FakeUpstream) -> None:
    """It is said why, to the log; the session may ask again, and others are as they were."""
    first, second = running.uris
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(inside(first, pki))
        held.go()
        asking = stack.enter_context(inside(second, pki))
        crowd = [stack.enter_context(RawClient(first)) for _ in range(2 * LIMIT)]
        running.wait_log("cannot accept, trying again: Too many open files")
        (reply,) = asking.ask(Opt.GO, info_data())
        assert reply.failed
        assert reply.data == b"the NBD server behind this gateway cannot be reached"
        running.wait_log("upstream unavailable: .*Too many open files")
        read_works(held)
        for client in crowd:
            client.close()
        running.wait_log("can accept again, after ")
        asking.go()
        read_works(asking)
        late = stack.enter_context(inside(second, pki))
        late.go()
        for client in (held, asking, late):
            leave(client)
    # Once a listener, and not once a try.
    assert running.log().count("cannot accept, trying again") <= 2


def test_tls_needs_no_descriptor_more(running: Patched, pki: Path) -> None:
    with contextlib.ExitStack() as stack:
        begun = stack.enter_context(RawClient(running.uris[0]))
        begun.greet()
        crowd = [stack.enter_context(RawClient(running.uris[1])) for _ in range(2 * LIMIT)]
        running.wait_log("cannot accept, trying again: Too many open files")
        begun.start_tls(tls_context(pki))
        assert begun.verdict(99) == Rep.ERR_UNSUP
        for client in crowd:
            client.close()
        running.wait_log("can accept again, after ")
        begun.go()
        leave(begun)
