"""mRoPE as tables: positions of tokens and patches, and the cos/sin rows that the graphs are fed.

A token's rotary angles depend only on its place in the sequence once the image grids are known, so they are computed
here in numpy and the graphs hold no rotary arithmetic. Knows grids and lengths only, neither text nor engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid

Positions = npt.NDArray[np.int64]  # (3, tokens): time, height, width


class RopeTable(NamedTuple):
    """Rotary rows for rotate-half layouts: cos and sin, each (tokens, head_dim / 2) float32."""

    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]


class PlaceTable(NamedTuple):
    """Patches among the places of a learned table: a patch's vector is the sum of four rows, each by its weight."""

    rows: npt.NDArray[np.int64]  # (patches, 4)
    weight: npt.NDArray[np.float32]  # (patches, 4)


def visual_tokens(grid: Grid, merge: int) -> int:
    """How many language-model tokens a picture of this patch grid takes."""
    t, h, w = grid
    return t * (h // merge) * (w // merge)


def mrope_positions(ids: npt.NDArray[np.int64], image_token_id: int, grids: Sequence[Grid], merge: int) -> Positions:
    """Positions (3, tokens) of a prompt, equal to transformers' Qwen2VLModel.get_rope_index for still pictures.

    Text advances the three streams together; a picture holds time and spreads height and width from where it starts;
    what follows starts after the picture's longer side.
    """
    pieces: list[Positions] = []
    position = start = 0
    starts = np.flatnonzero(ids == image_token_id)
    for grid in grids:
        if not starts.size:
            raise GemvgError(f"the prompt has places for fewer pictures than the {len(grids)} given")
        first = int(starts[0])
        t, h, w = grid[0], grid[1] // merge, grid[2] // merge
        pieces.append(text_positions(position, first - start))
        position += first - start
        pieces.append(position + np.indices((t, h, w)).reshape(3, -1))
        position += max(h, w)
        start = first + t * h * w
        starts = starts[starts >= start]
    if starts.size:
        raise GemvgError(f"the prompt has places for more pictures than the {len(grids)} given")
    pieces.append(text_positions(position, len(ids) - start))
    return np.concatenate(pieces, axis=1)


def text_positions(first: int, count: int) -> Positions:
    """Positions (3, count) of plain text that starts at `first`."""
    return np.tile(np.arange(first, first + count, dtype=np.int64), (3, 1))


def mrope_table(
    positions: Positions, head_dim: int, theta: float, sections: Sequence[int], interleaved: bool = False
) -> RopeTable:
    """Rows for the decoder: frequency j follows the stream whose section holds j (Qwen2-VL).

    `interleaved`: the streams take turns, and where height and width have had their sections, time goes on (Qwen3-VL).
    """
    stream = np.repeat(np.arange(3), sections)  # (head_dim / 2,)
    if interleaved:
        stream = np.zeros_like(stream)
        for k in (1, 2):
            stream[k : 3 * sections[k] : 3] = k
    angles = positions[stream].T.astype(np.float32) * _frequencies(head_dim, theta)  # (tokens, head_dim / 2)
    return RopeTable(np.cos(angles), np.sin(angles))


def vision_table(grid: Grid, merge: int, head_dim: int, theta: float = 10000.0) -> RopeTable:
    """Rows for the vision tower, (patches, head_dim / 2): half the frequencies follow the row, half the column.

    Patches come in merge-block order, as `images.patchify` writes them.
    """
    row, column = _block_order(grid, merge)  # (h * w,)
    inverse = _frequencies(head_dim // 2, theta)
    angles = np.concatenate([np.outer(row, inverse), np.outer(column, inverse)], axis=1).astype(np.float32)
    angles = np.tile(angles, (grid[0], 1))
    return RopeTable(np.cos(angles), np.sin(angles))


def place_table(grid: Grid, merge: int, side: int) -> PlaceTable:
    """Where each patch lies in a learned table of side x side places, which is stretched over the picture to its edges.

    Equal to transformers' bilinear get_vision_interpolation_indices_and_weights; patches in merge-block order.
    """
    taps, weights = [], []
    for size in grid[1:]:
        at = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(1, size - 1))
        before = np.floor(at)
        share = 1 - (at - before)
        near = before.astype(np.int64)
        taps.append(np.stack([near, np.minimum(near + 1, side - 1)], axis=1))
        weights.append(np.stack([share, 1 - share], axis=1))
    row, column = _block_order(grid, merge)
    index = taps[0][row][:, :, None] * side + taps[1][column][:, None]  # (h * w, 2, 2)
    weight = weights[0][row][:, :, None] * weights[1][column][:, None]
    return PlaceTable(*(np.tile(part.reshape(-1, 4), (grid[0], 1)) for part in (index, weight)))


def _block_order(grid: Grid, merge: int) -> npt.NDArray[np.int64]:
    """Row and column (2, h * w) of each patch of one frame, in merge-block order."""
    _, h, w = grid
    row_column = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
    return row_column.transpose(0, 1, 3, 2, 4).reshape(2, -1)


def _frequencies(dim: int, theta: float) -> npt.NDArray[np.float32]:
    """Inverse frequencies (dim / 2,), each step rounded once to float32, as torch does it."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # An error in the last place would grow with the position, to 1e-4 radians at 2,000.
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
