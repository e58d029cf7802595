"""What further training is worth: gains are paired over questions and pooled over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from bench.boxes.scoring import count
from bench.further import compare
from gemvg_edge.boxes import Box

RIGHT, WRONG = Box(0, 0, 0, 10, 10), Box(0, 50, 50, 60, 60)


def counts(right: int, questions: int = 40) -> np.ndarray:
    """Of so many questions with one box, the first `right` are answered."""
    answers = [[RIGHT] if k < right else [WRONG] for k in range(questions)]
    return count(answers, [[RIGHT]] * questions)


def test_gains_are_pooled_over_the_seeds_and_each_is_told() -> None:
    rows = compare(counts(20), {"grpo": [counts(30), counts(34)], "more-sft": [counts(22), counts(20)]})
    assert [(row["arm"], row["over"]) for row in rows] == [
        ("grpo", "start"), ("more-sft", "start"), ("grpo", "more-sft"),
    ]  # fmt: skip
    assert [row["gain"] for row in rows] == pytest.approx([0.3, 0.025, 0.275])
    assert rows[0]["seeds"] == pytest.approx([0.25, 0.35])
    assert rows[2]["seeds"] == pytest.approx([0.2, 0.35])
    low, high = rows[2]["interval"]
    assert 0 < low < rows[2]["gain"] < high
    assert rows[1]["interval"][0] <= 0
    assert rows[0]["f1"] == pytest.approx(0.8)


def test_a_mean_of_seeds_is_set_against_means_alone() -> None:
    seeds, mean = [counts(30), counts(34)], [counts(36)]
    rows = compare(counts(20), {"grpo": seeds, "grpo-mean": mean, "more-sft": seeds, "more-sft-mean": mean})
    assert [(row["arm"], row["over"]) for row in rows[4:]] == [("grpo", "more-sft"), ("grpo-mean", "more-sft-mean")]
    assert rows[1]["gain"] == pytest.approx(0.4)
