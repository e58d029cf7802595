"""Positions and rotary tables against transformers' own get_rope_index and rotary modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig, Qwen3VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLModel,
    Qwen2VLRotaryEmbedding,
    Qwen2VLVisionRotaryEmbedding,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from gemvg_edge.positions import (
    mrope_positions,
    mrope_table,
    place_table,
    text_positions,
    vision_table,
    visual_tokens,
)

IMAGE = 9  # any id; text is 0


def config(
    merge: int = 2, head_dim: int = 16, theta: float = 1e6, sections: tuple[int, ...] = (2, 3, 3)
) -> Qwen2VLConfig:
    """One tiny layer, with the rotary numbers of choice."""
    return Qwen2VLConfig(
        text_config={
            "vocab_size": 32,
            "hidden_size": 2 * head_dim,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)},
        },
        vision_config={
            "depth": 1,
            "embed_dim": 2 * head_dim,
            "num_heads": 2,
            "hidden_size": 2 * head_dim,
            "spatial_merge_size": merge,
        },
        image_token_id=IMAGE,
    )


with torch.device("meta"):
    MODELS = {merge: Qwen2VLModel(config(merge)) for merge in (1, 2, 3)}


def prompt(texts: list[int], grids: list[Grid], merge: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Text lengths and pictures in turn -> ids."""
    pieces = [np.zeros(texts[0], np.int64)]
    for grid, text in zip(grids, texts[1:], strict=True):
        pieces += [np.full(visual_tokens(grid, merge), IMAGE), np.zeros(text, np.int64)]
    return np.concatenate(pieces)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[Grid], int]:
    """Lengths of the text around 1 to 4 pictures, their grids in patches, and the merge size."""
    merge = draw(st.sampled_from([1, 2, 2, 3]))
    sides = st.integers(1, 12).map(lambda tokens: tokens * merge)
    grids = [(1, draw(sides), draw(sides)) for _ in range(draw(st.integers(1, 4)))]
    between = draw(st.lists(st.integers(1, 20), min_size=len(grids) - 1, max_size=len(grids) - 1))
    return [draw(st.integers(0, 30)), *between, draw(st.integers(0, 30))], grids, merge


@given(prompts())
@settings(max_examples=300)
def test_positions_equal_get_rope_index(drawn: tuple[list[int], list[Grid], int]) -> None:
    texts, grids, merge = drawn
    ids = prompt(texts, grids, merge)
    expected, _ = MODELS[merge].get_rope_index(
        torch.from_numpy(ids)[None],
        mm_token_type_ids=torch.from_numpy((ids == IMAGE).astype(np.int32))[None],
        image_grid_thw=torch.tensor(grids),
    )
    positions = mrope_positions(ids, IMAGE, grids, merge)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())


@given(prompts(), st.integers(1, 10))
def test_text_goes_on_where_get_rope_index_says(drawn: tuple[list[int], list[Grid], int], more: int) -> None:
    texts, grids, merge = drawn
    ids = prompt(texts, grids, merge)
    _, delta = MODELS[merge].get_rope_index(
        torch.from_numpy(ids)[None],
        mm_token_type_ids=torch.from_numpy((ids == IMAGE).astype(np.int32))[None],
        image_grid_thw=torch.tensor(grids),
    )
    after = text_positions(int(mrope_positions(ids, IMAGE, grids, merge).max()) + 1, more)
    np.testing.assert_array_equal(after, np.tile(np.arange(more) + len(ids) + int(delta), (3, 1)))


@pytest.mark.parametrize(
    ("grids", "message"),
    [([(1, 4, 4)], "more pictures than the 1 given"), ([(1, 4, 4)] * 3, "fewer pictures than the 3 given")],
)
def test_refuses_another_number_of_pictures(grids: list[Grid], message: str) -> None:
    with pytest.raises(GemvgError, match=message):
        mrope_positions(prompt([3, 1, 3], [(1, 4, 4)] * 2, 2), IMAGE, grids, 2)


def round_frequencies(module: Any, dim: int, theta: float) -> None:
    """Round a reference's frequencies once: torch's AVX-512 power is a unit off in places, which positions multiply."""
    power = np.float32(theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64))
    rounded = np.float32(1) / power
    np.testing.assert_array_max_ulp(module.inv_freq.numpy(), rounded, maxulp=2)
    module.inv_freq.copy_(torch.from_numpy(rounded))


def assert_same_angles(ours: np.ndarray, reference: torch.Tensor) -> None:
    """Two float32 cosines or sines of the same float32 angle: a unit or two in the last place apart."""
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=2.5e-7)


ROTARY = [
    ("Qwen2-VL 2B and 7B", 128, 1e6, (16, 24, 24)),
    ("small model", 32, 10.0, (4, 6, 6)),
    ("uneven sections", 40, 500_000.0, (3, 7, 10)),
]


@pytest.mark.parametrize(("head_dim", "theta", "sections"), [case[1:] for case in ROTARY], ids=[c[0] for c in ROTARY])
def test_decoder_rows_equal_transformers(head_dim: int, theta: float, sections: tuple[int, ...]) -> None:
    positions = np.random.default_rng(0).integers(0, 32_768, (3, 500))
    positions[:, :3] = [[0], [1], [32_767]]
    module = Qwen2VLRotaryEmbedding(config(2, head_dim, theta, sections).text_config)
    round_frequencies(module, head_dim, theta)
    cos, sin = module(torch.zeros(1), torch.from_numpy(positions)[:, None])  # (1, tokens, head_dim)
    table = mrope_table(positions, head_dim, theta, sections)
    assert table.cos.shape == (500, head_dim // 2)
    for ours, theirs in ((table.cos, cos), (table.sin, sin)):
        assert_same_angles(ours, theirs[0, :, : head_dim // 2])
        assert torch.equal(theirs[..., : head_dim // 2], theirs[..., head_dim // 2 :])  # what "rotate-half" rests on


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [80, 32, 8])
@pytest.mark.parametrize("tokens", [(1, 1, 1), (1, 9, 4), (1, 3, 40), (2, 2, 3)])
def test_vision_rows_equal_transformers(merge: int, head_dim: int, tokens: Grid) -> None:
    grid = (tokens[0], tokens[1] * merge, tokens[2] * merge)
    module = Qwen2VLVisionRotaryEmbedding(config(merge, head_dim, sections=(head_dim // 2, 0, 0)).vision_config)
    round_frequencies(module, head_dim // 2, 10_000.0)
    cos, sin = module(torch.zeros(1), get_vision_position_ids(torch.tensor([grid]), merge))  # (patches, head_dim)
    table = vision_table(grid, merge, head_dim)
    assert table.cos.shape == (np.prod(grid), head_dim // 2)
    for ours, theirs in ((table.cos, cos), (table.sin, sin)):
        assert_same_angles(ours, theirs[:, : head_dim // 2])
        assert torch.equal(theirs[:, : head_dim // 2], theirs[:, head_dim // 2 :])


INTERLEAVED = [
    ("Qwen3-VL", 128, 5e6, (24, 20, 20)),
    ("small model", 32, 20.0, (8, 4, 4)),
    ("a section past the last frequency", 32, 20.0, (4, 6, 6)),
    ("no height", 32, 20.0, (8, 0, 8)),
]


@pytest.mark.parametrize(
    ("head_dim", "theta", "sections"), [case[1:] for case in INTERLEAVED], ids=[c[0] for c in INTERLEAVED]
)
def test_interleaved_rows_equal_transformers(head_dim: int, theta: float, sections: tuple[int, ...]) -> None:
    positions = np.random.default_rng(0).integers(0, 32_768, (3, 500))
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections), "mrope_interleaved": True}
    module = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=head_dim, rope_parameters=rope))
    round_frequencies(module, head_dim, theta)
    cos, sin = module(torch.zeros(1), torch.from_numpy(positions)[:, None])  # (1, tokens, head_dim)
    table = mrope_table(positions, head_dim, theta, sections, interleaved=True)
    for ours, theirs in ((table.cos, cos), (table.sin, sin)):
        assert_same_angles(ours, theirs[0, :, : head_dim // 2])
    text = mrope_table(text_positions(7, 5), head_dim, theta, sections, interleaved=True)
    assert np.array_equal(text.cos, mrope_table(text_positions(7, 5), head_dim, theta, sections).cos)


@given(st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 48))
@settings(max_examples=200)
def test_places_equal_transformers(merge: int, frames: int, down: int, across: int, side: int) -> None:
    grid = (frames, down * merge, across * merge)
    rows, weight = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), side, "bilinear", align_corners=True, spatial_merge_size=merge
    )
    table = place_table(grid, merge, side)
    assert [str(part.dtype) for part in table] == ["int64", "float32"]
    assert np.array_equal(table.rows, rows.numpy())
    assert np.array_equal(table.weight, weight.numpy())


@pytest.mark.parametrize(("down", "across"), [(4, 6), (2, 2), (10, 3), (48, 48)])
def test_places_are_the_table_stretched(down: int, across: int) -> None:
    """What it is for: torch's own bilinear resize of the table, read in merge-block order."""
    side, grid = 48, (1, 2 * down, 2 * across)
    places = torch.from_numpy(np.random.default_rng(0).standard_normal((side * side, 8)).astype(np.float32))
    stretched = torch.nn.functional.interpolate(
        places.T.reshape(1, 8, side, side), grid[1:], mode="bilinear", align_corners=True
    )
    blocks = stretched[0].reshape(8, down, 2, across, 2).permute(1, 3, 2, 4, 0).reshape(-1, 8)
    table = place_table(grid, 2, side)
    ours = (places.numpy()[table.rows] * table.weight[..., None]).sum(axis=1)
    np.testing.assert_allclose(ours, blocks.numpy(), atol=1e-4)
