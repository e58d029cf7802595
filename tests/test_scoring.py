"""Box scores by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bench.boxes.scoring import mean_gain, score
from gemvg_edge.boxes import Box

A, B = Box(0, 0, 0, 10, 10), Box(1, 20, 20, 30, 40)
SHIFTED = Box(0, 2, 0, 12, 10)  # IoU with A: 80 / 120
CASES = [
    ("perfect", [[A, B]], [[A, B]], 1.0, 1.0, 1.0),
    ("one missed", [[A]], [[A, B]], 2 / 3, 1.0, 0.0),
    ("one too many", [[A, B]], [[A]], 2 / 3, 1.0, 0.0),
    ("right place, wrong image", [[Box(1, 0, 0, 10, 10)]], [[A]], 0.0, 0.0, 0.0),
    ("shifted", [[SHIFTED]], [[A]], 1.0, 2 / 3, 1.0),
    ("nothing wanted, nothing said", [[], [A]], [[], [A]], 1.0, 1.0, 1.0),
    ("nothing wanted, something said", [[A]], [[]], 0.0, 0.0, 0.0),
    ("the same box twice counts once", [[A, A]], [[A]], 2 / 3, 1.0, 1.0),
]


@pytest.mark.parametrize(("label", "predicted", "truth", "f1", "mean_iou", "image_accuracy"), CASES)
def test_scores(
    label: str, predicted: list[list[Box]], truth: list[list[Box]], f1: float, mean_iou: float, image_accuracy: float
) -> None:
    result = score(predicted, truth)
    assert (result.f1, result.mean_iou, result.image_accuracy) == pytest.approx((f1, mean_iou, image_accuracy)), label


def test_gains_are_paired() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(400)
    gain, (low, high) = mean_gain(before, before + 0.01)
    assert (gain, low, high) == pytest.approx((0.01, 0.01, 0.01))
    gain, (low, high) = mean_gain(before, rng.random(400))
    assert low < gain < high
    assert high - low == pytest.approx(2 * 1.96 * (1 / 6) ** 0.5 / 400**0.5, rel=0.2)
