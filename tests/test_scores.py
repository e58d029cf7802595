"""Scores of boxes: which tokens they are made of, and what a calibration makes of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.calibration import average_precision, fit, reliability, write_fit
from gemvg_edge import GemvgError, Grounder
from gemvg_edge.answer import AnswerFormat, read_answer
from gemvg_edge.answer_pieces import BOX_END, BOX_START, Span
from gemvg_edge.bundle import MANIFEST
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.prompt import encode
from gemvg_edge.scores import Calibration, box_log_prob, box_scores, token_ends
from tests.damage import edit_manifest
from tests.tokenizers_small import small_tokenizer

IMAGES = Path(__file__).parents[1] / "examples" / "images"
SIZES = [(100, 100), (100, 100)]


def tokens_of_boxes(text: str, form: AnswerFormat | None = None) -> list[list[str]]:
    """The tokens that each box's score is of, in the order of the text."""
    tokenizer, found = small_tokenizer(form.locations if form else 0), []
    tokens = encode(tokenizer, text)
    ends = token_ends(tokenizer, tokens, text)
    assert ends[-1] == len(text)

    def score(spans: Sequence[Span]) -> float:
        alone = np.eye(len(tokens))
        counted = [token for token, one in zip(tokens, alone, strict=True) if box_log_prob(ends, list(one), spans)]
        found.append([tokenizer.decode([token], skip_special_tokens=False) for token in counted])
        return 0.5

    answer = read_answer(text, SIZES, form or AnswerFormat(), score=score)
    assert all(box.score == 0.5 for box in answer.boxes)
    return found


def box(x1: int) -> str:
    return f"{BOX_START}({x1},2),(30,40){BOX_END}"


def test_a_score_is_of_what_opened_a_box_and_of_its_numbers() -> None:
    text = f"Image-1: {box(7)}{box(8)}\nImage-2: {box(9)}"
    first, second, third = map("".join, tokens_of_boxes(text))
    # The number of the picture and the line break before it decide that a box is there, as the next box's start does.
    assert first == f"Image-1{BOX_START}(7,2),(30,40)"
    assert second == f"{BOX_START}(8,2),(30,40)"
    assert third == f"\nImage-2{BOX_START}(9,2),(30,40)"


def test_a_score_without_marks_is_of_the_four_locations() -> None:
    first_box, second_box = "<loc_7><loc_2><loc_30><loc_40>", "<loc_8><loc_2><loc_30><loc_40>"
    text = f"Image-1: {first_box}{second_box}\nImage-2: {first_box}"
    first, second, third = map("".join, tokens_of_boxes(text, AnswerFormat("locations", 50, marks=False)))
    assert first == f"Image-1{first_box}"
    assert second == second_box
    assert third == f"\nImage-2{first_box}"


def test_reasoning_and_prose_are_no_part_of_a_score() -> None:
    text = f"<think>Image-1: {box(1)} or image 2?</think><answer>Image-1: {box(7)}</answer>"
    assert list(map("".join, tokens_of_boxes(text))) == [f"Image-1{BOX_START}(7,2),(30,40)"]
    prose = AnswerFormat(unnamed="query")
    text = f"It's in the second image, at the café \U0001f600. {box(7)} I think."
    (said,) = map("".join, tokens_of_boxes(text, prose))
    assert said == f"second image{BOX_START}(7,2),(30,40)"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_token_ends_are_those_of_the_growing_text(text: str) -> None:
    tokenizer = small_tokenizer()
    tokens = encode(tokenizer, text)
    decoded = tokenizer.decode(tokens, skip_special_tokens=False)
    ends = token_ends(tokenizer, tokens, decoded)
    grown = [len(tokenizer.decode(tokens[: k + 1], skip_special_tokens=False)) for k in range(len(tokens))]
    assert ends[-1:] == [len(decoded)][: len(ends)]
    if decoded.isascii():
        assert ends == grown


def test_without_a_fit_a_score_is_the_product() -> None:
    tokenizer, text = small_tokenizer(), f"Image-1: {box(7)}"
    tokens = encode(tokenizer, text)
    log_probs = [-0.5 if tokenizer.decode([token]) in ("7", "3") else 0.0 for token in tokens]
    for calibration, expected in ((None, math.exp(-1)), (Calibration(2.0, 1.0), 1 / (1 + math.exp(1)))):
        score = box_scores(tokenizer, tokens, log_probs, text, calibration)
        (found,) = read_answer(text, SIZES, AnswerFormat(), score=score).boxes
        assert found.score == pytest.approx(expected)


def test_scores_of_the_shipped_model_are_calibrated_and_between_0_and_1() -> None:
    scene = Grounder.open(threads=1).look([IMAGES / "scene1-a.png", IMAGES / "scene1-b.png"])
    answers = scene.ground(["all balls", "what both images show", "all teddies"])
    scores = [found.score for answer in answers for found in answer]
    assert scores
    assert all(score is not None and 0.02 < score < 1 for score in scores)
    free = scene.ground("all balls", constrained=False)
    assert [found.score for found in free] == pytest.approx([found.score for found in answers[0]], abs=0.05)


def test_a_fit_finds_the_curve_that_made_the_data() -> None:
    random = np.random.default_rng(0)
    log_probs = random.uniform(-8, 0, 20000)
    right = (random.random(20000) < 1 / (1 + np.exp(-1.5 * log_probs - 4))).astype(float)
    found = fit(log_probs, right)
    assert (found.a, found.b) == pytest.approx((1.5, 4), abs=0.15)
    scores = np.array([found.score(value) for value in log_probs])
    assert reliability(scores, right)[0] < 0.01
    assert reliability(np.exp(log_probs), right)[0] > 0.2


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_fit_of_one_kind_alone_is_finite(right: float) -> None:
    found = fit(np.linspace(-5, -1, 50), np.full(50, right))
    assert abs(found.score(-3.0) - right) < 0.2


def test_a_less_probable_box_is_never_the_surer_one() -> None:
    log_probs = np.linspace(-5, 0, 100)
    found = fit(log_probs, (log_probs < -2.5).astype(float))
    assert found.a == 0
    assert found.score(-1.0) == pytest.approx(0.5)


def test_average_precision() -> None:
    ranked = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(ranked, np.array([1.0, 1, 0, 0]), 2) == 1
    assert average_precision(ranked, np.array([0.0, 0, 1, 1]), 2) == pytest.approx(0.5)
    assert average_precision(ranked, np.array([1.0, 0, 1, 0]), 4) == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert average_precision(ranked[:0], ranked[:0], 3) == 0


def test_a_fit_is_written_into_a_bundle_and_read(tmp_path: Path) -> None:
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    write_fit(bundle, Calibration(1.25, -2.0))
    with Grounder.open(bundle) as grounder:
        assert grounder.manifest.calibration == Calibration(1.25, -2.0)
    edit_manifest(bundle, calibration=None)
    with Grounder.open(bundle) as grounder:
        assert grounder.manifest.calibration is None
    assert json.loads((bundle / MANIFEST).read_text())["calibration"] is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": -1.0, "b": 0.0}, r"calibration.a is -1.0, not a number of 0 to 1e\+06"),
        ({"a": 1.0, "b": "x"}, "calibration.b is 'x', not a number"),
        ({"a": 1.0, "b": 1e300}, "calibration.b is 1e.300, not a number"),
        ({"a": True, "b": 0.0}, "calibration.a is True, not a number"),
        ({"a": 1.0, "b": 0.0, "c": 0.0}, "calibration has the unknown field 'c'"),
        (3, "calibration is 3, not of type object"),
    ],
    ids=str,
)
def test_a_calibration_of_no_sense_is_one_sentence(value: object, said: str, tmp_path: Path) -> None:
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    edit_manifest(bundle, calibration=value)
    with pytest.raises(GemvgError, match=said):
        Grounder.open(bundle)
