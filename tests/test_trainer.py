"""What our trainer changes in a model that trains."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoints import write_checkpoint
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
