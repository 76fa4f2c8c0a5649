"""The bench's arithmetic and its tables, from made-up samples. What is measured is no test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import cases, goals, report
from tests.bench.processes import Failed
from tests.bench.results import Case, Record, Results, Sample
from tests.bench.summary import Summary, cpu, cpu_ratio, ratio, value

READS = Case("read-4k-d32", "4 KiB random read, depth 32", "op/s", per="operation")
MEMORY = Case("idle-1000", "memory per client, 1000 idle", "KiB", "less")
TLS = {"version": "TLS 1.3", "cipher": "AES_256_GCM_SHA384", "group": "SECP256R1"}
PLAIN = dict.fromkeys(TLS, "none")
TITLES = {"gateway": "gateway", "nbdkit": "nbdkit 1.32.5", "qemu-nbd": "qemu-nbd 7.2"}


def run(**by_server: list[float | str]) -> Results:
    """Rounds of READS: operations per second, each at a hundred thousandth of a second of CPU for
    every server but nbdkit, for which it is twice that; a string is a failure."""
    return fill(READS, by_server, lambda server: 2e-5 if server == "nbdkit" else 1e-5)


def fill(
    case: Case,
    by_server: dict[str, list[float | str]],
    cpu_s: Callable[[str], float | None],
    results: Results | None = None,
) -> Results:
    results = results or Results(facts={"cores": 2}, options={"rounds": 3, "seconds": 1.0})
    results.cases.append(case)
    for key, rounds in by_server.items():
        server = key.replace("_", "-")
        words = {"title": TITLES.get(server, server), "command": server, "tls": TLS}
        results.servers.setdefault(server, words)
        for number, found in enumerate(rounds):
            if isinstance(found, str):
                results.records.append(Record(case.name, server, number, None, found))
            else:
                sample = Sample(found, cpu_s(server))
                results.records.append(Record(case.name, server, number, sample))
    return results


# ---------------------------------------------------------------- figures


def test_summary_is_median_lowest_and_highest() -> None:
    assert Summary.of([3.0, 1.0, 10.0]) == Summary(3.0, 1.0, 10.0, 3)
    assert Summary.of([4.0, 1.0]) == Summary(2.5, 1.0, 4.0, 2)
    assert Summary.of([]) is None


def test_ratios_are_taken_within_each_round() -> None:
    """A machine that is three times as slow in one round changes no ratio."""
    results = run(gateway=[200, 20, 600], nbdkit=[100, 10, 300])
    assert ratio(results, READS, "gateway", "nbdkit") == Summary(2.0, 2.0, 2.0, 3)
    assert value(results, READS, "gateway") == Summary(200, 20, 600, 3)


def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians() -> None:
    results = run(gateway=[100, 300, 200], nbdkit=[100, 100, 400])
    assert ratio(results, READS, "gateway", "nbdkit") == Summary(1.0, 0.5, 3.0, 3)


def test_less_is_better_for_memory_and_time() -> None:
    results = fill(MEMORY, {"gateway": [50.0], "nbdkit": [200.0]}, lambda _: None)
    assert ratio(results, MEMORY, "gateway", "nbdkit") == Summary(4.0, 4.0, 4.0, 1)
    assert cpu_ratio(results, MEMORY, "gateway", "nbdkit") is None


def test_cpu_ratio_below_one_is_less_work() -> None:
    results = run(gateway=[1, 1], nbdkit=[1, 1])
    assert cpu(results, READS, "gateway") == Summary(1e-5, 1e-5, 1e-5, 2)
    assert cpu_ratio(results, READS, "gateway", "nbdkit") == Summary(0.5, 0.5, 0.5, 2)


def test_rounds_that_failed_on_one_side_are_left_out() -> None:
    results = run(gateway=["no", 30, 40], nbdkit=[10, "no", 10])
    assert ratio(results, READS, "gateway", "nbdkit") == Summary(4.0, 4.0, 4.0, 1)
    assert results.failures("read-4k-d32", "gateway") == ["no"]
    assert ratio(results, READS, "gateway", "nobody") is None


# ---------------------------------------------------------------- the file


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    results = run(gateway=[1.5, "broken pipe"], nbdkit=[2.0, 3.0])
    results.skipped["qemu-nbd"] = "not installed"
    results.dump(tmp_path / "bench.json")
    assert Results.load(tmp_path / "bench.json") == results


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 99}', "not JSON"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 (JSONDecodeError is one too)
        Results.load(path)


# ---------------------------------------------------------------- goals


def verdict(results: Results, case: str) -> str:
    (found,) = [one.words for one in goals.judge(results) if one.case == case]
    return found


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (2.5, "ok, aim reached"),
        (1.9, "ok"),
        (1.8, "ok"),
        (1.5, "short: 0.30 too slow"),
    ],
)
def test_verdicts(ours: float, words: str) -> None:
    assert verdict(run(gateway=[ours], nbdkit=[1.0]), "read-4k-d32") == words


def test_more_cpu_than_nbdkit_is_short_of_the_goal() -> None:
    spent = {"gateway": 3e-5, "nbdkit": 2e-5}
    results = fill(READS, {"gateway": [9], "nbdkit": [1]}, lambda server: spent[server])
    assert verdict(results, "read-4k-d32") == "short: 0.50 too much CPU"


def test_the_newer_nbdkit_counts_too() -> None:
    results = run(gateway=[20], nbdkit=[10], nbdkit_trixie=[18])
    assert verdict(results, "read-4k-d32").startswith("short: 0.69 too slow")


def test_what_was_not_measured_or_failed() -> None:
    assert verdict(run(gateway=[2], nbdkit=[1]), "handshakes") == "not measured"
    assert verdict(run(nbdkit=[1]), "read-4k-d32") == "not measured"
    assert verdict(run(gateway=["gone", 2], nbdkit=[1, 1]), "read-4k-d32") == "failed"
    assert verdict(run(gateway=[2], nbdkit=["gone"]), "read-4k-d32") == "not measured"


@pytest.mark.parametrize(
    ("kib", "words"), [(30.0, "ok, aim reached"), (50.0, "ok"), (51.0, "short: too much memory")]
)
def test_memory_has_an_aim_of_its_own(kib: float, words: str) -> None:
    results = fill(MEMORY, {"gateway": [kib], "nbdkit": [200.0]}, lambda _: None)
    assert verdict(results, "idle-1000") == words


def test_below_qemu_nbd() -> None:
    results = run(gateway=[5, 6], qemu_nbd=[10, 12])
    assert goals.below_qemu(results) == ["4 KiB random read, depth 32 (0.50)"]
    assert goals.below_qemu(run(gateway=[5], gateway_2w=[20], qemu_nbd=[10])) == [
        "4 KiB random read, depth 32 (0.50; 2 workers 2.00)"
    ]
    assert goals.below_qemu(run(gateway=[10], qemu_nbd=[10])) == []
    assert goals.below_qemu(run(gateway=[1], nbdkit=[10])) == []


def test_every_goal_is_about_cases_that_exist() -> None:
    names = {case.name for probe in cases.PROBES for case in probe.cases}
    assert {name for goal in goals.GOALS for name in goal.cases} <= names
    assert set(cases.QUICK) <= names


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0.1234, "0.12"),
        (9.99, "9.99"),
        (12.34, "12.3"),
        (123.4, "123"),
        (4567.0, "4567"),
        (12345.0, "12.3k"),
        (123456.0, "123k"),
    ],
)
def test_numbers_have_three_digits(number: float, words: str) -> None:
    assert report.short(number) == words


def test_ratio_table() -> None:
    results = run(gateway=[200, 210], nbdkit=[100, 100], qemu_nbd=["it hung | up", "it hung"])
    assert report.ratios(results).splitlines() == [
        "| case | gateway | qemu-nbd 7.2 |",
        "|---|---|---|",
        "| 4 KiB random read, depth 32 | 2.05 (2.00 to 2.10), CPU 0.50 | failed |",
    ]


def test_figures_say_what_failed_and_keep_their_columns() -> None:
    results = run(gateway=[200.0, "no"], qemu_nbd=["it hung | up", "it hung"])
    assert report.figures(results).splitlines()[2:] == [
        "| 4 KiB random read, depth 32 | op/s | 200, 1 failed | failed: it hung / up |"
    ]
    assert report.failures(results).splitlines() == [
        "- gateway, read-4k-d32: no (1 times)",
        "- qemu-nbd, read-4k-d32: it hung | up (1 times)",
        "- qemu-nbd, read-4k-d32: it hung (1 times)",
    ]


def test_cpu_table_is_in_microseconds() -> None:
    results = run(gateway=[1], nbdkit=[1])
    assert report.cpu_times(results).splitlines()[2] == (
        "| 4 KiB random read, depth 32 | us per operation | 10.0 | 20.0 |"
    )


def test_goal_table_has_a_line_for_each_case_that_was_in_the_run() -> None:
    results = run(gateway=[200], nbdkit=[100], qemu_nbd=[300])
    lines = report.goals(results).splitlines()
    assert lines[2] == (
        "| 4 KiB read, depth 32 | 1.80 | 2.20 | 4 KiB random read, depth 32 | 2.00 | 0.50 | ok |"
    )
    assert len(lines) == 5
    assert lines[-1] == "Below qemu-nbd 7.2 in: 4 KiB random read, depth 32 (0.67)."


def test_goal_table_of_memory_has_the_figure_too() -> None:
    results = fill(MEMORY, {"gateway": [50.0], "nbdkit": [200.0]}, lambda _: None)
    assert report.goals(results).splitlines()[2:] == [
        "| memory per idle client | 4.00 | 32 KiB | memory per client, 1000 idle: 50.0 KiB "
        "| 4.00 | - | ok |"
    ]


def test_different_ciphers_are_told() -> None:
    results = run(gateway=[1], nbdkit=[1], direct=[1])
    results.servers["direct"]["tls"] = PLAIN
    assert "cannot be compared" not in report.encryption(results)
    results.servers["nbdkit"]["tls"] = {**TLS, "cipher": "AES_128_GCM_SHA256"}
    assert "cannot be compared" in report.encryption(results)


@pytest.mark.parametrize("servers", [{"gateway": [1.0]}, {"gateway": [2.0], "nbdkit": [1.0]}])
def test_reports_of_part_of_a_run(servers: dict[str, list[float | str]]) -> None:
    results = run(**servers)
    whole = report.report(results)
    assert "## Figures" in whole
    assert ("## Ratios" in whole) == ("nbdkit" in servers)
    assert "AES_256_GCM_SHA384" in report.quick_report(results)


def test_a_run_without_any_figure_still_has_a_report() -> None:
    results = run(gateway=["no server"], nbdkit=["no server"])
    assert "no server (1 times)" in report.report(results)
    assert "failed" in report.quick_report(results)


# ---------------------------------------------------------------- choosing


def test_cases_are_chosen_by_pattern() -> None:
    assert len(cases.chosen(())) == len(cases.PROBES)
    (idle,) = cases.chosen(("idle-1000",))
    assert [case.name for case in idle.cases] == ["idle-1", "idle-100", "idle-1000"]
    with pytest.raises(Failed, match="no case is called speed"):
        cases.chosen(("speed",))


def test_case_names_are_unique() -> None:
    names = [case.name for probe in cases.PROBES for case in probe.cases]
    assert len(names) == len(set(names))
