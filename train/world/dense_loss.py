"""The dense head's losses of a batch of scenes: what the model's layers are asked while it trains (dense_head.py).

Hooks keep what the layers computed; `DenseLoss` is called with the batch once the model has run. The trainer knows
nothing of it but that it gives named losses (train/trainer.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.prompt import token_id
from train.checkpoint import CheckpointSettings
from train.collate import IGNORED
from train.stage import load_dense_head
from train.world.dense_head import DenseHead, DenseTargets, dense_targets, fate_targets
from train.world.guided_attention import attention_loss, find_looks
from train.world.pointers import find_pointers
from train.world.samples import SEEN_COLOURS, SEEN_NAMES, WorldSample


class DenseLoss:
    """A dense head added to a Qwen2-VL model, and its losses."""

    def __init__(self, model: Any, checkpoint: Path, settings: CheckpointSettings) -> None:
        self.tokenizer = settings.tokenizer
        self.locations, self.merge = settings.answer_format.locations, settings.preprocessing.merge_size
        self.first_location = token_id(self.tokenizer, "<loc_0>") if self.locations else -1
        self.box_tokens = token_id(self.tokenizer, BOX_START), token_id(self.tokenizer, BOX_END)
        model.dense_head = DenseHead(model.config.text_config.hidden_size, len(SEEN_NAMES), len(SEEN_COLOURS))
        load_dense_head(model.dense_head, checkpoint)
        self._seen_tokens, self._hidden = torch.empty(0), dict[str, torch.Tensor]()
        layers = model.model.language_model.layers
        model.model.visual.register_forward_hook(self._keep_tokens)
        n = len(layers)
        after = {"place": n // 3, "mark": (n - 1) // 2, "middle": n // 2, "answer": max(0, n - 2)}
        for name, layer in after.items():
            layers[layer].register_forward_hook(partial(self._keep_hidden, name))
        self.guided = layers[after["middle"]].self_attn
        self.guided.register_forward_pre_hook(self._keep_attention_inputs, with_kwargs=True)

    def _keep_tokens(self, module: Any, inputs: Any, output: Any) -> None:
        self._seen_tokens = output.pooler_output.float()  # (tokens, width); the model may run in bfloat16

    def _keep_hidden(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        self._hidden[name] = output.float()  # (batch, sequence, width)

    def _keep_attention_inputs(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._attention_inputs = kwargs["hidden_states"].float(), kwargs["position_embeddings"]

    def __call__(
        self, model: Any, inputs: dict[str, Any], labels: torch.Tensor, samples: Sequence[WorldSample]
    ) -> dict[str, torch.Tensor]:
        """The losses of the batch that the model has just seen, by name; `labels` is (batch, sequence)."""
        grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
        targets = dense_targets(grids, self.merge, [seen for sample in samples for seen in sample.seen])
        is_visual = inputs["mm_token_type_ids"] == 1
        losses = self._of_pictures(model, grids, targets, is_visual, inputs["attention_mask"], samples)
        locations = range(self.first_location, self.first_location + self.locations)
        answers, marks, named = find_pointers(
            inputs["input_ids"], labels, IGNORED, self.tokenizer, self.box_tokens, locations, samples, targets
        )
        head = model.dense_head
        losses["pointer_loss"] = head.answer_pointer.loss(self._hidden["answer"], is_visual, answers)
        losses["named_loss"] = head.answer_pointer.loss(self._hidden["answer"], is_visual, named)
        losses["mark_loss"] = head.mark_pointer.loss(self._hidden["mark"], is_visual, marks)
        losses["marked_loss"] = head.marked_loss(self._hidden["middle"], marks, targets)
        return losses

    def _of_pictures(
        self,
        model: Any,
        grids: Sequence[tuple[int, int, int]],
        targets: DenseTargets,
        is_visual: torch.Tensor,
        mask: torch.Tensor,
        samples: Sequence[WorldSample],
    ) -> dict[str, torch.Tensor]:
        """What the visual tokens are asked, whatever the questions."""
        counts, fates = [len(sample.seen) for sample in samples], [sample.fates for sample in samples]
        changed = fate_targets(grids, self.merge, counts, fates)
        head = model.dense_head
        losses = {"tower_loss": head.tower_loss(self._seen_tokens, targets)}
        if self.locations:
            rows = model.get_input_embeddings().weight[self.first_location : self.first_location + self.locations]
            losses["place_loss"] = head.place_loss(self._hidden["place"][is_visual], targets, rows)
            losses["first_loss"] = head.first_loss(self._hidden["middle"][is_visual], changed, rows)
        losses["fate_loss"] = head.fate_loss(self._hidden["middle"][is_visual], changed)
        last = self.guided.q_proj.out_features // self.guided.head_dim - 1
        for name, number, wanted in (("like_loss", 0, changed.likes), ("same_place_loss", last, changed.same_place)):
            looks = find_looks(changed.cells.tolist(), wanted, is_visual)
            losses[name] = attention_loss(self.guided, *self._attention_inputs, mask, number, looks)
        return losses
