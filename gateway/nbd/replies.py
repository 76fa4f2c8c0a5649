"""Single replies: those that the gateway gives itself, and the upstream's checked as they pass."""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right

from gateway.errors import PeerError
from gateway.nbd.constants import (
    CHUNK_ERROR_BIT,
    MAX_EXTENTS,
    MAX_STRING,
    SIMPLE_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Error,
    ReplyFlag,
)
from gateway.nbd.framing import framing
from gateway.nbd.in_flight import ErrorChunk, Request
from gateway.nbd.wire import ERROR_CHUNK, HOLE, SIMPLE_REPLY, U32, U64

_TEXTS = {
    Error.EPERM: b"this export is read-only",
    Error.EIO: b"input/output error of the server",
    Error.ENOMEM: b"the server is out of memory",
    Error.EINVAL: b"not a valid request for this export",
    Error.ENOSPC: b"beyond the end of the export, or no space left",
    Error.EOVERFLOW: b"too large for one reply",
    Error.ENOTSUP: b"no faster than writing zeroes",
    Error.ESHUTDOWN: b"the server is gone or going: disconnect",
}
MAX_ERROR_DATA = 6 + MAX_STRING + 64  # room for the fields of error types yet unknown
_MAX_RUNS = 4096  # pieces that do not touch: each costs time and memory
# For a text that is no UTF-8, or moves the cursor: bytes that are not printable ASCII become "?".
_PRINTABLE = bytes(byte if 32 <= byte < 127 else ord("?") for byte in range(256))
_LEGAL = frozenset(Error)
# In front of the extents of a block status, and each of them: compact, extended.
_STATUS_SIZES = ((4, 8), (8, 16))
_EXTENTS_AT_A_TIME = 8192  # as numbers they take ten times as much memory
MAX_STATUS_DATA = 4 + 8 * MAX_EXTENTS
_TRANSLATED = {
    errno.EROFS: Error.EPERM,
    errno.EDQUOT: Error.ENOSPC,
    errno.EFBIG: Error.ENOSPC,
}


def legal_error(error: int) -> int:
    """An upstream's error value as one that a client may be sent. proto.md, "Error values"."""
    if error in _LEGAL:
        return error
    return _TRANSLATED.get(error, Error.EINVAL)


def _showable(text: bytearray) -> bytes | bytearray:
    """A text "suitable for direct display to a human being", of the same length in bytes."""
    try:
        return text if text.decode().isprintable() else text.translate(_PRINTABLE)
    except UnicodeDecodeError:
        return text.translate(_PRINTABLE)


class Replies:
    """The replies that the gateway makes itself, in the style that the client has negotiated.

    proto.md, "Simple reply message", "Structured reply chunk message", and "Extended reply chunk
    message" of its branch extension-ext-header.
    """

    def __init__(self, *, structured: bool, extended: bool) -> None:
        self._chunks = structured or extended
        self._extended = extended
        self._framing = framing(extended=extended)

    def success(self, request: Request) -> bytes:
        """Success without data: of a request of no bytes, or behind all the data."""
        if self._extended or (self._chunks and request.kind == Cmd.READ):
            return self._chunk(request, ReplyFlag.DONE, Chunk.NONE, 0)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def end(self, request: Request) -> bytes:
        """The last chunk of a reply whose other chunks have said everything."""
        return self._chunk(request, ReplyFlag.DONE, Chunk.NONE, 0)

    def error(self, request: Request, error: int, chunk: ErrorChunk | None = None) -> bytes:
        """An error; in a chunk it has a text for the user, ours unless `chunk` is given."""
        if not self._chunks:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, request.cookie)
        if chunk is None:
            text = _TEXTS[Error(error)]
            chunk = ErrorChunk(Chunk.ERROR, ERROR_CHUNK.pack(error, len(text)) + text)
        header = self._chunk(request, ReplyFlag.DONE, chunk.kind, len(chunk.data))
        return header + chunk.data

    def data(self, request: Request, offset: int, count: int, *, done: bool) -> bytes:
        """What stands before `count` bytes of data in the reply to a READ."""
        if not self._chunks:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)
        header = self._chunk(
            request, ReplyFlag.DONE if done else 0, Chunk.OFFSET_DATA, U64.size + count
        )
        return header + U64.pack(offset)

    def hole(self, request: Request, offset: int, count: int, *, done: bool) -> bytes:
        """`count` bytes of zeroes in the reply to a READ. Not for simple replies."""
        header = self._chunk(request, ReplyFlag.DONE if done else 0, Chunk.OFFSET_HOLE, HOLE.size)
        return header + HOLE.pack(offset, count)

    def _chunk(self, request: Request, flags: int, kind: int, length: int) -> bytes:
        return self._framing.pack_chunk(flags, kind, request.cookie, request.offset, length)


class ChunkedReply:
    """What the chunks of one structured reply have said so far.

    Each method takes one chunk and raises PeerError where the specification lets a client
    disconnect (proto.md, "Structured reply types").
    """

    __slots__ = (
        "_base_ids",
        "_context_ids",
        "_covered",
        "_extended",
        "_failed",
        "_flags",
        "_kind",
        "_length",
        "_offset",
        "_seen_ids",
        "_starts",
        "_stops",
        "error_chunk",
    )

    def __init__(
        self,
        request: Request,
        context_ids: frozenset[int],
        *,
        base_ids: frozenset[int] = frozenset(),
        extended: bool,
    ) -> None:
        self._base_ids = base_ids
        self._kind = request.kind
        self._flags = request.flags
        self._offset = request.offset
        self._length = request.length
        self._context_ids = context_ids if request.context_ids is None else request.context_ids
        self._extended = extended
        self._seen_ids: set[int] = set()
        self._failed = False
        self.error_chunk: tuple[int, ErrorChunk] | None = None  # the first
        self._covered = 0
        # Disjoint runs of bytes that content chunks have covered, sorted. One run, mostly.
        self._starts: list[int] = []
        self._stops: list[int] = []

    def content(self, offset: int, count: int) -> None:
        """NBD_REPLY_TYPE_OFFSET_DATA or _HOLE: `count` bytes at `offset`."""
        if self._kind != Cmd.READ:
            raise PeerError("upstream", "data in the reply to a request that is not a read")
        stop = offset + count
        if count < 1 or offset < self._offset or stop > self._offset + self._length:
            raise PeerError("upstream", f"data at {offset}+{count}, outside the read")
        if self._starts and self._flags & CmdFlag.DF:
            raise PeerError("upstream", "two content chunks in spite of NBD_CMD_FLAG_DF")
        after = bisect_right(self._starts, offset)
        if (after and self._stops[after - 1] > offset) or (
            after < len(self._starts) and self._starts[after] < stop
        ):
            raise PeerError("upstream", f"data at {offset}+{count} for the second time")
        self._covered += count
        self._join(after, offset, stop)

    def _join(self, after: int, start: int, stop: int) -> None:
        """Add a run in front of the run with index `after`. Runs that touch become one."""
        starts, stops = self._starts, self._stops
        joins_before = after > 0 and stops[after - 1] == start
        joins_behind = after < len(starts) and starts[after] == stop
        if joins_before and joins_behind:
            stops[after - 1] = stops.pop(after)
            del starts[after]
        elif joins_before:
            stops[after - 1] = stop
        elif joins_behind:
            starts[after] = start
        else:
            if len(starts) == _MAX_RUNS:
                raise PeerError("upstream", "a read's reply in too many pieces out of order")
            starts.insert(after, start)
            stops.insert(after, stop)

    @property
    def failed(self) -> bool:
        """Whether the client has been told of an error."""
        return self._failed

    @property
    def contexts_told(self) -> frozenset[int]:
        """The meta contexts whose status has been told."""
        return frozenset(self._seen_ids)

    def check_length(self, kind: int, length: int) -> None:
        """The length of a chunk's payload, before that is waited for; OFFSET_DATA apart."""
        status = Chunk.BLOCK_STATUS_EXT if self._extended else Chunk.BLOCK_STATUS
        match kind:
            case Chunk.NONE:
                fits = length == 0
            case Chunk.OFFSET_HOLE:
                fits = length == HOLE.size
            case _ if kind == status:
                head, each = _STATUS_SIZES[self._extended]
                fits = head + each <= length <= head + each * MAX_EXTENTS
                fits = fits and (length - head) % each == 0
            case Chunk.ERROR_OFFSET:
                fits = ERROR_CHUNK.size + U64.size <= length <= MAX_ERROR_DATA
            case _ if kind & CHUNK_ERROR_BIT:
                fits = ERROR_CHUNK.size <= length <= MAX_ERROR_DATA
            case _:
                raise PeerError("upstream", f"unknown chunk type {kind}")
        if not fits:
            raise PeerError("upstream", f"chunk of type {kind:#x} with {length} bytes")

    def take(self, buffer: bytearray, at: int, kind: int, length: int, *, done: bool) -> int:
        """Any chunk of a legal length; OFFSET_DATA apart. Its payload is at `at`.

        Returns the error in it, or 0.
        """
        if kind == Chunk.NONE:
            if not done:
                raise PeerError("upstream", "NBD_REPLY_TYPE_NONE that is not the last chunk")
        elif kind == Chunk.OFFSET_HOLE:
            self.content(*HOLE.unpack_from(buffer, at))
        elif kind & CHUNK_ERROR_BIT:
            return self.error(buffer, at, kind, length)
        else:
            self.status(buffer, at, length)
        return 0

    def status(self, buffer: bytearray, at: int, length: int) -> None:
        """NBD_REPLY_TYPE_BLOCK_STATUS, or _EXT: `length` bytes at `buffer[at:]`, a legal length."""
        if self._kind != Cmd.BLOCK_STATUS:
            raise PeerError("upstream", "a block status that nobody asked for")
        (context,) = U32.unpack_from(buffer, at)
        if context not in self._context_ids or context in self._seen_ids:
            raise PeerError("upstream", f"block status for meta context id {context}")
        self._seen_ids.add(context)
        head, each = _STATUS_SIZES[self._extended]
        count = (length - head) // each
        if self._extended and U32.unpack_from(buffer, at + 4)[0] != count:
            raise PeerError("upstream", f"a wrong count of extents, where there are {count}")
        told = last = 0
        word = "Q" if self._extended else "I"
        for first in range(0, count, _EXTENTS_AT_A_TIME):
            some = min(count - first, _EXTENTS_AT_A_TIME)
            words = struct.unpack_from(f">{2 * some}{word}", buffer, at + head + each * first)
            lengths = words[::2]
            if self._extended and context in self._base_ids and max(words[1::2]) >> 32:
                raise PeerError("upstream", "a status of more than 32 bits in a base: context")
            if 0 in lengths:
                raise PeerError("upstream", "an extent of no bytes")
            told, last = told + sum(lengths), lengths[-1]
        if told - last >= self._length:
            raise PeerError("upstream", "extents beyond the request before the last one")
        if self._flags & CmdFlag.REQ_ONE and (count > 1 or last > self._length):
            raise PeerError("upstream", "more than the one extent asked for")

    def error(self, buffer: bytearray, at: int, kind: int, length: int) -> int:
        """Any error chunk, known or not. Returns the error.

        Makes it fit for the client, in place: a legal error value, and a text that can be shown.
        """
        error, text_length = ERROR_CHUNK.unpack_from(buffer, at)
        fields = U64.size if kind == Chunk.ERROR_OFFSET else 0
        if error == 0:
            raise PeerError("upstream", "an error chunk without an error")
        if text_length > min(length - ERROR_CHUNK.size - fields, MAX_STRING):
            raise PeerError("upstream", f"an error text of {text_length} bytes in {length}")
        if fields:
            (offset,) = U64.unpack_from(buffer, at + ERROR_CHUNK.size + text_length)
            if not self._offset <= offset < self._offset + self._length:
                raise PeerError("upstream", f"an error at {offset}, outside the request")
        self._failed = True
        error = legal_error(error)
        U32.pack_into(buffer, at, error)
        text_at = at + ERROR_CHUNK.size
        buffer[text_at : text_at + text_length] = _showable(buffer[text_at : text_at + text_length])
        if self.error_chunk is None:
            self.error_chunk = error, ErrorChunk(kind, bytes(buffer[at : at + length]))
        return error

    def finish(self) -> None:
        """The last chunk is through: success is only what was told in full."""
        if self._failed:
            return
        if self._kind == Cmd.READ and self._covered != self._length:
            raise PeerError("upstream", f"{self._covered} bytes for a read of {self._length}")
        if self._kind == Cmd.BLOCK_STATUS and self._seen_ids != self._context_ids:
            raise PeerError("upstream", "block status without all the contexts asked for")
