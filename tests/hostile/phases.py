"""Clients that stand in every phase of the negotiation, what comes of each when the gateway ends in
order, and what when it is cut. Those in transmission are in `open_phases`.

`enter` brings a client into its phase, `drained` goes on from there once the gateway has begun to
end, `cut` looks what is left of it when nothing was finished.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
import threading
from pathlib import Path
from typing import Final

from tests.support.fake_upstream import (
    DONE,
    MIB,
    FakeUpstream,
    Link,
    LinkEndedError,
    Script,
    data_chunk,
    pattern,
)
from tests.support.rawclient import (
    C_FIXED,
    C_NO_ZEROES,
    GREETING,
    OPTION,
    TIMEOUT_S,
    Opt,
    RawClient,
    Rep,
    Request,
    info_data,
    option,
    parse_export,
    tls_context,
)

SIZE: Final = 32 * MIB
READ: Final = (4093, 70_001)  # offset and length: neither is a round number
ANYHOW: Final = frozenset({"disc", "abort", "eof", "cut", "reset"})  # ends of an upstream


class Held(Script):
    """Keeps every answer back until `go`; it has the first request when `asked` is set."""

    def __init__(self, **changes: object) -> None:
        super().__init__(size=SIZE, **changes)
        self.asked, self.go = threading.Event(), threading.Event()

    def requested(self, link: Link, request: Request) -> None:
        self.asked.set()
        self.go.wait(4 * TIMEOUT_S)
        try:
            super().requested(link, request)
        except LinkEndedError:  # nobody takes the answer: look what had been sent before that
            link.end = None


class Halved(Held):
    """Answers a READ with two chunks, and waits between them."""

    def requested(self, link: Link, request: Request) -> None:
        half = request.length // 2
        data = pattern(request.offset, request.length)
        link.send(data_chunk(request.cookie, request.offset, data[:half]))
        self.asked.set()
        self.go.wait(4 * TIMEOUT_S)
        with contextlib.suppress(LinkEndedError):
            link.send(data_chunk(request.cookie, request.offset + half, data[half:], flags=DONE))
            return
        link.end = None


class Mute(Held):
    """Accepts, and says nothing."""

    def serve(self, link: Link) -> None:
        link.take_to_end()


class Slow(Held):
    """Answers no option before `go`."""

    def option(self, link: Link, opt: int, data: bytes) -> bool:
        self.asked.set()
        self.go.wait(4 * TIMEOUT_S)
        return super().option(link, opt, data)


class Phase:
    """One client in one phase. `upstream` is how its link has to end if all ends in order, and
    `upstream_cut` how it may end if not; empty: it is never dialled."""

    upstream: frozenset[str] = frozenset({"disc"})
    upstream_cut: frozenset[str] = frozenset({"disc"})
    ends_cut = frozenset({"close_notify"})  # what the client may see of a cut

    def __init__(self, uri: str, pki: Path, fake: FakeUpstream) -> None:
        self.uri, self.pki, self.fake = uri, pki, fake
        self.script = self.make_script()
        self.link: Link | None = None
        self.client = RawClient(uri)

    def make_script(self) -> Held:
        return Held()

    def close(self) -> None:
        self.script.go.set()
        self.client.close()

    def enter(self) -> None:
        if not self.upstream:
            self.begin()
            return
        known = len(self.fake.links)
        self.fake.queue.append(self.script)
        self.begin()
        self.link = self.fake.wait_link(known)

    def begin(self) -> None:
        raise NotImplementedError

    def drained(self) -> None:
        raise NotImplementedError

    def cut(self) -> None:
        self.client.recv_to_end()
        assert self.client.ended in self.ends_cut, self.client.ended
        self.close()

    def look_at_upstream(self, allowed: frozenset[str]) -> None:
        if self.link is not None:
            link = self.link
            self.fake.wait(lambda: link.end is not None, "the upstream's end")
            assert link.end in allowed, f"{type(self).__name__}: {link.end}"

    # For all of them

    def tls(self) -> RawClient:
        self.client.greet()
        self.client.start_tls(tls_context(self.pki))
        return self.client

    def ended(self) -> None:
        """Nothing more comes, and TLS was ended before TCP was."""
        assert self.client.recv_to_end() == b""
        assert self.client.ended == ("close_notify" if self.client.tls else "fin")
        self.client.close()


class InOptions(Phase):
    """The negotiation: every option is refused in so many words, but ABORT."""

    upstream: frozenset[str] = frozenset()
    upstream_cut: frozenset[str] = frozenset()
    ends_cut = frozenset({"close_notify", "fin", "reset"})

    def no_more_options(self) -> None:
        for opt, data in ((Opt.INFO, info_data()), (Opt.LIST, b""), (Opt.GO, info_data())):
            assert self.client.verdict(opt, data) == Rep.ERR_SHUTDOWN
        self.leave()

    def leave(self) -> None:
        assert self.client.verdict(Opt.ABORT) == Rep.ACK
        self.ended()


class Accepted(InOptions):
    """Nothing was said by the client."""

    def begin(self) -> None:
        self.client.recv_exactly(GREETING.size)

    def drained(self) -> None:
        self.client.send(struct.pack(">I", C_FIXED | C_NO_ZEROES))
        assert self.client.verdict(Opt.STARTTLS) == Rep.ERR_SHUTDOWN
        self.leave()


class HalfFlags(Accepted):
    def begin(self) -> None:
        super().begin()
        self.client.send(b"\0\0")

    def drained(self) -> None:
        self.client.send(struct.pack(">H", C_FIXED | C_NO_ZEROES))
        assert self.client.verdict(Opt.LIST) == Rep.ERR_SHUTDOWN
        self.leave()


class HalfOptionInPlaintext(InOptions):
    def begin(self) -> None:
        self.client.greet()
        self.client.send(option(Opt.STARTTLS)[:9])

    def drained(self) -> None:
        self.client.send(option(Opt.STARTTLS)[9:])
        assert self.client.replies(Opt.STARTTLS)[-1].type == Rep.ERR_SHUTDOWN
        self.leave()


class BeforeHello(InOptions):
    """It may go on to TLS, for only there can it be told."""

    def begin(self) -> None:
        self.client.greet()
        assert self.client.verdict(Opt.STARTTLS) == Rep.ACK

    def drained(self) -> None:
        self.client.wrap(tls_context(self.pki))
        self.no_more_options()


class HalfHello(InOptions):
    def begin(self) -> None:
        self.client.greet()
        assert self.client.verdict(Opt.STARTTLS) == Rep.ACK
        client = self.client
        self._tls = tls_context(self.pki).wrap_bio(client._incoming, client._outgoing)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        hello = client._outgoing.read()
        self._rest = hello[50:]
        client.send(hello[:50])

    def drained(self) -> None:
        client = self.client
        client.send(self._rest)
        client._feed()
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                client._feed()
        client.sock.sendall(client._outgoing.read())
        client.tls = self._tls
        self.no_more_options()


class InTLS(InOptions):
    def begin(self) -> None:
        self.tls()

    def drained(self) -> None:
        self.no_more_options()


class HalfOption(InOptions):
    def begin(self) -> None:
        self.tls().send(option(Opt.GO, info_data())[: OPTION.size + 3])

    def drained(self) -> None:
        self.client.send(option(Opt.GO, info_data())[OPTION.size + 3 :])
        assert self.client.replies(Opt.GO)[-1].type == Rep.ERR_SHUTDOWN
        self.no_more_options()


class UpstreamIsMute(InOptions):
    """It is waited for, as long as always, and what it did not say is not made up."""

    upstream = ANYHOW
    upstream_cut = frozenset({"eof"})

    def make_script(self) -> Held:
        return Mute()

    def begin(self) -> None:
        self.tls().send(option(Opt.GO, info_data()))

    def drained(self) -> None:
        assert self.link is not None
        self.link.hang_up()
        self.look_at_upstream(frozenset({"script"}))
        self.link = None
        assert self.client.replies(Opt.GO)[-1].type >= Rep.ERR_UNSUP
        self.no_more_options()


class AskedUpstream(InOptions):
    """What it grants is passed on, and that was all: the session ends there."""

    upstream = frozenset({"disc"})
    upstream_cut = ANYHOW  # an answer of it may be under way

    def make_script(self) -> Held:
        return Slow()

    def begin(self) -> None:
        self.tls().send(option(Opt.GO, info_data()))
        assert self.script.asked.wait(TIMEOUT_S)

    def drained(self) -> None:
        self.script.go.set()
        *infos, last = self.client.replies(Opt.GO)
        assert last.type == Rep.ACK
        assert parse_export(infos).size == SIZE
        self.ended()
