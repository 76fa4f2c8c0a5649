"""A session that is alone does the work of both pumps itself: with peers that are threads.

They answer while the relay looks, which scripted peers in its own loop cannot. Looks are long here,
so that nothing depends on who is quick.
"""

from __future__ import annotations

import queue
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from gateway import relay as relay_module
from gateway.errors import SessionEnd
from gateway.nbd.pairing import Terms
from gateway.nbd.transmission import Transmission
from gateway.relay import Relay
from gateway.transport import Channel
from gateway.turns import Luck
from tests.relay_rig import FEATURES, in_tls
from tests.support.fake_upstream import DONE, data_chunk, simple
from tests.support.rawclient import REQUEST, SIMPLE, SIMPLE_MAGIC, Cmd, Err, Request

MIB = 1 << 20
DISK = 8 * MIB
DISC = Request(Cmd.DISC, cookie=0).pack()
LONG_S = 20.0


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Turns are always taken, and looks are long. What each inline return of replies said."""
    said: list[bool] = []
    at_once = Relay._return_at_once

    def counted(self: Relay) -> bool:
        said.append(at_once(self))
        return said[-1]

    monkeypatch.setattr(Relay, "_return_at_once", counted)
    monkeypatch.setattr(relay_module.attention, "undivided", lambda _: True)
    monkeypatch.setattr(Luck, "worth_it", lambda _: True)
    monkeypatch.setattr(relay_module, "LOOK_S", 0.2)
    monkeypatch.setattr(relay_module, "TURN_S", 0.1)
    return said


class Stream:
    """A blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(LONG_S)

    def take(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            data = self.sock.recv(min(count - len(got), 1 << 20))
            if not data:
                raise EOFError
            got += data
        return bytes(got)


class Disk:
    """An upstream in two threads, so that it always takes requests. Cuts replies if told to."""

    def __init__(self, sock: socket.socket, *, seed: int, structured: bool, cut: bool) -> None:
        self._stream, self._structured, self._cut = Stream(sock), structured, cut
        self._random = random.Random(seed)
        self.content = bytearray(self._random.randbytes(1 << 16) * (DISK >> 16))
        self.disconnected = False
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def serve(self) -> None:
        sender = threading.Thread(target=self._send)
        sender.start()
        try:
            self._take()
        finally:
            self._replies.put(b"")
            sender.join()

    def _send(self) -> None:
        try:
            while reply := self._replies.get():
                at = self._random.randrange(len(reply)) if self._cut else 0
                self._stream.sock.sendall(reply[:at])
                self._stream.sock.sendall(reply[at:])
        except OSError:
            pass

    def _take(self) -> None:
        try:
            while True:
                _, _, cmd, cookie, offset, length = REQUEST.unpack(self._stream.take(REQUEST.size))
                payload = self._stream.take(length) if cmd == Cmd.WRITE else b""
                if cmd == Cmd.DISC:
                    self.disconnected = True
                    return
                self._answer(cmd, cookie, offset, length, payload)
        except (EOFError, OSError):
            pass

    def _answer(self, cmd: int, cookie: int, offset: int, length: int, payload: bytes) -> None:
        if cmd == Cmd.WRITE:
            self.content[offset : offset + length] = payload
        elif cmd == Cmd.WRITE_ZEROES:
            self.content[offset : offset + length] = bytes(length)
        data = bytes(self.content[offset : offset + length]) if cmd == Cmd.READ else b""
        if self._structured and data:
            reply = data_chunk(cookie, offset, data, flags=DONE)
        else:
            reply = simple(cookie, 0, data)
        self._replies.put(reply)


class Run:
    """A relay between threads."""

    def __init__(self, near: tuple[Channel, Channel], *, structured: bool) -> None:
        self.near = near
        terms = Terms("", DISK, FEATURES, structured_replies=structured)
        self.relay = Relay(*near, Transmission(terms))
        self.end: SessionEnd | None = None

    async def serve(self) -> None:
        try:
            self.end = await self.relay.run()
        finally:
            for channel in self.near:
                channel.shutdown()
            try:
                await self.relay.aclose()
            finally:
                for channel in self.near:
                    channel.close()


def sockets(size: int) -> Iterator[socket.socket]:
    for _ in range(2):
        for sock in socket.socketpair():
            if size:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
            yield sock


async def session(
    client: Callable[[Stream], None],
    *,
    structured: bool,
    seed: int = 0,
    size: int = 0,
    cut: bool,
    tls: Path | None = None,
) -> tuple[Run, Disk]:
    """Run one from its beginning to its end, which is the client's. `tls`: with these keys."""
    near_client, far_client, near_upstream, far_upstream = sockets(size)
    near = Channel(near_client)
    if tls:
        near, far = await in_tls(near, Channel(far_client), tls)
        far_client = far.socket
    run = Run((near, Channel(near_upstream)), structured=structured)
    disk = Disk(far_upstream, seed=seed, structured=structured, cut=cut)
    with far_client, far_upstream, trio.fail_after(3 * LONG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.serve)
            nursery.start_soon(trio.to_thread.run_sync, disk.serve)
            await trio.to_thread.run_sync(client, Stream(far_client))
    return run, disk


def replies(stream: Stream, waiting: dict[int, Request], *, structured: bool) -> tuple[int, bytes]:
    """One whole reply: its cookie and data."""
    (magic,) = struct.unpack(">I", stream.take(4))
    if magic == SIMPLE_MAGIC:
        error, cookie = struct.unpack(">IQ", stream.take(SIMPLE.size - 4))
        assert not error
        request = waiting[cookie]
        return cookie, stream.take(request.length if request.cmd == Cmd.READ else 0)
    assert structured
    got, flags = b"", 0
    while True:
        flags, _, cookie, length = struct.unpack(">HHQI", stream.take(16))
        payload = stream.take(length)
        if payload:
            assert payload[:8] == struct.pack(">Q", waiting[cookie].offset + len(got))
            got += payload[8:]
        if flags & DONE:
            return cookie, got
        stream.take(4)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("depth", [1, 4, 32])
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_every_byte_in_its_place(
    taken: list[bool], pki: Path, tls: bool, structured: bool, depth: int, cut: bool
) -> None:
    """Reads, writes, zeroes and flushes, none of which overlaps another in flight."""
    rng = random.Random(depth)
    model = bytearray(random.Random(7).randbytes(1 << 16) * (DISK >> 16))

    def client(stream: Stream) -> None:
        waiting: dict[int, Request] = {}
        for cookie in range(1, 600):
            slot = DISK // 64
            used = {one.offset // slot for one in waiting.values()}
            place = rng.choice([one for one in range(64) if one not in used])
            length = rng.choice([1, 512, 4096, 4096, 4096, 65536, slot])
            cmd = rng.choice([Cmd.READ, Cmd.READ, Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.FLUSH])
            payload = rng.randbytes(length) if cmd == Cmd.WRITE else b""
            request = Request(cmd, place * slot, length, cookie, payload=payload)
            if cmd == Cmd.FLUSH:
                request = Request(cmd, cookie=cookie)
            waiting[cookie] = request
            stream.sock.sendall(request.pack())
            while len(waiting) >= depth:
                settle(stream, waiting)
        while waiting:
            settle(stream, waiting)
        stream.sock.sendall(DISC)

    def settle(stream: Stream, waiting: dict[int, Request]) -> None:
        cookie, data = replies(stream, waiting, structured=structured)
        request = waiting.pop(cookie)
        at = slice(request.offset, request.offset + request.length)
        if request.cmd == Cmd.READ:
            assert data == model[at]
        elif request.cmd != Cmd.FLUSH:
            model[at] = request.payload or bytes(request.length)

    keys = pki if tls else None
    run, disk = await session(client, structured=structured, seed=7, cut=cut, tls=keys)
    assert run.end is SessionEnd.DISCONNECTED
    assert disk.disconnected
    assert disk.content == model
    assert taken.count(True) > 20


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
async def test_a_client_that_does_not_read_for_long(taken: list[bool], structured: bool) -> None:
    """What cannot be sent at once is handed over, and its writes go on meanwhile."""

    def client(stream: Stream) -> None:
        # More than all buffers on the way hold, in both directions, before the first byte is read.
        waiting = {n: Request(Cmd.READ, n * 65536, 65536, n) for n in range(1, 65)}
        for request in waiting.values():
            stream.sock.sendall(request.pack())
        for n in range(100, 164):
            waiting[n] = Request(Cmd.WRITE, (n - 100) * 4096, 4096, n, payload=bytes(4096))
            stream.sock.sendall(waiting[n].pack())
        while waiting:
            cookie, data = replies(stream, waiting, structured=structured)
            request = waiting.pop(cookie)
            if request.cmd == Cmd.READ and request.offset >= 64 * 4096:
                assert data == original[request.offset : request.offset + 65536]
        stream.sock.sendall(DISC)

    original = random.Random(3).randbytes(1 << 16) * (DISK >> 16)
    run, disk = await session(client, structured=structured, seed=3, size=4096, cut=False)
    assert run.end is SessionEnd.DISCONNECTED
    assert disk.content[: 64 * 4096] == bytes(64 * 4096)
    assert False in taken, "nothing was handed over"


@pytest.mark.parametrize("how", ["eof", "nonsense", "unknown cookie", "shutting down"])
async def test_the_upstream_ends_while_it_is_looked_at(taken: list[bool], how: str) -> None:
    """The client is told, in time, and everything is closed."""
    near_client, far_client, near_upstream, far_upstream = sockets(0)
    run = Run((Channel(near_client), Channel(near_upstream)), structured=False)
    ends = {
        "eof": lambda cookie: b"",
        "nonsense": lambda cookie: b"n" * 16,
        "unknown cookie": lambda cookie: simple(cookie + 7),
        "shutting down": lambda cookie: simple(cookie, Err.ESHUTDOWN),
    }

    def upstream() -> None:
        stream = Stream(far_upstream)
        for n in range(20):
            cookie = REQUEST.unpack(stream.take(REQUEST.size))[3]
            stream.sock.sendall(simple(cookie) if n < 19 else ends[how](cookie))
        if how == "shutting down":
            assert REQUEST.unpack(stream.take(REQUEST.size))[2] == Cmd.DISC
        far_upstream.shutdown(socket.SHUT_WR)

    def client() -> list[int]:
        stream, errors = Stream(far_client), []
        for cookie in range(1, 23):
            stream.sock.sendall(Request(Cmd.FLUSH, cookie=cookie).pack())
            try:
                magic, error, back = SIMPLE.unpack(stream.take(SIMPLE.size))
            except EOFError:
                break
            assert (magic, back) == (SIMPLE_MAGIC, cookie)
            errors.append(error)
        far_client.shutdown(socket.SHUT_WR)
        return errors

    with far_client, far_upstream, trio.fail_after(3 * LONG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.serve)
            nursery.start_soon(trio.to_thread.run_sync, upstream)
            errors = await trio.to_thread.run_sync(client)
    assert run.end is SessionEnd.UPSTREAM_LOST
    assert errors[:19] == [0] * 19
    assert errors[19:] == [Err.ESHUTDOWN] * len(errors[19:])
    assert errors[19:], "the request in flight was not answered"
    assert taken


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
async def test_a_client_that_leaves_in_the_middle(taken: list[bool], structured: bool) -> None:
    """After any number of bytes of its replies; nothing is left behind."""

    def client(count: int) -> Callable[[Stream], None]:
        def ask_and_leave(stream: Stream) -> None:
            for n in range(1, 9):
                stream.sock.sendall(Request(Cmd.READ, n * 65536, 65536, n).pack())
            stream.take(count)
            stream.sock.close()

        return ask_and_leave

    for count in (1, 16, 17, 65536, 200_000):
        run, _ = await session(client(count), structured=structured, size=4096, cut=True)
        assert run.end is SessionEnd.CLIENT_LEFT
        assert not run.relay._replies.stream.buffer


@pytest.mark.parametrize("how", ["shutdown", "cancel"])
async def test_it_is_ended_in_a_turn(taken: list[bool], how: str) -> None:
    near_client, far_client, near_upstream, far_upstream = sockets(0)
    run = Run((Channel(near_client), Channel(near_upstream)), structured=False)
    disk = Disk(far_upstream, seed=1, structured=False, cut=False)
    busy = threading.Event()
    scope = trio.CancelScope()

    def client() -> int:
        stream = Stream(far_client)
        for cookie in range(1, 1_000_000):
            try:
                stream.sock.sendall(Request(Cmd.READ, 0, 512, cookie).pack())
                _, error, _ = SIMPLE.unpack(stream.take(SIMPLE.size))
                if error:
                    assert error == Err.ESHUTDOWN
                    return cookie
                stream.take(512)
            except (EOFError, OSError):
                return cookie
            if cookie == 100:
                busy.set()
        raise AssertionError("it went on for ever")

    async def serve() -> None:
        with scope:
            await run.serve()

    async def end() -> None:
        await trio.to_thread.run_sync(busy.wait)
        if how == "shutdown":
            run.relay.shutdown()
        else:
            scope.cancel()

    with far_client, far_upstream, trio.fail_after(3 * LONG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            nursery.start_soon(trio.to_thread.run_sync, disk.serve)
            nursery.start_soon(end)
            assert await trio.to_thread.run_sync(client) >= 100
    assert run.end is (SessionEnd.SHUTDOWN if how == "shutdown" else None)
    assert disk.disconnected


async def test_two_busy_sessions_are_both_served(taken: list[bool]) -> None:
    """Even if each takes every turn that it can."""

    def client(stream: Stream) -> None:
        for cookie in range(1, 400):
            stream.sock.sendall(Request(Cmd.READ, cookie * 512, 512, cookie).pack())
            assert SIMPLE.unpack(stream.take(SIMPLE.size)) == (SIMPLE_MAGIC, 0, cookie)
            stream.take(512)
        stream.sock.sendall(DISC)

    ended: list[SessionEnd | None] = []

    async def one() -> None:
        run, _ = await session(client, structured=False, cut=False)
        ended.append(run.end)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(one)
    assert ended == [SessionEnd.DISCONNECTED] * 2
