"""GPTQ's solver against a plain, unblocked reference, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemvg_edge.errors import GemvgError
from quantize import solver
from quantize.gptq_format import QuantizedLinear, dequantize
from quantize.solver import Grid, Order, factor, round_to_nearest, solve

ORDERS: tuple[Order, ...] = ("none", "grouped", "desc_act")
GRIDS = [Grid(bits, group, sym) for bits in (3, 4, 8) for group in (32, 64, 128, -1) for sym in (True, False)]


def problem(outputs: int, inputs: int, tokens: int = 1000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (outputs, inputs) and the Hessian of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)[:, None]
    x = torch.randn(tokens, inputs, generator=generator) @ mix * (0.1 + 3 * torch.rand(inputs, generator=generator))
    return torch.randn(outputs, inputs, generator=generator) / inputs**0.5, x.T @ x


def output_error(weight: torch.Tensor, found: QuantizedLinear | torch.Tensor, hessian: torch.Tensor) -> float:
    """|X W^T - X Q^T|^2."""
    rounded = found if isinstance(found, torch.Tensor) else torch.from_numpy(dequantize(found))
    difference = (weight - rounded).double()
    return float(((difference @ hessian.double()) * difference).sum())


def reference(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, order: Order) -> torch.Tensor:
    """Optimal brain quantisation column by column in float64: the inverse Hessian is updated, nothing is blocked."""
    inputs = weight.shape[1]
    size = inputs if grid.group_size == -1 else grid.group_size
    importance, columns = hessian.diagonal().tolist(), list(range(inputs))
    if order == "desc_act":
        columns.sort(key=lambda k: -importance[k])
    if order == "grouped":
        columns.sort(key=lambda k: (-sum(importance[k // size * size :][:size]), -importance[k]))
    inverse = hessian.double()
    inverse = torch.linalg.inv(inverse + 0.01 * inverse.diagonal().mean() * torch.eye(inputs, dtype=torch.float64))
    left, rounded = weight.double(), torch.empty_like(weight).double()
    for place, column in enumerate(columns):
        if place % size == 0:
            scale, zero = plain_scale(left[:, columns[place : place + size]], grid)
        codes = ((left[:, column] / scale).round() + zero).clamp(0, 2**grid.bits - 1)
        rounded[:, column] = (codes - zero) * scale
        error = (left[:, column] - rounded[:, column]) / inverse[column, column]
        left = left - torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # done: no longer part of anything
    return rounded.float()


def plain_scale(values: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = values.amin(dim=1), values.amax(dim=1)
    if grid.symmetric:
        middle = 2 ** (grid.bits - 1)
        return (torch.where(high > -low, high, low) / -middle).half().double(), torch.full_like(low, middle)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**grid.bits - 1)).half().double()
    return scale, (-low / scale).round().clamp(0, 2**grid.bits - 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_as_good_as_the_plain_reference_and_better_than_rounding(grid: Grid, order: Order) -> None:
    weight, hessian = problem(96, 256)
    plain = output_error(weight, reference(weight, hessian, grid, order), hessian)
    ours = output_error(
        weight, solve(weight, factor(hessian.clone(), order, grid.size(256)), grid, search=False), hessian
    )
    assert ours <= 1.02 * plain
    searched = output_error(weight, solve(weight, factor(hessian.clone(), order, grid.size(256)), grid), hessian)
    assert searched <= 1.02 * plain
    assert searched < 0.6 * output_error(weight, round_to_nearest(weight, grid), hessian)


# The positive grid has one code less for the extreme: at most 2^(bits-1) / (2^(bits-1) - 1) of the signed grid's step.
@pytest.mark.parametrize(("bits", "factor_of_signed"), [(3, (4 / 3) ** 2), (4, (8 / 7) ** 2), (8, (128 / 127) ** 2)])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_positive_scales_cost_little(bits: int, factor_of_signed: float, group: int) -> None:
    weight, hessian = problem(96, 256)
    signed, positive = Grid(bits, group), Grid(bits, group, positive=True)
    solved, rounded = {}, {}
    for grid in (signed, positive):
        solved[grid] = solve(weight, factor(hessian.clone(), "grouped", grid.size(256)), grid)
        rounded[grid] = round_to_nearest(weight, grid)
    for found in (solved, rounded):
        assert (found[signed].scales < 0).any(), "the sign is what the positive grid does without"
        assert (found[positive].scales > 0).all()
        assert found[positive].symmetric
        errors = {grid: output_error(weight, found[grid], hessian) for grid in found}
        assert errors[positive] <= 1.05 * factor_of_signed * errors[signed]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_positive_grid_is_a_round_trip(bits: int) -> None:
    """Numbers on the grid come back, the lowest code's and the highest's too; of zeros the scale is above zero."""
    middle = 2 ** (bits - 1)
    codes = torch.arange(32 * 8).reshape(8, 32) % (2 * middle) - middle
    codes[:, 0], codes[:, 1] = -middle, middle - 1
    codes[-1] = 0
    weight = codes * torch.tensor([2.0**-k for k in range(8)])[:, None]
    found = round_to_nearest(weight, Grid(bits, -1, positive=True))
    assert np.array_equal(dequantize(found), weight.numpy())
    assert np.array_equal(found.codes.astype(int) - middle, codes.numpy())
    assert (found.scales > 0).all()


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, -1, False), Grid(8, 64)], ids=str)
def test_every_code_is_the_nearest_or_made_up_for(grid: Grid) -> None:
    weight, hessian = problem(16, 128)
    found = solve(weight, factor(hessian, "grouped", grid.size(128)), grid)
    assert found.codes.max() < 2**grid.bits
    assert np.isfinite(dequantize(found)).all()
    assert found.symmetric == grid.symmetric
    assert found.group_size == (128 if grid.group_size == -1 else grid.group_size)


def test_uncorrelated_inputs_need_no_making_up() -> None:
    """With a diagonal Hessian GPTQ is rounding to nearest."""
    weight, _ = problem(16, 64)
    grid = Grid(4, 32)
    found = solve(weight, factor(torch.eye(64), "grouped", 32), grid, search=False)
    assert np.array_equal(found.codes, round_to_nearest(weight, grid).codes)


def test_large_weights_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(40, 64)
    known = factor(hessian, "grouped", 32)
    whole = solve(weight, known, Grid(4, 32))
    monkeypatch.setattr(solver, "ROWS", 16)
    pieces = solve(weight, known, Grid(4, 32))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_an_input_never_seen_is_rounded_to_nearest(order: Order) -> None:
    weight, hessian = problem(16, 64)
    hessian[5] = hessian[:, 5] = 0
    grid = Grid(8, -1)
    found = dequantize(solve(weight, factor(hessian, order, 64), grid, search=False))
    step = np.abs(weight.numpy()).max(axis=1) / 128
    assert (np.abs(found[:, 5] - weight[:, 5].numpy()) <= 0.51 * step).all()


def test_rank_deficient_inputs_are_solved() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight, _ = problem(16, 64)
    found = solve(weight, factor(x.T @ x, "grouped", 32), Grid(4, 32))
    assert np.isfinite(dequantize(found)).all()


def test_zero_weights_stay_zero() -> None:
    found = solve(torch.zeros(16, 64), factor(problem(16, 64)[1], "grouped", 32), Grid(4, 32))
    assert not dequantize(found).any()


def test_nan_is_told() -> None:
    hessian = torch.eye(8)
    hessian[1, 2] = torch.nan
    with pytest.raises(GemvgError, match="Hessian holds NaN or infinite numbers"):
        factor(hessian, "none", 8)


def test_what_cannot_be_inverted_is_told() -> None:
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1e6  # not positive, whatever the damping
    with pytest.raises(GemvgError, match="cannot be inverted; raise --damping"):
        factor(hessian, "none", 8)


@pytest.mark.parametrize("broken", [float("inf"), float("nan"), 1e6])
def test_weights_beyond_float16_are_told(broken: float) -> None:
    weight = torch.ones(8, 32)
    weight[2, 3] = broken
    with pytest.raises(GemvgError, match="more than a float16 scale can hold"):
        round_to_nearest(weight, Grid(4, 32))
