"""Run-length masks and packed texts against the reference's own output and plain twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import masks
from train.data.masks import mask_box, read_runs, unpack

# Made with pycocotools 2.0 and lzstring 1.0.4: (height, width), counts, corners, counts packed.
KNOWN: list[tuple[tuple[int, int], str, tuple[int, ...], str]] = [
    ((40, 60), "m8?i0000000000000000000000000000000000000000000000ST1", (7, 5, 31, 20), "LYDg-AlgDDt-DFOVAygFQIxA"),
    ((50, 50), "W62kW2", (3, 0, 5, 50), "OoNgTA1sZA"),
]


@pytest.mark.parametrize(("size", "counts", "corners", "packed"), KNOWN)
def test_masks_of_the_reference(size: tuple[int, int], counts: str, corners: tuple[int, ...], packed: str) -> None:
    assert mask_box(counts, *size) == corners
    assert unpack(packed) == counts


def runs_of(mask: np.ndarray) -> list[int]:
    """The plain twin: count equal pixels down the columns, background first."""
    runs, value = [0], False
    for pixel in mask.T.reshape(-1):
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compressed(runs: list[int]) -> str:
    """The plain twin of `read_runs`, five bits a character."""
    text = ""
    for k, run in enumerate(runs):
        value = run - runs[k - 2] if k > 2 else run
        while True:
            low, value = value & 31, value >> 5
            done = (value == -1) if low & 16 else (value == 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]), st.integers(0, 10**6))
def test_mask_boxes_match_the_mask(height: int, width: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    runs = runs_of(mask)
    text = compressed(runs)
    assert read_runs(text) == runs
    ys, xs = np.nonzero(mask)
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None
    assert mask_box(text, height, width) == mask_box(runs, height, width) == expected


@pytest.mark.parametrize(
    "counts",
    [
        "m8?i", "m8?i0000000000000000000000000000000000000000000000ST", "é", [5, -5, 2400], [[1]],
        [2**62, 2**62, 2**62, 2**62, 2400],  # comes round to 2400
        [2399.5, 0.5], [True, 2399], ["2400"], None, {}, "o" * 10**6,
    ],
)  # fmt: skip
def test_wrong_masks_are_refused(counts: Any) -> None:
    with pytest.raises(ValueError, match=r"mask"):
        mask_box(counts, 40, 60)


def test_a_packed_text_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, counts, _, packed), *_ = KNOWN
    monkeypatch.setattr(masks, "MOST", len(counts))
    assert unpack(packed) == counts
    monkeypatch.setattr(masks, "MOST", len(counts) - 1)
    with pytest.raises(ValueError, match="a packed text is longer than any mask"):
        unpack(packed)


@pytest.mark.parametrize("text", ["", "LYDg-AlgDDt", "!!", "zzzz"])
def test_wrong_packings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"packed text|substring not found"):
        unpack(text)
