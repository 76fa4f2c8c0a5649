"""Upstreams of a fake server, and what is said of those that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from gateway.nbd.constants import Rep as OurRep
from gateway.nbd.pairing import (
    Open,
    Refused,
)
from gateway.upstream import Upstream
from tests.support.fake_upstream import FakeUpstream, Link

LOG = logging.LoggerAdapter(logging.getLogger("gateway.session"), {})
UNSUPPORTED = Refused(OurRep.ERR_UNSUP)
UNKNOWN = Refused(OurRep.ERR_UNKNOWN)
GO = Open("", (), go=True)
INFO = Open("", (), go=False)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        yield fake
        assert not fake.errors


Dial = Callable[..., Upstream]


@pytest.fixture
async def closing() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def dial(tmp_path: Path, closing: AsyncExitStack) -> Dial:
    """Upstreams of the fake, which are closed at the end."""

    def dial(
        path: Path | None = None, *, oldstyle_name: str = "", timeout_s: float = 10.0
    ) -> Upstream:
        path = path or tmp_path / "up"
        made = Upstream(str(path), LOG, oldstyle_name=oldstyle_name, timeout_s=timeout_s)
        closing.push_async_callback(made.aclose)
        return made

    return dial


async def ended(fake: FakeUpstream, index: int = -1) -> Link:
    return await trio.to_thread.run_sync(fake.wait_end, index)


def asked(link: Link) -> list[int]:
    return [opt for opt, _ in link.options]


class Words:
    """What was said of an upstream that cannot be used."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.DEBUG)

    def said(self) -> list[tuple[int, str]]:
        prefix = "upstream unavailable: "
        found = [(one.levelno, one.getMessage()) for one in self._caplog.records]
        return [(level, text[len(prefix) :]) for level, text in found if text.startswith(prefix)]

    @property
    def warning(self) -> str:
        """The one that there is."""
        ((level, text),) = self.said()
        assert level == logging.WARNING
        assert text.isprintable()
        return text


@pytest.fixture
def words(caplog: pytest.LogCaptureFixture) -> Words:
    return Words(caplog)
