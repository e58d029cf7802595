"""What our trainer changes in a model that trains, and the recipe at the true widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from gemvg_edge.boxes import Box
from tests.checkpoints import ONE_7B_LAYER, write_checkpoint
from train.data.record import Mode, Record, write_records
from train.sft import SftSettings, train
from train.trainer import embed_patches_by_matrix


def test_patches_embedded_by_a_matrix_are_those_of_the_convolution(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "small")
    patches, embed = torch.randn(24, model.model.visual.patch_embed.proj.weight[0].numel()), []
    for change in (lambda model: None, embed_patches_by_matrix):
        change(model)
        found = model.model.visual.patch_embed(patches)
        model.zero_grad()
        found.square().sum().backward()
        embed.append((found, model.model.visual.patch_embed.proj.weight.grad.clone()))
    for ours, theirs in zip(embed[1], embed[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_the_7b_recipe_takes_two_steps_at_the_true_widths(tmp_path: Path) -> None:
    """One layer of the decoder and two of the vision tower; 5.4 GiB and a minute."""
    write_checkpoint(tmp_path / "base", ONE_7B_LAYER, bfloat16=True)
    records = []
    for number in range(4):
        files = [tmp_path / f"{number}-{letter}.png" for letter in "ab"]
        for file in files:
            Image.new("RGB", (84, 56), (60 * number, 90, 120)).save(file)
        boxes = (Box(1, 10, 10, 40, 50),)
        mode: Mode = "cot" if number % 2 else "direct"
        records.append(Record(tuple(files), ((84, 56),) * 2, "the mug", boxes, "spatial", "test", mode, "a mug"))
    write_records(records, tmp_path / "records.jsonl")
    run = SftSettings(
        tmp_path / "base", tmp_path / "records.jsonl", tmp_path / "out", steps=2, batch=1, accumulate=2,
        learning_rate=5e-6, schedule="cosine", weight_decay=0.0, warmup_steps=1, freeze_vision=True, checkpointing=True,
        save_steps=10,
    )  # fmt: skip
    train(run)
    before, after = (Qwen2VLForConditionalGeneration.from_pretrained(folder) for folder in (run.model, run.out))
    old = before.state_dict()
    changed = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, old[name].float())}
    assert any("layers.0.mlp.down_proj" in name for name in changed)
    assert not any("visual" in name for name in changed)
