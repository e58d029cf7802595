"""A graph with fewer layers: enough to see what a compiler makes of it, in seconds and in little memory.

A network's layers are alike, so the first ones and the last stand for all. Knows ONNX files and what our graphs call
their layers, no TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx
from onnx.utils import Extractor

from gemvg_edge.errors import GemvgError

_LAYER = re.compile(r"(?:model\.layers|visual\.blocks)\.(\d+)/")
_CACHE = re.compile(r"(?:key|value)_(\d+)$")


def count_layers(model: onnx.ModelProto) -> int:
    """How many layers, or vision blocks, a graph of ours has."""
    return len({layer for node in model.graph.node if (layer := _layer_of(node)) is not None})


def shorten(model: onnx.ModelProto, layers: int) -> onnx.ModelProto:
    """The first `layers` - 1 layers and the last one; the weights stay in their file. The same where it has no more."""
    total = count_layers(model)
    if total <= layers or layers < 2:
        return model
    left_out = range(layers - 1, total - 1)
    short = onnx.ModelProto()
    short.CopyFrom(model)
    of_layer: dict[int, list[onnx.NodeProto]] = {}
    for node in short.graph.node:
        if (layer := _layer_of(node)) is not None:
            of_layer.setdefault(layer, []).append(node)
    instead: dict[str, str] = {}  # outputs of layers that are left out -> those of the last layer before them
    for layer in left_out:
        instead |= _same_outputs(of_layer[layer], of_layer[layers - 2])
    for node in short.graph.node:
        if _layer_of(node) not in left_out:
            for k, name in enumerate(node.input):
                node.input[k] = instead.get(name, name)
    parts = (short.graph.input, short.graph.output)
    inputs, outputs = ([value.name for value in part if _kept(value.name, left_out)] for part in parts)
    return Extractor(short).extract_model(inputs, outputs)


def _layer_of(node: onnx.NodeProto) -> int | None:
    found = _LAYER.match(node.name)
    return int(found[1]) if found else None


def _same_outputs(nodes: Sequence[onnx.NodeProto], others: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """Each output of a layer's last nodes -> the same of another layer; the first layers may do something more."""
    found: dict[str, str] = {}
    for node, other in zip(reversed(nodes), reversed(others), strict=False):
        if node.op_type != other.op_type:
            break
        found |= dict(zip(node.output, other.output, strict=True))
    if not found:
        raise GemvgError("the layers of this graph are not alike, so it cannot be shortened; export the bundle again")
    return found


def _kept(name: str, left_out: range) -> bool:
    found = _CACHE.search(name)
    return found is None or int(found[1]) not in left_out
