"""Muon for the matrices of a network and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) makes each momentum matrix nearly orthogonal by five Newton-Schulz steps. Scaled as Liu et al.
(2502.16982) do, its updates are as large as AdamW's, so one learning rate and one weight decay serve both. Trainer
saves, resumes and schedules one optimizer, which is all that is ours here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from train.stage import bfloat16_pays

BETAS = (0.9, 0.98)  # of AdamW's half: what the shipped model was trained with; no source, and nothing else was tried


class Float32Muon(torch.optim.Muon):
    """torch's Muon with its products in float32. torch computes them in bfloat16 on every machine, which a CPU without
    AVX-512 turns into plain loops: there a step of the shipped model takes seconds.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(buffer, momentum), group)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)  # AdamW's size: "match_rms_adamw"
        return loss


def orthogonal(matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The nearest matrix whose singular values are about 1, by Newton-Schulz steps as the parameter group says."""
    a, b, c = group["ns_coefficients"]
    x = matrix.mT if len(matrix) > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if len(matrix) > matrix.shape[1] else x


class MuonAndAdamW(torch.optim.Optimizer):
    """Two parameter groups, the first of matrices; both halves keep their state here."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float) -> None:
        matrices, others = ([group] for group in groups)  # either may have none
        muon = torch.optim.Muon if bfloat16_pays() else Float32Muon  # their states are alike
        self.halves: tuple[torch.optim.Optimizer, ...] = (
            muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
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
