"""`python -m tests.fuzz`: see `--help`. Exit code 1 if there is a finding."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import random
import sys
from dataclasses import asdict
from pathlib import Path

from tests.fuzz import findings, run
from tests.fuzz.findings import fault_of
from tests.fuzz.targets import TARGETS, target

_ENGINE = (
    "atheris is not installed here: pip install atheris (Linux on x86-64, Python 3.11 to 3.13). "
    "Without it, pytest tests/fuzz runs every input that was ever kept."
)


def main() -> int:
    options = _parser().parse_args()
    if options.replay:
        return _replay(options.target or [], options.replay)
    if importlib.util.find_spec("atheris") is None:
        print(_ENGINE, file=sys.stderr)
        return 2
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    plan = run.Plan(
        options.target or list(TARGETS),
        options.seconds,
        seed,
        options.jobs,
        options.runs,
        options.plant,
        options.findings,
        options.work,
    )
    print(f"seed {seed}, {plan.seconds} s, {plan.jobs} at a time", flush=True)
    figures = run.run(plan, sys.stdout)
    print(run.table(figures))
    for one in figures:
        for path in one.findings:
            print(f"finding: {path} (how to see it again: {path}.txt)")
        for failure in one.failures:
            print(f"the fuzzer itself failed: {failure}")
    if options.json:
        options.json.write_text(_json(plan, figures))
    return int(any(one.findings or one.failures for one in figures))


def _replay(names: list[str], paths: list[Path]) -> int:
    """Run single inputs. Exit code 1 if one fails."""
    if len(names) != 1:
        print("--replay goes with one --target", file=sys.stderr)
        return 2
    status = 0
    for path in paths:
        fault = fault_of(target(names[0]), path.read_bytes())
        print(f"{path}: {'passes' if fault is None else fault.words}")
        status |= fault is not None
    return int(status)


def _json(plan: run.Plan, figures: list[run.Figures]) -> str:
    return json.dumps(
        {
            "seconds": plan.seconds,
            "jobs": plan.jobs,
            "seed": plan.seed,
            "python": platform.python_version(),
            "inputs": sum(one.inputs for one in figures),
            "findings": sum(len(one.findings) for one in figures),
            "targets": [asdict(one) | {"per_second": one.per_second} for one in figures],
        },
        indent=1,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of all targets together")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="again for more")
    parser.add_argument("--seed", type=int, default=0, help="of the first process; 0: any")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--runs", type=int, default=-1, help="inputs of each target at most")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--work", type=Path, help="a folder to keep new inputs in")
    parser.add_argument("--findings", type=Path, default=findings.FINDINGS)
    parser.add_argument("--replay", type=Path, nargs="+", help="inputs to run, and nothing else")
    parser.add_argument("--plant", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
