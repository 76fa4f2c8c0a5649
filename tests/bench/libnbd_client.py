"""The bench's client for everything that fio and nbdcopy do not do: libnbd, driven from Python.

Run as a program by the interpreter that has Debian's nbd module. Prints one line of JSON for each
thing that it was asked to do; the last line of standard error says what went wrong, if anything.

    connections URI CLIENTS SECONDS           connect, disconnect; again and again
    crowd URI CLIENTS                         each: connect, read, write, disconnect
    first-byte URI SECONDS                    one at a time: connect until 4 KiB are read
    zeroes URI OFFSET LENGTH BLOCK DEPTH      NBD_CMD_WRITE_ZEROES
    idle URI                                  standard input: how many to hold, line by line
"""

from __future__ import annotations

import functools
import json
import select
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

import nbd

BLOCK = 4096
AT_A_TIME = 16  # handshakes under way until all are connected that are to be idle
GIVE_UP_S = 60.0  # for a crowd to be served

Job = Generator[Callable[[], Any], None, None]
"""What one client does: it yields what it waits for."""


def new_handle() -> nbd.NBD:
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)  # the certificates
    return handle


# ---------------------------------------------------------------- many clients in one thread


def connect_only(handle: nbd.NBD) -> Job:
    yield handle.aio_is_ready
    yield from leave(handle)


def a_little(handle: nbd.NBD) -> Job:
    yield handle.aio_is_ready
    buffer = nbd.Buffer(BLOCK)
    for request in (handle.aio_pread, handle.aio_pwrite):
        cookie = request(buffer, 0)
        yield functools.partial(handle.aio_command_completed, cookie)
    yield from leave(handle)


def stay(handle: nbd.NBD) -> Job:
    yield handle.aio_is_ready


def leave(handle: nbd.NBD) -> Job:
    handle.aio_disconnect()
    yield handle.aio_is_closed


class Client:
    """One connection on its way through a job."""

    def __init__(self, loop: Loop, uri: str, job: Callable[[nbd.NBD], Job]) -> None:
        self.handle = new_handle()
        self.failure = ""
        self._loop = loop
        self._job = job(self.handle)
        self._watched: tuple[int, int] | None = None  # descriptor, events
        try:
            self.handle.aio_connect_uri(uri)
            self._condition = next(self._job)
        except nbd.Error as error:
            self.failure = error.string
        self.done = bool(self.failure) or self._advance()

    def notify(self, events: int) -> None:
        wanted = self.handle.aio_get_direction()
        try:
            if events & ~select.EPOLLOUT and wanted & nbd.AIO_DIRECTION_READ:
                self.handle.aio_notify_read()
            elif events & ~select.EPOLLIN and wanted & nbd.AIO_DIRECTION_WRITE:
                self.handle.aio_notify_write()
            self.done = self._advance()
        except nbd.Error as error:
            self.failure, self.done = error.string, True
        if self.done:
            self._watch(None)

    def _advance(self) -> bool:
        while True:
            if self.handle.aio_is_dead():
                raise nbd.Error("the connection is dead", 0)
            if not self._condition():
                direction = self.handle.aio_get_direction()
                reads = select.EPOLLIN if direction & nbd.AIO_DIRECTION_READ else 0
                writes = select.EPOLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
                self._watch((self.handle.aio_get_fd(), reads | writes))
                return False
            try:
                self._condition = next(self._job)
            except StopIteration:
                return True

    def _watch(self, wanted: tuple[int, int] | None) -> None:
        if wanted != self._watched:
            self._loop.watch(self, self._watched, wanted)
            self._watched = wanted


class Loop:
    def __init__(self) -> None:
        self._poll = select.epoll()
        self._clients: dict[int, Client] = {}

    def watch(
        self, client: Client, old: tuple[int, int] | None, new: tuple[int, int] | None
    ) -> None:
        if old is not None and new is not None and old[0] == new[0]:
            self._poll.modify(*new)
            return
        if old is not None:
            del self._clients[old[0]]
            try:
                self._poll.unregister(old[0])
            except OSError:
                pass  # libnbd has closed it
        if new is not None:
            self._clients[new[0]] = client
            self._poll.register(*new)

    def turn(self, timeout_s: float) -> list[Client]:
        """Wait and move on. Returns those that are done."""
        done = []
        for descriptor, events in self._poll.poll(timeout_s):
            if (client := self._clients.get(descriptor)) is not None:
                client.notify(events)
                if client.done:
                    done.append(client)
        return done


def connections(uri: str, clients: int, seconds: float) -> dict[str, Any]:
    loop, count, busy = Loop(), 0, clients
    start = time.monotonic()
    end = start + seconds
    for _ in range(clients):
        Client(loop, uri, connect_only)
    while busy:
        for client in loop.turn(1.0):
            if client.failure:
                sys.exit(client.failure)
            count += 1
            if time.monotonic() < end:
                Client(loop, uri, connect_only)
            else:
                busy -= 1
        if time.monotonic() > end + GIVE_UP_S:
            sys.exit(f"{busy} clients are not served")
    return {"connections": count, "seconds": time.monotonic() - start}


def crowd(uri: str, clients: int) -> dict[str, Any]:
    loop = Loop()
    start = time.monotonic()
    all_of_them = [Client(loop, uri, a_little) for _ in range(clients)]
    while not all(client.done for client in all_of_them):
        loop.turn(1.0)
        if time.monotonic() > start + GIVE_UP_S:
            break
    failures = [
        one.failure or "not served in time" for one in all_of_them if one.failure or not one.done
    ]
    return {
        "seconds": time.monotonic() - start,
        "failed": len(failures),
        "reasons": sorted(set(failures))[:3],
    }


# ---------------------------------------------------------------- one after the other


def first_byte(uri: str, seconds: float) -> dict[str, Any]:
    times: list[float] = []
    end = time.monotonic() + seconds
    while not times or time.monotonic() < end:
        start = time.monotonic()
        handle = new_handle()
        handle.connect_uri(uri)
        handle.pread(BLOCK, 0)
        times.append(time.monotonic() - start)
        handle.shutdown()
    return {"seconds": times}


def zeroes(uri: str, offset: int, length: int, block: int, depth: int) -> dict[str, Any]:
    handle = new_handle()
    handle.connect_uri(uri)
    under_way: set[int] = set()
    start = time.monotonic()
    for at in range(offset, offset + length, block):
        while len(under_way) == depth:
            handle.poll(-1)
            under_way -= {one for one in under_way if handle.aio_command_completed(one)}
        under_way.add(handle.aio_zero(block, at))
    while under_way:
        handle.poll(-1)
        under_way -= {one for one in under_way if handle.aio_command_completed(one)}
    took = time.monotonic() - start
    handle.shutdown()
    return {"requests": length // block, "seconds": took}


def idle(uri: str) -> None:
    loop = Loop()
    there: list[Client] = []
    for line in sys.stdin:
        while len(there) < int(line):
            more = min(AT_A_TIME, int(line) - len(there))
            coming = [Client(loop, uri, stay) for _ in range(more)]
            while not all(client.done for client in coming):
                loop.turn(1.0)
            for client in coming:
                if client.failure:
                    sys.exit(client.failure)
            there += coming
        say({"clients": len(there)})


def say(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


def main(mode: str, uri: str, *args: str) -> None:
    match mode:
        case "connections":
            say(connections(uri, int(args[0]), float(args[1])))
        case "crowd":
            say(crowd(uri, int(args[0])))
        case "first-byte":
            say(first_byte(uri, float(args[0])))
        case "zeroes":
            say(zeroes(uri, *map(int, args)))
        case "idle":
            idle(uri)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except nbd.Error as error:
        sys.exit(error.string)
