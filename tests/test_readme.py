"""What README says is so: the demo's output, every flag, every file, every message of a client."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click

from gateway.cli import cli
from tests.bench import report
from tests.bench.results import Results

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def code_block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)[number]


def normalised(output: str) -> str:
    """Without what differs from run to run: port, cipher, version, and how we were called."""
    output = re.sub(r"localhost:\d+|127\.0\.0\.1:\d+", "127.0.0.1:PORT", output)
    output = re.sub(r"TLSv1\.\d, \S+;", "TLS;", output)
    output = re.sub(r"nbd-gateway \d\S+,", "nbd-gateway VERSION,", output)
    return re.sub(r"\S*(python\S* -m gateway|nbd-gateway) demo", "nbd-gateway demo", output)


def test_demo_prints_what_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "demo", "--self-test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = code_block("console").split("\n", 1)
    assert shown[0] == "$ make demo"
    assert done.stdout.strip()
    assert normalised(done.stdout).strip() in normalised(shown[1])


def test_every_flag_is_in_the_reference_and_no_other() -> None:
    table = README[
        README.index("| option | meaning") : README.index("It prints what it listens on")
    ]
    documented = set(
        re.findall(r"`(--[a-z-]+)", re.sub(r"\|[^|]*\|[^|]*\|$", "", table, flags=re.M))
    )
    first_column = {
        flag
        for line in table.splitlines()[2:]
        for flag in re.findall(r"--[a-z-]+", line.split(" | ")[0])
    }
    real = {
        option
        for parameter in cli.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
        if option.startswith("--") and option not in ("--version", "--help")
    }
    assert first_column == real
    assert documented <= real


def test_defaults_are_the_real_ones() -> None:
    real = {name: option.default for option in cli.params for name in option.opts}
    for flag, shown in (
        ("--max-connections", "100"),
        ("--workers", "1"),
        ("--handshake-timeout", "10"),
        ("--drain-timeout", "30"),
        ("--on-revoke", "`close`"),
        ("--reload-interval", "10"),
        ("--tls-min", "`1.2`"),
        ("--tls", "`require`"),
        ("--log-level", "`info`"),
    ):
        (line,) = [one for one in README.splitlines() if one.startswith(f"| `{flag} ")]
        assert line.endswith(f"| {shown} |")
        default = real[flag]
        assert shown.strip("`") == (f"{default:g}" if isinstance(default, float) else str(default))


def test_figures_are_those_of_the_run_that_is_kept() -> None:
    """`python -m tests.bench.report tests/bench/figures/bench.json --readme` puts them there."""
    results = Results.load(ROOT / "tests/bench/figures/bench.json")
    assert report.SECTION.text == report.readme_figures(results)
    assert not report.failures(results)


def test_production_lines_are_understood() -> None:
    """The commands of ours in the five lines parse; the rest of their way is tested elsewhere."""
    lines = [line.partition("#")[0] for line in code_block("sh").splitlines()]
    ours = [shlex.split(line)[1:] for line in lines if line.startswith("nbd-gateway ")]
    assert len(ours) == 2
    for words in ours:
        with cli.make_context("nbd-gateway", words, resilient_parsing=False) as context:
            assert context is not None


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "deploy/README.md", "certs/README.md", "SECURITY.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
