"""The `fused` dialect: com.microsoft ops of ONNX Runtime, one kernel for what is several ops in the standard.

Knows ops, not networks. `export.dialects.Ops` says what each function is for.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.graph import BOOL, FLOAT, INT32, HeadNorms, Inputs, cast, gelu, node, sizes
from export.weights import BlockLinear, DenseLinear, GridLinear, Linear, take_in_order
from gemvg_edge.bundle import ModelShape, VisionShape

MICROSOFT = "com.microsoft"
OPSETS = OPSETS_WITHOUT_INT4 = {"": 21, MICROSOFT: 1}
GRID = False
PRECISIONS: tuple[str, ...] = ("float32", "float16")  # the CPU's kernels have no bfloat16
BATCH: int | str = 1  # GroupQueryAttention has one rotary table for the whole batch, and scenes differ in theirs
NEW_CACHE = "present"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level: activations are rounded to 8 bits in blocks too


def linear(g: GraphBuilder, x: ir.Value, layer: Linear) -> ir.Value:
    """X @ weight + bias."""
    match layer:
        case DenseLinear(weight, bias):
            return node(g.op.Gemm(x, weight, *_until_last(bias), transB=1))
        case BlockLinear(packed, scales, zeros, bias, order, inputs, outputs, scheme):
            return node(
                _fused(g).MatMulNBits(
                    take_in_order(g, x, order), packed, scales, *_until_last(zeros, None, bias), K=inputs, N=outputs,
                    bits=scheme.bits, block_size=scheme.block_size, accuracy_level=INT8_ACTIVATIONS,
                )
            )  # fmt: skip
        case GridLinear():
            raise AssertionError("a grid is the layout of other dialects")


def rms_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """Root-mean-square norm."""
    return node(g.op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1))


def add_rms_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + residual, x + residual)."""
    y, _, _, total = _fused(g).SkipSimplifiedLayerNormalization(x, residual, weight, _outputs=4, epsilon=epsilon)
    return y, total


def layer_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float) -> ir.Value:
    """Layer norm."""
    return node(g.op.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon))


def add_layer_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + residual, x + residual)."""
    y, _, _, total = _fused(g).SkipLayerNormalization(x, residual, weight, bias, _outputs=4, epsilon=epsilon)
    return y, total


def decoder_inputs(g: GraphBuilder, embeds: ir.Value, shape: ModelShape, dtype: ir.DataType) -> Inputs:
    """How many tokens there are with the new ones, and the rotary row of every place."""
    half = shape.head_dim // 2
    return {
        "last": g.input("seqlens_k", INT32, [1]),  # total - 1
        "total": g.input("total", INT32, []),
        "cos": cast(g, g.input("cos", FLOAT, ["capacity", half]), dtype),
        "sin": cast(g, g.input("sin", FLOAT, ["capacity", half]), dtype),
        "rows": node(g.op.Constant(value_ints=[-1])),
    }


def cached_attention(
    g: GraphBuilder,
    qkv: ir.Value,
    past: tuple[ir.Value, ir.Value],
    inputs: Inputs,
    shape: ModelShape,
    norms: HeadNorms | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Causal attention over the cache; with one row a token, do_rotary serves mRoPE's 3-D positions unchanged."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    packed = node(g.op.Reshape(qkv, [1, -1, width]))
    y, key, value = _fused(g).GroupQueryAttention(
        *([packed, None, None] if norms is None else _normed(g, packed, shape, norms)), *past,
        *(inputs[name] for name in ("last", "total", "cos", "sin")), _outputs=3,
        num_heads=shape.heads, kv_num_heads=shape.kv_heads, do_rotary=1, scale=shape.head_dim**-0.5,
    )  # fmt: skip
    return node(g.op.Reshape(y, [-1, shape.heads * shape.head_dim])), key, value


def _normed(g: GraphBuilder, packed: ir.Value, shape: ModelShape, norms: HeadNorms) -> list[ir.Value]:
    """Queries, keys and values (1, tokens, width) of a packed input, each head of the first two normed."""
    parts = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    query, key, value = g.op.Split(packed, parts, axis=-1, _outputs=3)
    found = []
    for x, weight, width in ((query, norms.query, parts[0]), (key, norms.key, parts[1])):
        y = rms_norm(g, node(g.op.Reshape(x, [-1, shape.head_dim])), weight, norms.epsilon)
        found.append(node(g.op.Reshape(y, [1, -1, width])))
    return [*found, value]


def picture_inputs(
    g: GraphBuilder, patches: ir.Value, shape: VisionShape, dtype: ir.DataType, window: int = 0
) -> Inputs:
    """Rotary rows of the patches, and which patches of a padded picture are any."""
    half, width = shape.head_dim // 2, shape.heads * shape.head_dim
    inputs = {
        "cos": cast(g, g.input("cos", FLOAT, ["patches", half]), dtype),
        "sin": cast(g, g.input("sin", FLOAT, ["patches", half]), dtype),
        "picture": sizes(g, patches, 0, 1, -1, width),
        "first": node(g.op.Constant(value_ints=[0])),  # rows of the table are taken from the first on
    }
    if window:
        valid = cast(g, g.input("valid", BOOL, ["pictures", "patches"]), INT32, source=BOOL)
        inputs |= {"valid": valid, "valid in windows": node(g.op.Reshape(valid, [-1, window]))}
    return inputs


def picture_attention(g: GraphBuilder, qkv: ir.Value, inputs: Inputs, shape: VisionShape, window: int = 0) -> ir.Value:
    """Attention among the patches of each picture or window; without padding the flash kernel serves it."""
    width = shape.heads * shape.head_dim
    query, key, value = g.op.Split(qkv, axis=-1, num_outputs=3, _outputs=3)  # each (rows, width)
    query, key, value = (node(g.op.Reshape(x, inputs["picture"])) for x in (query, key, value))
    query, key = (_fused(g).RotaryEmbedding(x, *(inputs[k] for k in ("first", "cos", "sin"))) for x in (query, key))
    if window:
        query, key, value = (node(g.op.Reshape(x, [-1, window, width])) for x in (query, key, value))
    mask = inputs.get("valid in windows" if window else "valid")
    y = _fused(g).MultiHeadAttention(query, key, value, *_until_last(None, mask), num_heads=shape.heads)
    return node(g.op.Reshape(y, [-1, width]))


def activation(g: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """`quick_gelu`, `gelu` or `gelu_pytorch_tanh`."""
    return node(_fused(g).QuickGelu(x, alpha=1.702)) if name == "quick_gelu" else gelu(g, x, name)


def silu_times(g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
    """silu(gate) * up; QuickGelu with alpha 1 is SiLU in one kernel."""
    return node(g.op.Mul(_fused(g).QuickGelu(gate, alpha=1.0), up))


def _until_last(*inputs: ir.Value | None) -> list[ir.Value | None]:
    """Optional inputs without the absent ones at the end."""
    present = [k for k, value in enumerate(inputs) if value is not None]
    return list(inputs[: present[-1] + 1]) if present else []


def _fused(g: GraphBuilder) -> Any:
    return g.opset(MICROSOFT)
