"""Put the figures of long runs into README, and keep them:

    python -m tests.reliability --soak build/soak.json --fuzz build/fuzz.json --idle build/idle.json

Exit code 1, and nothing is written, if a run was short or has found something.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.reliability import figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("soak", "fuzz", "idle"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    try:
        found = figures.load(args.soak, args.fuzz, args.idle)
        if not (faults := figures.faults(found)):
            figures.write(found)
    except (OSError, ValueError) as error:
        sys.exit(f"reliability: {error}")
    except KeyError as error:
        sys.exit(f"reliability: {error} is missing: one of these is another program's file")
    if faults:
        sys.exit("\n".join(f"reliability: {one}" for one in faults))


if __name__ == "__main__":
    main()
