"""The course of a soak: gateways that live for a while each, with one worker and two in turn."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TextIO

from tests.soak import upstreams
from tests.soak.authority import Authority
from tests.soak.episode import Episode, write_rules
from tests.soak.findings import Findings
from tests.soak.sectors import SECTOR
from tests.soak.tally import Tally
from tests.soak.watching import Sample, WatchedGateway, versions
from tests.support.peers import wait_until

CLIENTS: Final = ("alice", "bob", "carol")
_LIFE_S: Final = 900.0  # of a gateway, at the most
_EPISODE_S: Final = (3.0, 30.0)
_KEEP_S: Final = 10.0  # between two samples that are kept
_TELL_S: Final = 60.0  # between two times that the figures are told
_LOG_BYTES: Final = 1 << 17  # of a gateway, that are looked at for what was lately
_FAULT: Final = re.compile(r" ERROR | CRITICAL |Traceback|Warning|ignored|awaited")

# What a process may hold more, with no clients, than when it was first quiet and warm. Descriptors
# and tasks: nothing. Memory: the allocators of C and Python give pages back late and in part, and
# each episode leaves them in another order.
SLACK_RSS_KIB: Final = 16 << 10
SLACK_OBJECTS: Final = 1000


class Soak:
    """`run` it once."""

    def __init__(
        self,
        seconds: float,
        seed: int,
        *,
        out: TextIO = sys.stderr,
        lives: int = 2,
        quiet_s: float = 40.0,
        as_user: str = "",
        findings: Path | None = None,
        each_minute: Callable[[], None] = lambda: None,
    ) -> None:
        """`lives`: of gateways, at the least. `quiet_s`: for sessions whose clients have been
        killed to come to their ends. `as_user`: whom half of the gateways become; only for root.
        `findings`: where each violation is told in full, at once."""
        self.seconds, self.seed = seconds, seed
        self._lives, self._quiet_s = lives, quiet_s
        self.tally = Tally()
        self.folder = Path(tempfile.mkdtemp(prefix="nbd-soak-"))
        self.samples: list[Sample] = []
        self.peaks: dict[str, int] = {"descriptors": 0, "rss_kib": 0, "threads": 0}
        self.quiet: list[list[Sample]] = []  # by life: each process, after each episode
        self._source = random.Random(seed)
        self._out = out
        self._began = time.monotonic()
        self._gateway: WatchedGateway | None = None
        self._over = threading.Event()
        self._as_user, self._each_minute = as_user, each_minute
        path = self.folder / "findings" if findings is None else findings
        heading = f"seed {seed}, in {self.folder}"
        self.findings = Findings(path, out, self.tally.history, heading, self._log)
        self.tally.found = lambda what, loss: self.findings.tell(what, loss=loss)
        self._said = ""

    def run(self) -> bool:
        """Returns whether nothing was wrong; then nothing is left of it on the disk."""
        watcher = threading.Thread(target=self._watch, daemon=True)
        mask = os.umask(0o022)
        if self._as_user:  # who is to reach the servers' sockets, and to read what is reloaded
            os.umask(0)
            self.folder.chmod(0o711)
        watcher.start()
        try:
            self._prepare()
            kinds = itertools.cycle(upstreams.KINDS)
            lives = max(self._lives, math.ceil(self.seconds / _LIFE_S))
            for number in range(lives):
                left = self._began + self.seconds - time.monotonic()
                self._live(number, 1 + number % 2, left / (lives - number), kinds)
        except Exception as error:
            self.tally.violation(f"the soak itself: {error!r}")
            raise
        finally:
            self._over.set()
            watcher.join()
            os.umask(mask)
            if not self.tally.violations:
                shutil.rmtree(self.folder, ignore_errors=True)
        return not self.tally.violations

    def report(self) -> dict[str, Any]:
        return {
            "seconds": round(time.monotonic() - self._began, 1),
            "seed": self.seed,
            "machine": versions(),
            **self.tally.as_json(),
            "peaks": self.peaks,
            "quiet": [[asdict(one) for one in life] for life in self.quiet],
            "samples": [asdict(one) for one in self.samples],
        }

    # -- lives of gateways

    def _prepare(self) -> None:
        authority = self._authority = Authority(self.folder / "tls")
        for name in CLIENTS:
            authority.client(name)
        write_rules(self.folder / "gateway.toml")
        self._pictures = []
        for number in range(3):
            path = self.folder / f"picture-{number}"
            with path.open("wb") as file:
                while (room := upstreams.DISK_SECTORS * SECTOR - file.tell()) > 0:
                    length = min(room, 512 * self._source.randint(1, 1024))
                    zero = self._source.random() < 0.3
                    file.write(bytes(length) if zero else self._source.randbytes(length))
            self._pictures.append(path)

    def _live(self, number: int, workers: int, seconds: float, kinds: Iterator[str]) -> None:
        until = time.monotonic() + seconds
        episode_s = min(max(self.seconds / 40, _EPISODE_S[0]), _EPISODE_S[1])
        other = bool(self._as_user) and number % 4 in (1, 2)  # with one worker, and with two
        gateway = WatchedGateway(
            self.folder / f"counts-{number}",
            *("--tls-dir", self._authority.path, "--config", self.folder / "gateway.toml"),
            *("--socket", self.folder / "disk.sock", "--any-export", "--listen", "127.0.0.1:0"),
            *("--workers", str(workers), "--reconnect", "120", "--reload-interval", "3"),
            *(("--user", self._as_user) if other else ()),
            began=self._began,
        )
        gateway.start()
        self.tally.history.note(f"a gateway with {workers} workers: {' '.join(gateway.args)}")
        try:
            self._gateway = gateway
            base = self._counted(gateway)
            quiet: list[Sample] = []
            self.quiet.append(quiet)
            for part in itertools.count():
                left = until - time.monotonic()
                if part and left < episode_s / 2:
                    break
                self._episode(f"{number}-{part}", next(kinds), min(episode_s, max(left, 2.0)))
                quiet += self._look_when_quiet(gateway, base)
            self._judge_memory(quiet)
            self._gateway = None
            self._end(gateway, number)
        finally:
            gateway.kill()

    def _episode(self, name: str, kind: str, seconds: float) -> None:
        assert self._gateway is not None
        episode = Episode(
            *(self._gateway, self._authority, self.folder / f"e{name}", self.folder / "disk.sock"),
            *(kind, self.tally, random.Random(self._source.random())),
            recorded=self._source.random() < 0.3,
            pictures=self._pictures,
        )
        episode.run(seconds)

    def _end(self, gateway: WatchedGateway, number: int) -> None:
        try:
            gateway.stop()
        except AssertionError as error:
            faults = [line for line in str(error).splitlines() if _FAULT.search(line)]
            words = "\n".join([str(error)[:200], *faults[:20]])
            self.tally.violation(f"the gateway's end: {words}")
        log = gateway.log()
        self.tally.served += len(re.findall(r": open: export ", log))
        self.tally.resumed += log.count("upstream is back after")
        (self.folder / f"gateway-{number}.log").write_text(log)

    def _log(self) -> str:
        """The end of the gateway's log."""
        gateway = self._gateway
        return "" if gateway is None else gateway.log_from(max(0, gateway.log_bytes - _LOG_BYTES))

    # -- what it holds

    def _counted(self, gateway: WatchedGateway) -> dict[bool, Sample]:
        """The supervisor, or the only process, and the one of its workers that has most."""
        first = gateway.count(gateway.pid)
        assert first is not None
        workers = [one for pid in gateway.workers() if (one := gateway.count(pid)) is not None]
        most = max(workers, key=lambda one: one.descriptors, default=first)
        return {True: first, False: most}

    def _look_when_quiet(self, gateway: WatchedGateway, base: dict[bool, Sample]) -> list[Sample]:
        """No client is there: descriptors and tasks have to be what they were at first."""
        found: list[Sample] = []
        for pid in gateway.processes():
            allowed = base[pid == gateway.pid]
            last: list[Sample] = []

            def is_quiet(pid: int = pid, allowed: Sample = allowed, last: Any = last) -> bool:
                seen = gateway.count(pid)
                if seen is None:
                    return True  # a worker that was drained, and has come to its end
                last[:] = [seen]
                assert seen.tasks is not None
                assert allowed.tasks is not None
                return seen.descriptors <= allowed.descriptors and seen.tasks <= allowed.tasks

            try:
                wait_until(is_quiet, "it to be quiet", self._quiet_s)
            except AssertionError:
                self.tally.violation(f"not quiet: {last} where {allowed} was to be")
            found += last
        self.samples += found
        return found

    def _judge_memory(self, quiet: list[Sample]) -> None:
        """Of each process that was there for long enough: from a third of its life on."""
        for pid in {one.pid for one in quiet}:
            mine = [one for one in quiet if one.pid == pid]
            if len(mine) < 6:
                continue
            warm, last = mine[len(mine) // 3], mine[-1]
            more_kib, more = last.rss_kib - warm.rss_kib, last.objects - warm.objects  # type: ignore[operator]
            if more_kib > SLACK_RSS_KIB or more > SLACK_OBJECTS:
                self.tally.violation(f"it grows, by {more_kib} KiB and {more} objects: {mine}")

    def _watch(self) -> None:
        """Sample all processes each second, and say how it goes."""
        kept = said = written = time.monotonic()
        is_terminal = self._out.isatty()
        while not self._over.wait(1.0):
            gateway, now = self._gateway, time.monotonic()
            if gateway is not None and gateway.alive():
                seen = [one for pid in gateway.processes() if (one := gateway.sample(pid))]
                for name in self.peaks:
                    total = sum(getattr(one, name) for one in seen)
                    self.peaks[name] = max(self.peaks[name], total)
                if now - kept >= _KEEP_S:
                    kept = now
                    self.samples += seen
            if is_terminal or now - said >= 60:
                said = now
                text = f"{now - self._began:.0f} of {self.seconds:.0f} s: {self.tally.line()}"
                end = "\r" if is_terminal else "\n"
                print(text.ljust(len(self._said)), end=end, file=self._out, flush=True)
                self._said = text
            if now - written >= _TELL_S:
                written = now
                self._each_minute()
