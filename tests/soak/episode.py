"""A part of a soak: one server, clients that come and go, and faults, until all are gone."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.soak import faults, jobs, upstreams
from tests.soak.authority import Authority
from tests.soak.checkers import Checker, Scene, killed_process
from tests.soak.jobs import Job, JobFailed, WrongData
from tests.soak.recorder import Recorder
from tests.soak.tally import Tally
from tests.soak.upstreams import Lease
from tests.soak.verdict import Finding
from tests.soak.watching import WatchedGateway
from tests.support.peers import Client
from tests.support.rawclient import PeerClosedError

CLIENTS = 5  # at a time
_KINDS = {
    "checker": 40,
    "checker as a process": 4,
    "nbdinfo": 4,
    "nbd-client": 3,
    "nbdcopy": 9,
    "qemu-img": 8,
    "qemu-io": 9,
    "nbdsh": 9,
    "fio": 7,
}
_HANG_S = 150.0  # longer than the longest timeout of a client
_CONNECT = (AssertionError, OSError, PeerClosedError)  # up to transmission


@dataclass
class Event:
    """A fault, while it goes on."""

    kind: str
    began: float
    ended: float | None = None


class Episode:
    """`run` it once. The gateway dials `socket`."""

    def __init__(
        self,
        gateway: WatchedGateway,
        authority: Authority,
        folder: Path,
        socket: Path,
        kind: str,
        tally: Tally,
        source: random.Random,
        *,
        recorded: bool,
        pictures: list[Path],
    ) -> None:
        self.gateway, self.authority = gateway, authority
        self.jobs: set[Job] = set()
        self._folder, self._socket = folder, socket
        self._kind, self._tally, self._source = kind, tally, source
        self._recorded = recorded
        self._pictures = pictures
        self._events: list[Event] = []
        self._threads: list[threading.Thread] = []
        self._count = 0
        self._checkers: set[Checker] = set()
        self.scene: Scene

    # -- its course

    def run(self, seconds: float) -> None:
        """What is wrong goes to the tally."""
        self._folder.mkdir()
        before = len(self._tally.violations)
        self._tally.count(self._tally.episodes, self._kind)
        upstream = upstreams.start(self._kind, self._folder)
        try:
            with contextlib.ExitStack() as stack:
                recorder = None
                target = upstream.server.socket
                if self._recorded:
                    recorder = Recorder(self._folder / "recorder", target)
                    target = stack.enter_context(recorder).path
                self._socket.unlink(missing_ok=True)
                self._socket.symlink_to(target)
                self.scene = Scene(upstream, recorder)
                self._work(time.monotonic() + seconds)
                self._tally.add(checked=self.scene.checked, told=self.scene.told)
        finally:
            upstream.end()
        if len(self._tally.violations) == before:
            shutil.rmtree(self._folder)

    def _work(self, until: float) -> None:
        due = time.monotonic() + self._source.expovariate(1.5)
        while time.monotonic() < until:
            self._threads = [one for one in self._threads if one.is_alive()]
            while len(self._threads) < CLIENTS and self._start_client():
                pass
            if time.monotonic() >= due:
                self._fault()
                due = time.monotonic() + self._source.expovariate(1.5)
            self._look_after_server()
            time.sleep(0.05)
        for checker in list(self._checkers):
            checker.stop()
        deadline = time.monotonic() + _HANG_S
        while any(thread.is_alive() for thread in self._threads):
            self._look_after_server()
            if time.monotonic() > deadline:
                self._tally.violation(f"{self._kind}: clients do not end")
                break
            time.sleep(0.05)

    def _look_after_server(self) -> None:
        upstream = self.scene.upstream
        if upstream.alive:
            return
        # nbdkit 1.32 aborts at times when a connection is cut under its replies: by the death of
        # a gateway, or of one of its workers.
        if self._kind != "nbdkit":
            self._tally.violation(f"{self._kind} died by itself: {upstream.server.log()[-500:]}")
        with self.scene.guard:
            self.scene.doubtful = True
            self._events.append(Event("server died", time.monotonic() - 3))
            self._tally.count(self._tally.faults, "server died by itself")
            self.scene.dying()
            upstream.server.kill()
            self.scene.dead()
            upstream.start()
            self._events[-1].ended = time.monotonic()

    def _fault(self) -> None:
        several = len(self.gateway.workers()) > 1
        weights = {
            name: weight
            for name, (_, weight) in faults.ALL.items()
            if several or name not in faults.WORKERS
        }
        name = self._source.choices(list(weights), list(weights.values()))[0]
        event = Event(name, time.monotonic())
        self._events.append(event)
        self._tally.history.note(f"{name} begins")
        try:
            faults.ALL[name][0](self, self._source)
            self._tally.count(self._tally.faults, name)
        except faults.NothingToDo:
            pass
        except (faults.Fault, AssertionError) as wrong:
            self._tally.violation(f"{self._kind}: {name}: {wrong}")
        event.ended = time.monotonic()
        self._tally.history.note(f"{name} is over")

    def _excused(self, since: float, *, kinds: frozenset[str] = faults.EXCUSES) -> bool:
        return any(
            event.kind in kinds and (event.ended is None or event.ended > since - 0.5)
            for event in self._events
        )

    # -- what faults use

    def certificates(self, name: str) -> Path:
        return self.authority.path.parent / f"client-{name}"

    def write_rules(self, deny: str = "") -> None:
        write_rules(self.authority.path.parent / "gateway.toml", deny)

    def checker(
        self, name: str, lease: Lease, *, seconds: float, uri: str | None = None
    ) -> Checker:
        self._count += 1
        return Checker(
            self.scene,
            uri or self.gateway.uri,
            self.certificates(name),
            lease,
            self._count,
            random.Random(self._source.random()),
            seconds,
        )

    def start_checker(self, checker: Checker) -> threading.Thread:
        """One whose end is no riddle: what it finds is judged, that it ends is not."""
        thread = threading.Thread(target=self._check, args=(checker, True), daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    @contextlib.contextmanager
    def another_gateway(self, workers: int) -> Iterator[WatchedGateway]:
        common = self.gateway.args
        where = common.index("--workers")
        args = [*common[: where + 1], str(workers), *common[where + 2 :]]
        self._count += 1
        gateway = WatchedGateway(self._folder / f"counts-{self._count}", *args, began=0.0)
        gateway.start()
        try:
            yield gateway
        finally:
            gateway.kill()

    # -- clients

    def _start_client(self) -> bool:
        lease = self.scene.upstream.lease()
        if lease is None:
            return False  # every disk was somebody's in this episode
        weights = {
            kind: weight
            for kind, weight in _KINDS.items()
            if (lease.whole or kind not in jobs.WHOLE)
            and not (kind == "checker as a process" and self.scene.upstream.lossy)
        }
        kind = self._source.choices(list(weights), list(weights.values()))[0]
        if kind == "checker":
            checker = self.checker("carol", lease, seconds=self._source.uniform(0.5, 8))
            target, args = self._check, (checker, False)
        elif kind == "checker as a process":
            self._count += 1
            target, args = self._check_process, (lease, self._count, self._source.uniform(1, 3))
        else:
            self._count += 1
            client = Client(self.gateway.uri, self.certificates("alice")).with_export(lease.export)
            folder = self._folder / f"job-{self._count}"
            source = random.Random(self._source.random())
            job = Job(kind, client, lease, folder, self._pictures, source)
            target, args = self._do, (job,)
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
        return True

    def _check(self, checker: Checker, expected: bool) -> None:
        began = time.monotonic()
        kind, tally = "checker", self._tally
        who = f"{self._kind}: {checker}"
        tally.history.note(f"{who} begins")
        self._checkers.add(checker)
        try:
            findings = checker.run()
        except _CONNECT as error:
            # Nobody is to fail here, not those either whose session is going to be ended.
            if not checker.connected and self._excused(began):
                tally.count(tally.excused, kind)
            else:
                where = "at work" if checker.connected else "before transmission"
                tally.violation(f"{who}, {where}: {error!r}")
            return
        except Exception as error:
            tally.violation(f"{who}: {error!r}")
            return
        finally:
            tally.history.note(f"{who} is over, {time.monotonic() - began:.1f} s old")
            self._checkers.discard(checker)
        tally.add(verified=checker.verified)
        self._judge(who, findings)
        # A server that is restarted is no excuse here: the session has to outlive it.
        if not checker.ended:
            tally.count(tally.ok, kind)
        elif expected or self._excused(began, kinds=faults.WORKERS):
            tally.count(tally.excused, kind)
        else:
            tally.violation(f"{who} was ended: {checker.ended}")

    def _check_process(self, lease: Lease, number: int, seconds: float) -> None:
        log = self._folder / f"book-{number}"
        try:
            findings, written = killed_process(
                *(self.scene, self.gateway.uri, self.certificates("carol"), lease),
                *(number, seconds, log),
            )
        except Exception as error:
            self._tally.violation(f"{self._kind}: checker as a process: {error!r}")
            return
        self._judge(f"{self._kind}: process {number} on {lease}", findings)
        self._tally.add(verified=written)
        self._tally.count(self._tally.killed, "checker as a process")

    def _judge(self, who: str, findings: list[Finding]) -> None:
        for finding in findings:
            self._tally.violation(f"{who}: {finding}", loss=True)

    def _do(self, job: Job) -> None:
        began, tally = time.monotonic(), self._tally
        who = f"{self._kind}: {job.kind} on {job.lease.export or job.lease.first}"
        tally.history.note(f"{who} begins")
        self.jobs.add(job)
        try:
            job.run()
        except JobFailed as error:
            if job.killed:
                tally.count(tally.killed, job.kind)
            elif self._excused(began):
                tally.count(tally.excused, job.kind)
            else:
                tally.violation(f"{who}: {error}")
        except WrongData as error:
            # Who does not heed a failed flush does not know what its server has lost.
            if self.scene.upstream.lossy and self._excused(began):
                tally.count(tally.excused, job.kind)
            else:
                tally.violation(f"{who}: {job.command}: {error}", loss=True)
        except Exception as error:
            tally.violation(f"{who}: {error!r}")
        else:
            tally.count(tally.ok, job.kind)
            tally.add(verified=job.verified)
        finally:
            self.jobs.discard(job)
            tally.history.note(f"{who} is over, {time.monotonic() - began:.1f} s old")
            shutil.rmtree(job.folder, ignore_errors=True)


def write_rules(path: Path, deny: str = "") -> None:
    """Who may enter, for `--config`."""
    text = 'allow = ["cn=alice", "cn=bob", "cn=carol"]\n'
    if deny:
        text += f'deny = ["{deny}"]\n'
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)
