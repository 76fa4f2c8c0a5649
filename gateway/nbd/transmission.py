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
    MAX_UNADVERTISED_PAYLOAD,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    UNLIMITED_PAYLOAD,
    Chunk,
    Cmd,
    CmdFlag,
    Error,
    ReplyFlag,
    TransmissionFlag,
)
from gateway.nbd.pairing import Terms
from gateway.nbd.replies import ChunkedReply, error_reply, legal_error, success_reply
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
# Plain ints: `~` of an IntFlag is the complement within its members, not of all bits.
_FUA, _NO_HOLE, _DF = int(CmdFlag.FUA), int(CmdFlag.NO_HOLE), int(CmdFlag.DF)
_REQ_ONE, _FAST_ZERO = int(CmdFlag.REQ_ONE), int(CmdFlag.FAST_ZERO)
# A block status may always tell less than was asked. Asked for nearly 4 GiB, some servers come to
# grief in their own arithmetic (CVE-2025-47711), so they are asked for less, in whole blocks.
_MAX_STATUS_LENGTH = (1 << 32) - (1 << 16)
_ZEROES = memoryview(bytes(1 << 16))

_CHANGES_DATA = frozenset({Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES})
_ANSWERED_HERE = -1  # a verdict beside 0 (forward) and NBD_E* (refuse): success without upstream


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
    `wanted`: `replies` can go on only with a buffer of at least this many bytes.
    """

    def __init__(self, terms: Terms) -> None:
        self.client_done = False
        self.client_fault: PeerError | None = None
        self.upstream_fault: PeerError | None = None
        self.wanted = 0
        self._terms = terms
        self._structured = terms.structured_replies
        self._context_ids = frozenset(one.id for one in terms.contexts)
        self._mask = terms.block_sizes.minimum - 1
        self._max_payload = terms.block_sizes.maximum
        self._next_cookie = 1  # 0 stands for "none"
        self._in_flight: dict[int, Request] = {}
        self._chunked: dict[int, ChunkedReply] = {}  # replies of more than one chunk, under way
        self._local: list[bytes] = []
        self._refusing = False  # answer everything with NBD_ESHUTDOWN
        self._upstream_lost = False
        # A WRITE's payload on its way from the client:
        self._payload_left = 0
        self._payload_cookie = 0  # ours; 0 when it is not forwarded
        self._payload_reply = b""  # what to say behind a payload that is thrown away
        # A READ's payload on its way to the client:
        self._reply_left = 0
        self._reply_to_be_continued = False  # more chunks follow for the same request
        # READ and WRITE within these bounds are forwarded without a closer look.
        self._forbidden_flags = [0xFFFF & ~flags for flags in self._flags_of_reads_and_writes()]
        self._limits = [
            UNLIMITED_PAYLOAD if self._structured else self._max_payload,
            0 if terms.read_only else self._max_payload,
        ]

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
        self._refusing = True
        self._limits = [0, 0]

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
        size, mask, limits, forbidden = (
            self._terms.size,
            self._mask,
            self._limits,
            self._forbidden_flags,
        )
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
                if verdict := self._verdict(kind, flags, offset, length):
                    if start < at:
                        spans.append((start, at))
                    if self.client_fault:
                        return at, spans
                    at += _REQUEST_SIZE
                    at += self._answer_here(verdict, cookie, kind, length, end - at)
                    start = at
                    continue
                if flags & _FUA and kind not in _CHANGES_DATA:
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
        if verdict == _ANSWERED_HERE:
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

    def _verdict(self, kind: int, flags: int, offset: int, length: int) -> int:
        """0: forward. -1: success, without the upstream. Else the NBD_E* to refuse with.

        proto.md, "Size constraints", "Command flags", "Request types" and "Error values".
        """
        terms = self._terms
        if kind == _WRITE and length > max(self._max_payload, MAX_UNADVERTISED_PAYLOAD):
            self.client_fault = PeerError("client", f"NBD_CMD_WRITE of {length} bytes")
            return Error.EINVAL
        if self._refusing:
            return Error.ESHUTDOWN
        if kind in _CHANGES_DATA and terms.read_only:
            return Error.EPERM
        allowed = self._allowed_flags(kind)
        if allowed is None or flags & ~allowed:
            return Error.EINVAL
        if kind == Cmd.FLUSH:
            return Error.EINVAL if offset or length else 0
        if offset > terms.size or length > terms.size - offset:
            return Error.ENOSPC if kind in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Error.EINVAL
        if length == 0:  # "unspecified", and some servers do not survive it: never forwarded
            return Error.EINVAL if kind == _BLOCK_STATUS else _ANSWERED_HERE
        if (offset | length) & self._mask:
            return Error.EINVAL
        if kind < 2 and length > self._limits[kind]:
            return Error.EINVAL
        return 0

    def _allowed_flags(self, kind: int) -> int | None:
        """Command flags that this command may carry; None if the command was not negotiated."""
        features = self._terms.flags
        fua = _FUA if features & TransmissionFlag.SEND_FUA else 0
        match kind:
            case Cmd.READ:
                return fua | (_DF if features & TransmissionFlag.SEND_DF else 0)
            case Cmd.WRITE:
                return fua
            case Cmd.FLUSH if features & TransmissionFlag.SEND_FLUSH:
                return fua
            case Cmd.TRIM if features & TransmissionFlag.SEND_TRIM:
                return fua
            case Cmd.CACHE if features & TransmissionFlag.SEND_CACHE:
                return fua
            case Cmd.WRITE_ZEROES if features & TransmissionFlag.SEND_WRITE_ZEROES:
                fast = _FAST_ZERO if features & TransmissionFlag.SEND_FAST_ZERO else 0
                return fua | _NO_HOLE | fast
            case Cmd.BLOCK_STATUS if self._context_ids:
                return fua | _REQ_ONE
            case _:
                return None

    def _flags_of_reads_and_writes(self) -> tuple[int, int]:
        """Flags that need no closer look. FUA on a READ does: it is taken off."""
        read, write = self._allowed_flags(Cmd.READ), self._allowed_flags(Cmd.WRITE)
        return (read or 0) & ~_FUA, write or 0

    # -- upstream to client

    def replies(self, buffer: bytearray, end: int) -> int:
        """Walk `buffer[:end]`. Returns how many bytes are done with: all of them may be sent on.

        Bytes that are not done with are part of one message; bring them again, at the front, in a
        buffer of `wanted` bytes at least.
        """
        at = min(self._reply_left, end)
        self._reply_left -= at
        self.wanted = 0
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

    def _begin_payload(self, at: int, end: int, length: int, *, to_be_continued: bool) -> int:
        """A READ's payload starts at `at`. Returns where it ends within this buffer."""
        if length > end - at:
            self._reply_left = length - (end - at)
            self._reply_to_be_continued = to_be_continued
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
        U64.pack_into(buffer, at + COOKIE_AT, request.cookie)
        at += _SIMPLE_SIZE
        if request.kind == _READ and not error:
            return self._begin_payload(at, end, request.length, to_be_continued=False)
        return at

    def _chunk(self, buffer: bytearray, at: int, end: int) -> int:
        """proto.md, "Structured reply chunk message". Returns `at` while it is not whole."""
        if end - at < _CHUNK_SIZE:
            return at
        _, flags, kind, mine, length = CHUNK.unpack_from(buffer, at)
        request = self._request(mine)
        done = bool(flags & _DONE)
        if kind == Chunk.OFFSET_DATA:
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
            after = self._begin_payload(after, end, count, to_be_continued=not done)
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
            reply.error(buffer, data_at, kind, length)
        if done:
            reply.finish()

    # -- the end of the upstream

    def lose_upstream(self) -> Iterator[bytes | memoryview] | None:
        """The upstream is gone. Returns what the client is to be sent, once and in full.

        Everything in flight is answered NBD_ESHUTDOWN, and so is every later request. None when
        the client cannot be told: a payload was promised without a way to say that it failed, and
        "the server MUST immediately initiate a hard disconnect".
        """
        self.shutdown()
        if self._reply_left and not self._reply_to_be_continued:
            return None
        if self._upstream_lost:
            return iter(())
        self._upstream_lost = True
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
