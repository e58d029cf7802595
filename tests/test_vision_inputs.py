"""The runs of the vision graph: windows against transformers' own grouping, and every patch in exactly one slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_window_index

from gemvg_edge.bundle import VisionShape
from gemvg_edge.engines.vision_inputs import vision_runs, window_places
from gemvg_edge.images import Grid
from gemvg_edge.positions import place_table, vision_table

MERGE, PATCH = 2, 14
DIM = 3  # numbers in a patch
HEAD_DIM = 8


def shape(window: int, side: int = 0) -> VisionShape:
    return VisionShape(2, 16, 2, HEAD_DIM, rope_theta=100.0, window=window, place_side=side)


def pictures(grids: list[Grid]) -> list[np.ndarray]:
    """Patches whose every number tells the picture and the patch: none is zero."""
    return [
        np.repeat(1 + 1000.0 * k + np.arange(np.prod(grid)), DIM).reshape(-1, DIM).astype(np.float32)
        for k, grid in enumerate(grids)
    ]


sides = st.integers(1, 11).map(lambda tokens: tokens * MERGE)
grids_of = st.lists(st.tuples(st.just(1), sides, sides), min_size=1, max_size=5)
windows = st.integers(1, 5)


@given(st.tuples(st.integers(1, 3), sides, sides), windows)
def test_windows_are_transformers(grid: Grid, window: int) -> None:
    order, borders = get_vision_window_index(torch.tensor([grid]), MERGE, window * MERGE * PATCH, PATCH)
    places = window_places(grid, MERGE, window)
    theirs = [part.tolist() for part in torch.tensor_split(order, (borders[1:-1] // MERGE**2).long())]
    ours = [part[part >= 0].tolist() for part in places.reshape(-1, window**2)]
    assert ours == theirs
    assert places.dtype == np.int64


@given(grids_of, windows)
def test_every_patch_has_one_slot_and_its_own_rotary_row(grids: list[Grid], window: int) -> None:
    patches = pictures(grids)
    runs = vision_runs(shape(window), MERGE, patches, grids)
    assert sorted(k for run in runs for k in run.members) == list(range(len(grids)))
    for run in runs:
        (grid,) = {grids[k] for k in run.members}
        values, valid, cos, sin = (run.inputs[name] for name in ("patches", "valid", "cos", "sin"))
        slots = values.shape[1]
        down, across = (-(-side // MERGE // window) for side in grid[1:])
        assert slots == down * across * window**2 * MERGE**2
        assert [str(part.dtype) for part in (values, cos, valid)] == ["float32", "float32", "bool"]
        assert (valid.shape, cos.shape) == ((len(run.members), slots), (slots, HEAD_DIM // 2))
        assert sin.shape == cos.shape
        assert (valid.sum(axis=1) == np.prod(grid)).all()
        assert not values[~valid].any()
        assert not cos[~valid[0]].any()
        table = vision_table(grid, MERGE, HEAD_DIM, 100.0)
        for row, k in enumerate(run.members):
            number = (values[row, valid[row], 0] - 1 - 1000 * k).astype(int)
            assert sorted(number) == list(range(len(patches[k])))
            assert np.array_equal(values[row, valid[row]], patches[k][number])
            assert np.array_equal(cos[valid[row]], table.cos[number])
            assert np.array_equal(sin[valid[row]], table.sin[number])


@given(grids_of, windows)
def test_tokens_come_back_in_their_order(grids: list[Grid], window: int) -> None:
    """A tower that only puts a token's patches side by side gives them back as they were."""
    patches = pictures(grids)
    for run in vision_runs(shape(window), MERGE, patches, grids):
        assert run.token_order is not None
        assert run.token_order.dtype == np.int64
        output = run.inputs["patches"].reshape(len(run.members), -1, MERGE**2 * DIM)
        for row, k in enumerate(run.members):
            assert np.array_equal(output[row][run.token_order], patches[k].reshape(-1, MERGE**2 * DIM))


def test_patches_of_a_window_lie_side_by_side() -> None:
    """Two by three tokens in windows of two by two: the second window has one column, and its right one is empty."""
    (run,) = vision_runs(shape(2), MERGE, pictures([(1, 4, 6)]), [(1, 4, 6)])
    tokens = (run.inputs["patches"][0, :: MERGE**2, 0] - 1) / MERGE**2
    assert np.where(run.inputs["valid"][0, :: MERGE**2], tokens, -1).tolist() == [0, 1, 3, 4, 2, -1, 5, -1]
    assert run.token_order is not None
    assert run.token_order.tolist() == [0, 1, 4, 2, 3, 6]


FILLED = [
    # grid in patches, slots of windows of 4 x 4 tokens, how many stay empty
    ("one whole window", (1, 8, 8), 64, 0),
    ("the smallest picture", (1, 2, 2), 64, 60),
    ("two windows, one of them a column", (1, 8, 10), 128, 48),
    ("edges on both sides", (1, 10, 18), 2 * 3 * 64, 2 * 3 * 64 - 180),
]


@pytest.mark.parametrize(("grid", "slots", "empty"), [case[1:] for case in FILLED], ids=[case[0] for case in FILLED])
def test_edges_are_filled_up(grid: Grid, slots: int, empty: int) -> None:
    (run,) = vision_runs(shape(4), MERGE, pictures([grid]), [grid])
    assert run.inputs["valid"].shape == (1, slots)
    assert int((~run.inputs["valid"]).sum()) == empty


def test_without_windows_pictures_stay_as_they_are() -> None:
    grids: list[Grid] = [(1, 4, 6), (1, 2, 2), (1, 4, 6)]
    patches = pictures(grids)
    runs = vision_runs(shape(0), MERGE, patches, grids)
    assert [run.members for run in runs] == [[0, 2], [1]]
    for run in runs:
        assert run.inputs.keys() == {"patches", "cos", "sin"}
        assert run.token_order is None
        assert np.array_equal(run.inputs["patches"], np.stack([patches[k] for k in run.members]))
        table = vision_table(grids[run.members[0]], MERGE, HEAD_DIM, 100.0)
        assert np.array_equal(run.inputs["cos"], table.cos)
        assert np.array_equal(run.inputs["sin"], table.sin)


def test_a_table_of_places_comes_with_each_run() -> None:
    grids: list[Grid] = [(1, 4, 6), (1, 2, 2), (1, 4, 6)]
    for run in vision_runs(shape(0, side=5), MERGE, pictures(grids), grids):
        assert run.inputs.keys() == {"patches", "cos", "sin", "place_index", "place_weight"}
        places = place_table(grids[run.members[0]], MERGE, 5)
        assert np.array_equal(run.inputs["place_index"], places.rows)
        assert np.array_equal(run.inputs["place_weight"], places.weight)
