"""The server role until TLS: greeting and plaintext haggling. `haggling` goes on from there.

Three machines, one after the other, each with its own inbox: what was said before TLS has no way
into what is said after it (proto.md, NBD_OPT_STARTTLS: "MUST NOT preserve any negotiation state").
The third is `Haggling`, or `Barred` for a client that may open nothing.
`receive` appends, steps until nothing more is whole, and returns the effects in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gateway.errors import PeerError, SessionEnd
from gateway.nbd.constants import (
    IHAVEOPT,
    MAX_UNADVERTISED_PAYLOAD,
    NBD_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Opt,
    Rep,
)
from gateway.nbd.pairing import (
    Question,
    Terms,
)
from gateway.nbd.wire import (
    CLIENT_FLAGS,
    GREETING,
    HANDSHAKE_FLAGS,
    OPTION,
    Inbox,
    option_reply,
)

MAX_OPTION_DATA = 64 << 10  # stored; room for 15 meta context queries of the longest kind
MAX_OPTION_SKIP = MAX_UNADVERTISED_PAYLOAD  # read and thrown away; beyond it is an attack

TLS_REQUIRED = "this server speaks NBD over TLS only: use nbds://, tls-creds= or -certfile"
TLS_TOO_EARLY = "TLS from its first byte: NBD turns it on by itself, so no stunnel or the like"
SHUTTING_DOWN = "this gateway is shutting down"

# Plain ints: an operation on an IntFlag is a dozen calls, and its `~` is the complement within its
# members, not of all bits.
_KNOWN_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_TLS_HANDSHAKE = b"\x16\x03"  # how a TLS record with a ClientHello begins
_FIXED_NEWSTYLE, _NO_ZEROES = int(ClientFlag.FIXED_NEWSTYLE), int(ClientFlag.NO_ZEROES)


# -- effects


@dataclass(frozen=True, slots=True)
class Send:
    """Send this to the client, in one write (some clients do not read twice)."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Greeted:
    """The client's flags are in. Go on with the machine of this listener's TLS mode."""

    no_zeroes: bool


@dataclass(frozen=True, slots=True)
class StartTLS:
    """Begin the TLS handshake now. This machine's work is over."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Put this question to the upstream and give the answer to `Haggling.answer`."""

    question: Question


@dataclass(frozen=True, slots=True)
class EnterTransmission:
    """Haggling is over. Bytes that came behind it are in `Haggling.rest`."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection, for this reason."""

    reason: SessionEnd


Effect = Send | Greeted | StartTLS | Ask | EnterTransmission | Close


# -- the machines


class Greeting:
    """proto.md, "Newstyle negotiation", up to the client flags."""

    def __init__(self, *, tls_required: bool) -> None:
        self._tls_required = tls_required
        self._inbox = Inbox("client")

    @staticmethod
    def hello() -> bytes:
        """What the server says first."""
        return GREETING.pack(NBD_MAGIC, IHAVEOPT) + HANDSHAKE_FLAGS.pack(_KNOWN_FLAGS)

    def receive(self, data: bytes) -> list[Effect]:
        """Take bytes from the client. Raises PeerError for flags that we did not offer."""
        self._inbox.append(data)
        if (raw := self._inbox.take(CLIENT_FLAGS.size)) is None:
            return []
        (flags,) = CLIENT_FLAGS.unpack(raw)
        if raw.startswith(_TLS_HANDSHAKE):
            raise PeerError("client", TLS_TOO_EARLY)
        if flags & ~_KNOWN_FLAGS:
            raise PeerError("client", f"unknown client flags {flags:#x}")
        if self._tls_required and not flags & _FIXED_NEWSTYLE:
            # "The server MUST operate in NOTLS mode unless ...", and that we do not offer.
            raise PeerError("client", "no fixed newstyle, so TLS cannot be negotiated")
        return [Greeted(bool(flags & _NO_ZEROES))]

    def rest(self) -> bytes:
        """Bytes behind the client flags, for the next machine."""
        return self._inbox.take(len(self._inbox)) or b""


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much haggling one client may do; beyond it is an attack, and closing the answer.

    proto.md, "Termination of the session during option haggling".
    """

    options: int
    octets: int  # of all options together, headers included, as their headers announce them


BEFORE_TLS = Allowance(32, 1 << 20)  # one option is enough, and clients that probe send a handful
INSIDE_TLS = Allowance(4096, 64 << 20)  # some clients ask for each export by itself


@dataclass(frozen=True, slots=True)
class Option:
    number: int
    length: int  # of the data
    data: bytes  # empty when the data was skipped


class Options:
    """Cuts a client's bytes into options. Data longer than `max_data` is skipped, not stored."""

    def __init__(self, max_data: int, allowance: Allowance) -> None:
        self.inbox = Inbox("client")
        self._max_data = max_data
        self._left = allowance.options
        self._octets_left = allowance.octets
        self._number: int | None = None  # of the option whose data is awaited
        self._length = 0
        self._to_skip = 0

    def next(self) -> Option | None:
        """None while no option is whole. Raises PeerError for what cannot be an option."""
        if self._number is None:
            if (header := self.inbox.take_option_header()) is None:
                return None
            if not self._left:
                raise PeerError("client", "too many options")
            self._left -= 1
            if header.length > MAX_OPTION_SKIP:
                raise PeerError("client", f"option {header.option} of {header.length} bytes")
            self._octets_left -= OPTION.size + header.length
            if self._octets_left < 0:  # before any of them is read
                raise PeerError("client", "too many bytes of options")
            self._number, self._length = header.option, header.length
            self._to_skip = self._length if self._length > self._max_data else 0
        data = b""
        if self._to_skip:
            self._to_skip -= self.inbox.skip(self._to_skip)
            if self._to_skip:
                return None
        else:
            if (taken := self.inbox.take(self._length)) is None:
                return None
            data = taken
        message = Option(self._number, self._length, data)
        self._number = None
        return message


class PlainHaggling:
    """FORCEDTLS before TLS: only STARTTLS and ABORT are served. proto.md, "FORCEDTLS mode".

    Stores no option data at all.
    """

    def __init__(self, allowance: Allowance = BEFORE_TLS) -> None:
        self._options = Options(max_data=0, allowance=allowance)
        self._done = False
        self._shutdown = False
        self.end = SessionEnd.ABORTED  # what it means if the client goes now

    def receive(self, data: bytes) -> list[Effect]:
        """Take plaintext from the client. Raises PeerError; never call it after StartTLS."""
        assert not self._done, "plaintext after STARTTLS"
        self._options.inbox.append(data)
        effects: list[Effect] = []
        while not self._done and (message := self._options.next()) is not None:
            effects += self._step(message)
        return effects

    def shutdown(self) -> None:
        """From now on every option but ABORT is answered NBD_REP_ERR_SHUTDOWN."""
        self._shutdown = True

    def _step(self, message: Option) -> list[Effect]:
        match message.number:
            case Opt.ABORT:
                self._done = True
                return [Send(option_reply(Opt.ABORT, Rep.ACK)), Close(self.end)]
            case Opt.EXPORT_NAME:  # has no error reply: hanging up is the only "no"
                self._done = True
                return [Close(SessionEnd.PLAINTEXT_CLIENT)]
            case _ if self._shutdown:
                return [refusal(message, Rep.ERR_SHUTDOWN, SHUTTING_DOWN)]
            case Opt.STARTTLS if message.length:
                return [refusal(message, Rep.ERR_INVALID, "NBD_OPT_STARTTLS takes no data")]
            case Opt.STARTTLS:
                if self._options.inbox:  # plaintext parked here would pass for decrypted data
                    raise PeerError("client", "bytes behind NBD_OPT_STARTTLS")
                self._done = True
                return [Send(option_reply(Opt.STARTTLS, Rep.ACK)), StartTLS()]
            case _:
                self.end = SessionEnd.PLAINTEXT_CLIENT
                return [refusal(message, Rep.ERR_TLS_REQD, TLS_REQUIRED)]


class Barred:
    """In place of `Haggling`, for a client that is known and may open nothing at all.

    Every option but ABORT is refused in words, whatever is in it. No effect is an `Ask`, so nobody
    is asked, and no option data is stored.
    """

    def __init__(self, text: str, allowance: Allowance = BEFORE_TLS) -> None:
        self._text = text
        self._options = Options(max_data=0, allowance=allowance)
        self._done = False
        self._shutdown = False

    def receive(self, data: bytes) -> list[Effect]:
        """Take bytes from the client, TLS taken off. Raises PeerError."""
        self._options.inbox.append(data)
        effects: list[Effect] = []
        while not self._done and (message := self._options.next()) is not None:
            effects += self._step(message)
        return effects

    def shutdown(self) -> None:
        """From now on every option but ABORT is answered NBD_REP_ERR_SHUTDOWN."""
        self._shutdown = True

    def _step(self, message: Option) -> list[Effect]:
        match message.number:
            case Opt.ABORT:
                self._done = True
                ack = Send(option_reply(Opt.ABORT, Rep.ACK))
                return [ack, Close(SessionEnd.NOT_ALLOWED)]
            case Opt.EXPORT_NAME:  # has no error reply: hanging up is the only "no"
                self._done = True
                return [Close(SessionEnd.NOT_ALLOWED)]
            case _ if self._shutdown:
                return [refusal(message, Rep.ERR_SHUTDOWN, SHUTTING_DOWN)]
            case _:
                return [refusal(message, Rep.ERR_POLICY, self._text)]


def refusal(message: Option, kind: Rep, text: str) -> Send:
    """An error reply. The text is ours, never a peer's bytes as they came."""
    return Send(option_reply(message.number, kind, text.encode()))


def joined(effects: list[Effect]) -> Iterator[Effect]:
    """The same, with neighbouring `Send`s in one: each costs a system call and a TLS record."""
    words: list[bytes] = []
    for effect in effects:
        if isinstance(effect, Send):
            words.append(effect.data)
            continue
        if words:
            yield Send(b"".join(words))
            words.clear()
        yield effect
    if words:
        yield Send(b"".join(words))
