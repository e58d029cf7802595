"""TRL's SFTTrainer with our batches: answers' loss, soft location targets, and while it is there the dense head's loss.

Coordinates written as location tokens are learned with soft targets, so that a near miss costs less than a far one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from trl import SFTTrainer

from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.prompt import token_id
from train.checkpoint import CheckpointSettings
from train.collate import IGNORED
from train.dense_head import dense_targets, fate_targets, find_pointers, spread
from train.guided_attention import attention_loss, find_looks
from train.muon import Muon, parameter_groups
from train.stage import load_weights
from train.world.samples import WorldSample


class GroundingTrainer(SFTTrainer):  # type: ignore[misc]  # transformers is not followed by mypy
    """SFTTrainer over batches of train.collate; `muon` chooses the optimizer."""

    # Ours is a mean over a batch; Trainer, seeing that the model takes any argument, would take it for a scaled sum.
    loss_is_scaled_for_ga = False

    def __init__(self, *, settings: CheckpointSettings, dense_weight: float = 0.0, muon: bool = False, **kwargs: Any):
        self.muon = muon  # asked for while Trainer sets itself up
        self.optimizer: torch.optim.Optimizer | None = None
        super().__init__(**kwargs)
        tokenizer = settings.tokenizer
        self.locations = settings.answer_format.locations
        self.first_location = token_id(tokenizer, "<loc_0>") if self.locations else -1
        self.box_tokens = token_id(tokenizer, BOX_START), token_id(tokenizer, BOX_END)
        self.merge = settings.preprocessing.merge_size
        self.dense_weight = dense_weight
        self._seen_tokens, self._hidden = torch.empty(0), dict[str, torch.Tensor]()
        embed_patches_by_matrix(self.model.get_base_model() if kwargs.get("peft_config") else self.model)
        if dense_weight:
            layers = self.model.model.language_model.layers
            self.model.model.visual.register_forward_hook(self._keep_tokens)
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

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Trainer's own, or Muon."""
        if self.muon and self.optimizer is None:
            groups = parameter_groups(self.model)
            self.optimizer = Muon(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Answer loss plus, while it is there, the dense head's."""
        samples, labels = inputs.pop("samples", None), inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        kept = targets != IGNORED
        loss = answer = self.answer_loss(logits[kept].float(), targets[kept], inputs, kept)
        self._metrics["train"]["answer_loss"].append(answer.item())
        if self.dense_weight:
            loss = loss + self.dense_weight * self._dense_loss(model, inputs, labels, samples)
        return (loss, outputs) if return_outputs else loss

    def answer_loss(
        self, logits: torch.Tensor, targets: torch.Tensor, inputs: dict[str, Any], kept: torch.Tensor
    ) -> torch.Tensor:
        """The loss of (n, vocabulary) logits against n targets, the batch's places that `kept` marks."""
        return answer_loss(logits, targets, self.first_location, self.locations)

    def _dense_loss(
        self, model: Any, inputs: dict[str, Any], labels: torch.Tensor, samples: Sequence[WorldSample]
    ) -> torch.Tensor:
        grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
        targets = dense_targets(grids, self.merge, [seen for sample in samples for seen in sample.seen])
        counts, fates = [len(sample.seen) for sample in samples], [sample.fates for sample in samples]
        changed = fate_targets(grids, self.merge, counts, fates)
        head, is_visual = model.dense_head, inputs["mm_token_type_ids"] == 1
        # Near 0 once the tower has collapsed to one vector, as it did at a learning rate of 1.5e-3.
        spread_now = self._seen_tokens.std(dim=0).mean() / self._seen_tokens.abs().mean()
        losses = {"tower_loss": head.tower_loss(self._seen_tokens, targets), "visual_spread": spread_now.detach()}
        if self.locations:
            rows = model.get_input_embeddings().weight[self.first_location : self.first_location + self.locations]
            losses["place_loss"] = head.place_loss(self._hidden["place"][is_visual], targets, rows)
            losses["first_loss"] = head.first_loss(self._hidden["middle"][is_visual], changed, rows)
        answers, marks = find_pointers(
            inputs["input_ids"],
            labels,
            IGNORED,
            self.box_tokens,
            targets.cells,
            _count_on(samples, [sample.wanted for sample in samples]),
            _count_on(samples, [sample.marked for sample in samples]),
            len(targets.centres),
        )
        losses["pointer_loss"] = head.answer_pointer.loss(self._hidden["answer"], is_visual, answers)
        losses["fate_loss"] = head.fate_loss(self._hidden["middle"][is_visual], changed)
        last = self.guided.q_proj.out_features // self.guided.head_dim - 1
        for name, number, wanted in (("like_loss", 0, changed.likes), ("same_place_loss", last, changed.same_place)):
            looks = find_looks(changed.cells.tolist(), wanted, is_visual)
            losses[name] = attention_loss(self.guided, *self._attention_inputs, inputs["attention_mask"], number, looks)
        losses["mark_loss"] = head.mark_pointer.loss(self._hidden["mark"], is_visual, marks)
        losses["marked_loss"] = head.marked_loss(self._hidden["middle"], marks, targets)
        for name, value in losses.items():
            self._metrics["train"][name].append(value.item())
        del losses["visual_spread"]
        return torch.stack(list(losses.values())).sum()


def embed_patches_by_matrix(model: Any) -> None:
    """Have the vision tower embed patches by a matrix product, which a convolution that never overlaps is.

    The same numbers, but on a CPU the gradient of torch's 3-D convolution took a tenth of a whole training step.
    """
    projection = model.model.visual.patch_embed.proj

    def embed(patches: torch.Tensor) -> torch.Tensor:
        return functional.linear(patches.to(projection.weight.dtype), projection.weight.flatten(1))

    model.model.visual.patch_embed.forward = embed


def answer_loss(logits: torch.Tensor, targets: torch.Tensor, first_location: int, locations: int) -> torch.Tensor:
    """Mean cross-entropy of (n, vocabulary) logits; location targets are spread over their neighbours."""
    place = targets - first_location
    is_location = (place >= 0) & (place < locations)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    if is_location.any():
        soft = spread(place[is_location].float(), locations)
        log_p = torch.log_softmax(logits[is_location], dim=1)[:, first_location : first_location + locations]
        losses = losses.index_put((is_location.nonzero()[:, 0],), -(soft * log_p).sum(dim=1))
    return losses.mean()


def _count_on(samples: Sequence[WorldSample], objects: Sequence[tuple[tuple[int, ...], ...]]) -> list[list[list[int]]]:
    """Each sample's objects, counted over the whole batch."""
    counted, first = [], 0
    for sample, questions in zip(samples, objects, strict=True):
        counted.append([[first + k for k in question] for question in questions])
        first += sum(map(len, sample.seen))
    return counted
