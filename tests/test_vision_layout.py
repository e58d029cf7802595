"""The ragged twin of the vision tower that bench.vision_layout times: the same tokens as grouped pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.vision_layout import ragged_tower
from export.to_onnx import main as export
from gemvg_edge.bundle import open_bundle
from gemvg_edge.engines.onnxruntime import OnnxVisionTower
from tests.checkpoints import random_pictures, write_checkpoint


def test_ragged_and_grouped_agree(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    assert export([str(tmp_path / "checkpoint"), str(tmp_path / "bundle")]) == 0
    bundle = open_bundle(tmp_path / "bundle")
    grids = [(1, 4, 6), (1, 2, 2), (1, 4, 6), (1, 8, 2)]
    patches = random_pictures(grids)
    grouped = np.concatenate(OnnxVisionTower(bundle).encode(patches, grids))
    ragged = ragged_tower(bundle)(patches, grids)
    assert grouped.shape == ragged.shape == (6 + 1 + 6 + 4, 96)
    assert np.abs(grouped - ragged).max() < 1e-4  # float32 sums in another order
    alone = np.concatenate([OnnxVisionTower(bundle).encode([p], [g])[0] for p, g in zip(patches, grids, strict=True)])
    assert np.abs(grouped - alone).max() < 1e-4
