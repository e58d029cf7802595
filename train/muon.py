"""Muon for the matrices of a network and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) makes each momentum matrix nearly orthogonal by five Newton-Schulz steps. Scaled as Liu et al.
(2502.16982) do, its updates are as large as AdamW's, so one learning rate and one weight decay serve both. Trainer
saves, resumes and schedules one optimizer, which is all that is ours here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from train.stage import bfloat16_pays

BETAS = (0.9, 0.98)  # of AdamW's half: what the shipped model was trained with; no source, and nothing else was tried
STACKED = 1 << 24  # elements of matrices that are made orthogonal together: past that they fill a processor each


class StackedMuon(torch.optim.Muon):
    """torch's Muon with matrices of one shape made orthogonal together, and in float32 where bfloat16 does not pay.

    torch goes matrix by matrix, and the shipped model has 88 small ones, which leaves two cores little to share. And it
    computes in bfloat16 on every machine, which a CPU without AVX-512 turns into plain loops.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        loss = None if closure is None else closure()
        dtype = torch.bfloat16 if bfloat16_pays() else torch.float32
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrices in stacks([p for p in group["params"] if p.grad is not None]):
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in matrices]
                gradients = [p.grad for p in matrices if p.grad is not None]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                stack = torch.stack(torch._foreach_lerp(gradients, buffers, momentum)).to(dtype)
                updates = orthogonal(stack, group).to(matrices[0].dtype).unbind()
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                # AdamW's size: "match_rms_adamw"
                torch._foreach_add_(matrices, updates, alpha=-lr * 0.2 * max(matrices[0].shape) ** 0.5)
        return loss


def stacks(matrices: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Matrices of one shape side by side, as many as STACKED elements hold; a larger one is alone."""
    found: list[list[torch.Tensor]] = []
    for _, alike in groupby(sorted(matrices, key=lambda p: p.shape), key=lambda p: p.shape):
        same = list(alike)
        count = max(1, STACKED // same[0].numel())
        found += [same[k : k + count] for k in range(0, len(same), count)]
    return found


def orthogonal(stack: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The nearest matrices to those of (n, rows, columns) whose singular values are about 1, by Newton-Schulz steps as
    the parameter group says.
    """
    a, b, c = group["ns_coefficients"]
    x = stack.mT if stack.shape[1] > stack.shape[2] else stack
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if stack.shape[1] > stack.shape[2] else x


class MuonAndAdamW(torch.optim.Optimizer):
    """Two parameter groups, the first of matrices; both halves keep their state here."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float) -> None:
        matrices, others = ([group] for group in groups)  # either may have none
        self.halves: tuple[torch.optim.Optimizer, ...] = (
            StackedMuon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
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
