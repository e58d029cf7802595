"""A layer's GPTQ codes -> the signed grid that the standard's DequantizeLinear reads; nothing is rounded.

A grid is (in, out), the layout that TensorRT's weight-only products and NVIDIA's own exporters have. Codes of 2 and 3
bits become 4-bit ones. TensorRT dequantises inside a product 4-bit codes in groups and 8-bit codes with a scale an
output; all others it would write out as floats at every step (docs/devices.md), so that 4-bit codes with a scale an
output become several groups of that one scale, and 8-bit groups are refused. Knows neither graphs nor files.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from export.gptq_blocks import input_order
from gemvg_edge.errors import GemvgError
from quantize.gptq_format import QuantizedLinear

GROUPS = (128, 64, 32, 16)  # of inputs, the largest first


class Grid(NamedTuple):
    """A weight is code * scale of its block."""

    codes: npt.NDArray[np.int8]  # (in, out), also for 4 bits
    scales: npt.NDArray[np.float16]  # (in / block_size, out); (out) where all inputs share one
    order: npt.NDArray[np.int64] | None  # (in): which input each row stands for, where groups are no runs
    bits: int  # 4 or 8
    block_size: int  # 0 where all inputs share a scale


def to_grid(linear: QuantizedLinear, name: str) -> Grid:
    """The layout of one layer; GemvgError, with its name, for zero-points, uneven groups, and groups of 8-bit codes."""
    if not linear.symmetric:
        raise GemvgError(
            f"{name} has zero-points, which TensorRT does not take; quantise the float checkpoint with --sym"
        )
    order, size = input_order(linear, name)
    codes = (linear.codes if order is None else linear.codes[:, order]).astype(np.int16) - 2 ** (linear.bits - 1)
    bits, scales = max(4, linear.bits), linear.scales
    one = len(scales) == 1
    if one and bits == 4 and (group := next((group for group in GROUPS if size > group and size % group == 0), 0)):
        one, scales, size = False, np.repeat(scales, size // group, axis=0), group
    if one == (bits == 4):
        how = f"groups of {size} of 8 bits" if bits == 8 else f"4 bits with one scale for {size} inputs"
        raise GemvgError(
            f"{name} is stored in {how}, which TensorRT writes out as floats at every step; quantise it to 4 bits in "
            "groups of 32, 64 or 128, or to 8 bits with one scale an output (--group-size -1)"
        )
    codes = np.ascontiguousarray(codes.T.astype(np.int8))
    return Grid(codes, scales[0] if one else scales, order, bits, 0 if one else size)
