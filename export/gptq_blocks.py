"""A layer's GPTQ codes -> the blocks that MatMulNBits reads; the same numbers in another layout, nothing is rounded.

Its blocks are runs of 16, 32, 64 or 128 inputs at 4 or 8 bits. Larger groups become several blocks of one scale; codes
of 2 and 3 bits become 4-bit codes around the same zero. Knows neither graphs nor files.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemvg_edge.errors import GemvgError
from quantize.gptq_format import QuantizedLinear
from quantize.rtn import BLOCK_SIZES, pack_codes

WHOLE_ROW = 32  # the block where all inputs share a scale: any size would do, this one rounds activations finest


class Blocks(NamedTuple):
    """A weight is (code - zero) * scale of its block."""

    packed: npt.NDArray[np.uint8]  # (out, blocks, block_size * bits / 8), low half of a byte first
    scales: npt.NDArray[np.float32]  # (out, blocks)
    zeros: npt.NDArray[np.uint8] | None  # (out, blocks * bits / 8 rounded up), None where all are the middle code
    order: npt.NDArray[np.int64] | None  # (in): which input each column stands for, where groups are no runs
    bits: int
    block_size: int


def to_blocks(linear: QuantizedLinear, name: str) -> Blocks:
    """The layout of one layer; GemvgError, with its name, where its groups are no runs of whole blocks."""
    bits = max(4, linear.bits)
    shift = 2 ** (bits - 1) - 2 ** (linear.bits - 1)
    order, size = input_order(linear, name)
    groups = len(linear.scales)
    block = WHOLE_ROW if groups == 1 else max((b for b in BLOCK_SIZES if size % b == 0), default=0)
    if not block:
        raise GemvgError(
            f"{name} is stored in groups of {size}, which has no kernel; quantise with groups of 32, 64 or 128"
        )
    outputs, inputs = linear.codes.shape
    blocks = -(-inputs // block)
    group = np.minimum(np.arange(blocks) * block // size, groups - 1)  # of each block
    zeros = (linear.zeros + np.uint8(shift)).T[:, group]  # (out, blocks)
    codes = np.full((outputs, blocks * block), 2 ** (bits - 1), np.uint8)
    codes[:, :inputs] = (linear.codes if order is None else linear.codes[:, order]) + np.uint8(shift)
    return Blocks(
        pack_codes(codes.reshape(outputs, blocks, block), bits),
        linear.scales.astype(np.float32).T[:, group],
        None if linear.symmetric else _pack_zeros(zeros, bits),
        order,
        bits,
        block,
    )


def input_order(linear: QuantizedLinear, name: str) -> tuple[npt.NDArray[np.int64] | None, int]:
    """(the order of inputs in which groups are runs, None where they are already; inputs in a group)."""
    if linear.group_size:
        return None, linear.group_size
    counts = np.bincount(linear.groups, minlength=len(linear.scales))
    if counts.min() != counts.max():
        raise GemvgError(f"{name} has groups of {counts.min()} to {counts.max()} inputs; quantise with even ones")
    return np.argsort(linear.groups, kind="stable"), int(counts[0])


def _pack_zeros(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return zeros
    padded = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return np.asarray(pack_codes(padded[:, None], 4)[:, 0])
