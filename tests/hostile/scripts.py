"""Upstreams that go wrong in ways which several files need."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests.support.fake_upstream import Link, Script
from tests.support.rawclient import TIMEOUT_S, Cmd, Request

Make = Callable[[Request], bytes]  # the raw answer to a request


class Answering(Script):
    """Answers every request of one kind with raw bytes, all others correctly."""

    def __init__(self, cmd: int, make: Make, **changes: object) -> None:
        super().__init__(**changes)
        self.cmd, self.make = cmd, make

    def requested(self, link: Link, request: Request) -> None:
        if request.cmd == self.cmd:
            link.send(self.make(request))
        else:
            super().requested(link, request)


class Holding(Script):
    """Collects requests, and answers them when told to: `count` have come, and `go` is set."""

    def __init__(self, count: int, **changes: object) -> None:
        super().__init__(**changes)
        self.count = count
        self.go = threading.Event()

    def transmit(self, link: Link) -> None:
        held = [link.take_request() for _ in range(self.count)]
        assert self.go.wait(TIMEOUT_S)
        for request in held:
            self.requested(link, request)
        super().transmit(link)


class Dying(Script):
    """Sends what `make` says when the first READ has come, and hangs up."""

    def __init__(self, make: Make, **changes: object) -> None:
        super().__init__(**changes)
        self.make = make

    def transmit(self, link: Link) -> None:
        while (request := link.take_request()).cmd != Cmd.READ:
            self.requested(link, request)
        link.send(self.make(request))
