"""GPTQ (Frantar et al., arXiv 2210.17323): round a weight column by column and let later columns make up for the error.

`Factor` is what the inputs of a layer say, made once for all layers that share them; `solve` rounds a weight by it, and
`round_to_nearest` is the plain baseline that needs no inputs. Rows (outputs) do not depend on each other, so a large
weight may come in pieces. Three choices are not the paper's: in `grouped` order the most important group comes first
and its columns by importance, so that groups stay runs of inputs and every kernel reads the result (GPTQModel's GAR);
a symmetric scale has the sign that gives its extreme the lowest code, so that all 2^bits codes are in use; and the
clipping of a group is searched, by what its errors will cost. Knows neither networks nor files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from gemvg_edge.errors import GemvgError
from quantize.gptq_format import QuantizedLinear

Order = Literal["none", "grouped", "desc_act"]  # as they lie; group by group; by importance, and grouped so
BLOCK = 128  # columns whose errors are gathered before they reach the rest of the weight
ROWS = 16384  # outputs solved at once: a head of 150,000 outputs needs no second copy
SHRINKS = tuple(1 - step / 40 for step in range(17))  # a group's range times 1 .. 0.6
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take: bits, inputs that share a scale (-1: all), whether zero is the middle one."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    positive: bool = False  # no symmetric scale below zero, which TensorRT refuses

    def size(self, inputs: int) -> int:
        """How many of so many inputs share a scale."""
        return inputs if self.group_size == -1 else self.group_size


class Factor(NamedTuple):
    """What solving needs of a layer's inputs."""

    upper: torch.Tensor  # (in, in): upper Cholesky factor of the inverse Hessian, in the order of `order`
    order: torch.Tensor  # (in): which column is taken when
    cost: torch.Tensor  # (in), in that order: what a column's squared error costs, those before it being rounded
    regroup: bool  # groups are runs of `order`, not of the inputs


def factor(hessian: torch.Tensor, order: Order, size: int, damping: float = 0.01) -> Factor:
    """Hessian X^T X (in, in) float32 -> Factor for groups of `size`; the Hessian is overwritten.

    GemvgError if it cannot be inverted.
    """
    if not hessian.isfinite().all():
        raise GemvgError("its Hessian holds NaN or infinite numbers: the layer's inputs are broken")
    importance = hessian.diagonal().clone()
    columns = torch.arange(len(hessian), device=hessian.device)
    if order != "none":
        columns = importance.argsort(descending=True, stable=True)
        if order == "grouped":
            first = importance.view(-1, size).mean(dim=1).argsort(descending=True, stable=True).argsort(stable=True)
            columns = columns[first[columns // size].argsort(stable=True)]
        hessian = hessian[columns][:, columns]
    diagonal = hessian.diagonal()
    # An input that calibration never saw is rounded to nearest: it neither takes part in others' errors nor gives any.
    diagonal[diagonal == 0] = max(float(importance.mean()), 1e-30)
    mean = float(diagonal.mean())
    for strength in (damping, 10 * damping, 100 * damping):
        diagonal += strength * mean
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            torch.cholesky_inverse(lower, out=hessian)
            upper, failed = torch.linalg.cholesky_ex(hessian, upper=True)
            if not failed:
                return Factor(upper, columns, upper.diagonal() ** -2.0, order == "desc_act")
            break
    raise GemvgError("its Hessian cannot be inverted; raise --damping or give more --samples")


def solve(weight: torch.Tensor, known: Factor, grid: Grid, search: bool = True) -> QuantizedLinear:
    """A weight (out, in) rounded by GPTQ."""
    pieces = [_solve_rows(rows, known, grid, search) for rows in torch.split(_checked(weight), ROWS)]
    return _finish(pieces, _group_index(known, grid), grid)


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> QuantizedLinear:
    """A weight (out, in) rounded number by number."""
    pieces, size = [], grid.size(weight.shape[1])
    for rows in torch.split(_checked(weight), ROWS):
        columns = rows.float().T.reshape(-1, size, len(rows))  # (groups, size, out)
        scale, zero = _fit(columns, None, grid)
        pieces.append((_codes(columns, scale, zero, grid).reshape(-1, len(rows)), scale, zero))
    return _finish(pieces, torch.arange(weight.shape[1]) // size, grid)


def _solve_rows(
    weight: torch.Tensor, known: Factor, grid: Grid, search: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (in, out) as the inputs lie, scales and zeros (groups, out)."""
    inputs, size = weight.shape[1], grid.size(weight.shape[1])
    left = weight.float().T[known.order].contiguous()  # (in, out): what is still to be rounded
    scales = left.new_empty(inputs // size, left.shape[1])
    zeros, codes = torch.empty_like(scales), torch.empty_like(left, dtype=torch.uint8)
    block = size if size % BLOCK and BLOCK % size else BLOCK  # no group begins within a block and ends beyond it
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        here, upper = left[start:stop], known.upper[start:stop, start:stop]
        errors = torch.empty_like(here)
        for k, column in enumerate(range(start, stop)):
            if column % size == 0:
                group = column // size if known.regroup else int(known.order[column]) // size
                cost = known.cost[None, column : column + size] if search else None
                scale, zero = _fit(left[None, column : column + size], cost, grid)
                scales[group], zeros[group] = scale[0], zero[0]
            codes[column] = _codes(here[k], scales[group], zeros[group], grid)
            errors[k] = (here[k] - (codes[column] - zeros[group]) * scales[group]) / upper[k, k]
            here[k + 1 :].addr_(upper[k, k + 1 :], errors[k], alpha=-1)
        left[stop:].addmm_(known.upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(codes)
    back[known.order] = codes
    return back, scales, zeros


def _fit(columns: torch.Tensor, weights: torch.Tensor | None, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point (groups, out) of columns (groups, size, out).

    With weights (groups, size), the clipping of least weighted squared error; without, none.
    """
    scale, zero = _span(columns, grid, 1.0)
    if weights is None:
        return scale, zero
    best = torch.full_like(scale, torch.inf)
    for shrink in SHRINKS:
        tried, middle = _span(columns, grid, shrink)
        codes = _codes(columns, tried, middle, grid)
        wrong = (codes - middle[:, None]).mul_(tried[:, None]).sub_(columns).square_()
        error = torch.einsum("gs,gso->go", weights, wrong)
        better = error < best
        best, scale, zero = (torch.where(better, *pair) for pair in ((error, best), (tried, scale), (middle, zero)))
    return scale, zero


def _span(columns: torch.Tensor, grid: Grid, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point (groups, out) that cover the columns' range times `shrink`."""
    low, high = columns.amin(dim=1), columns.amax(dim=1)
    middle = 2 ** (grid.bits - 1)
    if grid.symmetric:
        if grid.positive:
            scale = torch.maximum(high / (middle - 1), low / -middle) * shrink
        else:
            scale = torch.where(high > -low, high, low) * (shrink / -middle)
        zero = torch.full_like(scale, middle)
    else:
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = (high - low) / (2**grid.bits - 1)
        zero = torch.zeros_like(scale)
    scale = scale.half().float()  # as it is stored
    scale[scale == 0] = 1
    if not grid.symmetric:
        zero = (-low / scale).round_().clamp_(0, 2**grid.bits - 1)
    return scale, zero


def _codes(columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of columns (.., size, out) or of one (out)."""
    if columns.dim() > 1:
        scale, zero = scale[:, None], zero[:, None]
    return (columns / scale).add_(zero).round_().clamp_(0, 2**grid.bits - 1)


def _finish(
    pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], groups: torch.Tensor, grid: Grid
) -> QuantizedLinear:
    codes, scales, zeros = (torch.cat([piece[k] for piece in pieces], dim=1).cpu() for k in range(3))
    return QuantizedLinear(
        codes.to(torch.uint8).T.contiguous().numpy(),
        scales.half().numpy(),
        zeros.to(torch.uint8).numpy(),
        groups.to(torch.int32).cpu().numpy(),
        grid.bits,
    )


def _group_index(known: Factor, grid: Grid) -> torch.Tensor:
    places = torch.arange(len(known.order), device=known.order.device)
    if known.regroup:
        places = known.order.argsort()
    return places // grid.size(len(places))


def _checked(weight: torch.Tensor) -> torch.Tensor:
    largest = float(weight.detach().abs().max())
    if not largest < FLOAT16_MAX:
        raise GemvgError(f"its weights reach {largest}, more than a float16 scale can hold; the checkpoint is broken")
    return weight.detach()
