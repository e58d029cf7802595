"""A bundle's graphs -> the graphs that TensorRT's parser is given: sizes that it wants fixed, the head split off.

The weights stay where they are: a new graph refers to the same data file, which a link puts beside it. Knows ONNX
files, no TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import onnx
from onnx import helper
from onnx.utils import Extractor

from export.op_lists import load_graph
from gemvg_edge.errors import GemvgError

HIDDEN, LOGITS = "hidden", "logits"
# A tactic for the head of Qwen3-VL-2B, 151,936 x 2,048 in float16, wanted 1.03 GB in one piece, which a Jetson Orin
# Nano did not have; its head in two pieces was built (https://hokwangchoi.com/blog/vlm-benchmarks).
TACTIC_FACTOR = 1.03e9 / (151_936 * 2_048 * 2)
CONTIGUOUS_SHARE = 1 / 8  # of the free memory, what one piece may take: 0.8 GB on that Orin Nano


def read_graph(path: Path, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A graph without its weights, the dimensions of its inputs and outputs that `sizes` names fixed."""
    model = load_graph(path)
    del model.graph.value_info[:]  # they would speak of the dimensions by name
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    return model


def in_pieces(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The same graph, its attentions allowed to be several kernels each; None where it has no attention as one node."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    attentions = [node for node in changed.graph.node if node.op_type == "Attention"]
    for node in attentions:
        node.attribute.append(helper.make_attribute("TRT_decomposable", 1))  # an attribute of the parser's own
    return changed if attentions else None


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Each input's shape; dimensions that are still open have names."""
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


def write_graph(model: onnx.ModelProto, path: Path, data_folder: Path) -> None:
    """Write a graph, and links to its data files, which are in `data_folder`."""
    onnx.save(model, str(path))
    for name in sorted({info["location"] for info in map(_external, model.graph.initializer) if info}):
        link = path.with_name(name)
        if not link.exists():
            link.symlink_to((data_folder / name).resolve())


def weight_bytes(models: Iterable[onnx.ModelProto]) -> int:
    """What the initialisers take."""
    return sum(tensor_bytes(tensor) for model in models for tensor in model.graph.initializer)


def head_pieces(model: onnx.ModelProto, free_bytes: int) -> int:
    """Into how many pieces the head is cut for a GPU with so much free memory; 1: it stays in the decoder's engine."""
    wanted = TACTIC_FACTOR * tensor_bytes(_head_weight(model))
    return max(1, math.ceil(wanted / (free_bytes * CONTIGUOUS_SHARE)))


def split_head(model: onnx.ModelProto, pieces: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A decoder -> (decoder up to the `hidden` rows that the head reads, head: hidden -> logits).

    The head's weight is cut along the vocabulary where it is a plain matrix; codes, a quarter as large, stay whole.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    graph, head = whole.graph, _head_node(whole)
    source = head.input[0]
    if (maker := _makers(whole).get(source)) and maker.op_type == "Concat":
        source = maker.input[0]  # the row of zeros that an 8-bit product gets beside is the head's own
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == source:
                    names[index] = HIDDEN
    shapes = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    rows, width = shapes[LOGITS].shape.dim[0], _weight(graph, "model.norm.weight").dims[0]
    dims = [rows.dim_param or rows.dim_value, width]
    # The cache has the type that the graph computes in.
    graph.value_info.append(helper.make_tensor_value_info(HIDDEN, shapes["past_key_0"].elem_type, dims))
    if pieces > 1 and head.op_type == "Gemm":
        _cut(graph, head, pieces)
    extractor = Extractor(whole)
    outputs = [value.name for value in graph.output if value.name != LOGITS]
    body = extractor.extract_model([value.name for value in graph.input], [HIDDEN, *outputs])
    return body, extractor.extract_model([HIDDEN], [LOGITS])


def _head_node(model: onnx.ModelProto) -> onnx.NodeProto:
    """The matrix product that makes the logits."""
    makers = _makers(model)
    node = makers[LOGITS]
    while node.op_type in ("Cast", "Slice"):  # the latter drops the row of zeros of an 8-bit product
        node = makers[node.input[0]]
    if node.op_type not in ("Gemm", "MatMul"):
        raise GemvgError(f"the logits come from {node.op_type}, not from a matrix product; export the bundle again")
    return node


def _head_weight(model: onnx.ModelProto) -> onnx.TensorProto:
    """The head's matrix, or its codes."""
    makers, name = _makers(model), _head_node(model).input[1]
    while name in makers:
        name = makers[name].input[0]
    return _weight(model.graph, name)


def _makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Which node makes each value."""
    return {name: node for node in model.graph.node for name in node.output}


def _weight(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    weights: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
    return weights[name]


def _cut(graph: onnx.GraphProto, head: onnx.NodeProto, pieces: int) -> None:
    """Hidden @ weight^T as `pieces` products side by side, each with its rows of the weight (vocab, hidden)."""
    weight = _weight(graph, head.input[1])
    vocab = weight.dims[0]
    cuts = [vocab * piece // pieces for piece in range(pieces + 1)]
    nodes = []
    for piece, (start, stop) in enumerate(pairwise(cuts)):
        name = f"{weight.name}.{piece}"
        graph.initializer.append(_rows_of(weight, name, start, stop))
        nodes.append(helper.make_node("Gemm", [HIDDEN, name], [f"logits.{piece}"], f"head.{piece}", transB=1))
    nodes.append(helper.make_node("Concat", [node.output[0] for node in nodes], [head.output[0]], "head", axis=-1))
    at = list(graph.node).index(head)
    rest = list(graph.node)[at + 1 :]
    del graph.node[at:]
    graph.node.extend([*nodes, *rest])


def _rows_of(weight: onnx.TensorProto, name: str, start: int, stop: int) -> onnx.TensorProto:
    """Some rows of a matrix that lies in a data file: the same bytes, under another name."""
    place, row = _external(weight), tensor_bytes(weight) // weight.dims[0]
    part = onnx.TensorProto(name=name, data_type=weight.data_type, dims=[stop - start, *weight.dims[1:]])
    part.data_location = onnx.TensorProto.EXTERNAL
    offset = int(place.get("offset", 0)) + start * row
    for key, value in (("location", place["location"]), ("offset", offset), ("length", (stop - start) * row)):
        part.external_data.add(key=key, value=str(value))
    return part


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where a tensor lies: location, offset and length; empty where it is in the graph itself."""
    return {entry.key: entry.value for entry in tensor.external_data}


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """What an initialiser takes, wherever it lies."""
    return int(_external(tensor).get("length", tensor.ByteSize()))
