"""TRL's SFTTrainer with our batches: the loss on answers, and whatever losses a stage adds to it.

Coordinates written as location tokens are learned with soft targets, so that a near miss costs less than a far one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from trl import SFTTrainer

from gemvg_edge.prompt import token_id
from train.checkpoint import CheckpointSettings
from train.collate import IGNORED
from train.losses import answer_loss
from train.muon import MuonAndAdamW, parameter_groups
from train.stage import load_weights

# (model, inputs, labels, samples) of a batch that the model has just seen -> further losses by name.
SideLosses = Callable[[Any, dict[str, Any], torch.Tensor, Any], dict[str, torch.Tensor]]


class GroundingTrainer(SFTTrainer):  # type: ignore[misc]  # transformers is not followed by mypy
    """SFTTrainer over batches of train.collate; `muon` chooses the optimizer."""

    # Ours is a mean over a batch; Trainer, seeing that the model takes any argument, would take it for a scaled sum.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        settings: CheckpointSettings,
        side_losses: SideLosses | None = None,
        side_weight: float = 0.0,
        muon: bool = False,
        **kwargs: Any,
    ):
        self.muon = muon  # asked for while Trainer sets itself up
        self.optimizer: torch.optim.Optimizer | None = None
        super().__init__(**kwargs)
        tokenizer = settings.tokenizer
        self.locations = settings.answer_format.locations
        self.first_location = token_id(tokenizer, "<loc_0>") if self.locations else -1
        self.side_losses, self.side_weight = side_losses, side_weight
        embed_patches_by_matrix(self.model.get_base_model() if kwargs.get("peft_config") else self.model)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Trainer's own, or Muon."""
        if self.muon and self.optimizer is None:
            groups = parameter_groups(self.model)
            self.optimizer = MuonAndAdamW(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
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
        """The answers' loss plus those that the stage adds."""
        samples, labels, weights = (inputs.pop(name, None) for name in ("samples", "labels", "loss_weights"))
        targets = labels[:, 1:]
        kept = targets != IGNORED  # (batch, tokens - 1)
        # The head sees only these places of the rows: over whole rows its logits were the largest tensor of a step.
        places = kept.any(dim=0).nonzero()[:, 0]
        outputs = model(**inputs, use_cache=False, logits_to_keep=places)
        logits = outputs.logits[kept[:, places]].float()  # (answer tokens, vocabulary)
        loss = answer = self.answer_loss(logits, targets[kept], weights[:, 1:][kept], inputs, kept)
        side = self.side_losses(model, inputs, labels, samples) if self.side_losses else {}
        if side:
            loss = loss + self.side_weight * torch.stack(list(side.values())).sum()
        for name, value in {"answer_loss": answer, **side}.items():
            self._metrics["train"][name].append(value.item())
        return (loss, outputs) if return_outputs else loss

    def answer_loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        inputs: dict[str, Any],
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of (n, vocabulary) logits against n targets of n weights, the batch's places that `kept` marks."""
        return answer_loss(logits, targets, weights, self.first_location, self.locations)


def embed_patches_by_matrix(model: Any) -> None:
    """Have the vision tower embed patches by a matrix product, which a convolution that never overlaps is.

    The same numbers, but on a CPU the gradient of torch's 3-D convolution took a tenth of a whole training step.
    """
    projection = model.model.visual.patch_embed.proj

    def embed(patches: torch.Tensor) -> torch.Tensor:
        return functional.linear(patches.to(projection.weight.dtype), projection.weight.flatten(1))

    model.model.visual.patch_embed.forward = embed
