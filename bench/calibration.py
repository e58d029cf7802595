"""What a box's probability means: how many boxes of each score are right, and the fit that makes a score say so.

    python -m bench.calibration [BUNDLE] [--limit N] [--write] [--save bench/results/calibration.json]

A bundle answers held-out questions, and its boxes are right where they overlap a true one (IoU 0.5, right picture, one
to one). A logistic curve a log(p) + b over the product p of a box's token probabilities is fitted on the first half of
the questions and judged on the second: expected calibration error (ten bins), average precision, and what a threshold
keeps. `--write` puts the fit into the bundle's manifest, whose other files stay as they are; the runtime then gives it
as `Box.score`. `--save` also writes a reliability diagram beside the JSON, which is the last line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from bench.boxes.held_out import held_out, held_out_arguments
from bench.results import result_file, save_figure, save_result
from export.bundle_writer import write_manifest
from gemvg_edge.boxes import match_boxes
from gemvg_edge.bundle import MANIFEST, open_bundle
from gemvg_edge.command import command
from gemvg_edge.errors import GemvgError
from gemvg_edge.grounder import Grounder
from gemvg_edge.images import load_image
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.scores import Calibration
from train.data.record import Record
from train.data.samples import read_all

QUESTIONS, FEWEST, BINS = 1000, 20, 10
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
RIDGE = 1e-3  # keeps a fit finite where every box is right, or none
Values = npt.NDArray[np.float64]


def measure(grounder: Grounder, records: Sequence[Record], think: bool) -> tuple[list[Values], list[Values], list[int]]:
    """Of each question: log-probabilities of its boxes (boxes,), which are right (boxes,), and how many it has."""
    grounder.model.manifest = replace(grounder.manifest, calibration=None)  # scores are then the probabilities
    log_probs, right = [], []
    for record in tqdm(records, desc="questions", leave=False):
        answer = grounder.ground([load_image(path) for path in record.images], record.query, think=think)
        matched = {k for k, _, _ in match_boxes(answer.boxes, record.boxes)}
        log_probs.append(np.array([math.log(max(box.score or 0.0, 1e-300)) for box in answer]))
        right.append(np.array([float(k in matched) for k in range(len(answer))]))
    return log_probs, right, [len(record.boxes) for record in records]


def fit(log_probs: Values, right: Values) -> Calibration:
    """The logistic curve of greatest likelihood, by Newton's method; `right` is 1 or 0 for each box."""
    x = np.stack([log_probs, np.ones_like(log_probs)], axis=1)  # (boxes, 2)
    w = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (right - p) - RIDGE * w
        curvature = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        w += step
        if np.abs(step).max() < 1e-10:
            break
    if w[0] < 0:  # a less probable box is not to be the surer one
        share = np.clip(right.mean(), 1e-6, 1 - 1e-6)
        return Calibration(0.0, float(np.log(share / (1 - share))))
    return Calibration(float(w[0]), float(w[1]))


def reliability(scores: Values, right: Values) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error, and of each bin of equal width that has boxes how many, their score and share."""
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    bins = [
        {"boxes": int(inside.sum()), "score": float(scores[inside].mean()), "right": float(right[inside].mean())}
        for inside in (places == k for k in range(BINS))
        if inside.any()
    ]
    return sum(row["boxes"] * abs(row["score"] - row["right"]) for row in bins) / max(1, len(scores)), bins


def average_precision(scores: Values, right: Values, wanted: int) -> float:
    """Area under the precision over recall, each precision the best at that recall or a higher one."""
    hits = right[np.argsort(-scores, kind="stable")].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits / max(1, wanted), prepend=0.0) * best).sum())


def calibration(grounder: Grounder, records: Sequence[Record], think: bool = False) -> dict[str, Any]:
    """The fit of the first half of the questions, and what the second half says of it."""
    log_probs, right, wanted = measure(grounder, records, think)
    half = len(records) // 2
    fitting, fitting_right = np.concatenate(log_probs[:half]), np.concatenate(right[:half])
    testing, testing_right = np.concatenate(log_probs[half:]), np.concatenate(right[half:])
    if min(len(fitting), len(testing)) < FEWEST:
        raise GemvgError(
            f"half of the {len(records)} questions have {min(len(fitting), len(testing))} boxes, too few for a fit; "
            "give a higher --limit"
        )
    found, all_wanted = fit(fitting, fitting_right), sum(wanted[half:])
    scores = np.array([found.score(value) for value in testing])
    raw_error, raw_bins = reliability(np.exp(testing), testing_right)
    error, bins = reliability(scores, testing_right)
    return {
        "questions": len(records) - half,
        "boxes": len(testing),
        "right": float(testing_right.mean()),
        "fit": found.to_config(),
        "fitted_on": {"questions": half, "boxes": len(fitting)},
        "ece_raw": raw_error,
        "ece": error,
        "ap": average_precision(testing, testing_right, all_wanted),
        "ap_without_scores": float(testing_right.sum() / max(1, all_wanted) * testing_right.mean()),
        "bins_raw": raw_bins,
        "bins": bins,
        "thresholds": [_kept(scores, testing_right, all_wanted, threshold) for threshold in THRESHOLDS],
    }


def _kept(scores: Values, right: Values, wanted: int, threshold: float) -> dict[str, float]:
    kept = scores >= threshold
    precision = float(right[kept].mean()) if kept.any() else 0.0
    return {"threshold": threshold, "precision": precision, "recall": float(right[kept].sum() / max(1, wanted))}


def write_fit(folder: Path, found: Calibration) -> None:
    """Put a fit into the manifest of a bundle, and seal it again."""
    open_bundle(folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    write_manifest(folder, manifest | {"calibration": found.to_config()})


def plot(result: dict[str, Any], file: Path) -> None:
    """Share of right boxes over score, before and after the fit, and how many boxes each score has."""
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(6, 7), layout="constrained", sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="grey", linestyle=":", label="what a score should mean")
    for name, error, mark in (("bins_raw", "ece_raw", "s"), ("bins", "ece", "o")):
        bins, said = result[name], "probability as it is" if name == "bins_raw" else "calibrated"
        points = [row["score"] for row in bins], [row["right"] for row in bins]
        upper.plot(*points, marker=mark, label=f"{said} (ECE {result[error]:.3f})")
        lower.bar(points[0], [row["boxes"] for row in bins], width=0.04, alpha=0.6)
    upper.set(ylabel="share of right boxes", title=f"{result['model']}: {result['boxes']} boxes, held out")
    upper.legend()
    lower.set(xlabel="score", ylabel="boxes", xlim=(0, 1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    save_figure(figure, file)


@command("bench.calibration")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.calibration", description="What the score of a box means; half of the questions fit it."
    )
    which = "a bundle folder (default: the shipped bundle)"
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", default=DEFAULT_BUNDLE, help=which)
    held_out_arguments(parser, QUESTIONS, split=True)
    own = "a .jsonl of records to ask instead (default: held-out scenes)"
    parser.add_argument("--records", type=Path, metavar="FILE", help=own)
    parser.add_argument("--think", action="store_true", help="ask for reasoning before the answer")
    parser.add_argument("--write", action="store_true", help="put the fit into the bundle's manifest")
    saved = "keep the JSON here too, and a diagram of the same name in PNG (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 2:
        parser.error("--limit must be at least 2")
    records = read_all(args.records)[: args.limit] if args.records else held_out(args.data, args.limit, args.split)
    with Grounder.open(args.bundle) as grounder:
        model = {"model": args.bundle.name, "split": args.split, "think": args.think}
        result = model | calibration(grounder, records, args.think)
    if args.write:
        write_fit(args.bundle, Calibration(**result["fit"]))
    if args.save:
        plot(result, args.save.with_suffix(".png"))
    print(
        f"{result['boxes']} boxes, {result['right']:.3f} of them right: ECE {result['ece_raw']:.3f} as they are, "
        f"{result['ece']:.3f} calibrated; AP {result['ap']:.3f}"
    )
    save_result(result, args.save)


if __name__ == "__main__":
    main()
