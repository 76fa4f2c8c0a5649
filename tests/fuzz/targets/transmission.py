"""Requests and replies: what a client and an upstream say, in any order and cut anywhere."""

from __future__ import annotations

from tests.fuzz.model.frames import DISC, WRITE, request
from tests.fuzz.source import Source
from tests.fuzz.targets.line import Line
from tests.fuzz.targets.setups import Setup, read_setup
from tests.fuzz.targets.words import MOST, Words, data_of

STEPS = 400  # of one session at most
(CLIENT, UPSTREAM, CLIENT_FILL, UPSTREAM_FILL, REQUEST, ANSWER, ODD, HOLD, LOSE, SHUTDOWN, END) = (
    range(11)
)
_OFFSETS = (0, 512, 1024, 4096, 8192, 65536, 8, 1, 511, 1 << 32, 1 << 63, (1 << 64) - 1)
_LENGTHS = (
    *(512, 4096, 8, 1, 1024, 513, 600, 65536, 0, 8192, 4097, 1 << 20, 1 << 25, (1 << 25) + 1),
    *(1 << 31, (1 << 32) - 1, 1 << 32, 65535),
)


def transmission(data: bytes) -> Line:
    """One session, to its end."""
    source = Source(data)
    play = Play(read_setup(source))
    play.run(source)
    play.finish()
    return play.line


class Play:
    """Both peers of one session, as an input has them act."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.line = Line(setup)
        self.words = Words(self.line.book)
        self._cookie = 0
        self._hold = 0  # how many more things the client says before any of it is sent
        self._kept = b""

    def run(self, source: Source) -> None:
        for _ in range(STEPS):
            if not source.more or self.line.over:
                break
            self._step(source.u8(), source)

    def _step(self, what: int, source: Source) -> None:
        line = self.line
        match what % 11:
            case 0:
                self._ask(source.string())
            case 1:
                line.say(source.string())
            case 2:
                self._ask(data_of(source.u8() << 4, source.u16()))
            case 3:
                line.say(data_of(source.u8() << 4, source.u16()))
            case 4:
                self._ask(self.request(source))
            case 5:
                self._answer(source.u8())
            case 6:
                which, how, detail = source.u8(), source.u8(), source.u8()
                if outstanding := line.outstanding:
                    sent = outstanding[which % len(outstanding)]
                    line.say(self.words.odd(sent, how, detail))
            case 7:
                self._hold = source.u8() % 8
            case 8:
                self._change_upstream()
            case 9:
                if source.u8() % 4 == 0:  # little is left to be seen behind it
                    line.shutdown()
            case _:
                if source.u8() == 255:
                    self._ask(request(line.book.extended, 0, DISC, 0, 0, 0))

    def _ask(self, data: bytes) -> None:
        self._kept += data
        if self._hold:
            self._hold -= 1
            return
        kept, self._kept = self._kept, b""
        self.line.ask(kept)

    def request(self, source: Source) -> bytes:
        """A request with its payload, unless that is long, or to come later."""
        kind, flags, where, size = source.u8(), source.u8(), source.u8(), source.u8()
        terms = self.line.book.terms
        offsets = (*_OFFSETS, terms.size, max(terms.size - 512, 0), terms.size // 2)
        offset = offsets[where % len(offsets)]
        lengths = (*_LENGTHS, terms.block_sizes.maximum, terms.block_sizes.maximum + 1)
        length = lengths[size % len(lengths)]
        kind %= 10
        if kind == DISC:
            kind = WRITE
        if kind == 3 and not where & 128:
            offset = length = 0
        self._cookie += 1
        raw = request(self.line.book.extended, flags & 0x3F, kind, self._cookie, offset, length)
        if kind == WRITE and length <= MOST and not flags & 128:
            raw += data_of(offset, length, self._cookie)
        return raw

    def _answer(self, which: int) -> None:
        if self.line.mouth.mid_message:
            return
        if outstanding := self.line.outstanding:
            self.line.say(self.words.honest(outstanding[which % len(outstanding)]))

    def _change_upstream(self) -> None:
        if not self.line.book.resumable:
            self.line.lose()
            return
        self.line.suspend()
        self.line.resume()

    # -- the end

    def finish(self) -> None:
        """Whatever has been asked is to be answered, by an honest upstream or by the gateway."""
        line = self.line
        self._hold = 0
        self._ask(b"")
        if 0 < line.mind.mid_payload <= MOST:
            line.ask(bytes(line.mind.mid_payload))
        line.resume()
        for _ in range(2000):
            outstanding = line.outstanding
            if not outstanding or line.over or line.mouth.mid_message:
                break
            line.say(self.words.honest(outstanding[0]))
            line.resume()
        if line.outstanding:
            line.lose()
        line.check_end()
