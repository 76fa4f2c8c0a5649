"""Writers at work, each in a thread, while somebody else kills things."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tests.soak.book import Book
from tests.soak.verdict import Finding, told
from tests.soak.writer import Writer
from tests.support.peers import wait_until
from tests.support.rawclient import PeerClosedError


class Load:
    """Runs until `stop`, or until a session ends. `ended` has why, by writer; None: in order."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = list(writers)
        self.ended: dict[Writer, BaseException | None] = {}
        self._stop = threading.Event()
        self._cut = False
        self._threads = [
            threading.Thread(target=self._work, args=(writer,), daemon=True) for writer in writers
        ]
        for thread in self._threads:
            thread.start()

    @property
    def books(self) -> list[Book]:
        return [writer.book for writer in self.writers]

    def go_on(self, requests: int = 40) -> None:
        """Until each that is not at its end has had so many more answers."""
        goals = {writer: _answered(writer.book) + requests for writer in self.writers}
        wait_until(
            lambda: all(
                writer in self.ended or _answered(writer.book) >= goal
                for writer, goal in goals.items()
            ),
            "answers for every writer",
            60,
        )

    def kill_upstream(self, kill: Callable[[], None]) -> None:
        """`kill` returns when it is gone."""
        for book in self.books:
            book.dying()
        kill()
        for book in self.books:
            book.dead()

    def stop(self) -> None:
        """All wait for their last answers, and disconnect."""
        self._stop.set()
        self._join()

    def cut(self, how: Callable[[Writer], None]) -> None:
        """All drop what they are at, each in this way: `Writer.close` or `Writer.reset`."""
        self._cut = True
        self._stop.set()
        self._join()
        for writer in self.writers:
            how(writer)

    def wait_ended(self) -> None:
        """Until all sessions were ended by the other side."""
        self._join()

    def findings(self, *, fua_flushes: bool = False) -> list[Finding]:
        """What the writers themselves have found, and what the books say of flushes."""
        found = [finding for writer in self.writers for finding in writer.findings]
        for book in self.books:
            found += told(book, fua_flushes=fua_flushes)
        return found

    @property
    def all_well(self) -> bool:
        """Whether all have left in order, from a session that served them to the end."""
        return not any(self.ended.values()) and not any(writer.over for writer in self.writers)

    def bad_ends(self) -> list[BaseException]:
        """Ends that no kill explains, but a bug of ours or an answer that does not come."""
        ends = [end for end in self.ended.values() if end is not None]
        return [end for end in ends if not isinstance(end, PeerClosedError)]

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a writer hangs"

    def _work(self, writer: Writer) -> None:
        end: BaseException | None = None
        try:
            writer.run(lambda: not self._stop.is_set())
            if not self._cut:
                writer.leave()
        except BaseException as error:
            end = error
        self.ended[writer] = end


def _answered(book: Book) -> int:
    return len(book.requests) - len(book.open)
