"""Round to nearest: a weight matrix -> 4- or 8-bit blocks along its inputs, in ONNX Runtime's MatMulNBits layout.

The plain way to quantise: no calibration data, each row for itself, so a large matrix can be given in chunks of rows.
`dequantize` is its twin, used in tests. Knows neither graphs nor checkpoints; numpy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK_SIZES = (16, 32, 64, 128)


class QuantizedRows(NamedTuple):
    """Symmetric blocks: a weight is (code - 2^(bits-1)) * scale of its block."""

    packed: npt.NDArray[np.uint8]  # (out, blocks, block_size * bits / 8), low half of a byte first
    scales: npt.NDArray[np.float32]  # (out, blocks)


def quantize(weight: npt.NDArray[np.float32], bits: int, block_size: int) -> QuantizedRows:
    """Weight (out, in) -> blocks; `in` is padded with zeros to a whole number of blocks."""
    if bits not in (4, 8) or block_size not in BLOCK_SIZES:
        raise ValueError(f"bits={bits}, block_size={block_size}; use 4 or 8 bits and a block of {BLOCK_SIZES}")
    outputs, inputs = weight.shape
    blocks = -(-inputs // block_size)
    if padding := blocks * block_size - inputs:
        weight = np.pad(weight, ((0, 0), (0, padding)))
    values = weight.reshape(outputs, blocks, block_size)
    # The scale's sign sends the extreme to the lowest code, so that all 2^bits codes are in use (-8..7, not -7..7).
    largest, smallest = values.max(axis=2), values.min(axis=2)
    extreme = np.where(largest > -smallest, largest, smallest)  # (out, blocks)
    zero_point = 2 ** (bits - 1)
    scales = (extreme / np.float32(-zero_point)).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = values * inverse[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, -zero_point, zero_point - 1, out=codes)
    codes += zero_point
    return QuantizedRows(pack_codes(codes.astype(np.uint8), bits), scales)


def dequantize(rows: QuantizedRows, inputs: int, bits: int) -> npt.NDArray[np.float32]:
    """The weight (out, inputs) that the blocks stand for."""
    codes = rows.packed
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)  # (out, blocks, block_size)
    weight = (codes.astype(np.float32) - 2 ** (bits - 1)) * rows.scales[:, :, None]
    return np.ascontiguousarray(weight.reshape(len(weight), -1)[:, :inputs])


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes (out, blocks, block_size) -> bytes, two 4-bit codes in each, the low half first."""
    if bits == 8:
        return codes
    return np.bitwise_or(codes[:, :, 0::2], np.left_shift(codes[:, :, 1::2], 4), dtype=np.uint8)
