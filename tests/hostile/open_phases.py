"""Clients that stand in every phase of the transmission, as in `phases`; and all of both."""

from __future__ import annotations

import select
from typing import Final

from tests.hostile.duplex import narrow
from tests.hostile.phases import (
    ANYHOW,
    READ,
    SIZE,
    Accepted,
    AskedUpstream,
    BeforeHello,
    HalfFlags,
    HalfHello,
    HalfOption,
    HalfOptionInPlaintext,
    Halved,
    Held,
    InTLS,
    Phase,
    UpstreamIsMute,
)
from tests.hostile.session import Session
from tests.support.fake_upstream import (
    Link,
    Script,
    pattern,
)
from tests.support.rawclient import (
    OPTION,
    REQUEST,
    TIMEOUT_S,
    Cmd,
    Err,
    Request,
)


class Idle(Phase):
    structured = True

    def opened(self) -> Session:
        client = self.tls()
        if self.structured:
            client.ask_structured()
        self.session = Session(client, client.go(), {})
        return self.session

    def begin(self) -> None:
        self.opened()

    def drained(self) -> None:
        self.ended()

    def asked(self) -> None:
        assert self.script.asked.wait(TIMEOUT_S)

    def right(self) -> None:
        answer = self.session.collect()
        assert answer.error == 0
        assert answer.data == pattern(answer.request.offset, answer.request.length)


class HalfHeader(Idle):
    """A request that is not whole is none."""

    def begin(self) -> None:
        self.opened().client.send(Request(Cmd.READ, 0, 512).pack()[:14])


class HalfPayload(Idle):
    """The upstream has its header, so it gets the rest."""

    upstream_cut = frozenset({"cut"})  # a DISC would be taken for data
    payload = bytes(range(256)) * 1024

    def begin(self) -> None:
        self.opened()
        self._write = Request(Cmd.WRITE, 8192, len(self.payload), 7, payload=self.payload)
        self.session.expect(self._write)
        self.client.send(self._write.pack()[:100_000])

    def enter(self) -> None:
        super().enter()
        link = self.link
        assert link is not None
        before = sum(len(data) + OPTION.size for _, data in link.options) + 4
        self.fake.wait(lambda: len(link.received) > before + REQUEST.size, "half a write")

    def drained(self) -> None:
        self.script.go.set()
        self.client.send(self._write.pack()[100_000:])
        assert self.session.collect().error == 0
        self.ended()
        assert self.link is not None
        assert self.link.requests[0].payload == self.payload


class ReadInFlight(Idle):
    """It is answered, and what is asked later is refused without the upstream."""

    def begin(self) -> None:
        self.opened().submit(Cmd.READ, *READ)
        self.asked()

    def drained(self) -> None:
        for cmd, payload in ((Cmd.READ, b""), (Cmd.WRITE, bytes(512)), (Cmd.FLUSH, b"")):
            length = 512 if cmd == Cmd.READ else 0
            late = self.session.ask(cmd, 0, length, payload=payload)
            assert late.error == Err.ESHUTDOWN
        self.script.go.set()
        self.right()
        self.ended()
        assert self.link is not None
        self.fake.wait_end(self.fake.links.index(self.link))
        assert [one.cmd for one in self.link.requests] == [Cmd.READ, Cmd.DISC]


class ReadOfOldstyle(ReadInFlight):
    structured = False

    def make_script(self) -> Held:
        return Held(style="oldstyle")


class WriteInFlight(Idle):
    payload = pattern(5, 300_000)

    def begin(self) -> None:
        self.opened().submit(Cmd.WRITE, 512, payload=self.payload)
        self.asked()

    def drained(self) -> None:
        self.script.go.set()
        assert self.session.collect().error == 0
        self.ended()
        assert self.link is not None
        assert self.link.requests[0].payload == self.payload


class BetweenChunks(Idle):
    def make_script(self) -> Held:
        return Halved()

    def begin(self) -> None:
        self.opened().submit(Cmd.READ, *READ)
        self.asked()
        self.session.step()
        assert self.session.pending

    def drained(self) -> None:
        self.script.go.set()
        self.right()
        self.ended()


class UnreadReply(Idle):
    """More than all sockets hold, and the client reads nothing of it for now."""

    upstream_cut = ANYHOW  # in the middle of its reply it reads no DISC
    ends_cut = frozenset({"fin", "reset"})  # what is cut inside a reply has no clean end

    def begin(self) -> None:
        self.script.go.set()
        narrow(self.client.sock, 1 << 16)
        self.opened().submit(Cmd.READ, 0, SIZE)
        self.asked()
        assert select.select([self.client.sock], [], [], TIMEOUT_S)[0]

    def drained(self) -> None:
        self.right()
        self.ended()

    def cut(self) -> None:
        self.look_at_upstream(ANYHOW)  # before that it would not be cut, but read
        assert len(self.client.recv_to_end()) < SIZE
        assert self.client.ended in self.ends_cut, self.client.ended
        self.close()


class AfterDisc(Idle):
    """The client has said goodbye; what it has asked for before is answered."""

    def begin(self) -> None:
        self.opened().submit(Cmd.READ, *READ)
        self.client.send(Request(Cmd.DISC, cookie=0).pack())
        self.asked()

    def drained(self) -> None:
        self.script.go.set()
        self.right()
        self.ended()


# ---------------------------------------------------------------- upstream lost, --reconnect


class Down(Script):
    """Closes each connection at once."""

    def serve(self, link: Link) -> None:
        pass


class LostIdle(Idle):
    """The gateway dials again and again when the end comes. Nothing waits for that."""

    upstream = upstream_cut = frozenset({"script"})

    def enter(self) -> None:
        super().enter()
        known = len(self.fake.links)
        self.fake.script = Down()
        assert self.link is not None
        self.link.hang_up()
        self.fake.wait(lambda: len(self.fake.links) > known, "the next upstream to be dialled")


class LostInFlight(LostIdle):
    """What the lost one owes is asked of the next."""

    def begin(self) -> None:
        self.opened().submit(Cmd.READ, *READ)
        self.asked()

    def drained(self) -> None:
        assert self.session.ask(Cmd.READ, 0, 512).error == Err.ESHUTDOWN
        self.fake.script = Script(size=SIZE)
        self.right()
        self.ended()
        assert self.fake.wait_end().end == "disc"


ALL: Final[tuple[type[Phase], ...]] = (
    Accepted,
    HalfFlags,
    HalfOptionInPlaintext,
    BeforeHello,
    HalfHello,
    InTLS,
    HalfOption,
    UpstreamIsMute,
    AskedUpstream,
    Idle,
    HalfHeader,
    HalfPayload,
    ReadInFlight,
    ReadOfOldstyle,
    WriteInFlight,
    BetweenChunks,
    UnreadReply,
    AfterDisc,
)

# Who does not read what was sent last is given some seconds for it, also when all is cut.
QUICK: Final = tuple(kind for kind in ALL if kind is not UnreadReply)
