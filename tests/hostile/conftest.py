"""The lab: a real gateway as a child process, a fake upstream behind it, raw clients in front."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from tests.hostile.session import Session
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import Gateway, descriptors_of
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    TIMEOUT_S,
    Info,
    Opt,
    PeerClosedError,
    RawClient,
    tls_context,
)

# Our own ERROR level, and what the interpreter itself complains about.
FAULT = re.compile(r" (ERROR|CRITICAL) |Traceback|Exception ignored|ResourceWarning|never awaited")
BOTH = C_FIXED | C_NO_ZEROES
Client = TypeVar("Client", bound=RawClient)


class Lab:
    """What a hostile test works with. Closes the clients that it handed out."""

    def __init__(self, gateway: Gateway, fake: FakeUpstream, pki: Path) -> None:
        self.gateway = gateway
        self.fake = fake
        self.pki = pki
        self.pid = gateway.pid
        self.mortal = False  # set by a test that ends the gateway
        self._clients = contextlib.ExitStack()

    def close(self) -> None:
        self._clients.close()

    # Clients

    def raw(self) -> RawClient:
        """Connected, nothing said yet."""
        return self._clients.enter_context(RawClient(self.gateway.uri))

    def keep(self, client: Client) -> Client:
        """One that a test made itself: closed at the end, too."""
        return self._clients.enter_context(client)

    def plain(self, flags: int = BOTH) -> RawClient:
        """Past the greeting."""
        client = self.raw()
        client.greet(flags)
        return client

    def tls(self, flags: int = BOTH) -> RawClient:
        """Inside TLS, with a certificate; no option asked yet."""
        client = self.plain(flags)
        client.start_tls(tls_context(self.pki))
        return client

    def session(
        self,
        *,
        structured: bool = True,
        contexts: Sequence[bytes] = (),
        infos: Sequence[int] = (Info.BLOCK_SIZE,),
    ) -> Session:
        """In transmission on the default export."""
        client = self.tls()
        chosen: dict[int, bytes] = {}
        if structured:
            script = self.fake.queue[0] if self.fake.queue else self.fake.script
            client.ask_structured(optional=not script.structured)
        if contexts:
            chosen = client.set_contexts(contexts)
            assert sorted(chosen.values()) == sorted(contexts)
        return Session(client, client.go(infos=infos), chosen)

    def asked_upstream(self) -> set[int]:
        """The options that reached the upstream, but for those that a gateway asks by itself."""
        options = {opt for link in self.fake.links for opt, _ in link.options}
        return options - {Opt.STRUCTURED_REPLY, Opt.ABORT}

    # The process

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: waited {TIMEOUT_S:g} s in vain"
            time.sleep(0.01)

    def fds(self) -> int:
        return len(descriptors_of(self.pid))

    def settled_fds(self) -> int:
        """The number of descriptors of a gateway that serves nobody."""
        self.wait(lambda: not self.sockets_of_clients(), "sessions of an earlier test")
        return self.fds()

    def sockets_of_clients(self) -> int:
        """Connections that the gateway still holds: all its sockets but those that listen."""
        inodes = set()
        for fd in descriptors_of(self.pid):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{self.pid}/fd/{fd}")
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        found = 0
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                found += fields[9] in inodes and fields[3] != "0A"  # 0A: LISTEN
        return found

    def wait_fds(self, base: int) -> None:
        self.wait(lambda: self.fds() <= base, f"descriptors back to {base}")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_kib(self) -> int:
        """The most that was resident since `forget_peak`: what was freed again counts too."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
        raise AssertionError("no VmHWM")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def assert_idle(self) -> None:
        """A gateway without work uses no CPU: a spinning task would take the whole window."""
        before, window_s = self.cpu_s(), 0.25
        time.sleep(window_s)
        assert self.cpu_s() - before < window_s / 2, "the gateway spins"


class Gateways:
    """One gateway and one fake per set of options, shared by the files, started anew if it died."""

    def __init__(self, pki: Path, root: Path, stack: contextlib.ExitStack) -> None:
        self._pki, self._root, self._stack = pki, root, stack
        self._running: dict[tuple[str, ...], tuple[Gateway, FakeUpstream]] = {}

    def get(self, options: tuple[str, ...]) -> tuple[Gateway, FakeUpstream]:
        if options in self._running and self._running[options][0].alive():
            return self._running[options]
        path = self._root / f"{time.monotonic_ns()}.sock"
        fake = self._stack.enter_context(FakeUpstream(path))
        pem = [
            *("--cert", str(self._pki / "server-cert.pem")),
            *("--key", str(self._pki / "server-key.pem")),
            *("--client-ca", str(self._pki / "ca-cert.pem")),
        ]
        tls = [] if "off" in options else pem
        # One address, and hundreds of clients a second: what this is about is in test_floods.
        rate = ("--limit", "handshake-rate=0")
        arguments = [*tls, "--socket", str(path), "--listen", "127.0.0.1:0", *rate, *options]
        gateway = self._stack.enter_context(Gateway(*arguments))
        self._running[options] = gateway, fake
        return gateway, fake


@pytest.fixture(scope="session")
def gateways(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    with contextlib.ExitStack() as stack:
        yield Gateways(pki, tmp_path_factory.mktemp("upstream"), stack)


@pytest.fixture
def lab(request: pytest.FixtureRequest, gateways: Gateways, pki: Path) -> Iterator[Lab]:
    """A file chooses the gateway's flags with OPTIONS. After each test: no harm was done."""
    options: tuple[str, ...] = getattr(request.module, "OPTIONS", ())
    gateway, fake = gateways.get(options)
    fake.reset()
    logged = len(gateway.log())
    lab = Lab(gateway, fake, pki)
    try:
        yield lab
    finally:
        lab.close()
        errors = list(fake.errors)
        fake.reset()
    assert lab.mortal or gateway.alive(), gateway.log()[logged:]
    assert not errors, f"the upstream was ill-treated: {errors}"
    lines = gateway.log()[logged:]
    assert not FAULT.search(lines), lines


@pytest.fixture
def witness(lab: Lab) -> Iterator[Session]:
    """Another client, on a correct upstream: whatever the test does, it notices nothing."""
    session = lab.session()
    session.check()
    yield session
    session.check()
    session.disc()


__all__ = ["BOTH", "Lab", "PeerClosedError"]
