"""The checker of "nothing lost" finds what it is there to find, and nothing else.

No gateway here: the writer talks to the server with the volatile cache, through a recorder that
lies in one way or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.soak.book import Book, Sent
from tests.soak.disks import VolatileServer, image, in_file, in_server
from tests.soak.recorder import LIES, Recorder
from tests.soak.sectors import SECTOR, ZERO, Mark, fill, mark_of, stamp_of
from tests.soak.verdict import Finding, examine, made_up, told
from tests.soak.writer import Writer
from tests.support.rawclient import Cmd, Err

SECTORS = 2048


class Place:
    """A volatile server behind a recorder, and a writer in front of it."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self._stack = stack
        (root / "disks").mkdir()
        self.image = image(root / "disks" / "d0", SECTORS)

    def start(self, *flags: str, lie: str = "", every: int = 20) -> None:
        self.server = VolatileServer(self.root, self.root / "disks", *flags)
        self._stack.enter_context(self.server)
        path = self.root / "recorder"
        self.recorder = Recorder(path, self.server.socket, lie=lie, every=every)
        self._stack.enter_context(self.recorder)

    def writer(self, book: Book, **more: object) -> Writer:
        uri = f"nbd+unix:///d0?socket={self.recorder.path}"
        more = {"first": 0, "count": SECTORS, "export": "d0", **more}
        return self._stack.enter_context(Writer(uri, book, **more))  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


def so_many(book: Book, count: int) -> Callable[[], bool]:
    goal = len(book.requests) + count
    return lambda: len(book.requests) < goal


def rules(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


# ---------------------------------------------------------------- honest programs


@pytest.mark.parametrize("flags", [(), ("--shuffle", "--delay-ms=1"), ("--no-fua",)])
def test_nothing_is_found_where_all_is_well(place: Place, flags: tuple[str, ...]) -> None:
    place.start(*flags)
    book = Book(7)
    writer = place.writer(book, seed=1)
    writer.run(so_many(book, 400))
    writer.wait()
    assert not writer.ask(Cmd.WRITE, 0, 8)
    writer.leave()
    assert not writer.findings
    assert writer.read_bytes
    held = in_server(place.server, "d0", 0, SECTORS)
    assert not examine(book, held, 0, lossy=False)[0]
    assert not made_up(book, place.recorder.acknowledged)
    assert not told(book)
    # The file has what was flushed, and not all else: so the server is volatile.
    file = in_file(place.image, 0, SECTORS)
    assert not examine(book, file, 0, lossy=True)[0]
    assert rules(examine(book, file, 0, lossy=False)[0]) == {"lost"}


@pytest.mark.parametrize("flag", ["--die-after-requests=150", "--die-after-bytes=500000"])
def test_a_killed_server_loses_what_it_may_lose_and_no_more(place: Place, flag: str) -> None:
    place.start(flag, "--shuffle")
    book = Book(7)
    with pytest.raises(Exception, match=r"fin|Reset|Pipe"):
        place.writer(book, seed=2).run(lambda: True)
    place.server.kill()
    file = in_file(place.image, 0, SECTORS)
    findings, found = examine(book, file, 0, lossy=True)
    assert not findings
    assert len(found) == SECTORS
    assert any(one.durable for one in book.requests.values())


def test_the_next_writer_begins_with_what_is_there(place: Place) -> None:
    place.start()
    first = Book(1)
    writer = place.writer(first, seed=3)
    writer.run(so_many(first, 100))
    writer.leave()
    findings, found = examine(first, in_server(place.server, "d0", 0, SECTORS), 0, lossy=False)
    assert not findings
    second = Book(2).start_from(found)
    writer = place.writer(second, seed=4)
    writer.run(so_many(second, 100))
    writer.leave()
    held = in_server(place.server, "d0", 0, SECTORS)
    assert not writer.findings
    assert not examine(second, held, 0, lossy=False)[0]
    assert rules(examine(Book(2), held, 0, lossy=False)[0]) == {"misplaced"}


# ---------------------------------------------------------------- lies

FOUND_BY = {
    "drop a write": {"lost", "read back", "made up"},
    "misplace a write": {"lost", "misplaced", "read back"},
    "cut a write": {"lost", "read back"},
    "drop a flush": {"made up"},
    "answer early": {"made up"},
    "strip FUA": {"made up"},
    "repeat a write": {"lost", "read back"},
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_found(place: Place, lie: str) -> None:
    place.start(lie=lie, every=5)
    book = Book(7)
    writer = place.writer(book, seed=5, depth=4)
    writer.run(so_many(book, 600))
    writer.leave()
    assert place.recorder.lies > 3
    held = in_server(place.server, "d0", 0, SECTORS)
    found = rules(examine(book, held, 0, lossy=False)[0])
    found |= rules(writer.findings) | rules(made_up(book, place.recorder.acknowledged))
    # Some of what is lost is written again by the end; one of the rules is enough, others none.
    assert found
    assert found <= FOUND_BY[lie], found


@pytest.mark.parametrize("lie", ["drop a flush", "strip FUA"])
def test_a_lie_about_durability_is_found_on_the_disk(place: Place, lie: str) -> None:
    """Without a recorder's log: the server is killed, and the promise is measured by its file."""
    place.start(lie=lie, every=1)
    book = Book(7)
    writer = place.writer(book, seed=6)
    for number in range(8):
        assert not writer.ask(Cmd.WRITE, 8 * number, 8, fua=lie == "strip FUA")
    if lie == "drop a flush":
        assert not writer.ask(Cmd.FLUSH)
    place.server.kill()
    findings, _ = examine(book, in_file(place.image, 0, SECTORS), 0, lossy=True)
    assert rules(findings) == {"lost"}


# ---------------------------------------------------------------- the rules about flushes


def scene(*steps: str) -> Book:
    """A book of these steps: `w1` sent, `W1` done; `f`, `F` a flush; `u`, `U` FUA; `X` with EIO;
    `K` the upstream is killed and gone. Each request has its own sector."""
    book = Book(1)
    open_: dict[str, Sent] = {}
    kinds = {"w": (Cmd.WRITE, False), "f": (Cmd.FLUSH, False), "u": (Cmd.WRITE, True)}
    for step in steps:
        name = step.lower().rstrip("x")
        if step == "K":
            book.dying()
            book.dead()
        elif step[0].islower():
            cmd, fua = kinds[name[0]]
            where = (int(name[1:]), 1) if cmd == Cmd.WRITE else (0, 0)
            open_[name] = book.sent(cmd, *where, fua=fua)
        else:
            book.done(open_[name], Err.EIO if step.endswith("X") else 0)
    return book


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("w1 W1 K f1 F1X f2 F2", set()),
        ("w1 W1 K u2 U2X f2 F2", set()),
        ("w1 W1 K f1 F1", {"untold"}),
        ("w1 W1 K u2 U2", {"untold"}),
        ("w1 W1 f1 F1 K f2 F2", set()),
        ("w1 W1 f1 F1 K f2 F2X", {"false alarm"}),
        ("u1 U1 K f2 F2", set()),
        ("w1 W1 f1 K F1X f2 F2", set()),
        ("w1 W1 f1 K F1X f2 F2X", {"false alarm"}),
        ("w1 W1 f1 K f2 F1X F2X", set()),  # it was on its way already
        ("w1 W1 f1 K F1 f2 F2", set()),  # the last thing that the server did
        ("w1 W1 K f1 F1X f2 F2X", {"false alarm"}),
        ("w1 W1 K K f1 F1", {"untold"}),
        ("w1 W1 K f1 F1X K f2 F2", set()),
        ("w1 W1 K f1 F1X w2 W2 K f2 F2", {"untold"}),
        ("w1 f1 W1 F1 K f2 F2", set()),  # the gateway may have seen the answer before the flush
        ("f1 w1 W1 F1 K f2 F2", {"untold"}),
        ("w1 K W1 f1 F1", set()),  # it may be the next one's answer
        ("f1 F1X", {"false alarm"}),
        ("w1 W1 K w2 W2", set()),  # nobody has asked
    ],
)
def test_each_loss_is_to_be_told_once(steps: str, expected: set[str]) -> None:
    assert rules(told(scene(*steps.split()))) == expected


@pytest.mark.parametrize(
    ("steps", "durable"),
    [
        ("w1 W1 f1 F1", {1}),
        ("w1 f1 W1 F1", set()),
        ("w1 W1 f1 F1X", set()),
        ("w1 W1 f1 F1X f2 F2", set()),
        ("w1 W1 f1 F1X w2 W2 f2 F2", {2}),
        ("u1 U1 w2 W2", {1}),
        ("u1 U1X", set()),
        ("w1 W1 w2 W2 f1 w3 W3 F1", {1, 2}),
        ("f1 w1 W1 F1 f2 F2", {1}),
    ],
)
def test_what_a_client_may_rely_on(steps: str, durable: set[int]) -> None:
    book = scene(*steps.split())
    assert {one.first for one in book.requests.values() if one.durable} == durable


# ---------------------------------------------------------------- sectors and books


def test_a_sector_tells_where_it_belongs_and_whether_it_is_whole() -> None:
    data = fill(Mark(3, 9), 40, 4)
    assert len(data) == 4 * SECTOR
    for index in range(4):
        sector = data[index * SECTOR : (index + 1) * SECTOR]
        assert mark_of(sector, 40 + index) == Mark(3, 9)
        assert "content of sector" in str(mark_of(sector, 41 + index))
        stamp = stamp_of(sector)
        assert stamp is not None
        assert (stamp.count, stamp.index) == (4, index)
        for at in (0, 8, 17, 31, 100, 507, 508, 511):
            wrong = bytearray(sector)
            wrong[at] ^= 1
            assert "torn" in str(mark_of(bytes(wrong), 40 + index)), at
    other = fill(Mark(3, 10), 40, 4)
    for at in (100, 256, 300):
        assert "torn" in str(mark_of(data[:at] + other[at:SECTOR], 40))
    assert mark_of(bytes(SECTOR), 40) == ZERO


def test_requests_under_way_never_overlap() -> None:
    book = Book(1)
    book.sent(Cmd.WRITE, 10, 4)
    for first, count in ((10, 4), (8, 3), (13, 1), (0, 100)):
        with pytest.raises(AssertionError, match="while"):
            book.sent(Cmd.WRITE, first, count)
    book.sent(Cmd.WRITE, 14, 4)
    book.sent(Cmd.FLUSH)


def test_the_log_on_disk_says_the_same(tmp_path: Path) -> None:
    kept = Book(5, tmp_path / "log").start_from({3: Mark(1, 1)})
    for number in range(1, 41):
        one = kept.sent(Cmd.WRITE, 2 * number, 2, fua=number % 7 == 0)
        if number % 5:
            kept.done(one, Err.EIO if number == 12 else 0)
        if number % 9 == 0:
            kept.done(kept.sent(Cmd.FLUSH), 0)
    kept.dying()
    kept.dead()
    kept.close()
    with (tmp_path / "log").open("a") as file:
        file.write("S 99 1 4")  # half a line: killed there
    loaded = Book.load(tmp_path / "log")
    assert [str(one) for one in loaded.requests.values()] == [
        str(one) for one in kept.requests.values()
    ]
    assert [one.durable for one in loaded.requests.values()] == [
        one.durable for one in kept.requests.values()
    ]
    assert (loaded.base, loaded.losses, loaded.writer) == (kept.base, kept.losses, 5)
