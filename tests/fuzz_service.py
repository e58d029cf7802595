"""Requests that schemathesis makes up from the OpenAPI document of `gemvg serve`, for minutes.

    python -m tests.fuzz_service [--minutes 10] [--seed 0]

Every check of schemathesis, but two: that what the document allows is always answered (no schema can say what is a
picture), and where a form is taken that everything else is refused (in a form a number is a text as well). A worker
that is lost counts as a fault. What fails is shown with a command that sends it again; exit code 1. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.readme import ROOT
from bench.service.running import serving

CONFIG = "[checks]\npositive_data_acceptance.enabled = false\n" + "".join(
    f'[[operations]]\ninclude-name = "POST {path}"\nchecks.negative_data_rejection.enabled = false\n'
    for path in ("/v1/ground", "/v1/scenes")
)
FLAGS = ("--max-bytes", "4000000", "--max-queue", "64")


def fuzz(seconds: int, examples: int, seed: int) -> tuple[dict[str, Any], str]:
    """What came of requests for so long, at least so many an operation; and all that schemathesis says."""
    with serving(*FLAGS) as running, tempfile.TemporaryDirectory() as folder:  # schemathesis keeps what it found
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json", "--no-color"]
        command += ["--max-examples", str(examples), "--seed", str(seed)]
        command += ["--request-timeout", "20", "--warnings", "off"]
        command += ["--max-time", str(seconds)] if seconds else []
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.service_hooks", "PYTHONPATH": str(ROOT)}
        (Path(folder) / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
        before = running.memory()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        found, after = running.metrics(), running.memory()
        faults = running.log.read_text(encoding="utf-8")
    count = re.search(r"(\d+) generated", done.stdout)
    statuses: dict[str, int] = {}
    for name, value in found.items():
        if status := re.search(r'gemvg_requests_total\{.*status="(\d+)"', name):
            statuses[status[1]] = statuses.get(status[1], 0) + int(value)
    restarts = int(found["gemvg_worker_restarts"])
    result = {
        "requests": int(count[1]) if count else 0, "statuses": dict(sorted(statuses.items())), "restarts": restarts,
        "grew_mb": {name: round((after[name] - before[name]) / 1e6, 1) for name in before},
        "found": int(done.returncode != 0 or restarts > 0 or "Traceback" in faults),
    }  # fmt: skip
    return result, done.stdout + done.stderr + faults


def main() -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result, said = fuzz(max(1, int(given.minutes * 60)), 100, given.seed)
    if result["found"]:
        print(said)
    print(json.dumps({"minutes": given.minutes, "seed": given.seed, **result}))
    return int(result["found"])


if __name__ == "__main__":
    sys.exit(main())
