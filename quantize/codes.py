"""How a checkpoint stores quantised layers: as GPTQ files do, in one of their versions, or as AWQ's. One match each.

Knows names, shapes and config; the numbers are gptq_format.py's and awq_format.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import JsonObject, short
from quantize import awq_format, gptq_format
from quantize.gptq_format import WORD, QuantizedLinear
from train.checkpoint import QUANTIZED

AWQ = "awq"


def read_format(config: JsonObject) -> str | None:
    """AWQ or the version of the GPTQ format, None where a config.json states floats; GemvgError for another method."""
    key = next((key for key in QUANTIZED if config.content.get(key)), None)
    if key is None:
        return None
    quantization = config.object(key)
    match method := quantization.value("quant_method", str):
        case "gptq":
            return gptq_format.read_version(quantization)
        case "awq":
            awq_format.check_version(quantization)
            return AWQ
    raise GemvgError(
        f"{quantization.path}: quant_method {short(method)} is not read; give the float checkpoint that it was made "
        "from, or one of GPTQ or AWQ"
    )


def method(layout: str) -> str:
    """The method's name as files and manifests have it."""
    return AWQ if layout == AWQ else "gptq"


def parts(layout: str) -> tuple[str, ...]:
    """The tensors in place of a weight."""
    return awq_format.PARTS if layout == AWQ else gptq_format.PARTS


def unpack(layout: str, tensors: Mapping[str, npt.NDArray[Any]]) -> QuantizedLinear:
    """A layer from its tensors; ValueError or KeyError says what does not fit."""
    return awq_format.unpack(tensors) if layout == AWQ else gptq_format.unpack(tensors, layout)


def bits_of(layout: str, qweight: tuple[int, ...], qzeros: tuple[int, ...]) -> int:
    """Bits a weight, by the shapes of two of its tensors."""
    return awq_format.BITS if layout == AWQ else qzeros[1] * WORD // qweight[1]


def weight_shape(layout: str, qweight: tuple[int, ...], bits: int) -> tuple[int, int]:
    """(out, in) of the weight."""
    rows, columns = qweight
    return (columns * WORD // bits, rows) if layout == AWQ else (columns, rows * WORD // bits)


def stated_grids(layout: str, config: JsonObject) -> set[tuple[int, int]]:
    """The (bits, group size) that a config.json states, of all layers and of some; -1 is one group."""
    quantization = config.object("quantization_config")
    return awq_format.read_grids(quantization) if layout == AWQ else gptq_format.read_grids(quantization)


def in_activation_order(layout: str, config: JsonObject) -> bool:
    """Whether a config.json states groups that are no runs."""
    return layout != AWQ and config.object("quantization_config").value("desc_act", bool, False)
