"""A layer's GPTQ codes -> the signed grid that the standard's DequantizeLinear reads; nothing is rounded.

A grid is (in, out), the layout that TensorRT's weight-only products and NVIDIA's own exporters have. Codes of 2 and 3
bits become 4-bit ones. Knows neither graphs nor files.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from export.gptq_blocks import input_order
from gemvg_edge.errors import GemvgError
from quantize.gptq_format import QuantizedLinear


class Grid(NamedTuple):
    """A weight is code * scale of its block."""

    codes: npt.NDArray[np.int8]  # (in, out), also for 4 bits
    scales: npt.NDArray[np.float16]  # (in / block_size, out); (out) where all inputs share one
    order: npt.NDArray[np.int64] | None  # (in): which input each row stands for, where groups are no runs
    bits: int  # 4 or 8
    block_size: int  # 0 where all inputs share a scale


def to_grid(linear: QuantizedLinear, name: str) -> Grid:
    """The layout of one layer; GemvgError, with its name, where it has zero-points or uneven groups."""
    if not linear.symmetric:
        raise GemvgError(f"{name} has zero-points, which TensorRT does not take; quantise with --sym")
    order, size = input_order(linear, name)
    codes = (linear.codes if order is None else linear.codes[:, order]).astype(np.int16) - 2 ** (linear.bits - 1)
    one = len(linear.scales) == 1
    return Grid(
        np.ascontiguousarray(codes.T.astype(np.int8)),
        linear.scales[0] if one else linear.scales,
        order,
        max(4, linear.bits),
        0 if one else size,
    )
