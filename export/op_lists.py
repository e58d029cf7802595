"""Whether a graph parses in a TensorRT that is not here, and is fast there: each node against documented rules.

The lists are data files in export/targets, each with the document that it was read from. They name operators and types;
what the document says of single inputs and attributes, as far as our graphs could break it, is in `_broken_rule`. What
parses and is slow all the same, as compiled programs say (engine_reading.py), is in `_slow`. Of the weights only scales
are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from gemvg_edge.bundle import DECODER_GRAPH
from gemvg_edge.command import one_line
from gemvg_edge.errors import GemvgError

LISTS = Path(__file__).parent / "targets"
# Targets that a dialect is for, by the names of the lists.
TARGETS = {
    "fused": (),
    "standard": ("tensorrt_10_15", "tensorrt_11"),
    "plain": ("tensorrt_10_3", "tensorrt_10_15", "tensorrt_11"),
}
ONNX_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class OpList:
    """What one version's parser takes."""

    target: str  # such as "TensorRT 10.3"
    source: str  # the document's address
    newest_opset: int
    ops: Mapping[str, tuple[str, ...]]  # operator -> types, as TensorProto names them


def read_op_list(name: str) -> OpList:
    """One of the data files."""
    content = json.loads((LISTS / f"{name}.json").read_text(encoding="utf-8"))
    ops = {op: tuple(types) for op, types in content["ops"].items()}
    return OpList(content["target"], content["source"], content["opset"]["max"], ops)


def nearest_list(version: str) -> str:
    """The list for a TensorRT of this version: the newest that is not newer, or the oldest."""
    here = tuple(int(part) for part in version.split(".")[:2])
    names = [name for name in TARGETS["plain"] if tuple(map(int, name.split("_")[1:])) <= here]
    return names[-1] if names else TARGETS["plain"][0]


def check_graph(path: Path, op_list: OpList) -> list[str]:
    """What would not parse, one sentence a node; GemvgError where the file is no ONNX graph."""
    model = _inferred(path)
    types = dict(_value_types(model.graph))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = {node.output[0] for node in model.graph.node if node.op_type == "Constant"} | set(tensors)
    kinds = {name: node.op_type for node in model.graph.node for name in node.output}
    products = {name: node.input[0] for node in model.graph.node if node.op_type == "MatMul" for name in node.input[1:]}
    rows = {weight: kinds.get(x, "") for weight, x in products.items()}
    problems = []
    for node in model.graph.node:
        problem = _missing(node, types, op_list) or _broken_rule(node, constants)
        if problem is None and node.op_type == "DequantizeLinear":
            codes, scales = (tensors.get(name) for name in node.input[:2])
            if codes is None or scales is None:
                raise GemvgError(f"{path}: {node.name!r} dequantises what is no stored weight; export the bundle again")
            problem = _negative_scale(scales, path.parent)
            problem = problem or _slow(node, codes.data_type, rows.get(node.output[0], ""), path.name)
        if problem:
            problems.append(f"{path.name}: node {node.name!r} ({node.op_type}): {problem}")
    return problems


def load_graph(path: Path) -> onnx.ModelProto:
    """A graph without its weights; GemvgError where the file is none."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's exceptions have no common base
        raise GemvgError(f"{path} is not an ONNX graph ({error}); export the bundle again") from None


def _inferred(path: Path) -> onnx.ModelProto:
    """A graph without its weights, the types of its values with it."""
    model = load_graph(path)
    try:
        return onnx.shape_inference.infer_shapes(model, strict_mode=False)
    except Exception as error:  # as in load_graph
        raise GemvgError(f"{path} does not hold together ({one_line(error)}); export the bundle again") from None


def newest_opset(path: Path) -> int:
    """The version of the standard's operators that a graph is written in."""
    model = load_graph(path)
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ONNX_DOMAINS)


def _missing(node: onnx.NodeProto, types: Mapping[str, str], op_list: OpList) -> str | None:
    """Why a node's operator is not on the list, if it is not."""
    if node.domain not in ONNX_DOMAINS:
        return f"{op_list.target} has no operators of {node.domain}; export with --dialect plain or standard"
    if node.op_type not in op_list.ops:
        return f"not among the operators of {op_list.target} ({op_list.source})"
    # The list's types are those of what an operator works on: its first input, or where it has none, its output.
    value = node.input[0] if node.input else node.output[0]
    known = op_list.ops[node.op_type]
    if (found := types.get(value)) and found not in known:
        return f"{op_list.target} takes {', '.join(known)}, not {found}"
    return None


def _broken_rule(node: onnx.NodeProto, constants: set[str]) -> str | None:
    """What a node does that the parser's documentation or its source rules out, if anything.

    Restrictions of docs/operators.md, and for Attention, Squeeze and DequantizeLinear of onnxOpImporters.cpp (10.15).
    """
    inputs, outputs = [list(names) for names in (node.input, node.output)]
    given = {attribute.name for attribute in node.attribute}
    match node.op_type:
        case "Attention":
            if any(inputs[4:]):  # nonpad_kv_seqlen is not even refused, but ignored
                return "past_key, past_value and nonpad_kv_seqlen are not taken"
            if any(outputs[1:]):
                return "only the first output is taken"
            if unknown := given & {"softcap", "softmax_precision", "qk_matmul_output_mode"}:
                return f"the attribute {sorted(unknown)[0]} is not taken"
        case "TensorScatter":
            if _attribute(node, "axis", -2) not in (-2, 2) or _attribute(node, "mode", b"linear") != b"linear":
                return "axis must be -2 and mode linear"
        case "LayerNormalization" if any(outputs[1:]):
            return "only the first output is taken"
        case "DequantizeLinear":
            if any(inputs[2:]):
                return "zero-points must be zero; leave them out"
            if "axis" not in given:  # 10.3 takes 0, the standard 1
                return "axis must be written out"
        case "ReduceMean" | "ReduceMax" | "ReduceSum" | "Squeeze" | "Unsqueeze":
            if any(name and name not in constants for name in inputs[1:]):
                return "axes must be a constant"
    return None


def _slow(node: onnx.NodeProto, data_type: int, multiplied: str, graph: str) -> str | None:
    """Why a dequantised weight would be written out as floats at every run, if it would.

    `multiplied`: the operator that makes what the weight is multiplied with.
    """
    groups, four = int(_attribute(node, "block_size", 0)), data_type == onnx.TensorProto.INT4
    if four != bool(groups):
        how = "4 bits with one scale an output" if four else f"8 bits in groups of {groups}"
        return f"{how} are written out as floats at every run; quantise to 4 bits in groups, or to 8 bits without"
    # A decode step has one row; export.decoder gives such products a second.
    if graph == DECODER_GRAPH and not four and multiplied != "Concat":
        return "8 bits are written out as floats where a product has a single row; export the bundle again"
    return None


def _negative_scale(scales: onnx.TensorProto, folder: Path) -> str | None:
    try:
        values = onnx.numpy_helper.to_array(scales, str(folder))
    except Exception as error:  # as in load_graph
        why = one_line(error)
        raise GemvgError(f"{folder}: {scales.name} cannot be read ({why}); export the bundle again") from None
    if (values > 0).all():
        return None
    return "all scales must be above zero; quantise with `python -m quantize.gptq --positive-scales`"


def _attribute(node: onnx.NodeProto, name: str, default: int | bytes) -> int | bytes:
    for attribute in node.attribute:
        if attribute.name == name:
            value: int | bytes = onnx.helper.get_attribute_value(attribute)
            return value
    return default


def _value_types(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    for tensor in graph.initializer:
        yield tensor.name, onnx.TensorProto.DataType.Name(tensor.data_type)
