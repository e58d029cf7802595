"""Hand mutated inputs to one of the readers of strangers' files, for minutes.

    python -m tests.fuzz pictures --minutes 10 [--seed 0] [--guided]

With `--guided` atheris makes inputs from what readers do with earlier ones, else hypothesis does. A failing input is
shrunk, kept in a file and shown; exit code 1. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.drive import open_target, run_for, run_seeds, targets
from tests.fuzz.guided import run_guided

MEMORY = 6 * 2**30  # of the address space: what asks for more is a fault


def main() -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=targets())
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true")
    given = parser.parse_args()
    if given.guided:
        return guided(given.target, given.minutes, given.seed)
    target = open_target(given.target)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("error")

    def keep(data: bytes) -> None:
        file = Path(f"fuzz-{given.target}-{hashlib.sha256(data).hexdigest()[:12]}.bin")
        file.write_bytes(data)
        print(f"kept in {file}", file=sys.stderr)

    started, found, count = time.monotonic(), 0, 0
    try:
        count = run_seeds(target)
        count += run_for(target, given.minutes * 60, given.seed, keep)
    except Exception:
        traceback.print_exc()
        found = 1
    seconds = round(time.monotonic() - started)
    print(json.dumps({"target": given.target, "inputs": count, "seconds": seconds, "found": found}))
    return found


def guided(name: str, minutes: float, seed: int) -> int:
    """As without atheris, which keeps a failing input as it is."""
    count, found = run_guided(name, round(minutes * 60), seed)
    content = {"target": name, "guided": True, "inputs": count, "seconds": round(minutes * 60), "found": len(found)}
    print(json.dumps(content | ({"kept": [str(file) for file in found]} if found else {})))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
