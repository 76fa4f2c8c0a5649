"""A non-blocking byte channel over a connected socket, plain or TLS: one face for both.

TLS is `ssl.SSLSocket` on the real descriptor, not `trio.SSLStream`: OpenSSL reads and writes the
socket itself, nothing is copied through memory BIOs, and alerts are flushed by OpenSSL. Each call
is tried first, and Trio is asked to wait only when the kernel has said that there is nothing.

One task reads a channel, one task writes it; they may be two.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

import trio

from gateway.errors import ChannelClosed, Stalled

_MAX_RECORDS: Final = 64  # in one `fill`: a client may send records of one byte
RECORD: Final = 16384  # the most that one TLS record holds; RFC 8446, section 5.1
_SELECT_LIMIT: Final = 1024  # descriptors from here on are nothing for select(2), FD_SETSIZE
_ONE_CORE: Final = len(os.sched_getaffinity(0)) == 1
STUCK_S: Final = 1.0  # how often `while_stuck` is called
LINGER_S: Final = 2.0  # how long a last word may take to reach the peer
_LINGER_BYTES: Final = 1 << 20


class Channel:
    """A plain channel. Owns the socket: `close` or `aclose` it, on every path.

    `bytes_read` and `bytes_written` count payload, above TLS.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._drained = True  # nothing more had arrived when we last looked
        self.eof = False
        self.stall_s = math.inf  # how long the peer may take no bytes of a `send_all`
        self.while_stuck: Callable[[], None] = lambda: None  # called now and then in a `send_all`
        self.truncated = False  # EOF without the end that the protocol demands
        self.bytes_read = 0
        self.bytes_written = 0

    # -- reading

    async def readable(self) -> None:
        """Wait until `fill` may find something. Always a checkpoint. Holds no memory."""
        if self._drained:
            await trio.lowlevel.wait_readable(self._sock)
        else:
            await trio.lowlevel.checkpoint()

    def fill(self, view: memoryview, *, probe: bool = True) -> int:
        """Move what has arrived into `view` without waiting. Returns how many bytes.

        0 means nothing has, or the end: see `eof`. With `probe` false, a short read is taken to
        mean that there is no more, which saves a system call when it is true and costs a turn of
        the loop when it is not. Raises ChannelClosed.
        """
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            self._drained = True
            return 0
        except OSError as error:
            raise ChannelClosed(_reason(error)) from error
        if count == 0:
            self.eof = True
        self._drained = count < len(view)  # a stream socket gives all it has
        self.bytes_read += count
        return count

    async def receive(self, limit: int = 1 << 16) -> bytes:
        """At least one byte, at most `limit`; empty at the end. For handshakes, not for bulk."""
        buffer = bytearray(limit)
        view = memoryview(buffer)
        while True:
            await self.readable()
            count = self.fill(view)
            if count or self.eof:
                return bytes(view[:count])

    # -- writing

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. No checkpoint unless the kernel makes us wait.

        Cancelled, or on ChannelClosed: the peer holds an unknown part of it. Raises Stalled, which
        is one of these, when nothing was taken for `stall_s`.
        """
        sent = self.send_now(data)
        while sent < len(data):
            await self._writable()
            sent += self.send_now(memoryview(data)[sent:])

    async def _writable(self) -> None:
        left_s = self.stall_s
        while left_s > 0:
            with trio.move_on_after(min(left_s, STUCK_S)):
                await trio.lowlevel.wait_writable(self._sock)
                return
            left_s -= STUCK_S
            self.while_stuck()
        raise Stalled(f"it took no bytes for {self.stall_s:g} s")

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        """Send what there is room for without waiting. Returns how many bytes that is.

        The rest has to follow before anything else does. Raises ChannelClosed.
        """
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ChannelClosed(_reason(error)) from error
        self.bytes_written += sent
        return sent

    # -- ending

    def shutdown(self) -> None:
        """Wake a reader with EOF, behind what has arrived already. Idempotent."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)

    async def aclose(self, *, clean: bool = True) -> None:
        """Close so that what was sent last still arrives: wait (LINGER_S at most) for the peer.

        Not `clean`: what was sent last is not whole, so TLS, if there is any, is not ended.
        A close with unread bytes in the receive buffer makes the kernel send RST, which would
        destroy a TLS alert or an error reply that is still on its way.
        """
        try:
            with trio.move_on_after(LINGER_S):
                self._sock.shutdown(socket.SHUT_WR)
                left = _LINGER_BYTES
                while left > 0:
                    await trio.lowlevel.wait_readable(self._sock)
                    chunk = socket.socket.recv(self._sock, 1 << 16)
                    if not chunk:
                        break
                    left -= len(chunk)
        except OSError:
            pass  # the peer was faster
        finally:
            self.close()

    def close(self) -> None:
        """Close at once. Idempotent."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    @property
    def hung_up(self) -> bool:
        """Whether the peer has shut its side, behind whatever it has sent before."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def gone(self) -> bool:
        """Whether the peer takes nothing more: after a reset, and on a Unix socket any close. Over
        TCP an orderly one cannot be told from a peer that only sends no more."""
        poll = select.poll()
        poll.register(self._sock, 0)  # POLLHUP and POLLERR are always looked for
        return bool(poll.poll(0))

    @property
    def socket(self) -> socket.socket:
        """The socket, for options and addresses; not for bytes."""
        return self._sock

    async def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool = True,
        server_hostname: str | None = None,
    ) -> TLSChannel:
        """Hand the socket over to TLS and shake hands. This channel is of no more use.

        Raises ssl.SSLError with OpenSSL's reason, or ChannelClosed. On any failure and on
        cancellation the new owner is closed, after the alert had its chance to arrive.
        """
        try:
            # Gone already? Then `wrap_socket` would fail with the socket half handed over.
            self._sock.getpeername()
            wrapped = context.wrap_socket(
                self._sock,
                server_side=server_side,
                server_hostname=server_hostname,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
        except ssl.SSLError:
            raise
        except OSError as error:  # already gone
            raise ChannelClosed(_reason(error)) from error
        channel = TLSChannel(wrapped)
        channel.stall_s = self.stall_s
        try:
            await channel.do_handshake()
        except ssl.SSLError:
            await Channel.aclose(channel)
            raise
        except BaseException:
            channel.close()
            raise
        return channel


class TLSChannel(Channel):
    """A channel inside TLS, made by `Channel.start_tls`."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._tls = sock
        self._mid_write = False
        # Behind a short record more may wait in the kernel; and what is read one by one goes on
        # coming one by one, since the peer sends as it is answered. So every other `fill`, and as
        # long as it pays, looks for more also where it need not.
        self._expects_more = False
        self._drained = False  # the handshake may have read ahead

    async def do_handshake(self) -> None:
        """Raises ssl.SSLError or ChannelClosed. proto.md, "TLS support"."""
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._tls)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._tls)
            except ssl.SSLError:
                raise
            except OSError as error:
                raise ChannelClosed(_reason(error)) from error

    @property
    def tls(self) -> ssl.SSLSocket:
        """The TLS socket, for what was negotiated; not for bytes."""
        return self._tls

    def fill(self, view: memoryview, *, probe: bool = True) -> int:
        """As for a plain channel. Reads records until there are no more, no room, or many.

        With `probe` false it stops at a short record every other time, unless it has just been
        wrong about it.
        """
        read: Callable[[int, memoryview], int] = self._tls.read  # type: ignore[assignment]
        filled, room = 0, len(view)
        try:
            for _ in range(_MAX_RECORDS):
                if filled == room:
                    self._drained = False
                    break
                count = read(room - filled, view[filled:])
                if not count:  # close_notify
                    self.eof = True
                    self._drained = False  # nothing more comes to wake who waits
                    break
                filled += count
                if not (probe or self._expects_more or count == RECORD or self._tls.pending()):
                    self._drained = self._expects_more = True
                    break
            else:
                self._drained = False
        except ssl.SSLWantReadError:
            self._drained = True
            self._expects_more = False
        except ssl.SSLWantWriteError:
            # A key update that OpenSSL wants to answer. It does so with our next write. (While one
            # of our writes is half done, OpenSSL 3.0 gives up instead, and the session ends.)
            self._drained = True
        except OSError as error:
            self._drained = False  # the next call meets the end
            if _is_cut(error):
                self.eof = self.truncated = True
            elif filled == 0:
                raise ChannelClosed(_reason(error)) from error
        self.bytes_read += filled
        return filled

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        write = self._tls.write
        self._mid_write = True
        sent, count = 0, len(data)
        try:
            sent = write(data)  # one record at most
            while sent < count:
                sent += write(memoryview(data)[sent:])
            self._mid_write = False
        except ssl.SSLWantWriteError:
            pass
        except ssl.SSLWantReadError:  # OpenSSL never asks for it without renegotiation
            raise ChannelClosed("TLS wants to read before it writes") from None
        except OSError as error:
            raise ChannelClosed(_reason(error)) from error
        self.bytes_written += sent
        return sent

    async def aclose(self, *, clean: bool = True) -> None:
        """Send close_notify if it is `clean` and no write was cut short, then close as a plain
        channel does.

        The peer's close_notify is not waited for.
        """
        if clean and not self._mid_write and self._tls.fileno() >= 0:
            self._mid_write = True  # once
            try:
                self._tls.unwrap()
            except (OSError, ValueError):
                pass  # our close_notify is out, or the peer is gone
        await super().aclose()


def look(one: Channel, other: Channel, seconds: float) -> tuple[bool, bool]:
    """In which of two channels `fill` may find something. Looks again until it does, or for
    `seconds`, in which nothing else of this process runs.

    A task that sleeps and is woken costs its waker and itself more than what it looks for; where
    there is only one core, somebody else needs it.
    """
    if not (one._drained and other._drained):
        return not one._drained, not other._drained
    first, second = one._sock.fileno(), other._sock.fileno()
    if max(first, second) >= _SELECT_LIMIT:
        return False, False
    both = (first, second)
    if _ONE_CORE:
        ready, _, _ = select.select(both, (), (), seconds)
        return first in ready, second in ready
    end = time.perf_counter() + seconds
    while True:
        ready, _, _ = select.select(both, (), (), 0)
        if ready or time.perf_counter() > end:
            return first in ready, second in ready


def _is_cut(error: OSError) -> bool:
    """Whether the peer ended the connection, and not TLS. Older Pythons have no type for it."""
    if isinstance(error, ssl.SSLEOFError):
        return True
    return isinstance(error, ssl.SSLError) and error.reason == "UNEXPECTED_EOF_WHILE_READING"


def _reason(error: OSError) -> str:
    if _is_cut(error):
        return "connection cut without an end of TLS"
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    return error.strerror or str(error)
