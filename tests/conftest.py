"""What every test gets: ERROR records fail it, and `pki` issues certificates on demand; signals are
as they were before it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(level=logging.ERROR)
        self.messages: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@pytest.fixture(autouse=True)
def no_error_logged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test during which a logger below "gateway" logged an ERROR.

    A session turns a bug of ours into a log line and goes on, so without this a test would pass
    over it. A test marked `expects_error_log` must see at least one.
    """
    collector = _Collector()
    logger = logging.getLogger("gateway")
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
    if request.node.get_closest_marker("expects_error_log") is None:
        if collector.messages:
            pytest.fail("logged as ERROR:\n" + "\n".join(collector.messages), pytrace=False)
    elif not collector.messages:
        pytest.fail("marked expects_error_log, but no ERROR was logged", pytrace=False)


@pytest.fixture(autouse=True)
def signals_of_the_tests() -> Iterator[None]:
    """The command's own `main` leaves them ignored: its process is to end."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `nbd-gateway certs init` makes it: ca-cert.pem, server-*.pem, client-*.pem.

    Shared by all tests: read it, never write to it.
    """
    from gateway.certs import init

    directory = tmp_path_factory.mktemp("certs") / "pki"
    init(directory)
    return directory
