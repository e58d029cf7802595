"""The time of a training step is that of real runs, and a run that fails is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.train_step import step_seconds
from gemvg_edge.errors import GemvgError
from train.world.render import render


def test_a_step_is_timed_and_a_failed_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"train\.sft failed: train\.sft: .*none has no scenes"):
        step_seconds(tmp_path / "out", tmp_path / "none", 1, 0, "math", {})
    render(tmp_path / "data", first_seed=0, scenes=2, size=128, processes=1)
    assert 0.01 < step_seconds(tmp_path / "out", tmp_path / "data", 1, 0, "math", {}) < 60
