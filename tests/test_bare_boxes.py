"""Boxes without marks, from a bundle to the boxes: what is decoded, what is handed on meanwhile, and old bundles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from gemvg_edge import Grounder
from gemvg_edge.answer import AnswerFormat, read_answer
from gemvg_edge.boxes import Box
from gemvg_edge.bundle import BARE_VERSION, FORMAT_VERSION, MANIFEST, open_bundle
from gemvg_edge.engines.protocol import Floats, Step
from gemvg_edge.grounding import Grounding
from gemvg_edge.models import DEFAULT_BUNDLE
from tests.conftest import write_fixed_answer

FIRST, SECOND = "<loc_8><loc_16><loc_24><loc_40>", "<loc_9><loc_1><loc_13><loc_4>"
TEXT = f"Image-2: {FIRST}{SECOND}"
BOXES = [Box(1, 80, 80, 240, 200), Box(1, 90, 5, 130, 20)]  # of 400 x 200 pixels in 40 steps


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fixed_answer(tmp_path_factory.mktemp("bare"), TEXT, marks=False)


def ground(bundle: Path, pictures: list[str], **asked: Any) -> tuple[Grounding, int]:
    """The answer, and the steps of the decoder that it took, the query's prefill among them."""
    steps = 0
    with Grounder.open(bundle, threads=1) as grounder:
        scene = grounder.look(pictures)
        decoder = grounder.model.engines()[1]
        forward = decoder.forward

        def counted(asked: Sequence[Step[Any]]) -> list[Floats]:
            nonlocal steps
            steps += len(asked)
            return forward(asked)

        with patch.object(decoder, "forward", counted):
            answer: Grounding = scene.ground("the mug", **asked)
    return answer, steps


@pytest.mark.parametrize("constrained", [True, False])
def test_four_locations_are_a_box(bundle: Path, pictures: list[str], constrained: bool) -> None:
    answer, _ = ground(bundle, pictures, constrained=constrained)
    assert (answer.text, answer.problem) == (TEXT, None)
    assert list(answer) == BOXES
    assert all(box.score is not None and 0 < box.score <= 1 for box in answer)


def test_a_box_takes_four_steps(bundle: Path, pictures: list[str]) -> None:
    """A line or none, which picture, four numbers a box, and the end; without the grammar each token takes one."""
    answer, steps = ground(bundle, pictures)
    free, all_steps = ground(bundle, pictures, constrained=False)
    assert steps == 1 + 1 + 4 + 4 + 1
    assert free.text == answer.text
    assert all_steps == answer.timings.answer_tokens


def test_a_box_is_there_with_its_fourth_location(bundle: Path, pictures: list[str]) -> None:
    form, sizes = AnswerFormat("locations", 41, marks=False), [(80, 40), (400, 200)]
    pieces: list[str] = []
    ground(bundle, pictures, on_text=pieces.append)
    assert "".join(pieces) == TEXT
    there = [len(read_answer("".join(pieces[: k + 1]), sizes, form).boxes) for k in range(len(pieces))]
    assert there == [0] * 5 + [1] * 4 + [2]
    assert all(piece.endswith(">") for piece in pieces[2:])


@pytest.mark.parametrize("left", range(1, 10))
def test_of_an_answer_that_was_cut_whole_boxes_are_kept(bundle: Path, pictures: list[str], left: int) -> None:
    whole = ground(bundle, pictures)[0].timings.answer_tokens
    answer, _ = ground(bundle, pictures, max_new_tokens=whole - left)
    assert list(answer) == BOXES[: (9 - left) // 4]
    assert answer.problem == f"the answer was cut at max_new_tokens={whole - left}"


def test_versions_of_bundles(bundle: Path) -> None:
    """Who knows only version 6 would wait for marks that never come."""
    assert json.loads((bundle / MANIFEST).read_text())["format_version"] == BARE_VERSION
    assert not open_bundle(bundle).manifest.answer.marks
    shipped = json.loads((DEFAULT_BUNDLE / MANIFEST).read_text())
    assert shipped["format_version"] == FORMAT_VERSION
    assert "marks" not in shipped["answer"]
    assert open_bundle(DEFAULT_BUNDLE).manifest.answer.marks
