"""A run as tables in Markdown: `python -m tests.bench.report FILE.json` prints them again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.bench.goals import NEVER_BELOW, YARDSTICKS, Verdict, below_qemu, judge
from tests.bench.results import Case, Results
from tests.bench.summary import Summary, cpu, cpu_ratio, ratio, value
from tests.support.readme import Section

BASE = "nbdkit"
NONE = "-"

SECTION = Section("bench")

NOTES = """\
All servers stand in front of the same kind of disk (nbdkit's memory plugin, full of random bytes),
with the same certificates and their default settings, and are measured in turn, in another order
each round. Clients: fio's nbd engine for blocks, nbdcopy for copies, libnbd for connections.
Client, server and disk share the cores. Ratios are taken within each round; the figure is their
median, with the lowest and the highest in brackets. CPU is user and system time of the server's own
processes. Connections, zeroes and memory: with client certificates, and a disk that has one thread
a connection. Memory is anonymous memory (Pss_Anon) beyond that of the server without clients; what
the kernel holds for sockets and threads is not in it."""


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def short(number: float) -> str:
    """Three digits that mean something."""
    for limit, digits in ((10, 2), (100, 1)):
        if abs(number) < limit:
            return f"{number:.{digits}f}"
    if abs(number) < 10_000:
        return f"{number:.0f}"
    return f"{number / 1000:.{1 if abs(number) < 100_000 else 0}f}k"


def spread(found: Summary, show: Callable[[float], str] = short) -> str:
    if found.count == 1:
        return show(found.median)
    return f"{show(found.median)} ({show(found.low)} to {show(found.high)})"


def _times(found: Summary) -> str:
    return spread(found, lambda number: f"{number:.2f}")


# ---------------------------------------------------------------- what was measured


def machine(results: Results) -> str:
    facts = results.facts
    versions = ("Python", "OpenSSL", "GnuTLS", "nbdkit", "qemu", "fio", "libnbd")
    words = [f"{facts.get('cores')} cores ({facts.get('cpu')})", str(facts.get("kernel"))]
    words += [f"{name} {facts[name]}" for name in versions if name in facts]
    lines = [", ".join(words) + f"; {facts.get('date')}."]
    options = results.options
    others = Summary.of(record.others for record in results.records)
    lines.append(
        f"Rounds: {options.get('rounds')}, of {options.get('seconds')} s a case; revision "
        f"{facts.get('revision', 'unknown')}; load at the start {facts.get('load at the start')}, "
        f"at the end {facts.get('load at the end', 'unknown')}."
    )
    if others is not None:
        lines.append(
            f"Other programs took {others.median:.0%} of the machine's CPU time (median of the "
            f"measurements), and {others.high:.0%} at most."
        )
    return "\n".join(lines)


def encryption(results: Results) -> str:
    """Which cipher was negotiated by whom, and whether it was the same."""
    rows = [["server", "TLS", "cipher", "key exchange"]]
    ciphers = set()
    for server in results.servers.values():
        tls = server["tls"]
        rows.append([str(server["title"]), tls["version"], tls["cipher"], tls["group"]])
        if tls["version"] != "none":
            ciphers.add((tls["version"], tls["cipher"]))
    if len(ciphers) > 1:
        words = "**They did not use the same cipher: the figures cannot be compared.**"
    else:
        words = "In the words of the client's GnuTLS (nbdinfo with GNUTLS_DEBUG_LEVEL=4)."
    return f"{table(rows)}\n\n{words}"


def ratios(results: Results) -> str:
    """Every server but the yardstick; above 1 is better in every line."""
    if BASE not in results.servers:
        return ""
    servers = [name for name in results.servers if name != BASE]
    rows = [["case", *map(results.title, servers)]]
    for case in results.cases:
        cells = [_ratio_cell(results, case, server) for server in servers]
        rows.append([case.title, *cells])
    return table(rows)


def _ratio_cell(results: Results, case: Case, server: str) -> str:
    speed = ratio(results, case, server, BASE)
    if speed is None:
        return "failed" if results.failures(case.name, server) else NONE
    words = _times(speed)
    if (work := cpu_ratio(results, case, server, BASE)) is not None:
        words += f", CPU {work.median:.2f}"
    return words


def figures(results: Results) -> str:
    rows = [["case", "unit", *map(results.title, results.servers)]]
    for case in results.cases:
        cells = [_figure_cell(results, case, server) for server in results.servers]
        rows.append([case.title, case.unit, *cells])
    return table(rows)


def _figure_cell(results: Results, case: Case, server: str) -> str:
    found = value(results, case, server)
    failures = results.failures(case.name, server)
    if found is None:
        return f"failed: {failures[0][:60]}" if failures else NONE
    return spread(found) + (f", {len(failures)} failed" if failures else "")


def cpu_times(results: Results) -> str:
    """Microseconds for each operation, or seconds for each GiB."""
    servers = [
        name
        for name in results.servers
        if any(cpu(results, case, name) is not None for case in results.cases)
    ]
    rows = [["case", "CPU", *map(results.title, servers)]]
    for case in results.cases:
        found = [cpu(results, case, server) for server in servers]
        if any(one is not None for one in found):
            factor, unit = (1e6, "us") if case.per == "operation" else (1, "s")
            cells = [NONE if one is None else spread(one.times(factor)) for one in found]
            rows.append([case.title, f"{unit} per {case.per}", *cells])
    return table(rows) if len(rows) > 1 else ""


def goals(results: Results) -> str:
    """The goal table, filled in; without the lines whose cases were not in the run."""
    verdicts = [one for one in judge(results) if results.case(one.case) is not None]
    if not verdicts:
        return ""
    yardsticks = [one for one in YARDSTICKS if one in results.servers]
    columns = [word for one in yardsticks for word in (f"to {results.title(one)}", "CPU")]
    rows = [["goal", "at least", "aim", "measured as", *columns, "verdict"]]
    rows += [_goal_row(results, one, yardsticks) for one in verdicts]
    words = ""
    if NEVER_BELOW in results.servers:
        below = below_qemu(results)
        words = f"\n\nBelow {results.title(NEVER_BELOW)} in: {'; '.join(below) or 'no case'}."
    return table(rows) + words


def _goal_row(results: Results, verdict: Verdict, yardsticks: Sequence[str]) -> list[str]:
    goal, case = verdict.goal, results.case(verdict.case)
    assert case is not None
    aim = f"{goal.aim:.2f}" if goal.aim is not None else f"{goal.aim_value:g} {case.unit}"
    words = case.title
    if goal.aim_value is not None and (ours := value(results, case, goal.server)) is not None:
        words += f": {short(ours.median)} {case.unit}"
    found = {one.yardstick: one for one in verdict.against}
    cells = []
    for name in yardsticks:
        one = found.get(name)
        cells.append(NONE if one is None or one.ratio is None else _times(one.ratio))
        cells.append(NONE if one is None or one.cpu is None else f"{one.cpu.median:.2f}")
    return [goal.title, f"{goal.at_least:.2f}", aim, words, *cells, verdict.words]


def failures(results: Results) -> str:
    """Everything that came to nothing, each reason once."""
    seen: dict[tuple[str, str, str], int] = {}
    for record in results.records:
        if record.sample is None:
            key = (record.case, record.server, record.failed)
            seen[key] = seen.get(key, 0) + 1
    lines = [f"- {server}, {case}: {why} ({n} times)" for (case, server, why), n in seen.items()]
    lines += [f"- {server} was left out: {why}" for server, why in results.skipped.items()]
    return "\n".join(lines)


def report(results: Results) -> str:
    """All of it."""
    sections = [
        ("", f"{machine(results)}\n\n{NOTES}"),
        ("TLS", encryption(results)),
        (f"Ratios to {BASE}: above 1 is better, in CPU below 1", ratios(results)),
        ("Goals", goals(results)),
        ("Figures", figures(results)),
        ("CPU of the server", cpu_times(results)),
        ("What failed or was left out", failures(results)),
    ]
    return _joined(sections)


def quick_report(results: Results) -> str:
    """The gateway beside nbdkit, on one screen."""
    rows = [["case", "nbdkit = 1.0", "lowest to highest", "CPU per operation"]]
    for case in results.cases:
        speed, work = (one(results, case, "gateway", BASE) for one in (ratio, cpu_ratio))
        if speed is None or work is None:
            rows.append([case.title, "failed", NONE, NONE])
            continue
        low_high = f"{speed.low:.2f} to {speed.high:.2f}"
        rows.append([case.title, f"{speed.median:.2f}", low_high, f"{work.median:.2f}"])
    more = ratios(results) if len(results.servers) > 2 else ""
    ciphers = {server["tls"]["cipher"] for server in results.servers.values()}
    words = f"{machine(results)} Cipher: {', '.join(sorted(ciphers))}."
    return _joined([("", words), ("", table(rows)), ("", more), ("Failed", failures(results))])


def readme_figures(results: Results) -> str:
    """What stands in README.md between the two marks."""
    return f"{machine(results)}\n\n{ratios(results)}"


def _joined(sections: Iterable[tuple[str, str]]) -> str:
    return "\n\n".join(f"## {head}\n\n{text}" if head else text for head, text in sections if text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what the bench has written")
    parser.add_argument("--goals", action="store_true", help="the goal table alone")
    parser.add_argument("--readme", action="store_true", help="put the figures into README.md")
    options = parser.parse_args()
    try:
        results = Results.load(options.file)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if options.readme:
        SECTION.write(readme_figures(results))
    else:
        print(goals(results) if options.goals else report(results))


if __name__ == "__main__":
    main()
