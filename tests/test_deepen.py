"""More layers say the same until they are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from gemvg_edge.errors import GemvgError
from tests.checkpoints import write_checkpoint
from train.deepen import deepen, layer_sources


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "small")
    return tmp_path / "small"


def test_a_deeper_model_says_the_same_and_learns_in_its_new_layers(checkpoint: Path) -> None:
    out = checkpoint.with_name("deep")
    deepen(checkpoint, out, 5)
    before, after = (Qwen2VLForConditionalGeneration.from_pretrained(folder).eval() for folder in (checkpoint, out))
    assert len(after.model.language_model.layers) == 5 > len(before.model.language_model.layers)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits)
    after(input_ids=ids, labels=ids).loss.backward()
    for layer in after.model.language_model.layers:
        assert layer.mlp.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("old", "layers"), [(2, 3), (6, 8), (6, 12), (6, 14), (28, 32)])
def test_old_layers_keep_their_order_and_new_ones_are_spread(old: int, layers: int) -> None:
    sources = layer_sources(old, layers)
    assert [source for source, new in sources if not new] == list(range(old))
    assert len(sources) == layers
    assert all(source == max(0, sources[at - 1][0]) for at, (source, new) in enumerate(sources) if new and at)
    if layers < 2 * old:
        assert not sources[0][1], "the first layer is an old one"


def test_bad_input_is_told(checkpoint: Path) -> None:
    with pytest.raises(GemvgError, match=r"--layers 3: .*small has 3 layers already"):
        deepen(checkpoint, checkpoint.with_name("x"), 3)
    with pytest.raises(GemvgError, match="no such checkpoint folder"):
        deepen(checkpoint.with_name("none"), checkpoint.with_name("x"), 4)
    with pytest.raises(GemvgError, match="small is the checkpoint itself"):
        deepen(checkpoint, checkpoint, 4)
