"""One setting in a process of its own: what a look and a question take there, and the peak of its memory.

Imports the runtime alone, so that the peak is what a device would need. Reads a JSON object from stdin, writes another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.grounder import Grounder

CODE = "from bench.speed.tradeoff_process import main; main()"
PATIENCE = 600  # seconds
STATUS = Path("/proc/self/status")


def ask_process(request: dict[str, Any]) -> tuple[list[float], float]:
    """(milliseconds of each question, peak MB of 10^6 bytes) of a new process; GemvgError with what it said."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps(request), capture_output=True, text=True, timeout=PATIENCE,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise GemvgError(f"the process that was to be measured failed: {said[-1] if said else done.returncode}")
    reply = json.loads(done.stdout.splitlines()[-1])
    return reply["ms"], reply["mb"]


def main() -> None:
    """What the process does."""
    print(json.dumps(measure(**json.load(sys.stdin))))


def measure(
    bundle: str, engine: str, threads: int, max_pixels: int, keep: float, constrained: bool,
    questions: Sequence[tuple[list[str], str]],
) -> dict[str, Any]:  # fmt: skip
    """Look and ask, question by question; the first is asked once before, so that it finds all as the others do."""
    times = []
    # No look finds what an earlier one left: held-out scenes come in relatives.
    with Grounder.open(bundle, engine=engine, threads=threads, cache_bytes=0) as grounder:
        for images, query in [questions[0], *questions]:
            started = time.perf_counter()
            grounder.look(images, max_pixels=max_pixels, keep=keep).ground(query, constrained=constrained)
            times.append(1e3 * (time.perf_counter() - started))
    return {"ms": times[1:], "mb": peak_bytes(STATUS.read_text(encoding="ascii")) / 1e6}


def peak_bytes(status: str) -> int:
    """The high-water mark of a process's resident memory; a fork's, which begins at its parent's, it is not."""
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
