"""What the book has in it: a request of the client, and each that the upstream got for it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Sent:
    """One request as the upstream got it, and all that it has said to it."""

    cookie: int
    kind: int
    flags: int
    offset: int
    length: int
    number: int  # a count over requests and answers: what was before what
    ids: frozenset[int] | None = None
    ask: Ask | None = None  # whose payload this has; None: it has none, or zeroes
    payload_left: int = 0  # to be sent to the upstream of now
    # What the upstream of now has said:
    segments: list[tuple[int, bytearray | int]] = field(default_factory=list)  # int: zeroes
    contexts: set[int] = field(default_factory=set)
    errors: list[int] = field(default_factory=list)
    chunks: int = 0
    refused: bool = False  # with ESHUTDOWN, so that another upstream is to be asked
    answered: int = 0  # the count, when its last chunk was through
    forgotten: bool = False  # answered by the gateway itself, when another upstream took over
    # What any has:
    all_errors: set[int] = field(default_factory=set)
    statuses: set[bytes] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"#{self.cookie} command {self.kind} flags {self.flags:#x} {self.offset}+{self.length} "
            f"answered {self.answered} errors {self.errors}"
        )

    @property
    def ok(self) -> bool:
        return bool(self.answered) and not self.errors

    def start_anew(self) -> None:
        """Another upstream is asked."""
        self.segments.clear()
        self.contexts.clear()
        self.errors.clear()
        self.chunks = self.answered = 0
        self.refused = False

    def has(self, offset: int, count: int, data: bytes | None) -> bool:
        """Whether it has told this data; None: zeroes."""
        at = 0
        while at < count:
            for begin, told in self.segments:
                size = told if isinstance(told, int) else len(told)
                skip = offset + at - begin
                if not 0 <= skip < size:
                    continue
                step = min(size - skip, count - at)
                theirs = bytes(step) if isinstance(told, int) else told[skip : skip + step]
                mine = bytes(step) if data is None else data[at : at + step]
                if mine != theirs:
                    return False
                at += step
                break
            else:
                return False
        return True


@dataclass(eq=False, slots=True)
class Ask:
    """One request of the client."""

    cookie: int
    kind: int
    flags: int
    offset: int
    length: int  # the effect length
    header_end: int  # position in the client's stream
    payload_length: int
    payload: bytearray = field(default_factory=bytearray)
    ids: frozenset[int] | None = None
    bad_filter: bool = False  # a payload of a block status that cannot be one
    parts: list[Sent] = field(default_factory=list)
    follow_ups: list[Sent] = field(default_factory=list)
    # What the client was told:
    told: list[tuple[int, int]] = field(default_factory=list)  # data, from and to
    contexts: set[int] = field(default_factory=set)
    errors: list[int] = field(default_factory=list)
    padded: bool = False  # with zeroes, where the upstream's data did not come
    answered: bool = False

    def __str__(self) -> str:
        parts = "; ".join(map(str, (*self.parts, *self.follow_ups)))
        return (
            f"{self.cookie:#x} command {self.kind} flags {self.flags:#x} "
            f"{self.offset}+{self.length} told {self.told[:5]} errors {self.errors} [{parts[:500]}]"
        )


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in as few spans as there can be, sorted."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def covers(spans: list[tuple[int, int]], offset: int, length: int) -> bool:
    """Whether all these bytes are in the spans."""
    if not length:
        return True
    return any(start <= offset and offset + length <= stop for start, stop in merged(spans))
