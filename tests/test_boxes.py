"""Box arithmetic by table, one labelled case a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.boxes import RELATIVE_STEPS, Box, Steps, change_steps, from_steps, iou, match_boxes, to_steps

UNIT = Box(0, 0, 0, 10, 10)

IOU_CASES = [
    ("the same box", UNIT, UNIT, 1.0),
    ("half covered from the left", UNIT, Box(0, 0, 0, 5, 10), 0.5),
    ("half covered from below", UNIT, Box(0, 0, 5, 10, 10), 0.5),
    ("one inside the other", UNIT, Box(0, 2, 2, 7, 7), 0.25),
    ("shifted by half its width", UNIT, Box(0, 5, 0, 15, 10), 1 / 3),
    ("corners overlap", UNIT, Box(0, 5, 5, 15, 15), 25 / 175),
    ("edges touch", UNIT, Box(0, 10, 0, 20, 10), 0.0),
    ("corners touch", UNIT, Box(0, 10, 10, 20, 20), 0.0),
    ("far apart", UNIT, Box(0, 50, 50, 60, 60), 0.0),
    ("the same place in another picture", UNIT, Box(1, 0, 0, 10, 10), 0.0),
    ("less than a pixel", Box(0, 0, 0, 0.5, 0.5), Box(0, 0, 0, 0.5, 0.25), 0.5),
    ("no width", UNIT, Box(0, 5, 0, 5, 10), 0.0),
    ("inverted", UNIT, Box(0, 10, 10, 0, 0), 0.0),
    ("empty against itself", Box(0, 5, 5, 5, 5), Box(0, 5, 5, 5, 5), 0.0),
]

AREA_CASES = [
    ("square", UNIT, 100.0),
    ("fractions", Box(0, 0.5, 0.5, 1.0, 2.5), 1.0),
    ("inverted sideways", Box(0, 10, 0, 0, 10), 0.0),
    ("inverted both ways", Box(0, 10, 10, 0, 0), 0.0),
]

MATCH_CASES = [
    ("nothing predicted", [], [UNIT], 0.5, []),
    ("nothing to find", [UNIT], [], 0.5, []),
    ("one hit", [UNIT], [UNIT], 0.5, [(0, 0)]),
    ("exactly at the threshold", [Box(0, 0, 0, 5, 10)], [UNIT], 0.5, [(0, 0)]),
    ("just below the threshold", [Box(0, 0, 0, 4.9, 10)], [UNIT], 0.5, []),
    ("a second box on the same truth is no hit", [UNIT, UNIT], [UNIT], 0.5, [(0, 0)]),
    ("the better of two predictions wins", [Box(0, 0, 0, 8, 10), UNIT], [UNIT], 0.5, [(1, 0)]),
    ("crossed order", [Box(0, 50, 0, 60, 10), UNIT], [UNIT, Box(0, 50, 0, 60, 10)], 0.5, [(0, 1), (1, 0)]),
    ("the right place in the wrong picture", [Box(1, 0, 0, 10, 10)], [UNIT], 0.5, []),
    ("threshold 0 still needs an overlap", [Box(0, 50, 50, 60, 60)], [UNIT], 0.0, []),
]

STEP_CASES = [
    ("the whole picture", Box(0, 0, 0, 640, 480), (640, 480), RELATIVE_STEPS, (0, 0, 1000, 1000)),
    ("each side by its own length", Box(0, 320, 120, 640, 480), (640, 480), RELATIVE_STEPS, (500, 250, 1000, 1000)),
    ("rounded to the nearest", Box(0, 0.6, 0.4, 10.4, 10.6), (100, 100), (100, 100), (1, 0, 10, 11)),
    ("clamped to the picture", Box(0, -5, -5, 700, 500), (640, 480), RELATIVE_STEPS, (0, 0, 1000, 1000)),
    ("location steps", Box(0, 64, 0, 128, 32), (128, 128), (64, 64), (32, 0, 64, 16)),
    ("pixels of the resized picture", Box(0, 64, 48, 640, 240), (640, 480), (560, 420), (56, 42, 560, 210)),
    ("clamped to the resized picture", Box(0, -5, -5, 700, 500), (640, 480), (560, 420), (0, 0, 560, 420)),
]


@pytest.mark.parametrize(("a", "b", "expected"), [c[1:] for c in IOU_CASES], ids=[c[0] for c in IOU_CASES])
def test_iou(a: Box, b: Box, expected: float) -> None:
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)


@pytest.mark.parametrize(("box", "expected"), [c[1:] for c in AREA_CASES], ids=[c[0] for c in AREA_CASES])
def test_area(box: Box, expected: float) -> None:
    assert box.area == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "truth", "threshold", "expected"), [c[1:] for c in MATCH_CASES], ids=[c[0] for c in MATCH_CASES]
)
def test_match_boxes(predicted: list[Box], truth: list[Box], threshold: float, expected: list[tuple[int, int]]) -> None:
    matches = match_boxes(predicted, truth, threshold)
    assert sorted((i, j) for i, j, _ in matches) == expected
    assert all(overlap == iou(predicted[i], truth[j]) for i, j, overlap in matches)


@pytest.mark.parametrize(
    ("box", "size", "steps", "expected"), [c[1:] for c in STEP_CASES], ids=[c[0] for c in STEP_CASES]
)
def test_to_steps(box: Box, size: tuple[int, int], steps: Steps, expected: tuple[int, int, int, int]) -> None:
    assert to_steps(box, size, steps) == expected


def test_from_steps_keeps_the_image_and_scales_each_side() -> None:
    assert from_steps(2, (0, 250, 500, 1000), (640, 480), RELATIVE_STEPS) == Box(2, 0, 120, 320, 480)
    assert from_steps(2, (56, 42, 560, 210), (640, 480), (560, 420)) == Box(2, 64, 48, 640, 240)


def test_steps_change_along_each_side() -> None:
    assert change_steps((0, 250, 500, 1000), RELATIVE_STEPS, (560, 420)) == [0, 105, 280, 420]
    assert change_steps((9999, 9999, 1, 1), RELATIVE_STEPS, (560, 420)) == [560, 420, 1, 0]


def test_boxes_sort_by_image_then_left_then_top() -> None:
    boxes = [Box(1, 0, 0, 9, 9), Box(0, 5, 1, 9, 9), Box(0, 5, 0, 9, 9), Box(0, 1, 8, 9, 9)]
    assert sorted(boxes) == [boxes[3], boxes[2], boxes[1], boxes[0]]


extents = st.integers(1, 10_000)
steps_of_a_side = st.integers(0, 1000)


@given(st.tuples(extents, extents), st.tuples(steps_of_a_side, steps_of_a_side, steps_of_a_side, steps_of_a_side))
def test_steps_survive_pixels(size: tuple[int, int], values: tuple[int, int, int, int]) -> None:
    assert to_steps(from_steps(0, values, size, RELATIVE_STEPS), size, RELATIVE_STEPS) == values


corners = st.tuples(*[st.floats(-100, 100)] * 4)


@given(corners, corners)
def test_iou_is_symmetric_and_between_0_and_1(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    first, second = Box(0, *a), Box(0, *b)
    assert iou(first, second) == iou(second, first)
    assert 0 <= iou(first, second) <= 1 + 1e-9
