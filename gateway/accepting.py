"""From listening sockets to accepted clients: whose turn it is, and what to do in bad times."""

from __future__ import annotations

import errno
import logging
import select
import socket
from collections.abc import Callable
from typing import Any, Final

import trio

from gateway.gate import Gate

# A client in the queue is left to a worker that has fewer, and looked for again after each of these
# waits; after the last one that worker is taken to be busy or stuck.
_OTHERS_FIRST_S: Final = (0.001, 0.002, 0.003, 0.004)
_BACK_OFF_S: Final = (0.005, 1.0)  # first and longest wait after an accept that failed
_SAID_AGAIN_S: Final = 60.0  # while it goes on failing
# Out of descriptors or memory: it may get better. Everything else about a listener is a bug.
_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# accept(2): errors of the connection itself, "treat them like EAGAIN".
GONE = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
    }
)

BringIn = Callable[[socket.socket, object], None]
"""What is done with each client, and its address: owns the socket, and does not wait."""


async def accept_from(
    listener: socket.socket,
    gate: Gate,
    bring_in: BringIn,
    log: logging.Logger | logging.LoggerAdapter[Any],
) -> None:
    """Until it is cancelled. A client that there is no room for waits in the queue.

    Does not close the listener. Raises OSError for an error of the listener itself.
    """
    trouble = _Trouble(log)
    while True:
        if not _has_client(listener):
            gate.nobody_waits(listener)
        await trio.lowlevel.wait_readable(listener)
        # Room first, accept then: what comes between is not waited for, so the room stays.
        if not (await _is_ours(listener, gate) and await _finds_room(listener, gate)):
            continue
        try:
            sock, address = listener.accept()
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno in GONE:
                continue
            if error.errno not in _OUT_OF:
                raise
            await trouble.wait_out(error)
            continue
        trouble.is_over()
        bring_in(sock, address)


async def _is_ours(listener: socket.socket, gate: Gate) -> bool:
    """Leave a client to a worker that has fewer, for a while. False: it has been taken."""
    for wait_s in _OTHERS_FIRST_S:
        if not gate.others_first:
            break
        await trio.sleep(wait_s)
        if not _has_client(listener):
            return False
    return True


async def _finds_room(listener: socket.socket, gate: Gate) -> bool:
    """Wait for room. False: the client that waited is gone, or another worker has it."""
    while not await gate.wait_for_room(listener):
        if not _has_client(listener):
            return False
    return True


class _Trouble:
    """Of one listener that cannot accept: longer and longer waits, and few words."""

    def __init__(self, log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._log = log
        self._wait_s = 0.0
        self._began = self._said = 0.0

    async def wait_out(self, error: OSError) -> None:
        first_s, longest_s = _BACK_OFF_S
        now = trio.current_time()
        if not self._wait_s or now - self._said >= _SAID_AGAIN_S:
            self._log.warning("cannot accept, trying again: %s", error.strerror)
            self._said = now
        if not self._wait_s:
            self._began = now
        self._wait_s = min(2 * self._wait_s, longest_s) or first_s
        await trio.sleep(self._wait_s)

    def is_over(self) -> None:
        if self._wait_s:
            self._log.info("can accept again, after %.3g s", trio.current_time() - self._began)
        self._wait_s = 0.0


def _has_client(listener: socket.socket) -> bool:
    """Whether a client waits in its queue."""
    queue = select.poll()
    queue.register(listener, select.POLLIN)
    return bool(queue.poll(0))
