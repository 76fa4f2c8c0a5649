"""What goes wrong in a soak, one thing after the other."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from tests.soak.checkers import Checker, Scene
from tests.soak.watching import WatchedGateway
from tests.soak.writer import WriterFailed
from tests.support.peers import wait_until
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    IHAVEOPT,
    Opt,
    RawClient,
    client_hello,
    info_data,
    option,
    tls_context,
)

if TYPE_CHECKING:
    from tests.soak.episode import Episode

_ABSENT_S: Final = (0.0, 0.0, 0.2, 1.0, 2.0)  # how long a server stays away
_FROZEN_S: Final = (0.1, 0.5, 1.0, 2.5)  # less than the gateway waits in a handshake


class Fault(Exception):
    """What must not be has happened while this went wrong."""


def server_killed(episode: Episode, source: random.Random) -> None:
    _restart(episode.scene, source, signal.SIGKILL)


def server_terminated(episode: Episode, source: random.Random) -> None:
    _restart(episode.scene, source, signal.SIGTERM)


def _restart(scene: Scene, source: random.Random, how: signal.Signals) -> None:
    upstream = scene.upstream
    with scene.guard:
        scene.dying()
        upstream.signal(how)
        if how == signal.SIGTERM:  # some wait until their clients say something
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not upstream.alive, "it to end", 2.0)
        upstream.server.kill()
        scene.dead()
        time.sleep(source.choice(_ABSENT_S))
        upstream.start()


def server_frozen(episode: Episode, source: random.Random) -> None:
    scene = episode.scene
    with scene.guard:
        scene.upstream.signal(signal.SIGSTOP)
        time.sleep(source.choice(_FROZEN_S))
        scene.upstream.signal(signal.SIGCONT)


def worker_killed(episode: Episode, source: random.Random) -> None:
    _worker_ends(episode.gateway, source, signal.SIGKILL)


def worker_drained(episode: Episode, source: random.Random) -> None:
    _worker_ends(episode.gateway, source, signal.SIGTERM)


def _worker_ends(gateway: WatchedGateway, source: random.Random, how: signal.Signals) -> None:
    before = gateway.workers()
    gone = source.choice(before)
    os.kill(gone, how)
    wait_until(
        lambda: gone not in gateway.workers() and len(gateway.workers()) == len(before),
        "another worker",
        60,
    )


def client_killed(episode: Episode, source: random.Random) -> None:
    jobs = list(episode.jobs)
    source.shuffle(jobs)
    if not any(job.kill() for job in jobs):
        raise NothingToDo


class NothingToDo(Exception):
    """There is nobody just now that it could happen to."""


# ---------------------------------------------------------------- strangers


def silent_sockets(episode: Episode, source: random.Random) -> None:
    """They say nothing, or a part of a greeting, and stay for a while."""
    with contextlib.ExitStack() as stack:
        for _ in range(source.randint(1, 20)):
            sock = stack.enter_context(_connected(episode.gateway.uri))
            if source.random() < 0.5:
                sock.send(struct.pack(">I", C_FIXED | C_NO_ZEROES)[: source.randint(1, 4)])
        time.sleep(source.choice((0.1, 1.0, 3.0)))


def garbage(episode: Episode, source: random.Random) -> None:
    """Bytes that are no NBD, or NBD in the wrong place."""
    certificates = episode.certificates("carol")
    flags = struct.pack(">I", C_FIXED | C_NO_ZEROES)
    starttls = option(Opt.STARTTLS)
    choices = (
        source.randbytes(source.randint(1, 5000)),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        flags + source.randbytes(200),
        flags + option(Opt.GO, info_data(b"d0")),
        flags + option(Opt.EXPORT_NAME, b"d0"),
        flags + starttls + client_hello(tls_context(certificates)),
        flags + starttls + starttls,
        flags + struct.pack(">QII", IHAVEOPT, source.choice((1, 3, 6, 7, 99)), 0xFFFFFFFF),
        flags + option(Opt.LIST, bytes(source.randint(0, 4096))) * 40,
        struct.pack(">I", 0xFFFFFFFF),
    )
    for _ in range(source.randint(1, 6)):
        with _connected(episode.gateway.uri) as sock, contextlib.suppress(OSError):
            sock.sendall(source.choice(choices))
            if source.random() < 0.5:
                sock.settimeout(0.2)
                sock.recv(1 << 16)
            if source.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def resets(episode: Episode, source: random.Random) -> None:
    """Clients with certificates that go by TCP RST somewhere in the negotiation."""
    context = tls_context(episode.certificates("carol"))
    for _ in range(source.randint(1, 4)):
        with contextlib.suppress(OSError, AssertionError), RawClient(episode.gateway.uri) as client:
            steps: list[Callable[[], object]] = [
                client.greet,
                lambda client=client: client.start_tls(context),
                client.ask_structured,
                lambda client=client: client.send(option(Opt.LIST)),
                lambda client=client: client.send(option(Opt.GO, info_data(b"d0"))),
            ]
            for step in steps[: source.randint(0, len(steps))]:
                step()
            client.reset()


def _connected(uri: str) -> socket.socket:
    parts = urlsplit(uri)
    return socket.create_connection((parts.hostname, parts.port or 10809), 10)


# ---------------------------------------------------------------- reloads


def reload_unchanged(episode: Episode, source: random.Random) -> None:
    episode.gateway.reload()


def certificate_renewed(episode: Episode, source: random.Random) -> None:
    episode.authority.renew()
    episode.gateway.reload()


def rules_changed(episode: Episode, source: random.Random) -> None:
    """Of somebody who is never here, so nobody is to notice."""
    episode.write_rules(deny=source.choice(("", "cn=guest", "cn=mallory", "dns=*.guests.test")))
    episode.gateway.reload()


def client_revoked(episode: Episode, source: random.Random) -> None:
    """Bob is at work, is revoked and cut, may not enter, and may again once he is not revoked."""
    lease = episode.scene.upstream.lease()
    if lease is None:
        raise NothingToDo
    bob = episode.checker("bob", lease, seconds=60.0)
    thread = episode.start_checker(bob)
    wait_until(lambda: bob.connected or not thread.is_alive(), "bob to be connected", 30)
    if not bob.connected:
        raise NothingToDo  # why is judged where he has failed
    time.sleep(source.random())
    after = episode.gateway.log_bytes
    try:
        episode.authority.revoke("bob")
        episode.gateway.reload()
        episode.gateway.await_log(r"closed: client no longer allowed \(revoked", after)
        thread.join(60)
        if not bob.ended:
            raise Fault("a revoked client was not cut")
        if _may_enter(episode):
            raise Fault("a revoked client may enter")
    finally:  # whatever it was, the next one is to find its own
        episode.authority.revoke()
    episode.gateway.reload()
    if not _may_enter(episode):
        raise Fault("a client that is not revoked any more may not enter")


def _may_enter(episode: Episode) -> bool:
    """Whether bob is let in, which is before any server is asked."""
    try:
        with RawClient(episode.gateway.uri) as client:
            client.greet()
            client.start_tls(tls_context(episode.certificates("bob")))
            client.ask(Opt.LIST)
        return True
    except Exception:
        return False


# ---------------------------------------------------------------- another gateway


def gateway_killed(episode: Episode, source: random.Random) -> None:
    """One beside the one that is watched, in front of the same server."""
    lease = episode.scene.upstream.lease()
    if lease is None:
        raise NothingToDo
    with episode.another_gateway(source.choice((1, 2))) as gateway:
        pids = gateway.processes()
        checker = episode.checker("carol", lease, seconds=60.0, uri=gateway.uri)
        thread = episode.start_checker(checker)
        wait_until(lambda: checker.connected or not thread.is_alive(), "it to be connected", 30)
        if not checker.connected:
            raise NothingToDo
        time.sleep(source.random())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        thread.join(60)
        gateway.wait()
        if not checker.ended:
            raise Fault("a client outlives its gateway")


ALL: Final[dict[str, tuple[Callable[[Episode, random.Random], None], int]]] = {
    "server killed": (server_killed, 10),
    "server terminated": (server_terminated, 5),
    "server frozen": (server_frozen, 6),
    "worker killed": (worker_killed, 5),
    "worker drained": (worker_drained, 2),
    "client killed": (client_killed, 12),
    "gateway killed": (gateway_killed, 3),
    "silent sockets": (silent_sockets, 5),
    "garbage": (garbage, 8),
    "resets": (resets, 8),
    "reload": (reload_unchanged, 3),
    "certificate renewed": (certificate_renewed, 3),
    "rules changed": (rules_changed, 3),
    "client revoked": (client_revoked, 3),
}
WORKERS = frozenset({"worker killed", "worker drained"})  # only where there are several
# Behind these, clients may fail: those that enter while the server is away, and those that heed a
# failed flush; and all that a worker had.
EXCUSES = frozenset({"server killed", "server terminated", "server died"}) | WORKERS
__all__ = ["ALL", "EXCUSES", "WORKERS", "Checker", "Fault", "NothingToDo", "WriterFailed"]
