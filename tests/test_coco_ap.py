"""COCO's average precision: faster-coco-eval's as pycocotools', and our own matching, for intervals, as both."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.boxes.coco_ap import Boxes, average_precision, coco_rows, precisions, resampled_ap, weighted_ap


def pycocotools_ap(truth: Boxes, found: Boxes) -> float:
    """The first of pycocotools' twelve numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": int(k)} for k in np.unique(np.concatenate([truth.images, found.images]))],
            "categories": [{"id": int(k)} for k in np.unique(np.concatenate([truth.classes, found.classes]))],
            "annotations": coco_rows(truth, crowds=True),
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(coco_rows(found, crowds=False)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def draw(seed: int) -> tuple[Boxes, Boxes]:
    """True boxes, some of them crowds, and claimed ones near them with many equal scores; over 100 in some pictures."""
    rng = np.random.default_rng(seed)
    n, m, images, classes = rng.integers(1, 60), rng.integers(1, 260), rng.integers(1, 12), rng.integers(1, 4)
    low = rng.integers(0, 50, (n, 2))
    corners = np.concatenate([low, low + rng.integers(1, 30, (n, 2))], axis=1).astype(float)
    crowds = (rng.random(n) < 0.1).astype(float)
    truth = Boxes(rng.integers(0, images, n), rng.integers(0, classes, n), corners, crowds)
    pick = rng.integers(0, n, m)
    near = corners[pick] + rng.integers(-3, 4, (m, 4)).astype(float)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    named = np.where(rng.random(m) < 0.9, truth.classes[pick], rng.integers(0, classes, m))
    scores = rng.integers(0, 5, m) / 5 if seed % 2 else np.ones(m)
    return truth, Boxes(truth.images[pick], named, near, scores)


@pytest.mark.parametrize("seed", range(30))
def test_it_is_pycocotools_number(seed: int) -> None:
    truth, found = draw(seed)
    ap = average_precision(truth, found)
    if ap is None:
        assert pycocotools_ap(truth, found) == -1
        return
    assert ap == pytest.approx(pycocotools_ap(truth, found), abs=1e-9)
    images = np.unique(np.concatenate([truth.images, found.images]))
    assert weighted_ap(truth, found, images, np.ones((1, len(images))))[0] == pytest.approx(ap, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_an_image_that_is_drawn_twice_counts_twice(seed: int) -> None:
    """Weights against a data set in which such images really stand twice; equal scores would rank apart there."""
    truth, found = draw(seed)
    scores = np.random.default_rng(seed).permutation(len(found.scores)).astype(float)
    found = Boxes(found.images, found.classes, found.corners, scores)
    images = np.unique(np.concatenate([truth.images, found.images]))
    weights = np.random.default_rng(seed).integers(0, 3, len(images))
    copies = [(image, k) for image, weight in zip(images, weights, strict=True) for k in range(weight)]

    def repeat(boxes: Boxes) -> Boxes:
        rows = [np.flatnonzero(boxes.images == image) for image, _ in copies]
        names = [np.full(len(row), number) for number, row in enumerate(rows)]
        taken = np.concatenate([*rows, np.zeros(0, int)]).astype(int)
        numbers = np.concatenate([*names, np.zeros(0, int)]).astype(int)
        return Boxes(numbers, boxes.classes[taken], boxes.corners[taken], boxes.scores[taken])

    expected = average_precision(repeat(truth), repeat(found)) or 0.0
    assert weighted_ap(truth, found, images, weights[None])[0] == pytest.approx(expected, abs=1e-9)


def test_intervals_are_around_the_number() -> None:
    truth, found = draw(3)
    ap = average_precision(truth, found)
    assert ap is not None
    drawn = resampled_ap(truth, found, sorted({*truth.images.tolist(), *found.images.tolist()}))
    assert np.percentile(drawn, 2.5) <= ap <= np.percentile(drawn, 97.5)
    assert np.array_equal(drawn, resampled_ap(truth, found, sorted({*truth.images.tolist(), *found.images.tolist()})))


def test_nothing_found_and_nothing_there() -> None:
    truth, found = draw(1)
    nothing = Boxes.of([])
    assert average_precision(truth, nothing) == 0.0
    assert average_precision(nothing, found) is None
    assert average_precision(nothing, nothing) is None
    assert resampled_ap(nothing, nothing, []).tolist() == [0.0] * 200


def test_equal_scores_rank_by_image_then_as_given() -> None:
    truth = Boxes.of([(1, 0, (0, 0, 10, 10), 0.0), (2, 0, (0, 0, 10, 10), 0.0)])
    right, wrong = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)
    first = Boxes.of([(1, 0, right, 1.0), (2, 0, wrong, 1.0), (2, 0, right, 1.0)])
    last = Boxes.of([(1, 0, wrong, 1.0), (1, 0, right, 1.0), (2, 0, right, 1.0)])
    assert (average_precision(truth, first) or 0) > (average_precision(truth, last) or 0)
    assert precisions(truth, first)[0].tolist() == [0]
