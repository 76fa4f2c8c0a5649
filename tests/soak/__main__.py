"""`python -m tests.soak --seconds N [--seed S] [--json FILE]`: everything at once, for a long time.

Gateways with TLS and client certificates in front of real servers; real clients whose data is
verified; clients, workers, gateways and servers that are killed, frozen and restarted; strangers;
reloads. Exit code 1 if anything is lost, wrong, left over, or not as it has to be.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tests.soak.soak import Soak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="what is done; not when it is done")
    parser.add_argument("--json", type=Path, help="all figures, and samples through the run")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    soak = Soak(args.seconds, seed)
    print(f"soak: {args.seconds:g} s, seed {seed}, in {soak.folder}", file=sys.stderr, flush=True)
    try:
        good = soak.run()
    finally:
        report = soak.report()
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1))
        print(file=sys.stderr)
        print(soak.tally.table())
        for violation in soak.tally.violations:
            print(f"VIOLATION: {violation}", file=sys.stderr)
    if not good:
        sys.exit(f"soak: seed {seed}; what is left of it is in {soak.folder}")


if __name__ == "__main__":
    main()
