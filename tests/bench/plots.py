"""A run as plots: `python -m tests.bench.plots FILE.json --out DIR`. Needs matplotlib."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.bench.report import short
from tests.bench.results import Case, Results
from tests.bench.summary import Summary, cpu, ratio, value

BASE = "nbdkit"
COLOURS = {
    "gateway": "#1f6feb",
    "gateway-2w": "#79b8ff",
    "nbdkit": "#57606a",
    "nbdkit-trixie": "#afb8c1",
    "qemu-nbd": "#e16f24",
    "direct": "#2da44e",
}
DPI = 160

# Of the README's plot: case, and which gateway does it.
RATIOS = (
    ("read-4k-d1", "gateway"),
    ("write-4k-d1", "gateway"),
    ("read-4k-d32", "gateway"),
    ("write-4k-d32", "gateway"),
    ("read-256k", "gateway"),
    ("write-256k", "gateway"),
    ("read-4k-d32-c4", "gateway-2w"),
    ("write-4k-d32-c4", "gateway-2w"),
    ("read-256k-c4", "gateway-2w"),
    ("write-256k-c4", "gateway-2w"),
    ("handshakes", "gateway"),
)
DEPTHS = (1, 8, 32, 64)
CPU_OPERATIONS = ("read-4k-d1", "write-4k-d1", "read-4k-d32", "write-4k-d32", "zeroes")
CPU_BULK = ("read-64k", "write-64k", "read-256k", "write-256k", "copy-out", "copy-in")
MEMORY = ("idle-1", "idle-100", "idle-1000", "busy-100")


def draw(results: Results, folder: Path) -> list[Path]:
    """Write those plots for which there are figures. Returns where they are."""
    mpl.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": "#d8dee4",
            "figure.facecolor": "white",
        }
    )
    written = []
    for name, plot in (
        ("ratios", ratios),
        ("cpu", cpu_times),
        ("depth", depth),
        ("memory", memory),
    ):
        if (figure := plot(results)) is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI, bbox_inches="tight")
            written.append(path)
    return written


def ratios(results: Results) -> Figure | None:
    """Throughput beside nbdkit, one group of bars a case: the README's plot."""
    rows: list[tuple[str, dict[str, Summary]]] = []
    for name, server in RATIOS:
        case = results.case(name)
        if case is None or server not in results.servers:
            continue
        both = {one: ratio(results, case, one, BASE) for one in (server, "qemu-nbd")}
        found = {one: bar for one, bar in both.items() if bar is not None}
        if server in found:
            rows.append((case.title.replace("sequential ", "").replace("random ", ""), found))
    if not rows:
        return None
    figure = Figure(figsize=(7.2, 0.5 + 0.48 * len(rows)))
    axes = figure.subplots()
    height = 0.38
    labelled = set()
    for row, (_, bars) in enumerate(rows):
        for i, (server, bar) in enumerate(bars.items()):
            at = row + (i - (len(bars) - 1) / 2) * height
            label = None if server in labelled else results.title(server)
            labelled.add(server)
            axes.barh(at, bar.median, height * 0.92, color=_colour(server), label=label)
            axes.plot([bar.low, bar.high], [at, at], color="#24292f", linewidth=0.8)
            patch = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            words = f"{bar.median:.2f}"
            axes.text(bar.high + 0.03, at, words, va="center", fontsize=8, bbox=patch)
    axes.axvline(1.0, color="#24292f", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [title for title, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 0.25 + max(bar.high for _, bars in rows for bar in bars.values()))
    axes.set_xlabel(f"operations, bytes or handshakes per second; {results.title(BASE)} = 1")
    axes.grid(axis="x")
    _legend(figure, axes)
    return figure


def cpu_times(results: Results) -> Figure | None:
    """What an operation, and what a GiB, costs each server."""
    panels = [
        (title, factor, found)
        for title, factor, names in (
            ("microseconds of CPU per operation", 1e6, CPU_OPERATIONS),
            ("seconds of CPU per GiB", 1.0, CPU_BULK),
        )
        if (found := [case for name in names if (case := results.case(name)) is not None])
    ]
    if not panels:
        return None
    figure = Figure(figsize=(5.4 * len(panels), 4.2))
    servers = [one for one in results.servers if one not in ("direct", "gateway-2w")]
    for axes, (title, factor, cases) in zip(_row(figure, len(panels)), panels, strict=True):
        for i, server in enumerate(servers):
            bars = [cpu(results, case, server) for case in cases]
            _bars(axes, results, server, bars, (i, len(servers)), factor)
        axes.set_yticks(range(len(cases)), [_brief(case) for case in cases])
        axes.invert_yaxis()
        # One bar that runs away, as those of small reads do with qemu-nbd, must not hide the rest.
        rest = [cpu(results, case, one) for case in cases for one in servers if one != "qemu-nbd"]
        if widest := max((one.median * factor for one in rest if one is not None), default=0):
            edge = min(axes.get_xlim()[1], widest * 1.6)
            axes.set_xlim(0, edge)
            for words in axes.texts:
                words.set_x(min(words.get_position()[0], edge))
        axes.set_xlabel(title)
        axes.grid(axis="x")
    _legend(figure, axes)
    return figure


def depth(results: Results) -> Figure | None:
    """Operations per second as more requests are under way."""
    figure = Figure(figsize=(9, 3.8))
    panels = _row(figure, 2)
    drawn = False
    for axes, way in zip(panels, ("read", "write"), strict=True):
        cases = {number: results.case(f"{way}-4k-d{number}") for number in DEPTHS}
        for server in results.servers:
            points = {
                number: found
                for number, case in cases.items()
                if case is not None and (found := value(results, case, server)) is not None
            }
            if points:
                drawn = True
                _line(axes, results, server, points)
        axes.set_xscale("log", base=2)
        axes.set_xticks(DEPTHS, [str(number) for number in DEPTHS])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"4 KiB random {way}: requests under way")
        axes.set_ylabel("thousand operations per second")
        axes.grid()
    if not drawn:
        return None
    _legend(figure, panels[0])
    return figure


def memory(results: Results) -> Figure | None:
    """What a client costs each server. Logarithmic, for they differ by much."""
    cases = [case for name in MEMORY if (case := results.case(name)) is not None]
    servers = [one for one in results.servers if one != "direct"]
    if not cases or not servers:
        return None
    figure = Figure(figsize=(7.2, 0.8 + 0.8 * len(cases)))
    axes = figure.subplots()
    for i, server in enumerate(servers):
        bars = [value(results, case, server) for case in cases]
        _bars(axes, results, server, bars, (i, len(servers)), 1.0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.set_yticks(range(len(cases)), [case.title for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("KiB of memory per client")
    axes.grid(axis="x")
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Any) -> None:
    """Above everything, in one line: it hides nothing there."""
    figure.tight_layout()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(labels),
        frameon=False,
    )


def _row(figure: Figure, count: int) -> list[Any]:
    found = figure.subplots(1, count)
    return [found] if count == 1 else list(found)


def _bars(
    axes: Any,
    results: Results,
    server: str,
    bars: list[Summary | None],
    place: tuple[int, int],
    factor: float,
) -> None:
    """One server's bar in every group; `place` is which of how many in a group."""
    index, of = place
    height = 0.8 / of
    rows = [row for row, bar in enumerate(bars) if bar is not None]
    widths = [bar.median * factor for bar in bars if bar is not None]
    at = [row + (index - (of - 1) / 2) * height for row in rows]
    axes.barh(at, widths, height * 0.92, color=_colour(server), label=results.title(server))
    for y, width in zip(at, widths, strict=True):
        axes.text(width, y, f" {short(width)}", va="center", fontsize=7)


def _line(axes: Any, results: Results, server: str, points: dict[int, Summary]) -> None:
    """Medians in thousands, and the area from the lowest to the highest."""
    at = list(points)
    medians, lows, highs = (
        [getattr(found, which) / 1000 for found in points.values()]
        for which in ("median", "low", "high")
    )
    style = "--" if server == "direct" else "-"
    colour = _colour(server)
    label = results.title(server)
    axes.plot(at, medians, style, marker="o", markersize=4, color=colour, label=label)
    axes.fill_between(at, lows, highs, color=colour, alpha=0.12, linewidth=0)


def _brief(case: Case) -> str:
    title = case.title.replace("sequential ", "").replace("random ", "")
    return title.replace(", depth 16", "").replace(", one connection", "")


def _colour(server: str) -> str:
    return COLOURS.get(server, "#8250df")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what the bench has written")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), metavar="DIR")
    options = parser.parse_args()
    try:
        results = Results.load(options.file)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    for path in draw(results, options.out):
        print(path)


if __name__ == "__main__":
    main()
