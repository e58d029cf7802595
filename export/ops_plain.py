"""The `plain` dialect: basic ops that TensorRT 10.3 (JetPack 6) parses too, attention and norms written out.

The cache is read and not written: attention goes over its valid places and over the new tokens side by side, and the
graph's outputs are the new keys and values alone. The engine puts them into their places, so that no step copies the
cache, which 10.3 has no op to update in place. Knows ops, not networks; `export.dialects.Ops` says what each is for.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.graph import BOOL, FLOAT, INT64, HeadNorms, Inputs, cast, gelu, node, permute, sizes
from export.weights import BlockLinear, DenseLinear, GridLinear, Linear, take_in_order
from gemvg_edge.bundle import ModelShape, VisionShape

OPSETS = {"": 21}
OPSETS_WITHOUT_INT4 = {"": 20}  # the newest that TensorRT 10.3 documents; int4 came with 21
GRID = True
PRECISIONS: tuple[str, ...] = ("float32", "float16", "bfloat16")
BATCH: int | str = "batch"
NEW_CACHE = "new"
MASKED = -30000.0  # what is added to a score that must not count; float16 reaches -65504


def linear(g: GraphBuilder, x: ir.Value, layer: Linear) -> ir.Value:
    """X @ weight + bias."""
    match layer:
        case DenseLinear(weight, None):
            return node(g.op.Gemm(x, weight, transB=1))
        case DenseLinear(weight, bias):
            return node(g.op.Gemm(x, weight, bias, transB=1))
        case GridLinear(codes, scales, bias, order, _, block_size):
            blocks = {"axis": 0, "block_size": block_size} if block_size else {"axis": 1}
            weight = g.op.DequantizeLinear(codes, scales, **blocks)  # (in, out)
            y = node(g.op.MatMul(take_in_order(g, x, order), weight))
            return y if bias is None else node(g.op.Add(y, bias))
        case BlockLinear():
            raise AssertionError("blocks are the layout of another dialect")


def rms_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """Root-mean-square norm, its mean in float32."""
    dtype = weight.dtype or FLOAT
    wide = cast(g, x, FLOAT, source=dtype)
    mean = g.op.ReduceMean(g.op.Mul(wide, wide), [-1], keepdims=1)
    normed = node(g.op.Div(wide, g.op.Sqrt(g.op.Add(mean, epsilon))))
    return node(g.op.Mul(cast(g, normed, dtype), weight))


def add_rms_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + residual, x + residual)."""
    total = node(g.op.Add(x, residual))
    return rms_norm(g, total, weight, epsilon), total


def layer_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float) -> ir.Value:
    """Layer norm."""
    return node(g.op.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon))


def add_layer_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + residual, x + residual)."""
    total = node(g.op.Add(x, residual))
    return layer_norm(g, total, weight, bias, epsilon), total


def token_inputs(
    g: GraphBuilder, embeds: ir.Value, shape: ModelShape, dtype: ir.DataType, slots: str
) -> dict[str, ir.Value]:
    """Where the new tokens stand: rotary rows, the place of each in the cache, and the places that are looked at.

    `slots` names how many these are. `heads`: the shape (batch, tokens, heads and key/value heads, head_dim) of the new
    queries, keys and values.
    """
    rows: list[int | str | None] = ["batch", "tokens", shape.head_dim // 2]
    return {
        "cos": cast(g, g.input("cos", FLOAT, rows), dtype),
        "sin": cast(g, g.input("sin", FLOAT, rows), dtype),
        "places": g.input("places", INT64, ["batch", "tokens"]),
        "slots": g.input("slots", INT64, [slots]),
        "rows": g.input("rows", INT64, ["rows"]),
        "heads": sizes(g, embeds, 0, 2, shape.heads + 2 * shape.kv_heads, shape.head_dim),
    }


def decoder_inputs(g: GraphBuilder, embeds: ir.Value, shape: ModelShape, dtype: ir.DataType) -> Inputs:
    """Those of `token_inputs`, and what is added to the scores of cached and of new tokens."""
    inputs = token_inputs(g, embeds, shape, dtype, "capacity")
    places, group = inputs["places"], shape.heads // shape.kv_heads
    first = g.op.Slice(places, [0], [1], [1])  # (batch, 1): cached places come before
    cached = node(g.op.Unsqueeze(g.op.Less(inputs["slots"], first), [1, 2]))  # (batch, 1, 1, capacity)
    earlier = g.op.LessOrEqual(g.op.Unsqueeze(places, [1]), g.op.Unsqueeze(places, [2]))
    among_new = node(g.op.Unsqueeze(earlier, [1, 2]))  # (batch, 1, 1, tokens, tokens)
    among_new = node(g.op.Tile(_bias(g, among_new, dtype), [1, 1, group, 1, 1]))
    # A key/value head's queries stand below each other, its first head's tokens first.
    tokens = sizes(g, inputs["places"], 1, 2)
    stacked = g.op.Concat([0, 1, -1], tokens, axis=0)
    queries = g.op.Concat(sizes(g, places, 0, 2), [shape.kv_heads, group, shape.head_dim], axis=0)
    unstacked = g.op.Concat(sizes(g, places, 0, 1), [shape.kv_heads, group], tokens, [shape.head_dim], axis=0)
    return inputs | {
        "cached bias": _bias(g, cached, dtype),
        "new bias": node(g.op.Reshape(among_new, stacked)),  # (batch, 1, group x tokens, tokens)
        "capacity": sizes(g, inputs["slots"], 0, 1),
        "queries": node(queries),
        "unstacked": node(unstacked),
    }


def cached_attention(
    g: GraphBuilder,
    qkv: ir.Value,
    past: tuple[ir.Value, ir.Value],
    inputs: Inputs,
    shape: ModelShape,
    norms: HeadNorms | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Causal attention over the cache and the new tokens; the queries of a key/value head are one matrix."""
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    qkv = node(g.op.Reshape(qkv, inputs["heads"]))  # (batch, tokens, heads + 2 kv_heads, head_dim)
    turning, value = g.op.Split(qkv, [heads + kv_heads, kv_heads], axis=2, _outputs=2)
    if norms:
        query, key = g.op.Split(turning, [heads, kv_heads], axis=2, _outputs=2)
        query, key = rms_norm(g, query, norms.query, norms.epsilon), rms_norm(g, key, norms.key, norms.epsilon)
        turning = node(g.op.Concat(query, key, axis=2))
    turned = rotate(g, turning, *(g.op.Unsqueeze(inputs[k], [2]) for k in ("cos", "sin")))
    query, key = g.op.Split(turned, [heads, kv_heads], axis=2, _outputs=2)
    key, value = (permute(g, x, (0, 2, 1, 3)) for x in (key, value))  # (batch, kv_heads, tokens, head_dim)

    query = node(g.op.Mul(query, head_dim**-0.5))
    query = permute(g, node(g.op.Reshape(query, inputs["queries"])), (0, 2, 3, 1, 4))  # (batch, kv, group, tokens, dim)
    query = node(g.op.Reshape(query, [0, kv_heads, -1, head_dim]))  # (batch, kv, group x tokens, dim)
    cached, new = (node(g.op.MatMul(query, permute(g, x, (0, 1, 3, 2)))) for x in (past[0], key))
    scores = g.op.Concat(
        g.op.Add(cached, inputs["cached bias"]), g.op.Add(new, inputs["new bias"]), axis=-1
    )  # (batch, kv_heads, group x tokens, capacity + tokens)
    weights = g.op.Softmax(scores, axis=-1)
    capacity, end, last = inputs["capacity"], [2**31 - 1], [-1]
    of_cached = g.op.MatMul(g.op.Slice(weights, [0], capacity, last), past[1])
    of_new = g.op.MatMul(g.op.Slice(weights, capacity, end, last), value)
    y = node(g.op.Reshape(g.op.Add(of_cached, of_new), inputs["unstacked"]))  # (batch, kv, group, tokens, dim)
    y = node(g.op.Reshape(permute(g, y, (0, 3, 1, 2, 4)), [-1, heads * head_dim]))
    return y, key, value


def picture_inputs(
    g: GraphBuilder, patches: ir.Value, shape: VisionShape, dtype: ir.DataType, window: int = 0
) -> Inputs:
    """Rotary rows of the patches, and what is added to the scores of padding."""
    inputs = patch_inputs(g, patches, shape, dtype)
    if window:
        valid = g.input("valid", BOOL, ["pictures", "patches"])
        inputs["bias"] = _bias(g, node(g.op.Unsqueeze(valid, [1, 2])), dtype)  # (pictures, 1, 1, patches)
        inputs["bias in windows"] = node(g.op.Reshape(inputs["bias"], [-1, 1, 1, window]))
    return inputs


def patch_inputs(g: GraphBuilder, patches: ir.Value, shape: VisionShape, dtype: ir.DataType) -> dict[str, ir.Value]:
    """Rotary rows of the patches; `heads`: the shape of queries, keys and values (pictures, patches, 3 heads, dim)."""
    rows: list[int | str | None] = ["patches", shape.head_dim // 2]
    return {
        "cos": cast(g, g.input("cos", FLOAT, rows), dtype),
        "sin": cast(g, g.input("sin", FLOAT, rows), dtype),
        "heads": sizes(g, patches, 0, 2, 3 * shape.heads, shape.head_dim),
    }


def picture_attention(g: GraphBuilder, qkv: ir.Value, inputs: Inputs, shape: VisionShape, window: int = 0) -> ir.Value:
    """Attention among the patches of each picture or window."""
    heads, head_dim = shape.heads, shape.head_dim
    qkv = node(g.op.Reshape(qkv, inputs["heads"]))  # (pictures, patches, 3 x heads, head_dim)
    turning, value = g.op.Split(qkv, [2 * heads, heads], axis=2, _outputs=2)
    turned = rotate(g, turning, *(g.op.Unsqueeze(inputs[k], [0, 2]) for k in ("cos", "sin")))
    query, key = g.op.Split(turned, [heads, heads], axis=2, _outputs=2)
    if window:
        query, key, value = (g.op.Reshape(x, [-1, window, heads, head_dim]) for x in (query, key, value))
    query, key, value = (permute(g, x, (0, 2, 1, 3)) for x in (query, key, value))  # (.., heads, patches, head_dim)
    query = node(g.op.Mul(query, head_dim**-0.5))
    scores = node(g.op.MatMul(query, permute(g, key, (0, 1, 3, 2))))
    bias = inputs.get("bias in windows" if window else "bias")
    weights = g.op.Softmax(scores if bias is None else g.op.Add(scores, bias), axis=-1)
    y = permute(g, node(g.op.MatMul(weights, value)), (0, 2, 1, 3))
    return node(g.op.Reshape(y, [-1, heads * head_dim]))


def activation(g: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """`quick_gelu`, `gelu` or `gelu_pytorch_tanh`."""
    return node(g.op.Mul(x, g.op.Sigmoid(g.op.Mul(x, 1.702)))) if name == "quick_gelu" else gelu(g, x, name)


def silu_times(g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
    """silu(gate) * up."""
    return node(g.op.Mul(g.op.Mul(gate, g.op.Sigmoid(gate)), up))


def rotate(g: GraphBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Rotate-half rotary embedding of the last axis; cos and sin have half of it."""
    first, second = g.op.Split(x, axis=-1, num_outputs=2, _outputs=2)
    turned = g.op.Sub(g.op.Mul(first, cos), g.op.Mul(second, sin))
    return node(g.op.Concat(turned, g.op.Add(g.op.Mul(second, cos), g.op.Mul(first, sin)), axis=-1))


def _bias(g: GraphBuilder, counts: ir.Value, dtype: ir.DataType) -> ir.Value:
    """What is added to scores: 0 where one counts, MASKED where not."""
    return cast(g, node(g.op.Where(counts, 0.0, MASKED)), dtype)
