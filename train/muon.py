"""Muon for the matrices of a network, AdamW for everything else, as one optimizer that Trainer can save and resume.

Muon (Jordan et al. 2024) makes each momentum matrix nearly orthogonal by five Newton-Schulz steps. Scaled as Liu et al.
(2502.16982) do, its updates are as large as AdamW's, so one learning rate and one weight decay serve both. torch has a
Muon too (the tests hold ours against it); ours takes equal matrices of all layers in one batch, which on a CPU matters,
and keeps both halves in one state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from train.stage import bfloat16_pays

COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Parameter groups with `muon` true hold matrices; the others take AdamW's update."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if group["muon"]:
                self._step_matrices(parameters, group)
            else:
                for p in parameters:
                    self._step_adam(p, group)
        return loss

    def _step_matrices(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for p in parameters:
            alike[p.shape].append(p)
        for (rows, columns), same in alike.items():
            directions = []
            for p in same:
                gradient = _gradient(p)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(gradient, 1 - group["momentum"])
                directions.append(torch.lerp(gradient, momentum, group["momentum"]))  # Nesterov's look ahead
            updates = orthogonalise(torch.stack(directions))
            size = 0.2 * max(rows, columns) ** 0.5
            for p, update in zip(same, updates, strict=True):
                p.sub_(update, alpha=group["lr"] * size)

    def _step_adam(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        state["step"] += 1
        gradient = _gradient(p)
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = float(state["step"])
        denominator = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        p.addcdiv_(state["mean"], denominator, value=-group["lr"] / (1 - beta1**step))


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with equal singular values, roughly; (n, rows, columns) in and out.

    Computed in bfloat16, as its authors do, where the machine is faster in it.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16 if bfloat16_pays() else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: torch.Tensor = (x.mT if tall else x).to(matrices.dtype)
    return result


def _gradient(p: torch.Tensor) -> torch.Tensor:
    if p.grad is None:
        raise ValueError("a parameter without a gradient was asked to step")
    return p.grad


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices inside layers for Muon; embeddings, heads, convolutions, norms and biases for AdamW."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = p.ndim == 2 and id(p) not in tables and "lm_head" not in name and "dense_head" not in name
            (matrices if inside else others).append(p)
    return [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
