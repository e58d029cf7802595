"""What fewer visual tokens cost in boxes: pruning by every method, random pruning, and a lower pixel budget.

    python -m bench.pruning [BUNDLE] [--limit N] [--save bench/results/pruning.json]

All are asked the same held-out questions. Every method prunes each picture to the same share; random pruning is drawn
with several seeds, and its scores are over all of them. Gains are paired with the unpruned answers. A pixel budget of
the same share is the other way to fewer tokens, and saves work of the vision tower too. `--save` also writes a plot
beside the JSON, which is the last line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.boxes.held_out import held_out, held_out_arguments
from bench.boxes.scoring import Counts, count, f1_gain, score_counts
from bench.readme import pruning as table
from bench.results import machine, result_file, save_figure, save_result
from gemvg_edge.command import command, whole_number
from gemvg_edge.grounder import Grounder
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.positions import visual_tokens
from gemvg_edge.pruning import METHODS, Pruning
from gemvg_edge.stopping import Stopping
from train.data.record import Record

SHARES = (0.9, 0.75, 0.5, 0.25)
RANDOM, PIXELS, ALL = "random", "max_pixels", "all"


@dataclass(frozen=True)
class Way:
    """One way to fewer tokens, at one share."""

    name: str
    share: float
    seed: int = 0


def ways(seeds: int) -> list[Way]:
    """All that are compared, the whole pictures first."""
    found = [Way(ALL, 1.0)]
    for share in SHARES:
        found += [Way(PIXELS, share)]
        found += [Way(name, share) for name in METHODS if name != RANDOM]
        found += [Way(RANDOM, share, seed) for seed in range(seeds)]
    return found


def measure(grounder: Grounder, records: Sequence[Record], way: Way) -> tuple[Counts, float]:
    """Counts of boxes, and visual tokens a question."""
    predicted, tokens = [], 0
    merge, stop = grounder.manifest.preprocessing.merge_size, Stopping()
    for record in tqdm(records, desc=f"{way.name} {way.share:g}", leave=False):
        budget = round(way.share * grounder.preprocessing.max_pixels) if way.name == PIXELS else None
        resized = grounder._resize(record.images, budget, False, None, stop)
        if way.name in METHODS:
            resized = replace(resized, pruning=Pruning(way.share, way.name, way.seed))
        scene = grounder._look(resized, stop)
        predicted.append(scene.ask(record.query, False, stop, None).boxes)
        whole = [visual_tokens(grid, merge) for grid in resized.grids]
        tokens += sum(max(1, int(np.ceil(way.share * n))) if way.name in METHODS else n for n in whole)
    return count(predicted, [record.boxes for record in records]), tokens / len(records)


def compare(grounder: Grounder, records: Sequence[Record], seeds: int) -> list[dict[str, Any]]:
    """A row a way and share; the seeds of random pruning are one row."""
    found: dict[tuple[str, float], list[tuple[Counts, float]]] = {}
    for way in ways(seeds):
        found.setdefault((way.name, way.share), []).append(measure(grounder, records, way))
    whole = found[ALL, 1.0][0][0]
    rows = []
    for (name, share), runs in found.items():
        counts = np.concatenate([one for one, _ in runs])
        scores = score_counts(counts)
        gain, interval = f1_gain(np.concatenate([whole] * len(runs)), counts)
        rows.append(
            {
                "name": name,
                "share": share,
                "tokens": runs[0][1],
                "f1": scores.f1,
                "f1_interval": list(scores.f1_interval),
                "f1_gain": gain,
                "f1_gain_interval": list(interval),
                "mean_iou": scores.mean_iou,
                "image_accuracy": scores.image_accuracy,
                "seeds": [score_counts(one).f1 for one, _ in runs],
            }
        )
    return rows


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """F1 over visual tokens, a line a way."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    whole = next(row for row in rows if row["name"] == ALL)
    axes.axhspan(*whole["f1_interval"], color="grey", alpha=0.2, label="all tokens, 95 %")
    for k, name in enumerate(dict.fromkeys(row["name"] for row in rows if row["name"] != ALL)):
        line = [whole, *(row for row in rows if row["name"] == name)]
        f1 = np.array([row["f1"] for row in line])
        bars = np.abs(np.array([row["f1_interval"] for row in line]).T - f1)
        axes.errorbar([row["tokens"] for row in line], f1, yerr=bars, marker="os^Dv"[k % 5], capsize=3, label=name)
    axes.set(xlabel="visual tokens a question", ylabel="F1@0.5", title="fewer visual tokens (bars: 95 %)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, file)


@command("bench.pruning")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.pruning", description="What fewer visual tokens cost in boxes.")
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="a bundle folder (default: the shipped model)"
    )
    held_out_arguments(parser, 500)
    seeds = "how often random pruning is drawn (default: %(default)s)"
    parser.add_argument("--seeds", type=whole_number, metavar="N", default=3, help=seeds)
    saved = "keep the JSON here too, and a plot of the same name in PNG (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 1 or args.seeds < 1:
        parser.error("--limit and --seeds must be at least 1")
    with Grounder.open(args.bundle, threads=1, cache_bytes=0) as grounder:
        rows = compare(grounder, held_out(args.data, args.limit), args.seeds)
        result = {"model": grounder.manifest.name, "questions": args.limit, "seeds": args.seeds, "rows": rows}
    if args.save:
        plot(rows, args.save.with_suffix(".png"))
    print(table({**result, "machine": machine()}))
    save_result(result, args.save)


if __name__ == "__main__":
    main()
