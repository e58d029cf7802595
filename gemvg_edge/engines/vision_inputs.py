"""Patches of several pictures -> the runs of the vision graph: which pictures share one, and its inputs.

Pictures of one grid share a run, so attention stays inside each without a mask. A tower with windows (Qwen2.5-VL) wants
the patches of a window side by side, in as many slots as a whole window has: windows at the edge are filled up with
slots that are not `valid`. One with a learned table of places (Qwen3-VL) wants to know which of its rows each patch is
a sum of. Pure numpy, the same for every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import VisionShape
from gemvg_edge.engines.protocol import Floats
from gemvg_edge.images import Grid
from gemvg_edge.positions import place_table, vision_table


class VisionRun(NamedTuple):
    """One run of the vision graph."""

    members: list[int]  # which of the given pictures it holds
    # patches (members, slots, patch_dim); cos, sin (slots, head_dim / 2); with windows valid (members, slots) bool;
    # with a table of places place_index (slots, 4) int64 and place_weight (slots, 4)
    inputs: dict[str, npt.NDArray[Any]]
    token_order: npt.NDArray[np.int64] | None  # (tokens,): which output is each token of a picture; None: in order


def vision_runs(shape: VisionShape, merge: int, patches: Sequence[Floats], grids: Sequence[Grid]) -> list[VisionRun]:
    """Patches (n_i, patch_dim) of each picture in merge-block order, and its grid -> the runs that encode them all.

    A run's graph gives (members, slots / merge^2, width); where there is a `token_order`, picture k's tokens are
    output[k][token_order].
    """
    runs = []
    for grid in dict.fromkeys(grids):
        members = [i for i, other in enumerate(grids) if other == grid]
        table = vision_table(grid, merge, shape.head_dim, shape.rope_theta)
        inputs: dict[str, npt.NDArray[Any]] = {"patches": np.stack([patches[i] for i in members])}
        inputs |= {"cos": table.cos, "sin": table.sin}
        if shape.place_side:
            places = place_table(grid, merge, shape.place_side)
            inputs |= {"place_index": places.rows, "place_weight": places.weight}
        if not shape.window:
            runs.append(VisionRun(members, inputs, None))
            continue
        tokens = window_places(grid, merge, shape.window)
        slots = np.repeat(tokens >= 0, merge**2)  # a token's patches lie side by side
        inputs = {name: _fill(rows, tokens, merge**2) for name, rows in inputs.items()}
        inputs["valid"] = np.tile(slots, (len(members), 1))
        order = np.flatnonzero(tokens >= 0)[np.argsort(tokens[tokens >= 0])]
        runs.append(VisionRun(members, inputs, order))
    return runs


def window_places(grid: Grid, merge: int, window: int) -> npt.NDArray[np.int64]:
    """Which merged token each place holds (-1: none), window after window, each `window` x `window` places by row.

    Equal to transformers' get_vision_window_index but for the places that are left empty at the edges.
    """
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    down, across = -(-height // window), -(-width // window)
    tokens = np.full((frames, down * window, across * window), -1, np.int64)
    tokens[:, :height, :width] = np.arange(frames * height * width).reshape(frames, height, width)
    windows = tokens.reshape(frames, down, window, across, window).transpose(0, 1, 3, 2, 4)
    return windows.reshape(-1)


def _fill(rows: Floats, places: npt.NDArray[np.int64], together: int) -> Floats:
    """Rows (.., tokens x together, width) -> (.., places x together, width), zeros in empty places."""
    *pictures, _, width = rows.shape
    blocks = rows.reshape(*pictures, -1, together * width)
    filled = np.zeros((*pictures, len(places), together * width), np.float32)
    filled[..., places >= 0, :] = blocks[..., places[places >= 0], :]
    return filled.reshape(*pictures, -1, width)
