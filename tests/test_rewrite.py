"""Checkpoints in another number format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from gemvg_edge.errors import GemvgError
from tests.checkpoints import write_checkpoint
from train.rewrite import DENSE_HEAD, cast


def test_a_cast_checkpoint_opens_with_rounded_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small")
    (tmp_path / "small" / DENSE_HEAD).parent.mkdir()
    save_file({"fates.bias": torch.tensor([1.0, 0.1])}, tmp_path / "small" / DENSE_HEAD)
    cast(tmp_path / "small", tmp_path / "half", "float16")
    before, after = (
        Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / n, dtype="auto") for n in ("small", "half")
    )
    assert after.dtype == torch.float16
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor.half()), name
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert torch.equal(load_file(tmp_path / "half" / DENSE_HEAD)["fates.bias"], torch.tensor([1.0, 0.1]).half())


def test_numbers_that_do_not_fit_are_told_and_leave_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)].view(-1)[0] = 1e9
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GemvgError, match="has numbers that float16 cannot hold"):
        cast(tmp_path / "small", tmp_path / "half", "float16")
    assert not (tmp_path / "half").exists()
    cast(tmp_path / "small", tmp_path / "brain", "bfloat16")
    assert (tmp_path / "brain" / "config.json").is_file()
