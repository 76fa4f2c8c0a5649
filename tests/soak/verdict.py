"""Is anything lost? The rules, by the log of a connection, a disk, and what the upstream did.

misplaced     what is in a sector was never sent for it, or is older than it may be: rule "content"
lost          an acknowledged write is not on the disk, where it had to be
untold        completed writes may be lost, and the next FLUSH or FUA succeeded
false alarm   a FLUSH or FUA failed although nothing can be lost, or it had been told before
made up       the client was told of something that the upstream had not acknowledged by then
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.soak.book import CHANGES, Book, Loss, Sent
from tests.soak.sectors import SECTOR, ZERO, Mark, mark_of
from tests.support.rawclient import Cmd, Err

MOST = 20  # findings of one look: the rest is more of the same


class Finding(NamedTuple):
    """Something that must not be."""

    rule: str
    words: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.words}"


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A request as the upstream saw it and answered it, in nanoseconds of the monotonic clock."""

    cmd: int
    offset: int  # bytes, as `length`
    length: int
    fua: bool
    came: int
    answered: int
    mark: Mark | None  # of a WRITE: what its first sector says; ZERO if all of it is zeroes
    link: int = 0  # which connection to the upstream


# ---------------------------------------------------------------- the disk


def examine(
    book: Book, disk: bytes, first: int, *, lossy: bool
) -> tuple[list[Finding], dict[int, Mark]]:
    """Compare the sectors from `first` on with the log; also what was found there, for the next.

    `lossy`: the upstream was killed, and keeps what it has acknowledged in its memory.
    """
    findings: list[Finding] = []
    found: dict[int, Mark] = {}
    view = memoryview(disk)
    for index in range(len(disk) // SECTOR):
        sector = first + index
        mark = mark_of(view[index * SECTOR : (index + 1) * SECTOR], sector)
        if isinstance(mark, str):
            findings.append(Finding("misplaced", f"sector {sector} holds {mark}"))
            continue
        found[sector] = mark
        if not book.may_hold(sector, mark, lossy=lossy):
            findings.append(_wrong(book, sector, mark, lossy=lossy))
        if len(findings) >= MOST:
            break
    return findings, found


def _wrong(book: Book, sector: int, mark: Mark, *, lossy: bool) -> Finding:
    ever = {book.mark(one) for one in book.versions(sector)} | {book.base.get(sector, ZERO)}
    if mark not in ever:
        return Finding("misplaced", f"sector {sector} holds {mark}, never sent for it")
    needed = next(one for one in book.versions(sector) if (one.durable if lossy else one.ok))
    return Finding("lost", f"sector {sector} holds {mark}, which is older than {needed}")


# ---------------------------------------------------------------- flushes after a loss


def told(book: Book, *, fua_flushes: bool = False) -> list[Finding]:
    """Whether each loss of the upstream was told to the client, once, and no other was.

    `fua_flushes`: the upstream has no FUA, and the gateway makes it a flush, which covers more.
    """
    findings: list[Finding] = []
    durables = [one for one in book.requests.values() if one.durably]
    for index, loss in enumerate(book.losses):
        later = book.losses[index + 1 :]
        until = later[0].before if later else max((one.done for one in durables), default=0) + 1
        # What was under way at the loss, and then up to the first that was sent to the next one.
        asked = [one for one in durables if not one.done or one.done > loss.before]
        asked = [one for one in asked if one.at <= until]
        first = next((one for one in asked if one.at > loss.after and one.done), None)
        if first is None:
            continue  # nobody asked, or the next loss came first
        if any(one.done > until for one in asked if one.at <= first.at and one.done):
            continue  # answered behind the next loss, which it may be about
        failed = [one for one in asked if one.done and one.error and one.at <= first.at]
        at_risk = _at_risk(book, loss, fua_flushes=fua_flushes)
        if at_risk and not failed:
            findings.append(Finding("untold", f"{at_risk[0]} may be lost, but {first}"))
        if not at_risk and failed and _quiet_at(book, loss.before):
            findings.append(Finding("false alarm", f"nothing can be lost, but {failed[0]}"))
        # One that ends by itself may be lost more than once before it is known dead.
        known = min([first.done, *(one.done for one in failed if one.done > loss.after)])
        findings += [
            Finding("false alarm", f"it was told already, but {one}")
            for one in asked
            if one.error == Err.EIO and one.at > known and one.done <= until
        ]
    if not book.losses:
        findings += [
            Finding("false alarm", f"there was no loss, but {one}")
            for one in durables
            if one.error == Err.EIO
        ]
    return findings[:MOST]


def _at_risk(book: Book, loss: Loss, *, fua_flushes: bool) -> list[Sent]:
    """Writes that were acknowledged by then, and that no successful flush can have covered."""
    before = loss.before
    durables = [one for one in book.requests.values() if one.durably]
    good = [one for one in durables if one.ok and one.at <= loss.after]  # its last words
    flushed = max((one.at for one in good if one.cmd == Cmd.FLUSH), default=0)
    # Such a flush is sent once the write is answered, and may cover all until its own answer.
    by_fua = max((one.done for one in good if one.fua and fua_flushes), default=0)
    failed = max((one.done for one in durables if one.error and one.done <= before), default=0)
    return [
        one
        for one in book.requests.values()
        if one.cmd in CHANGES
        and one.ok
        and not one.fua
        and one.done <= before
        # Sent behind the write, not behind its answer: the gateway may have seen that earlier.
        and one.at > flushed
        and one.done > by_fua
        and one.done > failed
    ]


def _quiet_at(book: Book, event: int) -> bool:
    """Whether nothing was under way then, and every write covered beyond doubt."""
    if any(
        one.at <= event and (not one.done or one.done > event) for one in book.requests.values()
    ):
        return False
    changes = [one for one in book.requests.values() if one.cmd in CHANGES and one.done <= event]
    return all(one.durable or one.fua for one in changes if one.done)


# ---------------------------------------------------------------- what the upstream did


def made_up(book: Book, upstream: Sequence[Acknowledged]) -> list[Finding]:
    """Whether each success that the client was told was one of the upstream's before.

    `upstream`: what it acknowledged as done. The gateway may have cut a request into several.
    """
    writers: dict[int, set[int]] = {}
    for one in upstream:
        if one.mark is not None and one.mark != ZERO:
            writers.setdefault(one.link, set()).add(one.mark.writer)
    # Not what was done for others, whose connections they are.
    upstream = [one for one in upstream if book.writer in writers.get(one.link, {book.writer})]
    by_mark: dict[Mark, list[Acknowledged]] = {}
    for one in upstream:
        if one.mark is not None and one.mark != ZERO:
            by_mark.setdefault(one.mark, []).append(one)
    zeroes = [one for one in upstream if one.cmd == Cmd.WRITE_ZEROES or one.mark == ZERO]
    flushes = [one for one in upstream if one.cmd == Cmd.FLUSH]
    findings: list[Finding] = []
    for request in book.requests.values():
        if not request.ok:
            continue
        why = ""
        if request.cmd == Cmd.FLUSH:
            if not _within(flushes, request.ns, request.done_ns):
                why = "no flush of the upstream behind it"
        elif request.cmd in CHANGES:
            parts = (
                zeroes if request.cmd == Cmd.WRITE_ZEROES else by_mark.get(book.mark(request), [])
            )
            parts = _within(parts, request.ns, request.done_ns)
            if not _cover(parts, request.first * SECTOR, request.count * SECTOR):
                why = "the upstream had not acknowledged all of it"
            elif request.fua and not _durable(request, parts, flushes):
                why = "neither FUA nor a flush at the upstream"
        if why:
            findings.append(Finding("made up", f"{request}: {why}"))
    return findings[:MOST]


def _within(acks: Iterable[Acknowledged], since: int, until: int) -> list[Acknowledged]:
    return [one for one in acks if one.came >= since and one.answered <= until]


def _cover(parts: Iterable[Acknowledged], offset: int, length: int) -> bool:
    at, end = offset, offset + length
    for one in sorted(parts, key=lambda one: one.offset):
        if one.offset <= at:
            at = max(at, one.offset + one.length)
    return at >= end


def _durable(request: Sent, parts: list[Acknowledged], flushes: Sequence[Acknowledged]) -> bool:
    direct = [one for one in parts if one.fua]
    if _cover(direct, request.first * SECTOR, request.count * SECTOR):
        return True
    last = max(one.answered for one in parts)
    return bool(_within(flushes, last, request.done_ns))
