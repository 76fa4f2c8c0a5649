"""gateway.nbd.journal: what was sent and is not answered, to be sent to the next upstream."""

from __future__ import annotations

import random

import pytest

from gateway.nbd.constants import Cmd, CmdFlag
from gateway.nbd.framing import COMPACT, EXTENDED, Framing
from gateway.nbd.in_flight import InFlight, Request
from gateway.nbd.journal import Journal
from gateway.nbd.plans import ZEROES

FRAMINGS = pytest.mark.parametrize("framing", [COMPACT, EXTENDED], ids=["compact", "extended"])
FUA, PAYLOAD_LEN = int(CmdFlag.FUA), int(CmdFlag.PAYLOAD_LEN)
MIB = 1 << 20


class Book:
    """A journal, and the requests that it is about."""

    def __init__(self, framing: Framing = COMPACT) -> None:
        self.framing = framing
        self.in_flight = InFlight()
        self.journal = Journal(framing, self.in_flight)
        self.raw = bytearray()  # all that was recorded

    def pack(self, kind: int, payload: bytes = b"", flags: int = 0, length: int = 0) -> bytes:
        mine = self.in_flight.add(Request(7, kind, flags, 0, length or len(payload)))
        if self.framing.extended and payload:
            flags |= PAYLOAD_LEN
        header = self.framing.pack_request(flags, kind, mine, 0, length or len(payload))
        return header + payload

    def sends(self, kind: int, payload: bytes = b"", flags: int = 0, length: int = 0) -> int:
        """Records one request. Returns its cookie."""
        self.records(self.pack(kind, payload, flags, length))
        return self.in_flight.next_cookie - 1

    def records(self, raw: bytes) -> None:
        self.raw += raw
        self.journal.record(memoryview(raw))

    def answers(self, *cookies: int, failed: bool = False) -> None:
        for cookie in cookies:
            del self.in_flight.requests[cookie]
            if failed:
                self.in_flight.failed.add(cookie)
        self.journal.settle()

    def loss(self) -> bool:
        self.journal.suspend()
        return self.journal.take_loss()

    def again(self) -> bytes:
        self.journal.suspend()
        return b"".join(self.journal.again())


# ---------------------------------------------------------------- what is sent again


@FRAMINGS
def test_all_that_is_not_answered_is_there_to_the_byte_and_in_order(framing: Framing) -> None:
    book = Book(framing)
    book.sends(Cmd.WRITE, b"abcd")
    book.sends(Cmd.READ, length=99)
    book.sends(Cmd.FLUSH)
    book.sends(Cmd.WRITE, b"efg", FUA)
    if framing.extended:  # a block status may have a payload there
        book.sends(Cmd.BLOCK_STATUS, bytes(12))
    assert book.again() == bytes(book.raw)
    assert book.again() == bytes(book.raw), "and once more, for the one after that"


@FRAMINGS
def test_payload_may_come_in_any_pieces(framing: Framing) -> None:
    payload = random.Random(1).randbytes(40)
    for at in range(len(payload) + 1):
        for more in range(at, len(payload) + 1):
            book = Book(framing)
            raw = book.pack(Cmd.WRITE, payload)
            size = framing.request.size
            behind = book.pack(Cmd.READ, length=5)
            book.records(raw[: size + at])
            book.records(raw[size + at : size + more])
            book.records(raw[size + more :] + behind)
            assert book.again() == raw + behind


def test_half_a_payload_is_sent_again_as_far_as_it_is_here() -> None:
    book = Book()
    raw = book.pack(Cmd.WRITE, b"0123456789")
    book.records(raw[:-6])
    book.journal.suspend()
    again = book.journal.again()
    assert next(again) + next(again) == raw[:-6]
    book.records(raw[-6:-4])  # comes while the rest is sent again
    assert b"".join(again) == raw[-6:-4]
    book.records(raw[-4:])  # from now on it goes out at once
    assert book.journal.open_at_upstream == {1}
    assert book.again() == raw


def test_what_is_answered_is_not_sent_again() -> None:
    book = Book()
    first, second, third = (book.sends(Cmd.WRITE, bytes([n]) * 4) for n in range(3))
    book.answers(second)
    assert set(book.journal._entries) == {first, third}
    assert book.again() == bytes(book.raw[:32] + book.raw[64:])
    book.journal.forget(first)
    book.journal.forget(first)
    assert book.again() == bytes(book.raw[64:])
    book.journal.clear()
    assert book.again() == b""


def test_more_may_come_and_be_answered_while_it_is_sent_again() -> None:
    book = Book()
    first, second = book.sends(Cmd.READ, length=1), book.sends(Cmd.READ, length=2)
    book.journal.suspend()
    again = book.journal.again()
    assert next(again) == bytes(book.raw[:28])
    book.sends(Cmd.READ, length=3)
    book.answers(first, second)  # a liar, but no reason to stumble
    assert b"".join(again) == bytes(book.raw[56:])


def test_large_payloads_come_in_slices() -> None:
    book = Book()
    payload = random.Random(2).randbytes(3 * MIB + 5)
    raw = book.pack(Cmd.WRITE, payload)
    book.records(raw)
    book.journal.suspend()
    parts = list(book.journal.again())
    assert b"".join(parts) == raw
    assert max(map(len, parts)) <= MIB


def test_zeroes_are_not_copied() -> None:
    """A gigabyte of them may be under way."""
    book = Book()
    header = book.pack(Cmd.WRITE, length=3 * len(ZEROES) - 7)
    book.records(header)
    for piece in (ZEROES, ZEROES, ZEROES[:-7]):
        book.journal.record(piece)
    kept = [part for part in next(iter(book.journal._entries.values())).parts if len(part) > 99]
    assert all(isinstance(part, memoryview) and part.obj is ZEROES.obj for part in kept)
    assert book.again() == header + bytes(3 * len(ZEROES) - 7)


def test_what_is_recorded_is_a_copy() -> None:
    book = Book()
    raw = bytearray(book.pack(Cmd.WRITE, b"abcd"))
    with memoryview(raw) as view:
        book.journal.record(view)
    raw[-4:] = b"next"
    assert book.again()[-4:] == b"abcd"


# ---------------------------------------------------------------- whom it was sent to


def test_open_at_the_upstream_is_what_it_was_sent_in_full() -> None:
    book = Book()
    journal = book.journal
    first = book.sends(Cmd.READ, length=1)
    assert journal.open_at_upstream == {first}
    journal.suspend()
    book.sends(Cmd.READ, length=2)  # in the outage
    assert journal.open_at_upstream == {first}
    again = journal.again()
    next(again)
    next(again)
    assert next(again, None) is None
    assert len(journal.open_at_upstream) == 2
    book.sends(Cmd.READ, length=3)
    assert len(journal.open_at_upstream) == 3


def test_suspended_while_sending_again_it_hands_out_no_more() -> None:
    book = Book()
    raw = [book.pack(Cmd.WRITE, bytes([n]) * 9) for n in range(3)]
    for one in raw:
        book.records(one[:28])
        book.records(one[28:])
    book.journal.suspend()
    again = book.journal.again()
    assert b"".join(next(again) for _ in range(3)) == raw[0] + raw[1][:28]
    book.journal.suspend()
    assert next(again, None) is None
    assert book.journal.open_at_upstream == {1}, "the second is there by half, the third not"
    assert b"".join(book.journal.again()) == b"".join(raw)


def test_suspended_while_its_last_bytes_are_on_their_way() -> None:
    """It is all with that upstream then, and may be done by it."""
    book = Book()
    book.sends(Cmd.WRITE, b"abcd")
    book.journal.suspend()
    again = book.journal.again()
    assert next(again) + next(again) == bytes(book.raw)
    book.journal.suspend()
    assert next(again, None) is None
    assert book.journal.open_at_upstream == {1}


def test_rest_of_a_payload_behind_a_suspend_is_not_sent() -> None:
    book = Book()
    raw = book.pack(Cmd.WRITE, b"abcdef")
    book.records(raw[:-4])
    book.journal.suspend()
    book.records(raw[-4:])
    assert book.journal.open_at_upstream == frozenset()


def test_settled_counts_what_was_answered() -> None:
    book = Book()
    book.answers(book.sends(Cmd.FLUSH), book.sends(Cmd.READ, length=1))
    book.sends(Cmd.FLUSH)
    assert book.journal.settled == 2


# ---------------------------------------------------------------- what may be lost (X10)

VOLATILE = [(Cmd.WRITE, b"abcd"), (Cmd.TRIM, b""), (Cmd.WRITE_ZEROES, b"")]


@pytest.mark.parametrize(("kind", "payload"), VOLATILE)
def test_completed_and_not_flushed(kind: Cmd, payload: bytes) -> None:
    book = Book()
    one = book.sends(kind, payload, length=4)
    assert not book.loss(), "not answered: it is done again"
    book.answers(one)
    assert book.loss()
    assert not book.loss(), "said once"


@pytest.mark.parametrize(("kind", "payload"), VOLATILE)
def test_with_fua_nothing_is_lost(kind: Cmd, payload: bytes) -> None:
    book = Book()
    book.answers(book.sends(kind, payload, FUA, length=4))
    assert not book.loss()


@pytest.mark.parametrize("kind", [Cmd.READ, Cmd.CACHE, Cmd.BLOCK_STATUS, Cmd.FLUSH])
def test_what_changes_nothing_cannot_be_lost(kind: Cmd) -> None:
    book = Book()
    book.answers(book.sends(kind, length=0 if kind == Cmd.FLUSH else 4))
    assert not book.loss()


def test_flush_covers_what_was_answered_when_it_was_sent() -> None:
    book = Book()
    book.answers(book.sends(Cmd.WRITE, b"a"))
    flush = book.sends(Cmd.FLUSH)
    book.answers(flush)
    assert not book.loss()


def test_flush_does_not_cover_what_is_answered_behind_it() -> None:
    book = Book()
    write, flush = book.sends(Cmd.WRITE, b"a"), book.sends(Cmd.FLUSH)
    book.answers(write)
    book.answers(flush)
    assert book.loss()


def test_answered_together_does_not_cover() -> None:
    book = Book()
    write, flush = book.sends(Cmd.WRITE, b"a"), book.sends(Cmd.FLUSH)
    book.answers(flush, write)
    assert book.loss()


def test_flush_without_an_answer_covers_nothing() -> None:
    book = Book()
    book.answers(book.sends(Cmd.WRITE, b"a"))
    book.sends(Cmd.FLUSH)
    assert book.loss()


def test_flush_that_failed_covers_nothing() -> None:
    book = Book()
    book.answers(book.sends(Cmd.WRITE, b"a"))
    book.answers(book.sends(Cmd.FLUSH), failed=True)
    assert not book.in_flight.failed
    assert book.loss()


def test_flush_known_to_have_failed_before_its_reply_is_whole() -> None:
    """An error chunk that is not the last, and other replies before that comes."""
    book = Book()
    book.answers(book.sends(Cmd.WRITE, b"a"))
    flush, read = book.sends(Cmd.FLUSH), book.sends(Cmd.READ, length=1)
    book.in_flight.failed.add(flush)
    book.answers(read)
    book.answers(flush)
    assert book.loss()


def test_older_flush_takes_nothing_back() -> None:
    book = Book()
    book.answers(book.sends(Cmd.WRITE, b"a"))
    early = book.sends(Cmd.FLUSH)
    book.answers(book.sends(Cmd.WRITE, b"b"))
    late = book.sends(Cmd.FLUSH)
    book.answers(late)
    book.answers(early)
    assert not book.loss()


def test_failed_write_may_have_been_done_in_part() -> None:
    book = Book()
    book.answers(book.sends(Cmd.WRITE, b"a"), failed=True)
    assert book.loss()


def test_fua_is_about_its_own_data_only() -> None:
    book = Book()
    book.answers(book.sends(Cmd.WRITE, b"a"))
    book.answers(book.sends(Cmd.WRITE, b"b", FUA))
    assert book.loss()


def test_nothing_is_sent_again_to_one_that_is_gone_already() -> None:
    book = Book()
    book.sends(Cmd.READ, length=8)
    again = book.journal.again()
    book.journal.suspend()
    assert list(again) == []
    assert not book.journal.open_at_upstream
