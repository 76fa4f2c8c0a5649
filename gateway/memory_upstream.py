"""A small plain NBD server whose disks are in memory: what stands behind the gateway in the demo.

The handshake is that of the gateway's own server role, without TLS; its questions to an upstream
are answered from a dict. Transmission is one loop a client, with simple replies, in order.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
from typing import Final

import trio

from gateway.errors import ChannelClosed, PeerError
from gateway.nbd.constants import (
    MAX_UNADVERTISED_PAYLOAD,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Error,
    Rep,
    TransmissionFlag,
)
from gateway.nbd.haggling import Haggling
from gateway.nbd.negotiation import Ask, Close, EnterTransmission, Greeted, Greeting, Send
from gateway.nbd.pairing import (
    Answer,
    Granted,
    Listed,
    ListExports,
    Open,
    Question,
    Refused,
    Terms,
)
from gateway.nbd.policy import ExportPolicy
from gateway.nbd.wire import DEFAULT_BLOCK_SIZES, REQUEST, SIMPLE_REPLY, ListedExport
from gateway.transport import Channel

logger = logging.getLogger(__name__)

# Flags that each command may carry; FUA goes with all (proto.md, "Command flags"). As int, since
# the ~ of an IntFlag knows its members only.
_FUA: Final = int(CmdFlag.FUA)
_COMMANDS: Final[dict[int, int]] = {
    Cmd.READ: _FUA,
    Cmd.WRITE: _FUA,
    Cmd.FLUSH: _FUA,
    Cmd.TRIM: _FUA,
    Cmd.CACHE: _FUA,
    Cmd.WRITE_ZEROES: int(CmdFlag.FUA | CmdFlag.NO_HOLE),
}
_CHANGES_DATA: Final = (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)
_ZEROES: Final = memoryview(bytes(1 << 20))

Disk = bytearray | mmap.mmap


def new_disk(size: int) -> Disk:
    """A disk of at least one byte, all zeroes. Costs no memory where nothing is written.

    A bytearray would do as well, but is all written to at its birth.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class MemoryUpstream:
    """Disks in memory, by export name, shared by all clients. Never resize one."""

    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.CAN_MULTI_CONN  # one memory: what is written is seen by all at once
    )

    def __init__(self, exports: dict[str, Disk]) -> None:
        self.exports = exports

    async def serve(
        self, path: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve on a new Unix socket until cancelled, then remove its file.

        Raises OSError if there can be no such socket.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.setblocking(False)
            listener.bind(path)
            try:
                listener.listen()
                async with trio.open_nursery() as clients:
                    task_status.started()
                    while True:
                        await trio.lowlevel.wait_readable(listener)
                        try:
                            sock, _ = listener.accept()
                        except (BlockingIOError, ConnectionAbortedError):
                            continue  # that one is gone already
                        clients.start_soon(self._serve_client, sock)
            finally:
                os.unlink(path)

    def read(self, disk: Disk, offset: int, length: int) -> bytes | memoryview:
        """The data of a reply to NBD_CMD_READ, all of it within the disk."""
        return memoryview(disk)[offset : offset + length]

    async def _serve_client(self, sock: socket.socket) -> None:
        channel = Channel(sock)
        try:
            agreed = await self._negotiate(channel)
            if agreed is not None:
                await self._transmit(channel, *agreed)
        except (PeerError, ChannelClosed) as error:
            logger.debug("memory upstream: a client is dropped: %s", error)
        finally:
            channel.close()

    # -- haggling

    async def _negotiate(self, channel: Channel) -> tuple[Terms, bytes] | None:
        """Up to the transmission phase and the first bytes of it; None if it does not come."""
        greeting = Greeting(tls_required=False)
        await channel.send_all(greeting.hello())
        effects = greeting.receive(await _some(channel))
        while not effects:
            effects = greeting.receive(await _some(channel))
        (greeted,) = effects
        assert isinstance(greeted, Greeted)
        haggling = Haggling(ExportPolicy(None), tls=False, no_zeroes=greeted.no_zeroes)
        effects = haggling.receive(greeting.rest())
        while True:
            while effects:
                match effects.pop(0):
                    case Send(data):
                        await channel.send_all(data)
                    case Ask(question):
                        effects += haggling.answer(self._answer(question))
                    case EnterTransmission(terms):
                        return terms, haggling.rest()
                    case Close():
                        return None
                    case other:
                        raise AssertionError(other)
            effects = haggling.receive(await _some(channel))

    def _answer(self, question: Question) -> Answer:
        match question:
            case ListExports():
                return Listed(tuple(ListedExport(name, "") for name in self.exports))
            case Open(name) if name in self.exports:
                return Granted(len(self.exports[name]), self.flags, DEFAULT_BLOCK_SIZES)
            case Open():
                return Refused(Rep.ERR_UNKNOWN)
            case _:
                return Refused(Rep.ERR_UNSUP)

    # -- transmission

    async def _transmit(self, channel: Channel, terms: Terms, first: bytes) -> None:
        disk = self.exports[terms.export]
        requests = _Requests(channel, first)
        header = bytearray(REQUEST.size)
        while True:
            await requests.read_into(memoryview(header))
            magic, flags, kind, cookie, offset, length = REQUEST.unpack(header)
            if magic != REQUEST_MAGIC:
                raise PeerError("client", f"request magic {magic:#010x}")
            if kind == Cmd.DISC:
                return
            error = _refusal(terms, kind, flags, offset, length)
            answer: bytes | memoryview = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
            match kind:
                case Cmd.WRITE if length > MAX_UNADVERTISED_PAYLOAD:
                    raise PeerError("client", f"NBD_CMD_WRITE of {length} bytes")
                case Cmd.WRITE if error:  # the payload is on its way all the same
                    await requests.read_into(memoryview(bytearray(length)))
                case Cmd.WRITE:
                    await requests.read_into(memoryview(disk)[offset : offset + length])
                case Cmd.READ if not error:
                    await channel.send_all(answer)
                    answer = self.read(disk, offset, length)
                case Cmd.TRIM | Cmd.WRITE_ZEROES if not error:
                    _zero(disk, offset, length)
            await channel.send_all(answer)


class _Requests:
    """The client's bytes of the transmission phase."""

    def __init__(self, channel: Channel, first: bytes) -> None:
        self._channel = channel
        self._first = first

    async def read_into(self, view: memoryview) -> None:
        """Fill all of `view`. Raises ChannelClosed if the client leaves before."""
        at = min(len(view), len(self._first))
        view[:at] = self._first[:at]
        self._first = self._first[at:]
        while at < len(view):
            await self._channel.readable()
            at += self._channel.fill(view[at:])
            if self._channel.eof:
                raise ChannelClosed("it left without NBD_CMD_DISC")


async def _some(channel: Channel) -> bytes:
    data = await channel.receive()
    if not data:
        raise ChannelClosed("it left during the negotiation")
    return data


def _refusal(terms: Terms, kind: int, flags: int, offset: int, length: int) -> int:
    """The NBD_E* to answer with, or 0. proto.md, "Request types" and "Error values"."""
    if kind not in _COMMANDS or flags & ~_COMMANDS[kind]:
        return Error.EINVAL
    if kind in _CHANGES_DATA and terms.read_only:
        return Error.EPERM
    if kind == Cmd.FLUSH:
        return Error.EINVAL if offset or length else 0
    if offset > terms.size or length > terms.size - offset:
        return Error.ENOSPC if kind in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Error.EINVAL
    if kind == Cmd.READ and length > MAX_UNADVERTISED_PAYLOAD:
        return Error.EINVAL
    return 0


def _zero(disk: Disk, offset: int, length: int) -> None:
    with memoryview(disk)[offset : offset + length] as view:
        for at in range(0, length, len(_ZEROES)):
            step = min(len(_ZEROES), length - at)
            view[at : at + step] = _ZEROES[:step]
