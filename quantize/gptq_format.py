"""The GPTQ file format: four tensors in place of a linear layer's weight, as AutoGPTQ began it and GPTQModel writes it.

    qweight (in * bits / 32, out) int32: codes in a little-endian stream of bits along the inputs
    qzeros (groups, out * bits / 32) int32: zero-points in such a stream along the outputs
    scales (groups, out) float16, g_idx (in) int32: the group of each input

A weight is (code - zero) * scale of its group. In version 1 (`checkpoint_format: "gptq"`) qzeros holds zero - 1,
subtracted from whole words as GPTQModel does it, so that a zero of 0 borrows from its neighbour (3-bit codes, which
cross words, each for itself); in version 2 (`"gptq_v2"`) zero itself. Bits and groups are read from the shapes, so
per-module overrides need no rules. numpy only; knows neither networks nor solvers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import JsonObject, short

BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSION_1, VERSION_2 = "gptq", "gptq_v2"
WORD = 32
USUAL_GROUP = 128  # transformers' GPTQConfig, where a file does not say

Array = npt.NDArray[Any]


class QuantizedLinear(NamedTuple):
    """A quantised weight (out, in), unpacked."""

    codes: npt.NDArray[np.uint8]  # (out, in), 0 .. 2^bits - 1
    scales: npt.NDArray[np.float16]  # (groups, out)
    zeros: npt.NDArray[np.uint8]  # (groups, out)
    groups: npt.NDArray[np.int32]  # (in): the group of each input
    bits: int

    @property
    def group_size(self) -> int | None:
        """How many inputs in a row share a scale; None where groups are not runs (activation order)."""
        inputs, count = len(self.groups), len(self.scales)
        size = inputs // count
        return size if np.array_equal(self.groups, np.arange(inputs) // max(1, size)) else None

    @property
    def symmetric(self) -> bool:
        """Whether every zero-point is the middle code."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())


def dequantize(linear: QuantizedLinear) -> npt.NDArray[np.float32]:
    """The weight (out, in) that the codes stand for."""
    scales, zeros = linear.scales.astype(np.float32).T, linear.zeros.astype(np.float32).T  # (out, groups)
    weight = linear.codes.astype(np.float32)
    weight -= zeros[:, linear.groups]
    weight *= scales[:, linear.groups]
    return weight


def pack(linear: QuantizedLinear, version: str = VERSION_1) -> dict[str, Array]:
    """The four tensors. The inputs and the outputs must fill whole words."""
    outputs, inputs = linear.codes.shape
    for count, what in ((inputs, "inputs"), (outputs, "outputs")):
        if count * linear.bits % WORD:
            raise GemvgError(f"{count} {what} of {linear.bits} bits do not fill whole {WORD}-bit words of a GPTQ file")
    zeros = _pack_rows(linear.zeros.T, linear.bits)
    if version == VERSION_1:
        zeros = _shift_zeros(zeros, linear.bits, -1)
    return {
        "qweight": _pack_rows(linear.codes.T, linear.bits),
        "qzeros": np.ascontiguousarray(zeros.T),
        "scales": np.ascontiguousarray(linear.scales, np.float16),
        "g_idx": np.ascontiguousarray(linear.groups, np.int32),
    }


def unpack(tensors: Mapping[str, Array], version: str = VERSION_1) -> QuantizedLinear:
    """The reverse of `pack`, for files of any writer; ValueError says what does not fit."""
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    if not qweight.ndim == qzeros.ndim == scales.ndim == 2:
        raise ValueError(f"qweight, qzeros and scales have {qweight.ndim}, {qzeros.ndim} and {scales.ndim} dimensions")
    for name, values in (("qweight", qweight), ("qzeros", qzeros)):
        if values.dtype != np.int32:
            raise ValueError(f"{name} is of {values.dtype}, not int32")
    (groups, outputs), words = scales.shape, qweight.shape[0]
    if not groups or not outputs or not words:
        raise ValueError(f"qweight {qweight.shape} and scales {scales.shape} hold nothing")
    bits = qzeros.shape[1] * WORD // outputs
    if bits not in BITS or qweight.shape[1] != outputs or qzeros.shape != (groups, outputs * bits // WORD):
        raise ValueError(f"qweight {qweight.shape}, qzeros {qzeros.shape} and scales {scales.shape} do not fit")
    inputs = words * WORD // bits
    # Writers without activation order may leave g_idx out.
    if "g_idx" not in tensors and inputs % groups:
        raise ValueError(f"there is no g_idx, and {inputs} inputs are not {groups} even groups")
    g_idx = tensors.get("g_idx", np.arange(inputs) // max(1, inputs // groups))
    if g_idx.dtype.kind != "i":
        raise ValueError(f"g_idx is of {g_idx.dtype}, not whole numbers")
    if g_idx.shape != (inputs,) or g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"g_idx of {g_idx.shape} does not give each of {inputs} inputs one of {groups} groups")
    stored = np.ascontiguousarray(qzeros.T)
    if version == VERSION_1:
        stored = _shift_zeros(stored, bits, 1)
    zeros = np.ascontiguousarray(_unpack_rows(stored, bits).T)
    codes = np.ascontiguousarray(_unpack_rows(qweight, bits).T)
    return QuantizedLinear(codes, check_scales(scales), zeros, g_idx.astype(np.int32), bits)


def check_scales(scales: Array) -> npt.NDArray[np.float16]:
    """The scales in float16; ValueError where it does not hold them."""
    with np.errstate(over="ignore"):  # reported here
        stored = scales.astype(np.float16)
    if not np.isfinite(stored).all():
        raise ValueError("its scales hold NaN, infinity or numbers past float16's")
    return stored


def read_grids(quantization: JsonObject) -> set[tuple[int, int]]:
    """The (bits, group size) that a `quantization_config` states, of all layers and of some; -1 is one group.

    Which layers have an override is a stranger's regular expression, which may not end: shapes tell a layer's grid, and
    it must be one of these.
    """
    usual = quantization.value("bits", int), quantization.value("group_size", int, USUAL_GROUP)
    grids = {usual}
    dynamic = quantization.object("dynamic", {})
    for pattern in dynamic.content:
        if not pattern.startswith("-"):  # GPTQModel's sign for layers that stay floats
            override = dynamic.object(pattern)
            bits = override.value("bits", int, usual[0])
            grids.add((bits, override.value("group_size", int, usual[1])))
    for bits, size in grids:
        if bits not in BITS or not (size == -1 or size > 0):
            raise GemvgError(
                f"{quantization.path}: {quantization.place}bits {short(bits)} with group_size {short(size)}; read are "
                f"{', '.join(map(str, BITS))} bits and groups of 1 and more, or -1"
            )
    return grids


def read_version(quantization: JsonObject) -> str:
    """The version of GPTQ's format that `quantization_config` of a config.json states; GemvgError for another."""
    version = quantization.value("checkpoint_format", str, VERSION_1)
    if version not in (VERSION_1, VERSION_2):
        raise GemvgError(
            f"{quantization.path}: checkpoint_format {version!r} is not read; save the checkpoint as {VERSION_1!r}"
        )
    return version


def _shift_zeros(words: npt.NDArray[np.int32], bits: int, by: int) -> npt.NDArray[np.int32]:
    """Packed zero-points plus or minus 1."""
    if bits == 3:
        return _pack_rows((_unpack_rows(words, bits) + np.uint8(by % 8)) & np.uint8(7), bits)
    ones = np.uint32(sum(1 << shift for shift in range(0, WORD, bits)))
    unsigned = words.view(np.uint32)  # wraps
    return (unsigned + ones if by > 0 else unsigned - ones).view(np.int32)


def _pack_rows(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Codes (n, m) -> (n * bits / 32, m): column by column a stream of bits, the lowest first."""
    n, m = codes.shape
    padded = np.zeros((-(-n // WORD), WORD, m), np.uint32)
    padded.reshape(-1, m)[:n] = codes
    words = np.zeros((len(padded), bits, m), np.uint32)  # 32 codes fill `bits` words
    for k in range(WORD):
        word, shift = divmod(k * bits, WORD)
        words[:, word] |= padded[:, k] << np.uint32(shift)
        if shift + bits > WORD:  # of 3 bits, two codes in 32 lie in two words
            words[:, word + 1] |= padded[:, k] >> np.uint32(WORD - shift)
    return np.ascontiguousarray(words.reshape(-1, m)[: n * bits // WORD]).view(np.int32)


def _unpack_rows(packed: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """The reverse of `_pack_rows`."""
    rows, m = packed.shape
    n = rows * WORD // bits
    words = np.zeros((-(-rows // bits), bits, m), np.uint32)
    words.reshape(-1, m)[:rows] = np.ascontiguousarray(packed).view(np.uint32)
    codes = np.empty((len(words), WORD, m), np.uint8)
    for k in range(WORD):
        word, shift = divmod(k * bits, WORD)
        value = words[:, word] >> np.uint32(shift)
        if shift + bits > WORD:
            value |= words[:, word + 1] << np.uint32(WORD - shift)
        codes[:, k] = value & np.uint32(2**bits - 1)
    return codes.reshape(-1, m)[:n]
