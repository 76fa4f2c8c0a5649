"""Real clients, killed in the middle of what they do, and one beside them whose data are verified.

None of them leaves anything behind: no descriptor, no connection to the server, no byte of a write
that was cut.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.session import Session
from tests.peers.bench import MIB, Bench, Front
from tests.support.gateway import environment
from tests.support.peers import Client, check, find, wait_until
from tests.support.rawclient import Cmd, RawClient, tls_context

DISK = 64 * MIB
OURS = 48 * MIB  # from here on the disk is the witness's

Command = Callable[[Client, Path], list[str]]


def qemu_io(client: Client, command: str) -> list[str]:
    again = (word for _ in range(500) for word in ("-c", command))
    return ["qemu-io", *client.qemu_object(), *again, *client.qemu()[-2:]]


def fio(client: Client, rw: str) -> list[str]:
    job = ["fio", "--name=killed", "--ioengine=nbd", f"--uri={client.uri}", f"--rw={rw}"]
    return [*job, "--thread", "--bs=64k", "--iodepth=16", f"--size={OURS}", "--loops=99"]


KILLED: dict[str, Command] = {
    "nbdcopy-to": lambda client, picture: ["nbdcopy", str(picture), client.uri],
    "nbdcopy-from": lambda client, picture: ["nbdcopy", "--no-extents", client.uri, "null:"],
    "qemu-io-write": lambda client, picture: qemu_io(client, "write -P 1 0 4M"),
    "qemu-io-read": lambda client, picture: qemu_io(client, "read 0 4M"),
    "fio-write": lambda client, picture: fio(client, "randwrite"),
    "fio-read": lambda client, picture: fio(client, "randread"),
}
PLAIN = ("fio-write", "fio-read")  # it knows no TLS


class Witness:
    """Writes at random, and reads every time what it has written last."""

    def __init__(self, front: Front) -> None:
        client = RawClient(front.gateway.uri)
        client.greet()
        if front.gateway.uri.startswith("nbds"):
            client.start_tls(tls_context(front.pki))
        client.ask_structured()
        self._client = client
        self._session = Session(client, client.go(), {})
        self._random = random.Random(7)
        self._written: dict[int, bytes] = {}

    def look(self) -> None:
        place = self._random.randrange(OURS // 4096, DISK // 4096) * 4096
        data = self._random.randbytes(4096)
        assert self._session.ask(Cmd.WRITE, place, payload=data).error == 0
        self._written[place] = data
        for place in self._random.sample(sorted(self._written), 1):
            answer = self._session.ask(Cmd.READ, place, 4096)
            assert answer.error == 0
            assert answer.data == self._written[place]

    def look_at_all(self) -> None:
        for place, data in self._written.items():
            assert self._session.ask(Cmd.READ, place, 4096).data == data

    def close(self) -> None:
        self._session.disc()
        self._client.close()


class Scene:
    """A server that notes what it is asked, a gateway, and a witness."""

    def __init__(self, bench: Bench, *flags: str) -> None:
        self._log = bench.directory() / "log"
        server = bench.nbdkit(
            *("--filter=log", "--filter=delay", "memory", str(DISK), f"logfile={self._log}"),
            *("rdelay=2ms", "wdelay=2ms"),  # so that no client is done before it is killed
        )
        self.front = bench.gateway(server, *flags)
        self.client = Client(self.front.gateway.uri) if flags else self.front.client()
        check("nbdinfo", "--size", self.client.uri)
        self.witness = Witness(self.front)
        self.base = self.fds()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.front.gateway.pid}/fd"))

    def asked(self) -> int:
        return len(re.findall(r" (?:Read|Write|Zero) id=", self._log.read_text()))


@pytest.fixture(scope="module")
def scenes(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Scene]]:
    """One witness for all that are killed, with TLS and without."""
    with contextlib.ExitStack() as stack:
        bench = Bench(tmp_path_factory.mktemp("scenes"), pki, stack)
        scenes = {tls: Scene(bench, *(() if tls else ("--tls", "off"))) for tls in (True, False)}
        for scene in scenes.values():
            stack.enter_context(contextlib.closing(scene.witness))
        yield scenes


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture"
    path.write_bytes(random.Random(1).randbytes(OURS))
    return path


@pytest.mark.parametrize("kind", KILLED)
def test_killed(scenes: dict[bool, Scene], kind: str, picture: Path, tmp_path: Path) -> None:
    scene = scenes[kind not in PLAIN]
    logged = len(scene.front.gateway.log())
    command = KILLED[kind](scene.client, picture)
    for number in (1, 9):
        before = scene.asked()
        with subprocess.Popen(
            [find(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd=tmp_path,
        ) as client:
            wait_until(lambda: scene.asked() - before > number, "it to be at work")  # noqa: B023
            scene.witness.look()
            assert client.poll() is None, "it was done already"
            client.kill()
        scene.witness.look()
    wait_until(lambda: scene.fds() <= scene.base, "what they had opened to be closed")
    assert scene.front.gateway.log()[logged:].count("closed: client left without a word") >= 2
    scene.witness.look_at_all()
