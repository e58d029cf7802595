"""Two models' answers to the same questions: what one gains over the other, paired, and which questions changed.

Knows files of answers alone. Gains are B less A; intervals are 95 % paired bootstrap intervals over the questions (of
average precision: over the pictures), of the mean over parts with each part drawn by itself. McNemar's test is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from bench.boxes import mc_bench, odinw, tabletop
from bench.boxes.answers import Answered, read_answers
from bench.boxes.coco_ap import average_precision, resampled_ap
from bench.boxes.odinw_data import PROTOCOLS
from bench.boxes.rated import Rated, means
from bench.boxes.refcoco import SPLITS
from bench.boxes.report import headline
from bench.boxes.scores import family, rate
from bench.boxes.scoring import f1_gain, f1_of, interval
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable
from gemvg_edge.json_object import short
from train.journal import Line

SAME = ("task", "benchmark", "questions")  # of both headers
SHARES = ("mean_iou",)  # values that are no yes or no


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What B gains over A; GemvgError where they were not asked the same."""
    headers, answers = zip(*(_read(file) for file in (a, b)), strict=True)
    for key in SAME:
        if headers[0].get(key) != headers[1].get(key):
            found = [printable(str(header.get(key)))[:12] for header in headers]
            raise GemvgError(
                f"{printable(a)} has {key} {found[0]}, {printable(b)} {found[1]}: they are no answers to the same "
                "questions about the same data; ask both models again with bench.accuracy"
            )
    both = [name for name in answers[0] if name in answers[1]]
    if not both:
        raise GemvgError(f"{printable(a)} and {printable(b)} have no question in common; answer the same with both")
    paired = [(answers[0][name], answers[1][name]) for name in both]
    for one, other in paired:
        if (one.query, one.truth, _labels(one)) != (other.query, other.truth, _labels(other)):
            raise GemvgError(f"question {short(one.id)} is another one in {printable(b)} than in {printable(a)}")
    sides = [[pair[k] for pair in paired] for k in (0, 1)]
    told: dict[str, Any] = {
        "task": headers[0]["task"],
        "a": str(headers[0].get("model")),
        "b": str(headers[1].get("model")),
        "n": len(both),
        "only_a": len(answers[0]) - len(both),
        "only_b": len(answers[1]) - len(both),
        "same_text": sum(one.answer == other.answer for one, other in paired),
    }
    return {**told, **_gains(headers[0], headers[1], sides[0], sides[1])}


def _labels(answer: Answered) -> list[str | None]:
    return [box.label for box in answer.truth]  # boxes are equal by their places alone


def _read(file: Path) -> tuple[Line, dict[str, Answered]]:
    header, answers = read_answers(file)
    return header, {answer.id: answer for answer in sorted(answers, key=lambda answer: answer.number)}


def _gains(head_a: Line, head_b: Line, a: Sequence[Answered], b: Sequence[Answered]) -> dict[str, Any]:
    first, second = rate(head_a, a), rate(head_b, b)
    differences = {name: second.values[name] - first.values[name] for name in first.values}
    known = {name: values for name, values in differences.items() if np.isfinite(values).all()}
    gains = means(Rated(first.ids, first.parts, known), ())
    # Benchmarks of several tasks count each task alike, the others each question.
    by_part = family(head_a) == "mig-bench" or family(head_a) in SPLITS
    parts = first.parts if by_part else ["all"] * len(first.ids)
    sides = ({name: rated.values[name] for name in known} for rated in (first, second))
    before, after, overall = (means(Rated(first.ids, parts, side), ())["macro"] for side in (*sides, known))
    values: dict[str, Any] = {}
    for name in known:
        row = {"a": before[name], "b": after[name], "gain": overall[name], "interval": overall[f"{name}_interval"]}
        values[name] = row if name in SHARES else row | mcnemar(first.values[name] > 0, second.values[name] > 0)
    values |= _of_boxes(head_a, head_b, a, b)
    changed = headline(head_a["task"]) if headline(head_a["task"]) in known else next(iter(known), None)
    moved = known[changed] if changed else np.zeros(len(a))
    tasks = {
        part: {"n": told["n"], "gain": told.get(changed), "interval": told.get(f"{changed}_interval")}
        for part, told in gains["tasks"].items()
    }
    lost, gained = ([first.ids[k] for k in np.flatnonzero(moved * sign > 0)] for sign in (-1, 1))
    return {"values": values, "by": changed, "tasks": tasks, "lost": lost, "gained": gained}


def mcnemar(a: Any, b: Any) -> dict[str, Any]:
    """How many answers were right in A alone and in B alone, and the exact p of that under no difference."""
    lost, gained = int((a & ~b).sum()), int((~a & b).sum())
    p = float(binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0
    return {"lost": lost, "gained": gained, "p": p}


def _of_boxes(head_a: Line, head_b: Line, a: Sequence[Answered], b: Sequence[Answered]) -> dict[str, Any]:
    """What is no mean over answers: F1 over all boxes, average precision."""
    match family(head_a):
        case "tabletop" | "records":
            counts = [tabletop.counts_of(tabletop.count_answers(side)) for side in (a, b)]
            gain, bounds = f1_gain(*counts)
            first, second = (float(f1_of(side.sum(axis=0))) for side in counts)
            return {"f1": {"a": first, "b": second, "gain": gain, "interval": bounds}}
        case "mc-bench":
            samples = [mc_bench.corrected(mc_bench.read_samples(side)) for side in (a, b)]
            drawn = [mc_bench.resampled_ap50(side) for side in samples]
            first, second = (mc_bench.ap50(side) or 0.0 for side in samples)
            bounds = interval(drawn[1] - drawn[0])
            return {"ap50_corrected": {"a": first, "b": second, "gain": second - first, "interval": bounds}}
        case "odinw13":
            before, after = (
                odinw.gather(said, bool(head.get("verbatim"))) for head, said in ((head_a, a), (head_b, b))
            )
            asked = [
                p
                for p in PROTOCOLS
                if any(part.startswith(p) and len(found.truth.images) for part, found in before.items())
            ]
            return {f"ap, {protocol}": _ap_gain(before, after, protocol) for protocol in asked}
    return {}


def _ap_gain(a: dict[str, odinw.Found], b: dict[str, odinw.Found], protocol: str) -> dict[str, Any]:
    before, after, drawn = [], [], []
    for part in (part for part in a if part.startswith(f"{protocol}/") and len(a[part].truth.images)):
        before.append(average_precision(a[part].truth, a[part].scored) or 0.0)
        after.append(average_precision(b[part].truth, b[part].scored) or 0.0)
        ways = [resampled_ap(side[part].truth, side[part].scored, side[part].pictures) for side in (a, b)]
        drawn.append(ways[1] - ways[0])
    mean_a, mean_b = float(np.mean(before)), float(np.mean(after))
    return {"a": mean_a, "b": mean_b, "gain": mean_b - mean_a, "interval": interval(np.mean(drawn, axis=0))}
