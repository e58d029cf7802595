"""Two optimizers in one: they do what they do alone, and are saved, resumed and scheduled together."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from train.muon import MuonAndAdamW, orthogonal, parameter_groups, stacks


class Net(nn.Module):
    """Two equal matrices, one of another shape, a table, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.up, self.across, self.down = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """A loss."""
        x = self.norm(self.table(ids))
        loss: torch.Tensor = self.down(self.up(x).relu() * self.across(x)).square().sum(dim=1).mean()
        return loss


def both(net: Net) -> MuonAndAdamW:
    return MuonAndAdamW(parameter_groups(net), lr=0.01, weight_decay=0.1)


def run(make: Callable[[Net], list[torch.optim.Optimizer]], steps: int = 5) -> dict[str, torch.Tensor]:
    """Parameters after some steps along gradients that do not depend on the steps before, at a falling rate."""
    torch.manual_seed(0)
    net = Net()
    optimizers = make(net)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
    for _ in range(steps):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("stacked", [1, 1 << 24])
def test_both_halves_are_torch_s_but_for_rounding(monkeypatch: pytest.MonkeyPatch, fast: bool, stacked: int) -> None:
    def torch_s(net: Net) -> list[torch.optim.Optimizer]:
        matrices, others = (group["params"] for group in parameter_groups(net))
        assert [p.shape for p in matrices] == [(24, 16), (24, 16), (16, 24)]
        return [
            torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98)),
        ]

    monkeypatch.setattr("train.muon.bfloat16_pays", lambda: fast)
    monkeypatch.setattr("train.muon.STACKED", stacked)
    ours, theirs = run(lambda net: [both(net)]), run(torch_s)
    for name in theirs:  # 5 steps of up to 0.01, whose singular values bfloat16 moves by a hundredth
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=0)
    # A matrix alone is torch's to the bit, as AdamW's half always is.
    exact = theirs if fast and stacked == 1 else ("table.weight", "up.bias", "norm.weight")
    assert all(torch.equal(ours[name], theirs[name]) for name in exact)
    assert fast or not torch.equal(ours["up.weight"], theirs["up.weight"]), "torch's own was taken"


def test_matrices_of_one_shape_go_together_as_far_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.muon.STACKED", 2 * 24 * 16)
    shapes = [(24, 16), (16, 24), (24, 16), (24, 16), (64, 64)]
    found = stacks([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    assert sorted([tuple(p.shape) for p in stack] for stack in found) == [
        [(16, 24)],
        [(24, 16)],
        [(24, 16), (24, 16)],
        [(64, 64)],
    ]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_what_is_made_orthogonal_has_singular_values_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    group = {"ns_coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7, "ns_steps": 5}
    matrix = torch.randn(shape)
    found = orthogonal(torch.stack([matrix.flip(0), matrix]), group)[1]
    left, values, right = torch.linalg.svd(found, full_matrices=False)
    assert values.min() > 0.5
    assert values.max() < 1.5
    wanted, _, other = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(left @ right, wanted @ other, atol=1e-4, rtol=0)  # the same directions


@pytest.mark.parametrize("fast", [True, False])
def test_its_state_is_saved_and_loaded(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr("train.muon.bfloat16_pays", lambda: fast)
    torch.manual_seed(0)
    net = Net()
    first = both(net)
    net(torch.arange(64)).backward()
    first.step()
    saved, weights = deepcopy(first.state_dict()), {k: v.clone() for k, v in net.state_dict().items()}
    first.step()
    wanted = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(weights)
    second = both(net)
    second.load_state_dict(saved)
    second.param_groups[0]["lr"] = first.param_groups[0]["lr"]
    second.step()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in net.state_dict().items())
