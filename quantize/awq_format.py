"""The AWQ file format "gemm", as AutoAWQ began it: three tensors in place of a linear layer's weight, 4 bits each.

    qweight (in, out / 8) int32: a word has eight outputs of one input, its lowest four bits the first of ORDER
    qzeros (groups, out / 8) int32: zero-points in such words, none of them shifted
    scales (groups, out) float16

A weight is (code - zero) * scale of its group; groups are runs of inputs. What AWQ found of the activations is in the
weights already, so nothing else is left to apply. numpy only; knows neither networks nor solvers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import JsonObject, short
from quantize.gptq_format import USUAL_GROUP, WORD, QuantizedLinear, check_scales

BITS = 4
IN_A_WORD = WORD // BITS
PARTS = ("qweight", "qzeros", "scales")
# Which of a word's eight outputs each four bits hold, the lowest first: NVIDIA's kernels unpack pairs so.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMM = "gemm"

Array = npt.NDArray[Any]


def check_version(quantization: JsonObject) -> None:
    """GemvgError for a `quantization_config` of another layout than "gemm", whose tensors have the same names."""
    # AutoAWQ writes `version`, GPTQModel `format`.
    version = quantization.value("version", str, quantization.value("format", str, GEMM))
    backend = quantization.value("backend", str, "autoawq")
    if version.lower() != GEMM or backend.lower() == "llm-awq":
        found = f"version {short(version)}" if version.lower() != GEMM else f"backend {short(backend)}"
        raise GemvgError(
            f"{quantization.path}: AWQ of {found} is laid out otherwise and not read; quantise with AutoAWQ's version "
            f"{GEMM!r}, or give the float checkpoint"
        )


def read_grids(quantization: JsonObject) -> set[tuple[int, int]]:
    """The (bits, group size) that a `quantization_config` states; -1 is one group."""
    bits, size = quantization.value("bits", int), quantization.value("group_size", int, USUAL_GROUP)
    if bits != BITS or not (size == -1 or size > 0):
        raise GemvgError(
            f"{quantization.path}: {quantization.place}bits {short(bits)} with group_size {short(size)}; of AWQ files "
            f"{BITS} bits are read, in groups of 1 and more, or -1"
        )
    return {(bits, size)}


def unpack(tensors: Mapping[str, Array]) -> QuantizedLinear:
    """The codes of a layer; ValueError says what does not fit, KeyError which tensor is missing."""
    qweight, qzeros, scales = (tensors[part] for part in PARTS)
    for name, values in (("qweight", qweight), ("qzeros", qzeros)):
        if values.dtype != np.int32:
            raise ValueError(f"{name} is of {values.dtype}, not int32")
    if not qweight.ndim == qzeros.ndim == scales.ndim == 2:
        raise ValueError(f"qweight, qzeros and scales have {qweight.ndim}, {qzeros.ndim} and {scales.ndim} dimensions")
    inputs, words = qweight.shape
    groups, outputs = scales.shape
    if not inputs or not words or not groups:
        raise ValueError(f"qweight {qweight.shape} and scales {scales.shape} hold nothing")
    if words * IN_A_WORD != outputs or qzeros.shape != (groups, words) or inputs % groups:
        raise ValueError(f"qweight {qweight.shape}, qzeros {qzeros.shape} and scales {scales.shape} do not fit")
    codes = np.ascontiguousarray(_unpack_words(qweight).T)
    runs = np.arange(inputs, dtype=np.int32) // (inputs // groups)
    return QuantizedLinear(codes, check_scales(scales), _unpack_words(qzeros), runs.astype(np.int32), BITS)


def _unpack_words(packed: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Words (n, m) -> codes (n, 8 m)."""
    words = np.ascontiguousarray(packed).view(np.uint32)
    codes = np.empty((*words.shape, IN_A_WORD), np.uint8)
    for place, output in enumerate(ORDER):
        codes[:, :, output] = words >> np.uint32(place * BITS) & np.uint32(2**BITS - 1)
    return codes.reshape(len(words), -1)
