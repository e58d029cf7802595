"""COCO's average precision of boxes: the number by faster-coco-eval, its bootstrap interval by a matching of ours.

Boxes may have any image and class numbers; equal scores rank by image, then in the order they are given, so that order
must be fixed. A box counts against the first 100 of its image and class, as in COCO's own summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster

from bench.boxes.scoring import draw

MOST = 100  # boxes of an image and a class
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
RESAMPLES = 200
AT_ONCE = 2**18  # weights of boxes in all resamples that are looked at together
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """Boxes of many images, a row each, in the order in which equal scores rank."""

    images: npt.NDArray[np.int64]  # (n,)
    classes: npt.NDArray[np.int64]  # (n,)
    corners: Floats  # (n, 4): x1, y1, x2, y2 in pixels
    scores: Floats  # (n,); of true boxes 1 means "a crowd", which claims nothing

    @staticmethod
    def of(rows: Sequence[tuple[int, int, tuple[float, ...], float]]) -> Boxes:
        """From (image, class, corners, score) each."""
        return Boxes(
            np.asarray([row[0] for row in rows], np.int64),
            np.asarray([row[1] for row in rows], np.int64),
            np.asarray([row[2] for row in rows], np.float64).reshape(-1, 4),
            np.asarray([row[3] for row in rows], np.float64),
        )

    def constant(self) -> Boxes:
        """The same boxes without what their scores say."""
        return Boxes(self.images, self.classes, self.corners, np.ones_like(self.scores))


def precisions(truth: Boxes, found: Boxes) -> tuple[npt.NDArray[np.int64], Floats]:
    """(classes, precision (10 IoUs, 101 recalls, classes)); a class without true boxes has -1."""
    classes = np.unique(np.concatenate([truth.classes, found.classes]))
    if not len(found.images):
        blank = np.where(np.isin(classes, truth.classes[truth.scores == 0]), 0.0, -1.0)
        return classes, np.broadcast_to(blank, (len(IOUS), len(RECALLS), len(classes))).copy()
    images = np.unique(np.concatenate([truth.images, found.images]))
    listed = {
        "images": [{"id": int(image)} for image in images],
        "categories": [{"id": int(number), "name": str(number)} for number in classes],
        "annotations": coco_rows(truth, crowds=True),
    }
    known = COCO(listed)
    evaluation = COCOeval_faster(known, known.loadRes(coco_rows(found, crowds=False)), "bbox")
    evaluation.params.imgIds, evaluation.params.catIds = images.tolist(), classes.tolist()
    evaluation.params.maxDets = [1, 10, MOST]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return classes, np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]


def coco_rows(boxes: Boxes, crowds: bool) -> list[dict[str, Any]]:
    """Boxes as a COCO file has them: annotations with crowds, or results with scores."""
    sides = boxes.corners[:, 2:] - boxes.corners[:, :2]
    places = np.concatenate([boxes.corners[:, :2], sides], axis=1)
    columns = boxes.images, boxes.classes, places, np.prod(sides, axis=1)
    rows = zip(*(column.tolist() for column in columns), boxes.scores.tolist(), strict=True)
    return [
        {"id": k, "image_id": image, "category_id": number, "bbox": place, "area": area}
        | ({"iscrowd": int(score)} if crowds else {"score": score})
        for k, (image, number, place, area, score) in enumerate(rows, 1)
    ]


def average_precision(truth: Boxes, found: Boxes) -> float | None:
    """COCO's AP: the mean over IoU 0.50 to 0.95, 101 recalls and classes; None where nothing is to be found."""
    _, table = precisions(truth, found)
    known = table[table > -1]
    return float(known.mean()) if known.size else None


def resampled_ap(truth: Boxes, found: Boxes, images: npt.ArrayLike, weigh: bool = False, ious: Floats = IOUS) -> Floats:
    """AP (RESAMPLES,) of images drawn with replacement; `weigh` counts classes by their true boxes.

    The draw is fixed by the number of images, so that two models' may be subtracted: of the same `images` for both.
    """
    known, rng = np.unique(images), np.random.default_rng(0)
    weights = np.empty((RESAMPLES, len(known)), np.uint8)  # none is drawn 256 times
    for row in weights:
        row[:] = draw(rng, len(known)) if len(known) else 0
    return weighted_ap(truth, found, known, weights, weigh, ious)


def weighted_ap(
    truth: Boxes,
    found: Boxes,
    images: npt.NDArray[np.int64],
    weights: npt.NDArray[Any],
    weigh: bool = False,
    ious: Floats = IOUS,
) -> Floats:
    """AP (draws,) with each image (of `images`, sorted) counted `weights` (draws, images) times."""
    totals, shares = np.zeros(len(weights)), np.zeros(len(weights))
    for number in np.unique(truth.classes):
        true = _of_class(truth, number)
        ranked, hits = _match(true, _of_class(found, number), ious)
        wanted = weights[:, np.searchsorted(images, true.images[true.scores == 0])].sum(axis=1, dtype=np.float64)
        places = np.searchsorted(images, ranked)
        class_ap = _ap_of_draws(hits, places, weights, wanted)
        share = wanted if weigh else (wanted > 0).astype(np.float64)
        totals += share * class_ap
        shares += share
    return np.divide(totals, shares, out=np.zeros_like(totals), where=shares > 0)


def _ap_of_draws(hits: Floats, places: npt.NDArray[np.int64], weights: npt.NDArray[Any], wanted: Floats) -> Floats:
    """A class's AP (draws,) of ranked boxes whose `hits` (IoUs, boxes) are 1, 0, or NaN where a crowd excuses them."""
    found = np.zeros(len(weights))
    step = max(1, AT_ONCE // max(1, len(places)))
    for first in range(0, len(weights), step):
        some = slice(first, first + step)
        drawn = weights[some][:, places].astype(np.float64)  # (draws, boxes)
        claimed = np.cumsum(drawn, axis=1)
        for row in hits:
            excused = np.isnan(row)
            counted = np.cumsum(drawn * ~excused, axis=1) if excused.any() else claimed
            right = np.cumsum(drawn * (row == 1), axis=1)
            recall = right / np.maximum(wanted[some, None], 1e-12)
            precision = right / np.maximum(counted, np.spacing(1))
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for k, (up, height) in enumerate(zip(recall, best, strict=True), first):
                at = np.searchsorted(up, RECALLS, side="left")
                found[k] += height[at[at < len(height)]].sum() / len(RECALLS)
    return found / len(hits)


def _of_class(boxes: Boxes, number: int) -> Boxes:
    rows = boxes.classes == number
    return Boxes(boxes.images[rows], boxes.classes[rows], boxes.corners[rows], boxes.scores[rows])


def _match(true: Boxes, found: Boxes, ious: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """(the image of each box by falling score, its hits (IoUs, boxes)), matched as COCO does."""
    rows = _first_of_each_image(found)
    hits = np.zeros((len(ious), len(rows)))
    order = _by_image(true.images)
    for image, places in _by_image(found.images[rows]).items():
        targets = order.get(image)
        if targets is None:
            continue
        targets = targets[np.argsort(true.scores[targets], kind="stable")]  # crowds last
        crowd = true.scores[targets] == 1
        overlaps = _overlaps(found.corners[rows[places]], true.corners[targets], crowd)
        for level, threshold in enumerate(ious):
            hits[level, places] = _greedy(overlaps, crowd, min(threshold, 1 - 1e-10))
    sides = found.corners[rows, 2:] - found.corners[rows, :2]
    outside = np.prod(sides, axis=1) < 0  # inverted one way: COCO takes no notice of them unless they match
    hits[:, outside] = np.where(hits[:, outside] == 0, np.nan, hits[:, outside])
    ranked = np.argsort(-found.scores[rows], kind="stable")
    return found.images[rows][ranked], hits[:, ranked]


def _first_of_each_image(found: Boxes) -> npt.NDArray[np.int64]:
    """The rows of the best MOST boxes of each image: images in order, each one's by falling score."""
    kept = [
        places[np.argsort(-found.scores[places], kind="stable")][:MOST]
        for _, places in sorted(_by_image(found.images).items())
    ]
    return np.concatenate(kept) if kept else np.zeros(0, np.int64)


def _by_image(images: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int64]]:
    order = np.argsort(images, kind="stable")
    numbers, starts = np.unique(images[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)) if len(images) else {}


def _overlaps(found: Floats, true: Floats, crowd: npt.NDArray[np.bool_]) -> Floats:
    """IoU (found, true); of a crowd, the share of the found box that lies in it."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = found.T[:, :, None], true.T
    across = np.minimum(x2, u2) - np.maximum(x1, u1)
    down = np.minimum(y2, v2) - np.maximum(y1, v1)
    both = np.maximum(across, 0) * np.maximum(down, 0)
    area = (x2 - x1) * (y2 - y1)
    whole = area + np.where(crowd, 0.0, (u2 - u1) * (v2 - v1) - both)
    shares: Floats = np.divide(both, whole, out=np.zeros_like(both), where=whole > 0)
    return shares


def _greedy(overlaps: Floats, crowd: npt.NDArray[np.bool_], threshold: float) -> Floats:
    """Of boxes by falling score: 1 for a match, 0 for none, NaN for one that a crowd excuses."""
    taken, hits = np.zeros(len(crowd), bool), np.zeros(len(overlaps))
    for k, row in enumerate(overlaps):
        best, chosen = threshold, -1
        for j, overlap in enumerate(row):
            if taken[j] and not crowd[j]:
                continue
            if chosen >= 0 and not crowd[chosen] and crowd[j]:
                break  # a true box comes before any crowd
            if overlap >= best:
                best, chosen = overlap, j
        if chosen >= 0:
            taken[chosen] = True
            hits[k] = np.nan if crowd[chosen] else 1.0
    return hits
