"""The transmission phase of one session: every header checked, payload only counted.

Two walks over the caller's buffers, one in each direction. A walk reads whole headers, writes our
cookie over the peer's in place (proto.md, "Transmission": a cookie is opaque, and a sloppy client
may use one twice), and names the spans of the buffer that may go on. Payload that runs past the
buffer is passed by count, so that large reads and writes are never assembled.

Requests that the upstream must not see are answered here: `take_local_replies`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gateway.errors import PeerError
from gateway.nbd.constants import (
    CHUNK_ERROR_BIT,
    MAX_EXTENTS,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Error,
    ReplyFlag,
)
from gateway.nbd.pairing import Terms
from gateway.nbd.replies import ChunkedReply, error_reply, legal_error, success_reply
from gateway.nbd.requests import ANSWERED_HERE, CHANGES_DATA, RequestRules
from gateway.nbd.wire import (
    CHUNK,
    ERROR_CHUNK,
    HOLE,
    REQUEST,
    SIMPLE_REPLY,
    U16,
    U32,
    U64,
    disconnect_request,
)

Span = tuple[int, int]
"""Start and stop of bytes in the caller's buffer that may be sent on as they are."""

COOKIE_AT = 8  # in a request, a simple reply and a chunk alike
MAX_STATUS_DATA = 4 + 8 * MAX_EXTENTS
MAX_ERROR_DATA = 6 + MAX_STRING + 64  # room for the fields of error types yet unknown

_REQUEST_SIZE = REQUEST.size
_SIMPLE_SIZE = SIMPLE_REPLY.size
_CHUNK_SIZE = CHUNK.size
_DATA_HEADER_SIZE = CHUNK.size + U64.size
_READ, _WRITE = int(Cmd.READ), int(Cmd.WRITE)
_DISC, _BLOCK_STATUS = int(Cmd.DISC), int(Cmd.BLOCK_STATUS)
_DONE = int(ReplyFlag.DONE)
_FUA = int(CmdFlag.FUA)
# A block status may always tell less than was asked. Asked for nearly 4 GiB, some servers come to
# grief in their own arithmetic (CVE-2025-47711), so they are asked for less, in whole blocks.
_MAX_STATUS_LENGTH = (1 << 32) - (1 << 16)
_ZEROES = memoryview(bytes(1 << 16))


class Request(NamedTuple):
    """A request that the upstream has not answered yet."""

    cookie: int  # the client's
    kind: int
    flags: int
    offset: int
    length: int


class Transmission:
    """Both directions of one session. Not aware of time, sockets or TLS.

    Feed `requests` with what the client sent and `replies` with what the upstream sent, and send
    on what they name. Then look at the attributes:

    `client_done`: the client sent NBD_CMD_DISC; nothing behind it is read.
    `client_fault`, `upstream_fault`: that peer broke the protocol at this point of its stream.
    `upstream_ends`: the upstream has answered NBD_ESHUTDOWN; disconnect once nothing is in flight.
    `trailer`, `wanted`: see `replies`.
    """

    def __init__(self, terms: Terms) -> None:
        self.client_done = False
        self.client_fault: PeerError | None = None
        self.upstream_fault: PeerError | None = None
        self.upstream_ends = False
        self.trailer = b""
        self.wanted = 0
        self._rules = RequestRules(terms)
        self._structured = terms.structured_replies
        self._context_ids = frozenset(one.id for one in terms.contexts)
        self._next_cookie = 1  # 0 stands for "none"
        self._in_flight: dict[int, Request] = {}
        self._chunked: dict[int, ChunkedReply] = {}  # replies of more than one chunk, under way
        self._local: list[bytes] = []
        self._upstream_lost = False
        # A WRITE's payload on its way from the client:
        self._payload_left = 0
        self._payload_cookie = 0  # ours; 0 when it is not forwarded
        self._payload_reply = b""  # what to say behind a payload that is thrown away
        # A READ's payload on its way to the client:
        self._reply_left = 0
        self._reply_can_fail = False  # it is a chunk, and an error chunk may follow
        self._trailer_for = 0  # ours; of the reply whose last chunk it is, DONE taken off

    # -- what a shell wants to know

    @property
    def in_flight(self) -> int:
        """Requests that the upstream has not answered yet."""
        return len(self._in_flight)

    @property
    def idle(self) -> bool:
        """Whether every request is answered, to its last byte."""
        return not self._in_flight and not self._reply_left

    @property
    def mid_request(self) -> bool:
        """Whether the upstream is owed payload. It would take anything else for data."""
        return bool(self._payload_left and self._payload_cookie)

    @property
    def mid_payload(self) -> bool:
        """Whether the client owes payload, forwarded or not."""
        return bool(self._payload_left)

    @property
    def mid_reply(self) -> bool:
        """Whether the client is in the middle of a message, so that no other may start."""
        return bool(self._reply_left)

    def take_local_replies(self) -> bytes:
        """Replies to requests that were not forwarded, in the order of the requests."""
        if not self._local:
            return b""
        replies = b"".join(self._local)
        self._local.clear()
        return replies

    def disconnect_request(self) -> bytes:
        """NBD_CMD_DISC for the upstream. Not to be sent while `mid_request`."""
        assert not self.mid_request, "DISC would be taken for data"
        return disconnect_request()

    def shutdown(self) -> None:
        """Answer NBD_ESHUTDOWN from now on; what is in flight goes on to its end."""
        self._rules.refuse_all()

    # -- client to upstream

    def requests(self, buffer: bytearray, at: int, end: int) -> tuple[int, list[Span]]:
        """Walk `buffer[at:end]`. Returns up to where it is done with, and what to send upstream.

        Bytes that are not done with are less than one header; bring them again with the next.
        """
        spans: list[Span] = []
        start = at
        if self._payload_left:
            at += self._pass_payload(end - at)
            if not self._payload_cookie:
                start = at
            if not self._payload_left:
                self._end_payload()
        rules = self._rules
        size, mask, limits, forbidden = rules.size, rules.mask, rules.limits, rules.forbidden_flags
        in_flight, unpack, pack_cookie = (
            self._in_flight,
            REQUEST.unpack_from,
            U64.pack_into,
        )
        while end - at >= _REQUEST_SIZE:
            magic, flags, kind, cookie, offset, length = unpack(buffer, at)
            if magic != REQUEST_MAGIC:
                self.client_fault = PeerError("client", f"request magic {magic:#010x}")
                break
            if not (
                kind < 2
                and 0 < length <= limits[kind]
                and offset + length <= size
                and not (offset | length) & mask
                and not flags & forbidden[kind]
            ):
                if kind == _DISC:
                    self.client_done = True
                    break
                try:
                    verdict = rules.verdict(kind, flags, offset, length)
                except PeerError as fault:
                    self.client_fault = fault
                    break
                if verdict:
                    if start < at:
                        spans.append((start, at))
                    at += _REQUEST_SIZE
                    at += self._answer_here(verdict, cookie, kind, length, end - at)
                    start = at
                    continue
                if flags & _FUA and kind not in CHANGES_DATA:
                    U16.pack_into(buffer, at + 4, flags & ~_FUA)
                if kind == _BLOCK_STATUS and length > _MAX_STATUS_LENGTH:
                    length = _MAX_STATUS_LENGTH
                    U32.pack_into(buffer, at + 24, length)
            mine = self._next_cookie
            self._next_cookie = mine + 1
            in_flight[mine] = Request(cookie, kind, flags, offset, length)
            pack_cookie(buffer, at + COOKIE_AT, mine)
            at += _REQUEST_SIZE
            if kind == _WRITE:
                if length > end - at:
                    self._payload_left = length - (end - at)
                    self._payload_cookie = mine
                    at = end
                    break
                at += length
        if start < at:
            spans.append((start, at))
        return at, spans

    def _pass_payload(self, available: int) -> int:
        passed = min(self._payload_left, available)
        self._payload_left -= passed
        return passed

    def _end_payload(self) -> None:
        self._payload_cookie = 0
        if self._payload_reply:
            self._local.append(self._payload_reply)
            self._payload_reply = b""

    def _answer_here(
        self, verdict: int, cookie: int, kind: int, length: int, available: int
    ) -> int:
        """Answer a request that is not forwarded. Returns how much of its payload was dropped."""
        if verdict == ANSWERED_HERE:
            self._local.append(success_reply(cookie, kind, structured=self._structured))
            return 0
        reply = error_reply(cookie, verdict, structured=self._structured)
        if kind != _WRITE:
            self._local.append(reply)
            return 0
        # "Rejected" is not "not sent": the payload is on its way, and the reply comes behind it.
        self._payload_left, self._payload_reply = length, reply
        dropped = self._pass_payload(available)
        if not self._payload_left:
            self._end_payload()
        return dropped

    # -- upstream to client

    def replies(self, buffer: bytearray, at: int, end: int) -> int:
        """Walk `buffer[at:end]`. Returns up to where it is done with: all that may be sent on.

        Send `trailer` behind it, and if there is one, call again with the rest. Bytes that are not
        done with are part of one message; bring them again with the next, in a buffer that has
        room for `wanted` bytes of them.
        """
        self.trailer = b""
        self.wanted = 0
        if self._reply_left:
            passed = min(self._reply_left, end - at)
            self._reply_left -= passed
            at += passed
            if not self._reply_left and self._trailer_for:
                request = self._in_flight.pop(self._trailer_for)
                self._chunked.pop(self._trailer_for, None)
                self._trailer_for = 0
                self.trailer = success_reply(request.cookie, request.kind, structured=True)
                return at
        try:
            while end - at >= _SIMPLE_SIZE:
                (magic,) = U32.unpack_from(buffer, at)
                if magic == SIMPLE_REPLY_MAGIC:
                    after = self._simple_reply(buffer, at, end)
                elif magic == STRUCTURED_REPLY_MAGIC and self._structured:
                    after = self._chunk(buffer, at, end)
                else:
                    raise PeerError("upstream", f"reply magic {magic:#010x}")
                if after == at:
                    break
                at = after
        except PeerError as fault:
            self.upstream_fault = fault
        return at

    def _request(self, cookie: int) -> Request:
        request = self._in_flight.get(cookie)
        if request is None:
            raise PeerError("upstream", f"a reply with cookie {cookie:#x}, which nobody sent")
        if cookie == self._payload_cookie:
            raise PeerError("upstream", "a reply to a write whose payload it does not have yet")
        return request

    def _begin_payload(self, at: int, end: int, length: int, *, can_fail: bool) -> int:
        """A READ's payload starts at `at`. Returns where it ends within this buffer."""
        if length > end - at:
            self._reply_left = length - (end - at)
            self._reply_can_fail = can_fail
            return end
        return at + length

    def _simple_reply(self, buffer: bytearray, at: int, end: int) -> int:
        """proto.md, "Simple reply message"."""
        _, error, mine = SIMPLE_REPLY.unpack_from(buffer, at)
        request = self._request(mine)
        if self._structured and (
            request.kind == _READ or (request.kind == _BLOCK_STATUS and not error)
        ):
            raise PeerError("upstream", "a simple reply where a structured one is due")
        if mine in self._chunked:
            raise PeerError("upstream", "a simple reply to a request that has chunks")
        del self._in_flight[mine]
        if error:
            U32.pack_into(buffer, at + 4, legal_error(error))
            self._look_for_shutdown(error)
        U64.pack_into(buffer, at + COOKIE_AT, request.cookie)
        at += _SIMPLE_SIZE
        if request.kind == _READ and not error:
            return self._begin_payload(at, end, request.length, can_fail=False)
        return at

    def _chunk(self, buffer: bytearray, at: int, end: int) -> int:
        """proto.md, "Structured reply chunk message". Returns `at` while it is not whole."""
        if end - at < _CHUNK_SIZE:
            return at
        _, flags, kind, mine, length = CHUNK.unpack_from(buffer, at)
        request = self._request(mine)
        done = bool(flags & _DONE)
        if kind == Chunk.OFFSET_DATA:
            if length <= U64.size:
                raise PeerError("upstream", f"a data chunk of {length} bytes")
            if end - at < _DATA_HEADER_SIZE:
                return at
            (offset,) = U64.unpack_from(buffer, at + _CHUNK_SIZE)
            count = length - U64.size
            if not (
                done
                and offset == request.offset
                and count == request.length
                and request.kind == _READ
                and mine not in self._chunked
            ):  # not the whole answer in one chunk
                self._chunked_reply(mine, request).content(offset, count)
                if done:
                    self._chunked[mine].finish()
            after = at + _DATA_HEADER_SIZE
            after = self._begin_payload(after, end, count, can_fail=True)
            if done and self._reply_left:
                # The rest may never come, so this is not the last chunk: "MUST NOT do so for a
                # content chunk if it would still be possible to detect an error".
                U16.pack_into(buffer, at + 4, 0)
                self._trailer_for, flags, done = mine, 0, False
        else:
            self._check_length(kind, length)
            after = at + _CHUNK_SIZE + length
            if after > end:
                self.wanted = after - at
                return at
            self._small_chunk(buffer, at, kind, mine, request, length, done=done)
        if done:
            del self._in_flight[mine]
            self._chunked.pop(mine, None)
        if flags & ~_DONE:  # flags that were not negotiated with the client
            U16.pack_into(buffer, at + 4, flags & _DONE)
        U64.pack_into(buffer, at + COOKIE_AT, request.cookie)
        return after

    def _chunked_reply(self, mine: int, request: Request) -> ChunkedReply:
        if (reply := self._chunked.get(mine)) is None:
            reply = self._chunked[mine] = ChunkedReply(
                request.kind,
                request.flags,
                request.offset,
                request.length,
                self._context_ids,
            )
        return reply

    @staticmethod
    def _check_length(kind: int, length: int) -> None:
        """Raises PeerError for a chunk that is not worth waiting for. proto.md, "Structured
        reply types"."""
        match kind:
            case Chunk.NONE:
                fits = length == 0
            case Chunk.OFFSET_HOLE:
                fits = length == HOLE.size
            case Chunk.BLOCK_STATUS:
                fits = 12 <= length <= MAX_STATUS_DATA and length % 8 == 4
            case Chunk.ERROR_OFFSET:
                fits = ERROR_CHUNK.size + U64.size <= length <= MAX_ERROR_DATA
            case _ if kind & CHUNK_ERROR_BIT:
                fits = ERROR_CHUNK.size <= length <= MAX_ERROR_DATA
            case _:
                raise PeerError("upstream", f"unknown chunk type {kind}")
        if not fits:
            raise PeerError("upstream", f"chunk of type {kind:#x} with {length} bytes")

    def _small_chunk(
        self,
        buffer: bytearray,
        at: int,
        kind: int,
        mine: int,
        request: Request,
        length: int,
        *,
        done: bool,
    ) -> None:
        """A chunk other than data, whole in the buffer. Raises PeerError."""
        reply = self._chunked_reply(mine, request)
        data_at = at + _CHUNK_SIZE
        if kind == Chunk.NONE:
            if not done:
                raise PeerError("upstream", "NBD_REPLY_TYPE_NONE that is not the last chunk")
        elif kind == Chunk.OFFSET_HOLE:
            reply.content(*HOLE.unpack_from(buffer, data_at))
        elif kind == Chunk.BLOCK_STATUS:
            reply.status(buffer, data_at, length)
        else:
            self._look_for_shutdown(reply.error(buffer, data_at, kind, length))
        if done:
            reply.finish()

    # -- the end of the upstream

    def _look_for_shutdown(self, error: int) -> None:
        """ "If the client receives an NBD_ESHUTDOWN error it MUST initiate a soft disconnect." """
        if error == Error.ESHUTDOWN:
            self.upstream_ends = True
            self.shutdown()

    def lose_upstream(self) -> Iterator[bytes | memoryview] | None:
        """The upstream is gone. Returns what the client is to be sent, once and in full.

        Everything in flight is answered NBD_ESHUTDOWN, and so is every later request. None when
        the client cannot be told: a payload was promised without a way to say that it failed, and
        "the server MUST immediately initiate a hard disconnect".
        """
        self.shutdown()
        if self._reply_left and not self._reply_can_fail:
            return None
        if self._upstream_lost:
            return iter(())
        self._upstream_lost = True
        self._trailer_for = 0
        if self.mid_request:  # its reply comes behind its payload
            cut = self._in_flight.pop(self._payload_cookie)
            self._payload_cookie = 0
            self._payload_reply = self._shutdown_reply(cut)
        return self._last_words()

    def _last_words(self) -> Iterator[bytes | memoryview]:
        while self._reply_left:  # "it MUST use padding bytes which SHOULD be zero"
            padding = _ZEROES[: self._reply_left]
            self._reply_left -= len(padding)
            yield padding
        unanswered = list(self._in_flight.values())
        self._in_flight.clear()
        self._chunked.clear()
        for request in unanswered:
            yield self._shutdown_reply(request)

    def _shutdown_reply(self, request: Request) -> bytes:
        return error_reply(request.cookie, Error.ESHUTDOWN, structured=self._structured)
