"""The requests that the upstream has not answered, by the cookies that we gave them."""

from __future__ import annotations

from typing import NamedTuple


class ErrorChunk(NamedTuple):
    """An upstream's error chunk, fit for the client."""

    kind: int
    data: bytes


class Request(NamedTuple):
    """One request, as the upstream was sent it."""

    cookie: int  # the client's
    kind: int
    flags: int
    offset: int
    length: int  # the effect length, in bytes
    plan: Plan | None = None  # set if it is one of several for one request of the client
    context_ids: frozenset[int] | None = None  # a block status limited to these meta contexts


class Plan:
    """One request of the client, and how far it is."""

    __slots__ = (
        "at",
        "complete",
        "error",
        "error_chunk",
        "flush",
        "held",
        "holds",
        "kind",
        "queued",
        "request",
        "stop",
        "unanswered",
        "under_way",
        "volatile",
    )

    def __init__(self, request: Request, kind: int, under_way: int = 0) -> None:
        self.request = request  # the client's
        self.kind = kind  # of the parts
        self.under_way = under_way  # parts at a time; 0: they come with the client's payload
        self.at = request.offset  # where the next part begins
        self.stop = request.offset + request.length
        self.complete = False  # no more parts but for the flush
        self.unanswered = 0
        self.volatile = False  # a part has changed data that nothing has made durable
        self.flush = False  # still to be sent, when all else has succeeded
        self.holds = False  # the reply is one message: its data is put together here
        self.held: bytearray | None = None
        self.queued = False
        self.error = 0
        self.error_chunk: ErrorChunk | None = None

    def hold(self, offset: int, data: memoryview) -> None:
        """Keep data of a reply until the reply is whole."""
        assert self.held is not None, "made with the first part"
        at = offset - self.request.offset
        self.held[at : at + len(data)] = data


class InFlight:
    """proto.md, "Transmission": a cookie is opaque, and a sloppy client may use one twice. So the
    upstream sees ours, each of them once in a session."""

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self.next_cookie = 1  # 0 stands for "none"
        self.unfinished = 0  # the cookie of the request whose payload is still on its way
        self.failed: set[int] = set()  # flushes that the upstream refused, for the journal

    def crowds(self, length: int, most: int) -> bool:
        """Whether `length` more bytes of READs and WRITEs are more than `most`. If nothing is in
        flight they never are."""
        held = sum(one.length for one in self.requests.values() if one.kind < 2)
        return bool(self.requests) and held + length > most

    def add(self, request: Request) -> int:
        """Remember a request, and return its cookie."""
        cookie = self.next_cookie
        self.next_cookie = cookie + 1
        self.requests[cookie] = request
        return cookie
