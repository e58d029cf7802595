"""torch's Muon for the matrices of a network and its AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) makes each momentum matrix nearly orthogonal by five Newton-Schulz steps. Scaled as Liu et al.
(2502.16982) do, its updates are as large as AdamW's, so one learning rate and one weight decay serve both. Trainer
saves, resumes and schedules one optimizer, which is all that is ours here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.98)  # of AdamW's half: what the shipped model was trained with; no source, and nothing else was tried


class MuonAndAdamW(torch.optim.Optimizer):
    """Two parameter groups, the first of matrices; both halves keep their state here."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float) -> None:
        matrices, others = ([group] for group in groups)  # either may have none
        self.halves: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=BETAS),
        )
        super().__init__([half.param_groups[0] for half in self.halves], {})
        self._share()

    def _share(self) -> None:
        """Have the halves work on this optimizer's groups and state, which it saves and a scheduler changes."""
        for half, group in zip(self.halves, self.param_groups, strict=True):
            half.param_groups, half.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for half in self.halves:
            half.step()
        return loss


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices inside layers for Muon; embeddings, heads, convolutions, norms and biases for AdamW."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = p.ndim == 2 and id(p) not in tables and "lm_head" not in name and "dense_head" not in name
            (matrices if inside else others).append(p)
    return [{"params": matrices}, {"params": others}]
