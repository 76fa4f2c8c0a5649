"""What a soak counts, and says in the end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.soak.findings import History

MOST = 50  # violations that are kept


@dataclass
class Tally:
    """Safe from all threads."""

    ok: Counter[str] = field(default_factory=Counter)  # clients, by kind
    excused: Counter[str] = field(default_factory=Counter)  # failed, and a fault explains it
    killed: Counter[str] = field(default_factory=Counter)  # by us
    faults: Counter[str] = field(default_factory=Counter)
    episodes: Counter[str] = field(default_factory=Counter)  # by the kind of server
    verified: int = 0  # bytes
    checked: int = 0  # acknowledged writes that were looked for on a disk
    told: int = 0  # flushes and FUA that said that something may be lost
    resumed: int = 0  # sessions that went on with another server
    served: int = 0  # sessions, by the gateway's own word
    losses: int = 0
    violations: list[str] = field(default_factory=list)
    history: History = field(default_factory=History)
    found: Callable[[str, bool], None] = lambda _what, _loss: None  # called with each violation
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, counter: Counter[str], kind: str) -> None:
        with self._lock:
            counter[kind] += 1

    def add(self, *, verified: int = 0, checked: int = 0, told: int = 0) -> None:
        with self._lock:
            self.verified += verified
            self.checked += checked
            self.told += told

    def violation(self, what: str, *, loss: bool = False) -> None:
        with self._lock:
            self.losses += loss
            if len(self.violations) < MOST:
                self.violations.append(what)
            else:
                return
        self.found(what, loss)

    @property
    def clients(self) -> int:
        return sum(sum(one.values()) for one in (self.ok, self.excused, self.killed))

    def line(self) -> str:
        return (
            f"{self.clients} clients, {sum(self.faults.values())} faults, "
            f"{self.verified / (1 << 30):.2f} GiB verified, {self.checked} acknowledged writes "
            f"checked, {self.losses} losses, {len(self.violations)} violations"
        )

    def as_json(self) -> dict[str, Any]:
        with self._lock:
            return self._as_json()

    def _as_json(self) -> dict[str, Any]:
        return {
            "clients": {
                "ok": dict(self.ok),
                "failed for a reason": dict(self.excused),
                "killed": dict(self.killed),
            },
            "sessions": self.served,
            "faults": dict(self.faults),
            "episodes": dict(self.episodes),
            "verified_bytes": self.verified,
            "acknowledged_writes_checked": self.checked,
            "sessions_resumed": self.resumed,
            "losses_told": self.told,
            "losses": self.losses,
            "violations": list(self.violations),
        }

    def table(self) -> str:
        """For people, and for README."""
        lines = ["| client | ran to its end | failed for a reason | killed |", "|---|---|---|---|"]
        for kind in sorted(self.ok.keys() | self.excused.keys() | self.killed.keys()):
            row = (self.ok[kind], self.excused[kind], self.killed[kind])
            lines.append(f"| {kind} | {' | '.join(map(str, row))} |")
        lines += ["", "| fault | times |", "|---|---|"]
        lines += [f"| {kind} | {count} |" for kind, count in sorted(self.faults.items())]
        lines += ["", "| | |", "|---|---|"]
        lines += [
            f"| sessions served | {self.served} |",
            f"| sessions that went on with another server | {self.resumed} |",
            f"| data verified | {self.verified / (1 << 30):.2f} GiB |",
            f"| acknowledged writes looked for | {self.checked} |",
            f"| times that a client was told of a possible loss | {self.told} |",
            f"| losses | {self.losses} |",
            f"| violations | {len(self.violations)} |",
        ]
        return "\n".join(lines)
