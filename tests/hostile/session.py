"""A client in the transmission phase that holds every reply against the specification."""

from __future__ import annotations

import dataclasses
import itertools
import struct

from tests.support.fake_upstream import DONE, pattern
from tests.support.rawclient import (
    CHUNK,
    CHUNK_MAGIC,
    MAX_PAYLOAD,
    SIMPLE,
    SIMPLE_MAGIC,
    Cf,
    Cmd,
    Ct,
    Err,
    Export,
    RawClient,
    Request,
)

ERROR_BIT = 1 << 15  # in the types of all error chunks
LEGAL_ERRORS = {error.value for error in Err} - {Err.OK}
GONE = (Err.ESHUTDOWN, Err.EIO)  # what requests get whose upstream is lost


@dataclasses.dataclass
class Answer:
    """The whole reply to one request. `error` is the first error, 0 for success."""

    request: Request
    structured: bool = False
    error: int = 0
    data: bytearray = dataclasses.field(default_factory=bytearray)
    extents: dict[int, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    ranges: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    done: bool = False

    def cover(self, offset: int, data: bytes) -> None:
        start = offset - self.request.offset
        end = start + len(data)
        assert 0 <= start < end <= self.request.length, "content outside of the request"
        assert all(end <= low or start >= high for low, high in self.ranges), "content overlaps"
        self.ranges.append((start, end))
        assert not self.request.flags & Cf.DF or len(self.ranges) == 1, "fragments in spite of DF"
        self.data[start:end] = data


class Session:
    def __init__(self, client: RawClient, export: Export, contexts: dict[int, bytes]) -> None:
        self.client = client
        self.export = export
        self.contexts = contexts
        self.pending: dict[int, Answer] = {}
        self._cookies = itertools.count(0xC00C1E0000000001)

    def submit(
        self,
        cmd: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> Request:
        """Send a request; a payload gives the length. Its answer comes from `collect`."""
        cookie = next(self._cookies)
        request = Request(cmd, offset, length or len(payload), cookie, flags, payload)
        self.expect(request)
        self.client.send(request.pack())
        return request

    def expect(self, request: Request) -> None:
        """A request that the test sends by itself."""
        served = request.cmd == Cmd.READ and request.length <= 2 * MAX_PAYLOAD
        room = bytearray(request.length if served else 0)
        self.pending[request.cookie] = Answer(request, data=room)

    def ask(
        self,
        cmd: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> Answer:
        request = self.submit(cmd, offset, length, flags=flags, payload=payload)
        answer = self.collect()
        assert answer.request.cookie == request.cookie, f"answered: {answer.request}"
        return answer

    def ask_plainly(self, cmd: int, flags: int = 0) -> Answer:
        """A request like any other of its kind: 512 bytes at 0, and a payload where one is due."""
        if cmd == Cmd.WRITE:
            return self.ask(cmd, flags=flags, payload=bytes(512))
        return self.ask(cmd, 0, 0 if cmd == Cmd.FLUSH else 512, flags=flags)

    def check(self, offset: int = 4093, length: int = 999) -> None:
        """Both streams are in step: a read brings the right bytes."""
        answer = self.ask(Cmd.READ, offset, length)
        assert answer.error == 0
        assert answer.data == pattern(offset, length)

    def lost(self) -> None:
        """Outstanding requests and one more are told that the upstream is gone."""
        while self.pending:
            assert self.collect().error in GONE
        assert self.ask(Cmd.READ, 0, 512).error in GONE

    def disc(self) -> None:
        """NBD_CMD_DISC: no reply, TLS closed, TCP closed."""
        self.client.send(Request(Cmd.DISC, cookie=0).pack())
        assert self.client.recv_to_end() == b""
        if self.client.tls is not None:
            assert self.client.ended == "close_notify"

    def collect(self) -> Answer:
        """The next answer to be complete."""
        while True:
            answer = self.step()
            if answer.done:
                del self.pending[answer.request.cookie]
                return answer

    def step(self) -> Answer:
        """Read one simple reply or one chunk; the answer may be incomplete still."""
        head = self.client.recv_exactly(4)
        magic = int.from_bytes(head, "big")
        if magic == SIMPLE_MAGIC:
            return self._simple(head + self.client.recv_exactly(SIMPLE.size - 4))
        assert magic == CHUNK_MAGIC, f"reply magic {magic:#x}"
        return self._chunk(head + self.client.recv_exactly(CHUNK.size - 4))

    def _answer(self, cookie: int) -> Answer:
        assert cookie in self.pending, f"unknown cookie {cookie:#x}"
        return self.pending[cookie]

    def _simple(self, raw: bytes) -> Answer:
        _, error, cookie = SIMPLE.unpack(raw)
        answer = self._answer(cookie)
        assert not answer.structured, "a simple reply after chunks"
        read = answer.request.cmd == Cmd.READ
        assert not (read and self.client.structured), "simple reply to READ"
        assert error in LEGAL_ERRORS or not error, f"error {error}"
        if read and not error:
            answer.data[:] = self.client.recv_exactly(answer.request.length)
        answer.error, answer.done = error, True
        return answer

    def _chunk(self, raw: bytes) -> Answer:
        assert self.client.structured, "a chunk, but structured replies were not negotiated"
        _, flags, kind, cookie, length = CHUNK.unpack(raw)
        answer = self._answer(cookie)
        answer.structured = True
        assert not flags & ~DONE, f"chunk flags {flags:#x}"
        answer.done = bool(flags & DONE)
        payload = self.client.recv_exactly(length)
        request = answer.request
        match kind:
            case Ct.NONE:
                assert answer.done, "a chunk of type NONE without DONE"
                assert length == 0
            case Ct.OFFSET_DATA:
                assert request.cmd == Cmd.READ, "data that nobody asked for"
                assert length >= 9
                answer.cover(int.from_bytes(payload[:8], "big"), payload[8:])
            case Ct.OFFSET_HOLE:
                assert request.cmd == Cmd.READ, "a hole that nobody asked for"
                offset, size = struct.unpack(">QI", payload)
                answer.cover(offset, bytes(size))
            case Ct.BLOCK_STATUS:
                self._status(answer, payload)
            case _ if kind & ERROR_BIT:  # an unknown one is just an error
                self._error(answer, kind, payload)
            case _:
                raise AssertionError(f"chunk type {kind:#x}")
        if answer.done and not answer.error:
            if request.cmd == Cmd.READ:
                covered = sum(high - low for low, high in answer.ranges)
                assert covered == request.length, "success, but bytes are missing"
            if request.cmd == Cmd.BLOCK_STATUS:
                assert set(answer.extents) == set(self.contexts), "not one chunk per context"
        return answer

    def _status(self, answer: Answer, payload: bytes) -> None:
        request = answer.request
        assert request.cmd == Cmd.BLOCK_STATUS, "block status that nobody asked for"
        assert len(payload) >= 12
        assert len(payload) % 8 == 4
        assert len(payload) <= 4 + (8 << 20)
        ident = int.from_bytes(payload[:4], "big")
        assert ident in self.contexts, f"context {ident:#x} was not negotiated"
        assert ident not in answer.extents, "a second chunk for one context"
        extents = list(struct.iter_unpack(">II", payload[4:]))
        answer.extents[ident] = extents
        assert all(length for length, _ in extents), "an empty extent"
        assert sum(length for length, _ in extents[:-1]) < request.length
        if request.flags & Cf.REQ_ONE:
            assert len(extents) == 1
            assert extents[0][0] <= request.length

    def _error(self, answer: Answer, kind: int, payload: bytes) -> None:
        fixed = 14 if kind == Ct.ERROR_OFFSET else 6
        assert len(payload) >= fixed
        error, text_length = struct.unpack_from(">IH", payload)
        assert text_length <= min(4096, len(payload) - fixed), "error text longer than the chunk"
        text = payload[6 : 6 + text_length].decode()
        assert not text or text.isprintable(), f"not fit for display: {text!r}"
        assert error in LEGAL_ERRORS, f"error {error}"
        if kind == Ct.ERROR_OFFSET:
            (offset,) = struct.unpack_from(">Q", payload, 6 + text_length)
            first = answer.request.offset
            assert first <= offset < first + answer.request.length
        answer.error = answer.error or error
