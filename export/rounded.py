"""A float16 or bfloat16 graph -> the same in float32 with every value rounded where a GPU's kernels round it.

ONNX Runtime's CPU has no bfloat16 and few kernels for float16. Here products sum in float32 and their results are
rounded, as are weights, activations and the cache, and the shares of a softmax before they weigh the values. TensorRT's
fused attention in float16 sums in float16, 16 products at a time (`Ampere_hmma_fp16_traits` in its programs, beside
`bf16_traits`, which sum in float32): here, too. Norms and softmax compute in float32, as in the kernels. Knows ops of
`standard` and `plain`, no networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

from gemvg_edge.errors import GemvgError

TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
AT_ONCE = 16  # products that a tensor core sums before it rounds the sum
DOMAIN = "gemvg.rounded"


def rounded(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph as described, its weights where they were; keys and values go in and out as float32."""
    half = TYPES[precision]
    kinds = _value_types(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    del graph.node[:], graph.value_info[:]
    widened = {tensor.name for tensor in graph.initializer if tensor.data_type == half}
    for name in sorted(widened):
        graph.node.append(helper.make_node("Cast", [name], [f"{name}.wide"], f"{name}/widen", to=TensorProto.FLOAT))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        rounds = [name for name in node.output if kinds[name] == half]
        graph.node.append(_widened(node, widened, rounds, half))
        for name in rounds:
            graph.node.extend(_round(name, half))
    if attentions := [node for node in graph.node if node.op_type == "Attention"]:
        function = _attention(attentions[0], half, _cache_heads(model))
        wide.functions.append(function)
        wide.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        for node in attentions:
            del node.attribute[:]
            node.domain = DOMAIN
    return wide


def _widened(node: onnx.NodeProto, widened: set[str], rounds: list[str], half: int) -> onnx.NodeProto:
    """A node on float32, its outputs `rounds` still to be rounded."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for k, name in enumerate(copy.input):
        copy.input[k] = f"{name}.wide" if name in widened else name
    for k, name in enumerate(copy.output):
        copy.output[k] = f"{name}.exact" if name in rounds else name
    for attribute in copy.attribute:
        if attribute.name == "to" and attribute.i == half:
            attribute.i = TensorProto.FLOAT
    return copy


def _value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    for name in (name for node in model.graph.node for name in node.output if name not in kinds):
        raise GemvgError(f"the type of {name} in the graph is not known; export the bundle again")
    return kinds


def _cache_heads(model: onnx.ModelProto) -> int | None:
    """Key/value heads of a decoder's cache; None for a graph without one, where every head has its own."""
    shapes = {value.name: value.type.tensor_type.shape for value in model.graph.input}
    return shapes["past_key_0"].dim[1].dim_value if "past_key_0" in shapes else None


def _round(name: str, half: int) -> Iterator[onnx.NodeProto]:
    yield helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], f"{name}/round", to=half)
    yield helper.make_node("Cast", [f"{name}.half"], [name], f"{name}/widen", to=TensorProto.FLOAT)


def _attention(node: onnx.NodeProto, half: int, kv_heads: int | None) -> onnx.FunctionProto:
    """The operator in pieces. Queries (batch, heads, tokens, dim), keys and values (batch, kv_heads, places, dim)."""
    scale = next((attribute.f for attribute in node.attribute if attribute.name == "scale"), 0.0)
    if not scale > 0:
        raise GemvgError(f"the attention {node.name!r} has no scale; export the bundle again")
    root = math.sqrt(scale)
    mask = len(node.input) > 3
    # Both sides by the root of the scale, as the standard says and the programs do.
    return onnx.parser.parse_function(f"""
        <domain: "{DOMAIN}", opset_import: ["": 21]>
        Attention (query, key0, value0{", mask" if mask else ""}) => (y)
        {{
            root = Constant <value_float = {root!r}> ()
            {_per_head("key", kv_heads)}
            {_per_head("value", kv_heads)}
            q_exact = Mul (query, root)
            {_rounding("q", half)}
            k_exact = Mul (key, root)
            {_rounding("k", half)}
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            {_product("q", "kt", "all_scores", half)}
            {
        '''never = Constant <value_float = -1e30> ()
            scores = Where (mask, all_scores, never)'''
        if mask
        else "scores = Identity (all_scores)"
    }
            shares_exact = Softmax <axis = -1> (scores)
            {_rounding("shares", half)}
            {_product("shares", "value", "y", half)}
        }}
    """)


def _per_head(name: str, kv_heads: int | None) -> str:
    """Keys or values with a row of heads as the queries have them: each of the few serves a group."""
    if kv_heads is None:
        return f"{name} = Identity ({name}0)"
    return f"""{name}_heads = Shape <start = 1, end = 2> (query)
            {name}_few = Constant <value_ints = [{kv_heads}]> ()
            {name}_group = Div ({name}_heads, {name}_few)
            {name}_zero = Constant <value_int = 0> ()
            {name}_one = Constant <value_int = 1> ()
            {name}_axis = Constant <value_ints = [0]> ()
            {name}_last = Squeeze ({name}_heads, {name}_axis)
            {name}_all = Range ({name}_zero, {name}_last, {name}_one)
            {name}_which = Div ({name}_all, {name}_group)
            {name} = Gather <axis = 1> ({name}0, {name}_which)"""


def _rounding(name: str, half: int) -> str:
    return f"""{name}_half = Cast <to = {half}> ({name}_exact)
            {name} = Cast <to = {TensorProto.FLOAT}> ({name}_half)"""


def _product(a: str, b: str, y: str, half: int) -> str:
    """A @ b: in bfloat16 summed in float32, in float16 rounded after every AT_ONCE products, piece by piece."""
    if half == TensorProto.BFLOAT16:
        return f"{y} = MatMul ({a}, {b})"
    four = "float[?, ?, ?, ?]"
    return f"""{y}_size = Constant <value_ints = [{AT_ONCE}]> ()
            {y}_none = Constant <value_ints = [0]> ()
            {y}_rest = Constant <value_ints = [-1]> ()
            {y}_across = Constant <value_ints = [3]> ()
            {y}_down = Constant <value_ints = [2]> ()
            {y}_length = Shape <start = 3> ({a})
            {y}_minus = Neg ({y}_length)
            {y}_missing = Mod ({y}_minus, {y}_size)
            {y}_ends = Concat <axis = 0> ({y}_none, {y}_missing)
            {y}_a_filled = Pad ({a}, {y}_ends, , {y}_across)
            {y}_b_filled = Pad ({b}, {y}_ends, , {y}_down)
            {y}_rows = Shape <end = 3> ({a})
            {y}_batch = Shape <end = 2> ({b})
            {y}_columns = Shape <start = 3> ({b})
            {y}_a_sizes = Concat <axis = 0> ({y}_rows, {y}_rest, {y}_size)
            {y}_b_sizes = Concat <axis = 0> ({y}_batch, {y}_rest, {y}_size, {y}_columns)
            {y}_a_cut = Reshape ({y}_a_filled, {y}_a_sizes)
            {y}_b_cut = Reshape ({y}_b_filled, {y}_b_sizes)
            {y}_a_pieces = Transpose <perm = [3, 0, 1, 2, 4]> ({y}_a_cut)
            {y}_b_pieces = Transpose <perm = [2, 0, 1, 3, 4]> ({y}_b_cut)
            {y}_sizes = Concat <axis = 0> ({y}_rows, {y}_columns)
            {y}_zeros = ConstantOfShape ({y}_sizes)
            {y} = Scan <num_scan_inputs = 2, body = sum ({four} sum, {four} a, {four} b) => ({four} next) {{
                    more = MatMul (a, b)
                    exact = Add (sum, more)
                    short = Cast <to = {half}> (exact)
                    next = Cast <to = {TensorProto.FLOAT}> (short)
                }}> ({y}_zeros, {y}_a_pieces, {y}_b_pieces)"""
