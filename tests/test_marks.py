"""Boxes that a query shows: of the right picture, whole and inside it, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gemvg_edge import Box, GemvgError, Grounder, mark
from gemvg_edge.marks import check_marks
from gemvg_edge.prompt import check_query

IMAGES = Path(__file__).parents[1] / "examples" / "images"
QUESTIONS = Path(__file__).parents[2] / "shared" / "fixtures" / "mig_bench" / "revised_MIG_bench.json"
SIZE = (200, 100)  # width and height


def shown(*values: int) -> str:
    return "the same as <|box_start|>({},{}),({},{})<|box_end|> in image 1".format(*values)


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (Box(0, 10, 10, 10, 20), "has no area"),
        (Box(0, 30, 10, 10, 20), "has no area"),
        (Box(0, 10, 20, 30, 10), "has no area"),
        (Box(0, math.nan, 10, 30, 20), "has no area"),
        (Box(0, 10, 10, math.inf, 20), "has no area"),
        (Box(0, 10, 10, 202, 20), "ends outside its picture of 200 x 100"),
        (Box(0, -2, 10, 30, 20), "ends outside its picture of 200 x 100"),
        (Box(1, 10, 10, 30, 150), "ends outside its picture of 200 x 100; give that picture's own size"),
    ],
)
def test_a_box_that_cannot_be_shown(box: Box, said: str) -> None:
    with pytest.raises(GemvgError, match=said):
        mark(box, SIZE)


@pytest.mark.parametrize("size", [(0, 100), (200, -1)])
def test_a_picture_without_a_size(size: tuple[int, int]) -> None:
    with pytest.raises(GemvgError, match="has no area"):
        mark(Box(0, 0, 0, 1, 1), size)


def test_a_box_that_was_rounded_past_the_edge() -> None:
    assert mark(Box(0, -0.5, 0, 200.9, 100.5), SIZE) == "<|box_start|>(0,0),(1000,1000)<|box_end|>"


def test_a_scene_knows_which_picture_a_box_lies_in() -> None:
    scene = Grounder.open(threads=1).look([IMAGES / f"scene1-{letter}.png" for letter in "ab"])
    box = Box(1, 30, 40, 90, 80)
    assert scene.mark(box) == mark(box, scene.sizes[1])
    for image in (2, -1):
        with pytest.raises(GemvgError, match="lies in none of the scene's 2 pictures"):
            scene.mark(Box(image, 30, 40, 90, 80))


@pytest.mark.parametrize("values", [(0, 0, 1001, 5), (10, 0, 10, 5), (20, 0, 10, 5), (0, 9, 10, 5)])
def test_a_box_that_was_typed_wrongly(values: tuple[int, ...]) -> None:
    with pytest.raises(GemvgError, match=r"the query shows the box .* which is none"):
        check_query(shown(*values))


def test_boxes_that_were_typed_rightly() -> None:
    check_query(shown(0, 0, 1000, 1000))
    check_query("Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. " + shown(451, 265, 519, 388))


def test_the_benchmarks_questions_are_accepted() -> None:
    if not QUESTIONS.is_file():
        pytest.skip("../shared is missing")
    asked = [record["question"] for record in json.loads(QUESTIONS.read_text())]
    refused = 0
    for question in asked:
        try:
            check_marks(question)
        except GemvgError:
            refused += 1
    assert len(asked) > 4000
    assert refused == 0


def test_a_query_without_end_is_refused_before_it_is_tokenised() -> None:
    with pytest.raises(GemvgError, match="the query has 10000000 characters, more than"):
        check_query("a" * 10**7)
