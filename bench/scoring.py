"""Box scores of one model over many questions. Pure functions; knows neither models nor files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemvg_edge.boxes import Box, match_boxes


@dataclass(frozen=True)
class Scores:
    """`f1` counts boxes over all questions (IoU at least the threshold, right image, one to one).

    `mean_iou` is over matched boxes; `image_accuracy` is the share of questions whose predicted boxes lie in exactly
    the images that the true boxes lie in (both empty counts as right).
    """

    n: int
    f1: float
    precision: float
    recall: float
    mean_iou: float
    image_accuracy: float


def score(predicted: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]], threshold: float = 0.5) -> Scores:
    """Score each question's predicted boxes against its true ones."""
    overlaps = [
        overlap for p, t in zip(predicted, truth, strict=True) for _, _, overlap in match_boxes(p, t, threshold)
    ]
    hits, claimed, wanted = len(overlaps), sum(map(len, predicted)), sum(map(len, truth))
    same_images = [{b.image for b in p} == {b.image for b in t} for p, t in zip(predicted, truth, strict=True)]
    return Scores(
        n=len(truth),
        f1=_share(2 * hits, claimed + wanted),
        precision=_share(hits, claimed),
        recall=_share(hits, wanted),
        mean_iou=_share(sum(overlaps), hits),
        image_accuracy=_share(sum(same_images), len(truth)),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
