"""The loss on a head's weights is that of the weights which the attention itself uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from tests.checkpoints import write_checkpoint
from train.world.guided_attention import attention_loss, find_looks


def test_looks_lie_in_the_rows_of_the_pictures() -> None:
    is_visual = torch.tensor([[False, True, True, False, True], [True, True, False, False, False]])
    looks = find_looks([2, 4, 1], [[0, 1], [3], []], is_visual)  # visual tokens 0, 1, 2 and 3, 4
    assert (looks.rows.tolist(), looks.places.tolist()) == ([0, 1], [4, 1])
    assert looks.wanted.tolist() == [[0, 0.5, 0.5, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("head", [0, 2])
def test_it_is_the_cross_entropy_of_the_weights_that_the_attention_uses(tmp_path: Any, head: int) -> None:
    write_checkpoint(tmp_path)
    model = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    attention = model.model.language_model.layers[1].self_attn
    kept: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kept["inputs"] = kwargs["hidden_states"], kwargs["position_embeddings"]

    attention.register_forward_pre_hook(keep, with_kwargs=True)
    attention.register_forward_hook(lambda module, args, output: kept.update(weights=output[1]))
    model(input_ids=torch.arange(1, 15).reshape(2, 7))
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7)
    looks = find_looks([5, 9, 13], [[1, 2], [8], [10]], torch.ones(2, 7, dtype=torch.bool))
    weights = kept["weights"][looks.rows, head, looks.places]  # (3, 7)
    assert weights.shape == looks.wanted.shape
    wanted = -(looks.wanted * weights.clamp(min=1e-30).log()).sum(dim=1).mean()
    hidden, rotary = kept["inputs"]
    found = attention_loss(attention, hidden, rotary, mask, head, looks)
    torch.testing.assert_close(found, wanted)
    nobody = find_looks([5], [[]], torch.ones(2, 7, dtype=torch.bool))
    assert attention_loss(attention, hidden, rotary, mask, head, nobody) == 0
