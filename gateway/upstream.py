"""One session's upstream: dialled when the client first needs it, asked in its own dialect."""

from __future__ import annotations

import errno
import logging
import socket
from dataclasses import replace
from typing import Final

import trio

from gateway.errors import ChannelClosed, PeerError, UpstreamUnavailable
from gateway.nbd.constants import Info, Rep
from gateway.nbd.framing import framing
from gateway.nbd.handshake import Greeted, Handshake, Style
from gateway.nbd.pairing import (
    Acked,
    Answer,
    Granted,
    ListExports,
    Open,
    QueryContexts,
    Question,
    Refused,
    Unavailable,
    UseExtendedHeaders,
    UseStructuredReplies,
)
from gateway.nbd.wire import BlockSizes, rep_name
from gateway.transport import Channel

SEND_BUFFER: Final = 1 << 20  # bytes; the default of 208 KiB costs bulk writes a tenth
_BUSY_RETRY_S: Final = 0.02  # a full backlog on a Unix socket is EAGAIN, not a wait
_RECEIVE: Final = 4096  # bytes at a time; the answer to most options has less than a hundred

_UNSUPPORTED: Final = Refused(Rep.ERR_UNSUP)


class Upstream:
    """The upstream of one client. `aclose` it on every path.

    `oldstyle_name` is the name by which an oldstyle server, which has none, may be opened.
    """

    def __init__(
        self,
        path: str,
        log: logging.LoggerAdapter[logging.Logger],
        *,
        oldstyle_name: str,
        timeout_s: float,
        quiet: bool = False,
    ) -> None:
        """`quiet`: that it is not there is nothing worth a warning."""
        self._path = path
        self._log = log
        self._oldstyle_name = oldstyle_name
        self._timeout_s = timeout_s
        self._channel: Channel | None = None
        self._unsent = b""  # our half of the greeting, to go with the first option
        self._handshake = Handshake()
        self._structured = self._extended = False  # agreed on, so it has to stay that way
        # Block sizes of the export that was asked about last: None if it has none to tell.
        self._sizes: dict[str, BlockSizes | None] = {}
        self._taken = False
        self._gave_up = False  # it has taken too long once
        self._warned = quiet
        # Set once the upstream is in transmission: the name, and what it granted.
        self._opened: tuple[str, Granted] | None = None
        # What was agreed on, by the kind of question; of each kind the last one counts.
        self._agreed: dict[type[Question], tuple[Question, Answer]] = {}

    @property
    def agreed(self) -> list[tuple[Question, Answer]]:
        """What has to be asked again, in this order, of an upstream that is to be like this one."""
        assert self._opened is not None
        name = self._opened[0]
        return [
            (question, answer)
            for question, answer in self._agreed.values()
            if not (isinstance(question, QueryContexts) and question.name != name)
        ]

    async def ask(self, question: Question) -> Answer:
        """The upstream's answer. Failures to reach or understand it are logged, once each.

        One that has let `timeout_s` pass is not asked again: else a client with several questions
        would meet its own deadline before it has heard the reason.
        proto.md: "Fixed newstyle negotiation", and NBD_OPT_GO for the fall-back.
        """
        try:
            if self._gave_up:
                raise UpstreamUnavailable(f"{self._path} did not answer before")
            with trio.CancelScope(deadline=trio.current_time() + self._timeout_s):
                answer = await self._answer(question)
                self._note(question, answer)
                return answer
            self._gave_up = True
            reason = f"{self._path} did not answer within {self._timeout_s:g} s"
        except (PeerError, UpstreamUnavailable) as error:
            reason = str(error)
        except ChannelClosed as error:
            reason = f"{self._handshake.closed()} ({error})"
        self._hang_up()
        level = logging.DEBUG if self._warned else logging.WARNING  # clients try more than once
        self._log.log(level, "upstream unavailable: %s", reason)
        self._warned = True
        return Unavailable()

    def take_channel(self) -> Channel:
        """The channel, for the transmission phase, which ends with the taker's NBD_CMD_DISC.

        Still closed by `aclose`.
        """
        assert self._channel is not None
        assert self._opened is not None
        self._taken = True
        return self._channel

    async def aclose(self) -> None:
        """Close the connection, with a last word (DISC or ABORT) unless that is the taker's."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        last_word = b""
        if self._opened and not self._taken:
            last_word = framing(extended=self._extended).disconnect()
        elif not self._opened and self._handshake.style is Style.FIXED_NEWSTYLE:
            last_word = self._handshake.abort()
        try:
            if last_word:
                channel.send_now(last_word)  # who does not read does not get it
        except ChannelClosed:
            pass  # it went first
        finally:
            channel.close()

    def _note(self, question: Question, answer: Answer) -> None:
        match question, answer:
            case ((UseStructuredReplies() | UseExtendedHeaders()), Acked()):
                pass
            case QueryContexts(select=True), _:  # a refusal too: it leaves none selected
                pass
            case Open(go=True), Granted():
                pass
            case _:
                return
        self._agreed.pop(type(question), None)  # it comes last now
        self._agreed[type(question)] = (question, answer)

    # -- in the upstream's own dialect

    async def _answer(self, question: Question) -> Answer:
        if isinstance(question, Open) and self._opened and self._opened[0] != question.name:
            self._hang_up()  # it is in transmission with another export
        if self._channel is None:
            if self._structured or self._extended:
                raise UpstreamUnavailable(f"{self._path} went away during the negotiation")
            await self._dial()
        if isinstance(question, Open):
            return await self._open(question)
        if self._opened or self._handshake.style is not Style.FIXED_NEWSTYLE:
            return _UNSUPPORTED  # oldstyle and newstyle have no options to ask with
        match question:
            case UseStructuredReplies():
                answer = await self._exchange(self._handshake.structured_reply())
                self._structured = isinstance(answer, Acked)
            case UseExtendedHeaders():
                answer = await self._exchange(self._handshake.extended_headers())
                self._extended = isinstance(answer, Acked)
            case ListExports():
                answer = await self._exchange(self._handshake.list_exports())
            case QueryContexts(name, queries, select):
                option = (
                    self._handshake.set_meta_context
                    if select
                    else self._handshake.list_meta_context
                )
                answer = await self._exchange(option(name, queries))
        return answer

    async def _open(self, question: Open) -> Answer:
        if self._opened:  # an oldstyle server has one export, by one name
            name, granted = self._opened
            return granted if name == question.name else Refused(Rep.ERR_UNKNOWN)
        style = self._handshake.style
        if style is Style.FIXED_NEWSTYLE:
            answer = await self._open_by_option(question)
            if isinstance(answer, Granted) and question.go:
                self._opened = (question.name, answer)
            refused = isinstance(answer, Refused) and answer.kind == Rep.ERR_UNSUP
            if self._extended or not refused:  # "MUST NOT fail NBD_OPT_GO with ..._UNSUP"
                return answer
        try:
            answer = await self._exchange(self._handshake.export_name(question.name))
        except (ChannelClosed, PeerError):  # closing is its only way to say no
            self._hang_up()
            self._log.info("the upstream closed the connection when asked for the export")
            return Refused(Rep.ERR_UNKNOWN)
        assert isinstance(answer, Granted)
        self._opened = (question.name, answer)
        return answer

    async def _open_by_option(self, question: Open) -> Answer:
        """NBD_OPT_INFO or NBD_OPT_GO, and what has to be known before."""
        name, infos = question.name, question.infos
        unasked = Info.BLOCK_SIZE not in infos
        if question.go and question.learn_sizes and unasked and name not in self._sizes:
            # "Clients MAY issue NBD_OPT_INFO with NBD_INFO_BLOCK_SIZE to learn the server's
            # constraints without committing to them". A refusal is for the GO to repeat.
            learnt = await self._exchange(self._handshake.info(name, (Info.BLOCK_SIZE,)))
            if isinstance(learnt, Granted):
                self._sizes = {name: learnt.block_sizes}
        option = self._handshake.go if question.go else self._handshake.info
        answer = await self._exchange(option(name, infos))
        if isinstance(answer, Refused) and answer.kind == Rep.ERR_BLOCK_SIZE_REQD and unasked:
            # Only now: to ask is to promise to "abide by the size constraints", and a client that
            # did not ask may be served in smaller blocks by a server that rounds.
            answer = await self._exchange(option(name, (*infos, Info.BLOCK_SIZE)))
        if isinstance(answer, Granted):
            if not unasked or answer.block_sizes is not None:
                self._sizes = {name: answer.block_sizes}
            if answer.block_sizes is None:
                answer = replace(answer, learnt_sizes=self._sizes.get(name))
        return answer

    async def _exchange(self, option: bytes) -> Answer:
        assert self._channel is not None
        greeting, self._unsent = self._unsent, b""
        await self._channel.send_all(greeting + option)
        answer = await self._receive()
        assert not isinstance(answer, Greeted)
        if isinstance(answer, Refused):
            self._log.debug("upstream refuses: %s %r", rep_name(answer.kind), answer.text[:80])
        return answer

    async def _receive(self) -> Greeted | Answer:
        assert self._channel is not None
        while True:
            data = await self._channel.receive(_RECEIVE)
            if not data:
                raise self._handshake.closed()
            if (result := self._handshake.receive(data)) is not None:
                return result

    async def _dial(self) -> None:
        """Connect and greet. Raises UpstreamUnavailable, PeerError or ChannelClosed."""
        self._handshake = Handshake()
        self._channel = Channel(await _connect(self._path))
        greeted = await self._receive()
        assert isinstance(greeted, Greeted)
        self._log.debug("upstream speaks %s", greeted.style.value)
        if greeted.export is not None:
            self._opened = (self._oldstyle_name, greeted.export)
        elif greeted.style is Style.FIXED_NEWSTYLE:
            self._unsent = greeted.reply  # goes with the first option, to wake the upstream once
        else:
            await self._channel.send_all(greeted.reply)

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._opened = None
        self._sizes.clear()


async def _connect(path: str) -> socket.socket:
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise UpstreamUnavailable(f"{path}: {_in_words(error)}") from error
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                await trio.sleep(_BUSY_RETRY_S)
            else:
                return sock
    except OSError as error:
        sock.close()
        raise UpstreamUnavailable(f"{path}: {_in_words(error)}") from error
    except BaseException:
        sock.close()
        raise


def _in_words(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return "no such socket: is the NBD server running?"
        case errno.ECONNREFUSED:
            return "connection refused: nobody listens on this socket any more"
        case errno.EACCES:
            return "permission denied: the gateway's user may not open this socket"
        case _:
            return error.strerror or str(error)
