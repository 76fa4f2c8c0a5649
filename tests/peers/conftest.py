"""Fixtures for the scenarios with real programs."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.bench import SIZE, UPSTREAMS, Bench, Front
from tests.support.modern import Modern
from tests.support.modern import modern as a_modern_python
from tests.support.peers import NbdServer
from tests.support.trixie import Trixie, trixie

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.peers)


@pytest.fixture
def bench(tmp_path: Path, pki: Path) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(tmp_path, pki, stack)


@pytest.fixture(scope="module", params=UPSTREAMS)
def disk(
    request: pytest.FixtureRequest, pki: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    """A writable disk of SIZE bytes, behind a gateway, on each kind of upstream in turn."""
    with contextlib.ExitStack() as stack:
        bench = Bench(tmp_path_factory.mktemp("disk"), pki, stack)
        server = UPSTREAMS[request.param](bench)
        export = ["--export", "disk"] if isinstance(server, NbdServer) else []
        yield bench.gateway(server, *export)


@pytest.fixture(scope="module")
def newer() -> Iterator[Trixie]:
    """The programs of Debian trixie."""
    with trixie() as found:
        yield found


@pytest.fixture(scope="module")
def modern() -> Iterator[Modern]:
    """A Python that has pre-shared keys, with the project."""
    with a_modern_python() as found:
        yield found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two different files of SIZE bytes: data, and zeroes both short and long."""
    directory = tmp_path_factory.mktemp("pictures")
    paths = directory / "a.img", directory / "b.img"
    for seed, path in enumerate(paths):
        source = random.Random(seed)
        with path.open("wb") as file:
            while (room := SIZE - file.tell()) > 0:
                length = min(room, 512 * source.randint(1, 1024))
                file.write(source.randbytes(length) if source.random() < 0.6 else bytes(length))
    return paths


@pytest.fixture(scope="session")
def other_pki(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a CA that the gateway does not know.

    ca-cert.pem holds both CAs: the client finds no fault with the gateway, nor (as qemu looks at
    that first) with its own certificate. It is the gateway that has to refuse.
    """
    from gateway.certs import init

    directory = tmp_path_factory.mktemp("other") / "pki"
    init(directory)
    with (directory / "ca-cert.pem").open("ab") as file:
        file.write((pki / "ca-cert.pem").read_bytes())
    return directory


@pytest.fixture(scope="session")
def no_certificate(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a client has that can check the gateway, but cannot show anything itself."""
    directory = tmp_path_factory.mktemp("without")
    shutil.copy(pki / "ca-cert.pem", directory / "ca-cert.pem")
    return directory
