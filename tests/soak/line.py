"""A client's connection that never waits in the middle of something: one poll at a time."""

from __future__ import annotations

import select
import ssl
from pathlib import Path

from tests.support.rawclient import Export, PeerClosedError, RawClient, tls_context

_CHUNK = 1 << 18


class Line(RawClient):
    """Once open, `queue` what is to be sent, and `flow`."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.to_send = bytearray()
        self._poll = select.poll()

    def open(
        self, certificates: Path | None, export: bytes = b"", *, structured: bool = True
    ) -> Export:
        """Up to transmission. Raises what RawClient raises, AssertionError if it is refused."""
        self.greet()
        if certificates is not None:
            self.start_tls(tls_context(certificates))
        if structured:
            self.ask_structured(optional=True)
        granted = self.go(export)
        self.sock.setblocking(False)
        self._poll.register(self.sock, 0)
        return granted

    def queue(self, data: bytes) -> None:
        self.to_send += self.seal(data) if self.tls else data

    def flow(self, timeout_s: float) -> bytearray:
        """Send and receive what can be, after one wait. What has come, in one piece, and still is
        the buffer: take from its beginning what is understood. Raises PeerClosedError."""
        self._poll.modify(self.sock, select.POLLIN | (select.POLLOUT if self.to_send else 0))
        for _, events in self._poll.poll(timeout_s * 1000):
            try:
                if events & select.POLLOUT:
                    with memoryview(self.to_send) as view, view[:_CHUNK] as part:
                        count = self.sock.send(part)
                    del self.to_send[:count]
                if events & ~select.POLLOUT:
                    self._take()
            except BlockingIOError:
                pass
            except ConnectionError as error:
                self.ended = type(error).__name__
        if self.ended is not None:
            raise PeerClosedError(self.ended)
        return self._inbox

    def _take(self) -> None:
        data = self.sock.recv(_CHUNK)
        if self.tls is None:
            self._inbox += data
            self.ended = None if data else "fin"
            return
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        try:
            while more := self.tls.read(_CHUNK):
                self._inbox += more
            self.ended = "close_notify"
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.ended = error.reason or str(error)
        if out := self._outgoing.read():
            self.to_send += out
