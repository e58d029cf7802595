"""The mean of checkpoints' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from gemvg_edge.errors import GemvgError
from tests.checkpoints import TINY, edit_json, write_checkpoint
from train.average import average
from train.rewrite import cast


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A checkpoint and two that went further from it, one of them in two shards."""
    write_checkpoint(tmp_path / "a")
    folders = [tmp_path / name for name in "abc"]
    for k, folder in enumerate(folders[1:], start=1):
        cast(folders[0], folder, "float32")
        tensors = load_file(folder / "model.safetensors")
        chance = torch.Generator().manual_seed(k)
        moved = {name: tensor + torch.randn(tensor.shape, generator=chance) for name, tensor in tensors.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    model = Qwen2VLForConditionalGeneration.from_pretrained(folders[2], dtype="auto")
    (folders[2] / "model.safetensors").unlink()
    model.save_pretrained(folders[2], max_shard_size="100KB")
    assert len(list(folders[2].glob("model-*.safetensors"))) > 1
    return folders


def test_it_is_the_mean(three: list[Path], tmp_path: Path) -> None:
    average(three, tmp_path / "mean")
    mean, *each = (
        Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype="auto").state_dict()
        for folder in (tmp_path / "mean", *three)
    )
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([one[name] for one in each]).mean(dim=0), rtol=0, atol=1e-6)
    assert (tmp_path / "mean" / "tokenizer.json").read_bytes() == (three[0] / "tokenizer.json").read_bytes()


def test_what_cannot_be_averaged_is_told_and_leaves_nothing(three: list[Path], tmp_path: Path) -> None:
    a, b, _ = three
    for folders in ([a], [a, a], [a, b, tmp_path / "x" / ".." / "a"]):
        with pytest.raises(GemvgError, match="two checkpoints or more"):
            average(folders, tmp_path / "mean")
    write_checkpoint(tmp_path / "smaller", TINY | {"text_config": TINY["text_config"] | {"intermediate_size": 24}})
    with pytest.raises(GemvgError, match=r"smaller and .*a differ in .*; average checkpoints of one model"):
        average([a, tmp_path / "smaller"], tmp_path / "mean")
    edit_json(b / "config.json", grounding={"prompt": {}, "answer": {"coordinates": "pixels"}})
    with pytest.raises(GemvgError, match="another format"):
        average([a, b], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
