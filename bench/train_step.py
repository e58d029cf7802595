"""Seconds a step of supervised fine-tuning takes by how attention is computed, how threads wait, and by malloc.

    python -m bench.train_step [--data data/world/train] [--allocator libtcmalloc_minimal.so.4] [--save FILE]

Whole runs of train.sft on the shipped model, as examples/pipeline_tiny.sh trains it: the arms in turn, in several
rounds, each set beside the first arm of its round. A run's first steps are in it, its start is not. Another allocator
is put before libc's by LD_PRELOAD. Data are rendered scenes (train.world.render). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import result_file, save_result
from gemvg_edge.command import command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file

MODEL = Path("checkpoints/tabletop")
BATCH = 4
TUNING = ("LD_PRELOAD", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")  # what the arms must not inherit


def step_seconds(out: Path, data: Path, steps: int, seed: int, attention: str, settings: dict[str, str]) -> float:
    """Seconds a step of one run under those environment variables; GemvgError if the run fails."""
    flags: dict[str, Any] = {"model": MODEL, "data": data, "out": out, "steps": steps, "batch": BATCH, "seed": seed}
    flags |= {"dense-weight": 0.3, "warmup-steps": 1, "learning-rate": 1e-5, "attention": attention}
    run = [sys.executable, "-m", "train.sft", "--muon", *(f"--{name}={value}" for name, value in flags.items())]
    plain = {name: value for name, value in os.environ.items() if name not in TUNING} | settings
    ended = subprocess.run(run, env=plain, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        raise GemvgError(f"train.sft failed: {said[-1] if said else ended.returncode}")
    log = json.loads((out / "training.json").read_text(encoding="utf-8"))["log"]
    return float(log[-1]["train_runtime"]) / steps


@command("bench.train_step")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.train_step", description="Time of a training step by attention, waiting threads and allocator."
    )
    folder = "a folder of rendered scenes (default: %(default)s)"
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=Path("data/world/train"), help=folder)
    preloaded = "a library with another malloc, for one more arm (default: none)"
    parser.add_argument("--allocator", type=Path, metavar="FILE", help=preloaded)
    parser.add_argument("--steps", type=whole_number, default=100, metavar="N", help="of a run (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=whole_number, default=5, metavar="N", help="runs an arm (default: %(default)s)"
    )
    saved = "keep the JSON here too, such as bench/results/train_step.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if min(args.steps, args.rounds) < 1:
        parser.error("--steps and --rounds must be at least 1")
    if args.allocator and not is_file(args.allocator):
        raise GemvgError(f"--allocator {args.allocator}: there is no such file; Debian's libtcmalloc-minimal4 has one")
    arms: list[tuple[str, dict[str, str]]] = [("sdpa", {}), ("sdpa", {"OMP_WAIT_POLICY": "passive"}), ("math", {})]
    arms += [("math", {"LD_PRELOAD": str(args.allocator)})] if args.allocator else []
    times: list[list[float]] = [[] for _ in arms]
    with tempfile.TemporaryDirectory() as folder_name:
        for number in range(args.rounds):
            for k, arm in enumerate(arms):
                out = Path(folder_name) / f"{number}-{k}"
                times[k].append(step_seconds(out, args.data, args.steps, number, *arm))
                print(f"round {number + 1} of {args.rounds}, {arm}: {times[k][-1]:.3f} s a step", file=sys.stderr)
    rows = []
    for (attention, settings), column in zip(arms, times, strict=True):
        ratios = [seconds / first for seconds, first in zip(column, times[0], strict=True)]
        said = " ".join(f"{name}={Path(value).name}" for name, value in settings.items())
        row = {"attention": attention, "settings": said, "seconds": median(column), "over_first": median(ratios)}
        rows.append({**row, "lowest": min(ratios), "highest": max(ratios)})
    save_result({"batch": BATCH, "steps": args.steps, "rounds": args.rounds, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
