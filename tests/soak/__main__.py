"""`python -m tests.soak --seconds N [--seed S] [--json FILE]`: everything at once, for a long time.

Figures are written each minute; what is wrong is told at once, on standard error and in
FILE.findings.

Gateways with TLS and client certificates in front of real servers; real clients whose data is
verified; clients, workers, gateways and servers that are killed, frozen and restarted; strangers;
reloads. Exit code 1 if anything is lost, wrong, left over, or not as it has to be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

from tests.soak.soak import Soak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="what is done; not when it is done")
    parser.add_argument("--json", type=Path, help="all figures, and samples through the run")
    parser.add_argument(
        "--as-user",
        default="nobody:nogroup" if os.geteuid() == 0 else "",
        help="USER:GROUP that half of the gateways become; empty: none does",
    )
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    figures: Path | None = args.json

    def write() -> None:
        if figures is not None:  # whole at every moment
            new = figures.with_name(f".{figures.name}.new")
            new.write_text(json.dumps(soak.report(), indent=1))
            new.replace(figures)

    soak = Soak(
        args.seconds,
        seed,
        as_user=args.as_user,
        findings=None if figures is None else figures.with_name(f"{figures.name}.findings"),
        each_minute=write,
    )
    print(f"soak: {args.seconds:g} s, seed {seed}, in {soak.folder}", file=sys.stderr, flush=True)
    try:
        good = soak.run()
    finally:
        write()
        print(file=sys.stderr)
        print(soak.tally.table())
    if not good:
        found = soak.findings.path
        sys.exit(f"soak: seed {seed}; findings in {found}, what is left in {soak.folder}")


if __name__ == "__main__":
    main()
