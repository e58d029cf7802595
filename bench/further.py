"""What further training of one checkpoint is worth: GRPO beside as much SFT on the same records, over several seeds.

    python -m bench.further runs/tiny stage2 grpo more-sft --seeds 1 2 3 [--limit 2000] [--save FILE]

`runs/tiny/grpo-1` is the arm `grpo` with seed 1, and so on; an arm that is a checkpoint itself, such as the mean of
seeds that train.average writes, has no seeds. All are asked the same held-out questions, directly and with reasoning.
An arm's gain over the start, and over the other arms, is that of all its seeds together, question by question, with the
paired bootstrap's interval; each seed's own gain stands beside it. Reasoned answers are also set against direct ones on
the tasks that need reasoning. What was scored is kept beside the checkpoints. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bench.boxes.held_out import held_out, held_out_arguments
from bench.boxes.scoring import Counts, f1_gain, gain_text, score_counts
from bench.results import result_file, save_result
from bench.stages import score_stage
from gemvg_edge.command import command, seed_number
from gemvg_edge.files import is_file
from train.checkpoint import CONFIG
from train.data.record import MODES

LIMIT = 2000
NEED_REASONING = ("missing", "kind", "ordinal")  # tasks whose answer is no look but a conclusion


def compare(start: Counts, arms: dict[str, list[Counts]]) -> list[dict[str, Any]]:
    """Each arm over the start, and over the arms named after it: pooled over the seeds, and each seed by itself."""
    rows = []
    for name, seeds in arms.items():
        before = [start] * len(seeds)
        rows.append({"arm": name, "over": "start", **_gain(before, seeds)})
    for one, other in combinations(arms, 2):
        if len(arms[one]) != len(arms[other]):
            continue  # seeds are paired with seeds, and a mean with a mean
        rows.append({"arm": one, "over": other, **_gain(arms[other], arms[one])})
    return rows


def _gain(before: list[Counts], after: list[Counts]) -> dict[str, Any]:
    gain, interval = f1_gain(np.sum(before, axis=0), np.sum(after, axis=0))
    each = [f1_gain(b, a)[0] for b, a in zip(before, after, strict=True)]
    return {"f1": score_counts(np.sum(after, axis=0)).f1, "gain": gain, "interval": interval, "seeds": each}


@command("bench.further")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.further", description="What further training is worth, over several seeds."
    )
    parser.add_argument("folder", type=Path, help="the folder where the checkpoints are")
    parser.add_argument("start", help="the name of the checkpoint that all arms started from")
    parser.add_argument("arms", nargs="+", help="names of ways to train; NAME-SEED is a checkpoint, or NAME itself")
    seeds = "the seeds that each arm was trained with (default: 1 2 3)"
    parser.add_argument("--seeds", type=seed_number, nargs="+", metavar="N", default=[1, 2, 3], help=seeds)
    held_out_arguments(parser, LIMIT)
    saved = "keep the JSON here too, such as bench/results/further.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    names = {
        arm: [arm] if is_file(args.folder / arm / CONFIG) else [f"{arm}-{seed}" for seed in args.seeds]
        for arm in args.arms
    }
    records = held_out(args.data, args.limit)
    hard = [k for k, record in enumerate(records) if record.source.partition(":")[2] in NEED_REASONING]

    def counts_of(name: str, mode: str) -> Counts:
        row = score_stage(args.folder / name, mode == "cot", "held-out", args.data, args.limit)
        print(f"{name} {mode}: F1@0.5 {row['f1']:.3f}", flush=True)
        return np.asarray(row["counts"], float)

    scored = {
        mode: (counts_of(args.start, mode), {arm: [counts_of(name, mode) for name in names[arm]] for arm in names})
        for mode in MODES
    }
    result: dict[str, Any] = {"n": len(records), "start": args.start, "seeds": args.seeds, "modes": {}, "reasoned": []}
    for mode, (start, arms) in scored.items():
        result["modes"][mode] = {"start_f1": score_counts(start).f1, "rows": compare(start, arms)}
        for row in result["modes"][mode]["rows"]:
            print(f"{mode}: {row['arm']} over {row['over']}: F1 {gain_text(row['gain'], row['interval'])}")
    (start_direct, direct), (start_cot, cot) = scored["direct"], scored["cot"]
    pairs = {args.start: ([start_direct], [start_cot]), **{arm: (direct[arm], cot[arm]) for arm in args.arms}}
    for name, (asked, thought) in pairs.items():
        row = {"arm": name, "n": len(hard), **_gain([c[hard] for c in asked], [c[hard] for c in thought])}
        row["direct_f1"] = score_counts(np.sum([c[hard] for c in asked], axis=0)).f1
        result["reasoned"].append(row)
        said = f"F1 {row['f1']:.3f}, over direct {gain_text(row['gain'], row['interval'])}"
        print(f"{name}, reasoned, on {', '.join(NEED_REASONING)} ({len(hard)} questions): {said}")
    save_result(result, args.save)


if __name__ == "__main__":
    main()
